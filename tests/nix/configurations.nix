# Deployments that the tests are about. What each of them renders is in rendered/NAME.
{ lib }:
let
  secret = "/var/lib/secrets/banter-jwt";
  # Limits that tests are not about are off.
  usual = {
    enable = true;
    jwtSecretFile = secret;
    limits = {
      authRate = 0;
      postRate = 0;
    };
  };
in
{
  # nix/vm-test.nix and tests/systemd/nix.test.js boot this one, and switch to the next three and back.
  two.services.banter = usual;
  four.services.banter = usual // {
    workers = 4;
  };
  limited.services.banter = usual // {
    limits = {
      authRate = lib.mkForce 3;
      postRate = 0;
    };
  };
  traced.services.banter = usual // {
    environment.RUST_BACKTRACE = "1";
  };

  minimal.services.banter = {
    enable = true;
    jwtSecretFile = secret;
  };

  behind-nginx.services = {
    banter = {
      enable = true;
      jwtSecretFile = secret;
      nginx.enable = true;
      nginx.hostName = "chat.example.org";
      trustedProxies = [ "10.0.0.0/8" ];
    };
    nginx.virtualHosts."chat.example.org" = {
      enableACME = true;
      forceSSL = true;
    };
  };

  embedded.services.banter = {
    enable = true;
    jwtSecretFile = secret;
    redis.createLocally = false;
    startAtBoot = true;
    openFirewall = true;
    port = 9000;
    workers = 1;
  };

  remote-redis.services.banter = {
    enable = true;
    jwtSecretFile = "/run/keys/100%/jwt";
    redis = {
      createLocally = false;
      urlFile = "/run/keys/banter-redis";
      addresses = [
        "127.0.0.1"
        "2001:db8::/32"
      ];
      prefix = "chat";
    };
    retention.days = 30;
    listenStreams = [
      "127.0.0.1:8000"
      "[::1]:8000"
    ];
    logLevel = "info,banter=debug";
    environment.SOME = "100% of it";
    workerServiceConfig = {
      MemoryMax = "1G";
      LoadCredential = [ "more:/run/keys/more" ];
    };
  };
}
