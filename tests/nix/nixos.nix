# Stand-ins for the options of NixOS that nix/module.nix sets: their types as far as the module depends
# on them. What the real options do is not covered.
{ lib, ... }:
let
  inherit (lib) mkOption;
  inherit (lib.types)
    anything
    attrsOf
    bool
    enum
    int
    lines
    listOf
    nullOr
    path
    port
    str
    submodule
    unspecified
    ;

  option =
    type: default:
    mkOption {
      inherit type default;
    };

  # A value of a unit file: lists add up, anything else must be the same everywhere.
  unitValue = lib.mkOptionType {
    name = "unit value";
    merge =
      loc: definitions:
      let
        values = map (definition: definition.value) definitions;
      in
      if lib.all lib.isList values then
        lib.concatLists values
      else if lib.any lib.isList values then
        throw "${lib.showOption loc} is a list here and a single value there"
      else
        lib.mergeEqualOption loc definitions;
  };

  unit = {
    wantedBy = option (listOf str) [ ];
    after = option (listOf str) [ ];
    wants = option (listOf str) [ ];
    partOf = option (listOf str) [ ];
    description = option str "";
    overrideStrategy = option (enum [
      "asDropinIfExists"
      "asDropin"
    ]) "asDropinIfExists";
  };
in
{
  options = {
    assertions = option (listOf unspecified) [ ];

    environment.etc = option (attrsOf (submodule {
      options.text = option lines "";
    })) { };

    networking.firewall.allowedTCPPorts = option (listOf port) [ ];

    systemd = {
      packages = option (listOf unspecified) [ ];
      tmpfiles.rules = option (listOf str) [ ];
      targets = option (attrsOf (submodule {
        options = unit;
      })) { };
      sockets = option (attrsOf (submodule {
        options = unit // {
          listenStreams = option (listOf str) [ ];
        };
      })) { };
      services = option (attrsOf (submodule {
        options = unit // {
          environment = option (attrsOf str) { };
          path = option (listOf unspecified) [ ];
          serviceConfig = option (attrsOf unitValue) { };
          restartIfChanged = option bool true;
          reloadTriggers = option (listOf str) [ ];
        };
        # As in NixOS: without an override there is a PATH in every unit.
        config.path = lib.mkAfter [ "/nix/store/coreutils" ];
      })) { };
    };

    users.groups = option (attrsOf (submodule { })) { };
    users.users = option (attrsOf (submodule {
      options = {
        isSystemUser = option bool false;
        group = option str "";
        home = option path "/var/empty";
        description = option str "";
        extraGroups = option (listOf str) [ ];
      };
    })) { };

    services.redis.servers = option (attrsOf (
      submodule (
        { name, ... }:
        {
          options = {
            enable = option bool false;
            port = option port 6379;
            unixSocket = option (nullOr path) "/run/redis-${name}/redis.sock";
            group = option str "redis-${name}";
            appendOnly = option bool false;
            appendFsync = option str "everysec";
            settings = option (attrsOf (lib.types.oneOf [
              int
              str
            ])) { };
          };
        }
      )
    )) { };

    services.nginx = {
      enable = option bool false;
      virtualHosts = option (attrsOf (submodule {
        options = {
          enableACME = option bool false;
          forceSSL = option bool false;
          locations = option (attrsOf (submodule {
            options = {
              proxyPass = option (nullOr str) null;
              proxyWebsockets = option bool false;
              recommendedProxySettings = option anything null;
              extraConfig = option lines "";
            };
          })) { };
        };
      })) { };
    };
  };
}
