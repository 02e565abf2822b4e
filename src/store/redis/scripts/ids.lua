-- What several scripts need to know of ids; put in front of them.

-- Ids are below 2^53, which a Lua number holds exactly; its default format does not.
local function text(id)
  return string.format('%.0f', id)
end

-- Messages of a channel are counted from 1, those included that are not kept any more: that is a
-- message's place. Ids are dense, so it is the id as well, until ids are left out: then the sorted
-- set `holes` gets the first id behind them, scored by its place.

-- The place of the channel's last message.
local function last_place(holes, last)
  local hole = redis.call('ZRANGE', holes, -1, -1, 'WITHSCORES')
  return hole[1] and hole[2] + (last - hole[1]) or last
end

-- The id at a place.
local function id_at(holes, place)
  local hole = redis.call('ZREVRANGEBYSCORE', holes, text(place), '-inf', 'WITHSCORES', 'LIMIT', 0, 1)
  return hole[1] and hole[1] + (place - hole[2]) or place
end

-- The last id that a stream was given; 0 if there is no stream.
local function last_generated(stream)
  if redis.call('EXISTS', stream) == 0 then
    return 0
  end
  local info = redis.call('XINFO', 'STREAM', stream)
  for n = 1, #info, 2 do
    if info[n] == 'last-generated-id' then
      return tonumber(string.match(info[n + 1], '^%d+'))
    end
  end
end

