-- Stores a message and publishes it, once.
--
-- KEYS: counter (hash: last, millis, date), messages (stream), nonce, holes (sorted set), life (hash).
-- ARGV:  1 topic
--        2 the highest id that the caller has seen in the channel
--        3 now, Unix time in milliseconds     4 the same as ISO 8601
--        5 the event before its date          6 the event after its id
--        7 author                             8 sender
--        9 how long to remember the nonce, milliseconds
--       10 how many messages to keep, 0: all
--       11 messages before this time may go, Unix time in milliseconds, 0: none may
--       12 the life that the caller believes Redis to lead (life.lua)
-- Returns "ID DATE", or the error OTHERLIFE.
--
-- Everything that can be refused (no memory, no disk, a replica) is refused at the first write,
-- so it happens as a whole or not at all.

local known = redis.call('GET', KEYS[3])
if known then
  return known
end

local life = redis.call('HMGET', KEYS[5], 'id', 'floor')
if life[1] ~= ARGV[12] then
  return redis.error_reply('OTHERLIFE these are the data of another life')
end

local state = redis.call('HMGET', KEYS[1], 'last', 'millis', 'date')
local millis, date = ARGV[3], ARGV[4]
if state[2] and tonumber(state[2]) > tonumber(millis) then
  -- The clock was set back, but a channel's dates never go back.
  millis, date = state[2], state[3]
end

-- Without a counter the channel is new, or the counter is gone (evicted, or removed by hand).
local last = tonumber(state[1] or last_generated(KEYS[2]))
-- Below the floor, ids may have been given out and lost. What the caller has seen counts where keys
-- were evicted or removed by hand.
local id = math.max(last + 1, tonumber(ARGV[2]) + 1, tonumber(life[2]))
local hole = id > last + 1 and last_place(KEYS[4], last) + 1

local event = ARGV[5] .. date .. '","id":' .. text(id) .. ARGV[6]
local added = redis.pcall('XADD', KEYS[2], text(id) .. '-0',
  'event', event, 'user', ARGV[7], 'sender', ARGV[8], 'millis', millis)
if type(added) == 'table' and added.err then
  return added
end
if hole then
  redis.call('ZADD', KEYS[4], text(hole), text(id))
end
local posted = text(id) .. ' ' .. date
redis.call('HSET', KEYS[1], 'last', text(id), 'millis', millis, 'date', date)
redis.call('SET', KEYS[3], posted, 'PX', ARGV[9])
redis.call('PUBLISH', ARGV[1], 'm ' .. text(id) .. ' ' .. #ARGV[7] .. ' ' .. #ARGV[8] .. '\n'
  .. ARGV[7] .. ARGV[8] .. event)

-- Retention. A step removes a thousand messages at most, so that no post takes long when much has
-- become too old at once.
local STEP = 1000
local keep, cutoff = tonumber(ARGV[10]), tonumber(ARGV[11])

-- The first message from `from` on, as id and date.
local function first(from)
  local entry = redis.call('XRANGE', KEYS[2], text(from), '+', 'COUNT', 1)[1]
  return tonumber(string.match(entry[1], '^%d+')), tonumber(entry[2][8])
end

if keep > 0 or cutoff > 0 then
  local oldest, oldest_millis = first(0)
  local most = math.min(oldest + STEP, id)
  local from = oldest
  if keep > 0 then
    local place = last_place(KEYS[4], id)
    if place > keep then
      from = math.max(from, math.min(id_at(KEYS[4], place - keep + 1), most))
    end
  end
  if oldest_millis < cutoff then
    -- Dates ascend with the ids, so bisection finds the first message to stay.
    local gone, stays = oldest, most
    while stays - gone > 1 do
      local middle = math.floor((gone + stays) / 2)
      local found, found_millis = first(middle)
      if found < stays and found_millis < cutoff then
        gone = found
      else
        stays = middle
      end
    end
    from = math.max(from, stays)
  end
  if from > oldest then
    redis.call('XTRIM', KEYS[2], 'MINID', '=', text(from))
  end
end
return posted
