-- Appends messages of another server to a channel, unless they are there or it has others.
--
-- KEYS: counter (hash: last, millis, date, imported), messages (stream).
-- ARGV: the first message's id, and then for each message: Unix time in milliseconds, the same as
--       ISO 8601, the event before its date, the event after its id, author.
-- Returns {how many messages from id 1 on were imported, last id}, as they now are.
--
-- Everything that can be refused (no memory, no disk, a replica) is refused at the first write,
-- so it happens as a whole or not at all.

local FIELDS = 5
local first, count = tonumber(ARGV[1]), (#ARGV - 1) / FIELDS
local state = redis.call('HMGET', KEYS[1], 'last', 'millis', 'date', 'imported')
local last, millis, date = tonumber(state[1] or 0), state[2], state[3]
local imported = tonumber(state[4] or 0)

if last == 0 then
  -- The counter may be gone (evicted, or removed by hand), and the stream not.
  last = last_generated(KEYS[2])
end

if first < 1 or first > imported + 1 or first - 1 + count <= imported or last > imported then
  return { text(imported), text(last) }
end

for n = imported - first + 1, count - 1 do
  local at = 1 + n * FIELDS
  -- A channel's dates never go back.
  if not millis or tonumber(ARGV[at + 1]) >= tonumber(millis) then
    millis, date = ARGV[at + 1], ARGV[at + 2]
  end
  last = last + 1
  redis.call('XADD', KEYS[2], text(last) .. '-0',
    'event', ARGV[at + 3] .. date .. '","id":' .. text(last) .. ARGV[at + 4],
    'user', ARGV[at + 5], 'sender', '', 'millis', millis)
end
redis.call('HSET', KEYS[1], 'last', text(last), 'millis', millis, 'date', date, 'imported', text(last))
return { text(last), text(last) }
