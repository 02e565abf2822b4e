-- KEYS: the lease. ARGV: identity, description, term in milliseconds.
-- Takes or renews the lease and returns false, or returns who has it and for how long yet.
local holder = redis.call('HMGET', KEYS[1], 'identity', 'description')
if holder[1] and holder[1] ~= ARGV[1] then
  return { holder[2], math.max(redis.call('PTTL', KEYS[1]), 0) }
end
redis.call('HSET', KEYS[1], 'identity', ARGV[1], 'description', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return false
