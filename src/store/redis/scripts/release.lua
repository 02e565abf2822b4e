-- KEYS: the lease. ARGV: identity.
-- Gives the lease back, if it is that master's.
if redis.call('HGET', KEYS[1], 'identity') == ARGV[1] then
  redis.call('DEL', KEYS[1])
end
return false
