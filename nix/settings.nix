# Every setting of Banter that the module has an option for, by its variable. Those with a type become
# options as they stand and lines of /etc/banter/banter.conf; module.nix says what becomes of the others.
# tests/settings.rs reads this file line by line, and compares names and defaults with the program.
{ lib }:
let
  inherit (lib.types) ints listOf strMatching;
  seconds = ints.u32;
  word = strMatching "[^[:space:]\"'\\\\]+";
in
{
  BANTER_AUTH_RATE = {
    option = "limits.authRate";
    default = 30;
    type = ints.u32;
    reload = true;
    description = "Registrations and failed logins per minute and address. 0: no limit.";
  };
  BANTER_POST_RATE = {
    option = "limits.postRate";
    default = 20;
    type = ints.u32;
    reload = true;
    description = ''
      Posts per second and session, with a burst of three times as many; a user may create a twentieth
      as many channels. 0: no limit.
    '';
  };
  BANTER_MAX_CONNECTIONS = {
    option = "limits.maxConnections";
    default = 0;
    type = ints.u32;
    reload = true;
    description = "Connections per worker. 0: what the limit on open files allows.";
  };
  BANTER_MAX_PER_ADDRESS = {
    option = "limits.maxPerAddress";
    default = 0;
    type = ints.u32;
    reload = true;
    description = "Connections per client address. 0: no limit.";
  };
  BANTER_MAX_MESSAGE = {
    option = "limits.maxMessage";
    default = 16384;
    type = ints.u32;
    reload = true;
    description = "Bytes of UTF-8 in a message. 0: no limit but the transport's (1 MB).";
  };
  BANTER_GRACE = {
    option = "limits.grace";
    default = 10;
    type = seconds;
    reload = true;
    description = "Seconds that a lost session keeps its name and channels. 0: it ends at once.";
  };
  BANTER_PING_INTERVAL = {
    option = "limits.pingInterval";
    default = 15;
    type = ints.between 1 3600;
    reload = false;
    description = "Seconds between heartbeats.";
  };
  BANTER_PING_TIMEOUT = {
    option = "limits.pingTimeout";
    default = 10;
    type = ints.between 1 3600;
    reload = false;
    description = "Seconds that a heartbeat may stay unanswered.";
  };
  BANTER_RETENTION_COUNT = {
    option = "retention.count";
    default = 0;
    type = ints.u32;
    reload = false;
    description = "Messages that each channel keeps in Redis. 0: all.";
  };
  BANTER_RETENTION_DAYS = {
    option = "retention.days";
    default = 0;
    type = ints.u32;
    reload = false;
    description = "Days that messages are kept in Redis. 0: for ever.";
  };
  BANTER_REDIS_PREFIX = {
    option = "redis.prefix";
    default = "banter";
    type = word;
    reload = false;
    description = "What all names in Redis begin with: deployments with different ones can share a Redis.";
  };
  BANTER_DRAIN = {
    option = "drain";
    default = 3;
    type = ints.between 0 3600;
    reload = true;
    description = ''
      Seconds over which a worker that stops closes its clients' sockets, so that they do not come back
      all at once. 0: all together.
    '';
  };
  BANTER_TRUST_PROXY = {
    option = "trustedProxies";
    default = [ ];
    type = listOf (strMatching "[0-9a-fA-F.:]+(/[0-9]+)?");
    reload = true;
    description = ''
      Networks whose PROXY headers and X-Forwarded-For are believed. Whoever connects from them can pass
      for any client. With {option}`services.banter.nginx.enable` it has 127.0.0.1.
    '';
  };
  RUST_LOG = {
    option = "logLevel";
    default = "info";
    type = word;
    reload = true;
    description = "A level (error, warn, info, debug, trace) or RUST_LOG directives.";
  };

  PORT = {
    option = "port";
    default = 8000;
  };
  REDIS_URL = {
    option = "redis.url";
  };
  BANTER_JWT_SECRET_FILE = {
    option = "jwtSecretFile";
  };
  WORKERS = {
    option = "workers";
  };
}
