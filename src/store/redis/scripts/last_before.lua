-- Finds the last message that was stored before a time.
-- KEYS: counter (hash), messages (stream). ARGV: Unix time in milliseconds.
-- Returns its id, or 0.
local last = tonumber(redis.call('HGET', KEYS[1], 'last') or 0)
local millis = tonumber(ARGV[1])
-- `before` is a message before `millis` (or 0), nothing from `not_before` on is.
local before, not_before = 0, last + 1
while not_before - before > 1 do
  local middle = math.floor((before + not_before) / 2)
  -- The first message from the middle on stands for a gap that may be there.
  local entry = redis.call('XRANGE', KEYS[2], text(middle), '+', 'COUNT', 1)[1]
  local id = entry and tonumber(string.match(entry[1], '^%d+'))
  if id and id < not_before and tonumber(entry[2][8]) < millis then
    before = id
  else
    not_before = middle
  end
end
return text(before)
