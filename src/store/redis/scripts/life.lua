-- Names the life that Redis leads: from its start, or from its promotion from a replica, to the next
-- one. A life that begins may lack records that an earlier one had acknowledged; then ids go on from
-- where none was ever given out.
--
-- KEYS: life (hash: id, durable, floor).
-- ARGV: 1 now, Unix time in microseconds
--       2 1 if this Redis has everything on its disk before it answers, else 0
--       3 1 if the caller has known a life before, else 0
-- Returns the life's id, and the floor if it was raised, else false.

-- By so much the floor rises at least, should the clock have been set back.
local LEAST = 2 ^ 24

local function info(section, pattern)
  local told = redis.pcall('INFO', section)
  return type(told) == 'string' and string.match(told, pattern) or 'unknown'
end

-- The first changes with each process, the second also with each promotion.
local id = info('server', 'run_id:(%x+)') .. ' ' .. info('replication', 'master_replid:(%x+)')
-- What is on this disk may still be missing on a replica that takes over.
local durable = ARGV[2] == '1' and info('replication', 'connected_slaves:(%d+)') == '0' and '1' or '0'

local known = redis.call('HMGET', KEYS[1], 'id', 'durable', 'floor')
if known[1] == id and known[2] == durable then
  return { id, false }
end
local floor, raised = tonumber(known[3] or 0), false
if known[1] ~= id and (known[1] or ARGV[3] == '1') then
  local promoted = not string.match(info('replication', 'master_replid2:(%x+)'), '^0+$')
  if known[2] ~= '1' or promoted then
    -- In a channel there is less than one post a microsecond: so the time is above all ids that began
    -- at an earlier one, even if Redis has forgotten that they did.
    floor, raised = math.max(tonumber(ARGV[1]), floor + LEAST), true
  end
end
floor = string.format('%.0f', floor)
local written = redis.pcall('HSET', KEYS[1], 'id', id, 'durable', durable, 'floor', floor)
if type(written) == 'table' and written.err then
  return written
end
return { id, raised and floor }
