-- Replaces a user's password hash, if it still is the expected one.
-- KEYS: user. ARGV: expected hash, new hash.
if redis.call('HGET', KEYS[1], 'password_hash') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'password_hash', ARGV[2])
end
return 1
