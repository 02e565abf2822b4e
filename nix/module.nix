# The units are those of the package, as they are on any other system (systemd/). What is set here
# becomes drop-ins beside them.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkEnableOption mkIf mkOption;
  inherit (lib.types)
    attrsOf
    bool
    externalPath
    int
    ints
    listOf
    nullOr
    oneOf
    package
    port
    str
    strMatching
    ;

  cfg = config.services.banter;
  redisServer = config.services.redis.servers.banter;

  settings = import ./settings.nix { inherit lib; };
  pathOf = setting: lib.splitString "." setting.option;
  # Those that are options as they stand.
  plain = lib.filterAttrs (_: setting: setting ? type) settings;

  redisUrl = if cfg.redis.createLocally then "unix:${redisServer.unixSocket}" else cfg.redis.url;
  redisByTcp =
    !cfg.redis.createLocally
    && (cfg.redis.urlFile != null || (redisUrl != null && lib.hasInfix "://" redisUrl));
  # A change of these is a reload, of those a restart.
  live = lib.filterAttrs (_: setting: setting.reload) plain;
  fixed = lib.filterAttrs (_: setting: !setting.reload) plain;

  line =
    name: value:
    if value == null || value == [ ] then
      ""
    else
      "${name}=${lib.concatMapStringsSep "," toString (lib.toList value)}\n";
  linesOf = lib.concatMapAttrsStringSep "" (
    name: setting: line name (lib.getAttrFromPath (pathOf setting) cfg)
  );
  liveLines = linesOf live;
  fixedLines = linesOf fixed + line "REDIS_URL" redisUrl;

  workers = map (number: "banter-worker@${toString number}") (lib.range 0 (cfg.workers - 1));
  # systemd expands %.
  literal = lib.replaceStrings [ "%" ] [ "%%" ];
  whatRestarts =
    name:
    let
      unit = config.systemd.services.${name};
    in
    builtins.toJSON { inherit (unit) after environment serviceConfig; };
  redisUnit = lib.optional cfg.redis.createLocally "redis-banter.service";

  # Of master and workers.
  service = {
    environment = lib.mapAttrs (_: literal) cfg.environment;
    # NixOS would put a PATH into every drop-in, and restart Banter whenever coreutils change. It runs
    # no other program.
    path = lib.mkForce [ ];
    # By default a switch stops a changed service together with its sockets, and starts only these:
    # clients would be refused meanwhile. With `stopIfChanged = false` it would restart all of them at
    # once, and nobody would be there to serve. banter-rollout does it one after the other.
    restartIfChanged = false;
    # `requires` would stop Banter whenever Redis restarts.
    after = redisUnit;
    wants = redisUnit;
    serviceConfig = lib.mkMerge [
      (mkIf (cfg.redis.urlFile != null) { EnvironmentFile = [ (literal cfg.redis.urlFile) ]; })
      (mkIf redisByTcp {
        PrivateNetwork = false;
        # A second line adds to the packaged one.
        RestrictAddressFamilies = "AF_INET AF_INET6";
        IPAddressAllow = lib.concatStringsSep " " cfg.redis.addresses;
      })
    ];
  };
