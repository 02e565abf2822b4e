-- Reads a page of messages.
--
-- KEYS: counter (hash), messages (stream), holes (sorted set).
-- ARGV: kind, bound, limit. Kinds:
--   latest: bound is how many of the newest to leave out
--   before: bound is an exclusive upper id
--   after:  bound is an exclusive lower id
-- Returns {last id, then for each message, in the order of the stream's walk: id, author, sender, event}.
-- All but `after` walk from the newest message to the oldest.

local kind, bound, limit = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local last = redis.call('HGET', KEYS[1], 'last') or '0'
local page = { last }
if limit == '0' then
  return page
end

local entries
if kind == 'after' then
  entries = redis.call('XRANGE', KEYS[2], text(bound + 1), '+', 'COUNT', limit)
else
  local newest = bound - 1
  if kind == 'latest' then
    newest = tonumber(last)
    if bound > 0 then
      local place = last_place(KEYS[3], newest) - bound
      newest = place > 0 and id_at(KEYS[3], place) or 0
    end
  end
  if newest < 1 then
    return page
  end
  entries = redis.call('XREVRANGE', KEYS[2], text(newest), '-', 'COUNT', limit)
end

for _, entry in ipairs(entries) do
  local fields = entry[2]
  page[#page + 1] = string.match(entry[1], '^%d+')
  page[#page + 1] = fields[4]
  page[#page + 1] = fields[6]
  page[#page + 1] = fields[2]
end
return page
