-- Adds a channel to the list, unless it is on it.
-- KEYS: names by key (hash), order of creation (list). ARGV: key, name.
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 1 then
  redis.call('RPUSH', KEYS[2], ARGV[1])
end
return 1