in
{
  imports = lib.mapAttrsToList (name: setting: {
    options.services.banter = lib.setAttrByPath (pathOf setting) (mkOption {
      inherit (setting) type default;
      description = "${lib.trim setting.description} (${name})";
    });
  }) plain;

  options.services.banter = {
    enable = mkEnableOption "Banter, a chat server";

    package = mkOption {
      type = package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalMD "Banter's own package";
      description = "The package of Banter.";
    };

    port = mkOption {
      inherit (settings.PORT) default;
      type = port;
      description = "TCP port that clients, or nginx, connect to.";
    };

    listenStreams = mkOption {
      type = listOf str;
      default = if cfg.nginx.enable then [ "127.0.0.1:${toString cfg.port}" ] else [ (toString cfg.port) ];
      defaultText = lib.literalMD "the port: of every address, or with nginx of 127.0.0.1 only";
      example = [
        "127.0.0.1:8000"
        "[::1]:8000"
      ];
      description = ''
        Where it listens, in the form of systemd's `ListenStream=`. A switch that changes it closes the
        old sockets; who is connected stays so.
      '';
    };

    openFirewall = mkOption {
      type = bool;
      default = false;
      description = "Whether to open the port in the firewall. Not needed behind nginx.";
    };

    startAtBoot = mkOption {
      type = bool;
      default = false;
      description = ''
        Whether to start at boot. Otherwise the first connection starts everything, and nothing runs
        before.
      '';
    };

    workers = mkOption {
      type = ints.between 1 1024;
      default = 2;
      description = ''
        Number of worker processes, the instances of `banter-worker@.service` from 0. A change starts or
        stops just those that it is about; clients of one that stops come back to the others.
      '';
    };

    jwtSecretFile = mkOption {
      # A path literal, which Nix would copy into the store for everybody to read, is refused.
      type = nullOr externalPath;
      default = null;
      example = "/var/lib/secrets/banter-jwt";
      description = ''
        The file with the secret that signs tokens, at least 32 bytes. systemd reads it as root
        whenever a worker starts, so it needs no other reader. Who knows it can be anybody.
      '';
    };

    redis = {
      createLocally = mkOption {
        type = bool;
        default = true;
        description = ''
          Whether to run a Redis for Banter: {option}`services.redis.servers.banter`, reached by a unix
          socket, which syncs every message to the disk before it is acknowledged. With neither this
          nor a URL, Banter keeps everything in a database of its own in /var/lib/banter.
        '';
      };

      url = mkOption {
        type = nullOr (strMatching "(unix:/|rediss?://)[^[:space:]\"'\\\\]+");
        default = null;
        example = "rediss://redis.example.org:6379";
        description = ''
          Another Redis, in the form of REDIS_URL. It gets into the store, which everybody can read: a
          URL with a password belongs into {option}`services.banter.redis.urlFile`.
        '';
      };

      urlFile = mkOption {
        type = nullOr externalPath;
        default = null;
        example = "/var/lib/secrets/banter-redis";
        description = ''
          A file with the line `REDIS_URL=rediss://USER:PASSWORD@HOST:PORT`, in place of the URL. Only
          root needs to read it. What has changed in it counts after a restart.
        '';
      };

      addresses = mkOption {
        type = listOf str;
        default = [ ];
        example = [ "192.0.2.10" ];
        description = ''
          Addresses or networks of a Redis that is reached by TCP. Master and workers have no network
          but this: where the URL has a host's name, and nscd is off, the DNS server belongs here too.
        '';
      };
    };

    environment = mkOption {
      type = attrsOf str;
      default = { };
      example.RUST_BACKTRACE = "1";
      description = ''
        Further environment variables of master and workers. They outrank the options; everybody on the
        machine can read them.
      '';
    };

    workerServiceConfig = mkOption {
      type = attrsOf (oneOf [
        bool
        int
        str
        (listOf str)
      ]);
      default = { };
      example.MemoryMax = "1G";
      description = ''
        Lines for the [Service] section of every worker. `systemd.services."banter-worker@"` would have
        no effect.
      '';
    };

    nginx = {
      enable = mkEnableOption "a virtual host of nginx in front of Banter";

      hostName = mkOption {
        type = str;
        example = "chat.example.org";
        description = ''
          The virtual host's name. Everything else of it is set as usual, TLS for instance by
          `services.nginx.virtualHosts."chat.example.org" = { enableACME = true; forceSSL = true; }`.
        '';
      };
    };
  };

  config = mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.jwtSecretFile != null;
        message = ''
          services.banter.jwtSecretFile is not set. Make a secret on the machine itself:
            (umask 077; mkdir -p /var/lib/secrets; head -c 32 /dev/urandom | base64 > /var/lib/secrets/banter-jwt)
          and set services.banter.jwtSecretFile = "/var/lib/secrets/banter-jwt";
        '';
      }
      {
        assertion = !cfg.redis.createLocally || (cfg.redis.url == null && cfg.redis.urlFile == null);
        message = "services.banter.redis has the URL of a Redis and runs one: set services.banter.redis.createLocally = false, or remove the URL.";
      }
      {
        assertion = cfg.redis.url == null || cfg.redis.urlFile == null;
        message = "services.banter.redis has both url and urlFile: remove one.";
      }
      {
        assertion = !redisByTcp || cfg.redis.addresses != [ ];
        message = "services.banter.redis.addresses is empty: Banter has no network but what it names. Set it to the address of the Redis.";
      }
    ];

    # NixOS ignores [Install] of packaged units: what is wanted by whom is said again here.
    systemd.packages = [ cfg.package ];

    systemd.sockets = {
      banter = {
        wantedBy = [ "sockets.target" ];
        # The empty one removes the packaged port.
        listenStreams = [ "" ] ++ cfg.listenStreams;
      };
      banter-control.wantedBy = [ "sockets.target" ];
      banter-handoff.wantedBy = [ "sockets.target" ];
    };

    systemd.targets = mkIf cfg.startAtBoot { banter.wantedBy = [ "multi-user.target" ]; };

    systemd.services = {
      banter = lib.mkMerge [
        service
        # Workers are reloaded with the master.
        { reloadTriggers = [ liveLines ]; }
      ];

      # Does nothing, until a switch reloads it because something changed that takes a restart.
      banter-rollout = {
        description = "Banter chat server, restart of one process after the other";
        wantedBy = [
          "multi-user.target"
          "banter.target"
        ];
        partOf = [ "banter.target" ];
        path = lib.mkForce [ ];
        reloadTriggers = [
          "${cfg.package}"
          fixedLines
        ]
        ++ cfg.listenStreams
        # Not their number: a switch starts and stops instances by itself.
        ++ lib.unique (map whatRestarts ([ "banter" ] ++ workers));
        serviceConfig = {
          Type = "oneshot";
          RemainAfterExit = true;
          RuntimeDirectory = "banter-rollout";
          ExecStart = "/bin/sh ${./rollout.sh} start";
          ExecReload = "/bin/sh ${./rollout.sh} reload";
        };
      };
    }
    # On each instance, not on the template: NixOS calls every drop-in overrides.conf, and systemd reads
    # only one of that name, the instance's.
    // lib.genAttrs workers (
      _:
      lib.mkMerge [
        service
        {
          # Otherwise it would be a whole unit, and hide the template. It also lets a switch notice that
          # an instance is gone, and stop it.
          overrideStrategy = "asDropin";
          wantedBy = [ "banter.target" ];
          # In place of the packaged one of this name.
          serviceConfig.LoadCredential = [ "jwt-secret:${literal cfg.jwtSecretFile}" ];
        }
        { serviceConfig = cfg.workerServiceConfig; }
      ]
    );

    environment.etc."banter/banter.conf".text = liveLines + fixedLines;

    # The directory of the sockets, before the first of them is made.
    systemd.tmpfiles.rules = [ "d /run/banter 0750 banter banter -" ];

    users.users.banter = {
      isSystemUser = true;
      group = "banter";
      home = "/var/lib/banter";
      description = "Banter chat server";
      extraGroups = lib.optional cfg.redis.createLocally redisServer.group;
    };
    users.groups.banter = { };

    services.redis.servers.banter = mkIf cfg.redis.createLocally {
      enable = true;
      port = 0;
      # An ack means that the message is on the disk.
      appendOnly = lib.mkDefault true;
      appendFsync = lib.mkDefault "always";
      settings.maxmemory-policy = lib.mkDefault "noeviction";
    };

    networking.firewall.allowedTCPPorts = mkIf cfg.openFirewall [ cfg.port ];

    services.banter.trustedProxies = mkIf cfg.nginx.enable [ "127.0.0.1" ];

    # As docs/proxies/nginx.conf, which is tested.
    services.nginx = mkIf cfg.nginx.enable {
      enable = true;
      virtualHosts.${cfg.nginx.hostName}.locations."/" = {
        proxyPass = "http://127.0.0.1:${toString cfg.port}";
        # Upgrade and Connection headers; and no upstream block, so no kept connection that requests of
        # different people would share: Banter hands a connection, not a request, to a worker.
        proxyWebsockets = true;
        # These would come a second time, and some with other values.
        recommendedProxySettings = false;
        extraConfig = ''
          proxy_set_header Host $host;
          proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
          # Answers go out as they come.
          proxy_buffering off;
          # Longer than the heartbeat's interval and timeout.
          proxy_read_timeout ${toString (cfg.limits.pingInterval + cfg.limits.pingTimeout + 50)}s;
          proxy_send_timeout ${toString (cfg.limits.pingInterval + cfg.limits.pingTimeout + 50)}s;
          client_max_body_size 2m;
        '';
      };
    };
  };
}
