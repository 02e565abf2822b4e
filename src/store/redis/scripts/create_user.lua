-- Creates a user, unless there is one.
-- KEYS: user. ARGV: name, password hash.
-- Returns 1 if the user now has that hash, else 0.
local existing = redis.call('HGET', KEYS[1], 'password_hash')
if existing then
  -- The hash is salted: only a repetition of the request that created the user has the same.
  return existing == ARGV[2] and 1 or 0
end
redis.call('HSET', KEYS[1], 'name', ARGV[1], 'password_hash', ARGV[2])
return 1
