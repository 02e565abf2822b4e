# What the module makes of configurations.nix, what it says to bad ones, and what the flake consists of.
# `lib` is the path of a nixpkgs' lib; packages and NixOS' own modules are stand-ins.
{ lib }:
let
  libPath = lib;
in
let
  lib = import libPath;
  evaluate =
    modules:
    lib.evalModules {
      modules = [
        ./nixos.nix
        ../../nix/module.nix
      ]
      ++ modules;
      specialArgs.pkgs.callPackage = _: _: {
        type = "derivation";
        outPath = "/nix/store/banter";
      };
    };
  complaints =
    config: map (one: one.message) (lib.filter (one: !one.assertion) config.assertions);

  configurations = lib.mapAttrs (_: module: evaluate [ module ]) (import ./configurations.nix { inherit lib; });
  rendered = lib.mapAttrs (
    _: evaluated: import ./render.nix { inherit lib; inherit (evaluated) config; }
  ) configurations;

  with' = banter: (evaluate [ { services.banter = banter; } ]).config;
  good = {
    enable = true;
    jwtSecretFile = "/run/keys/jwt";
  };
  says =
    banter: words:
    let
      told = complaints (with' banter);
    in
    lib.length told == 1 && lib.hasInfix words (lib.head told);
  refuses = banter: !(builtins.tryEval (builtins.deepSeq (with' banter).services.banter true)).success;

  etc = name: path: rendered.${name}.files.${path};
  unit = name: of: etc name "systemd/system/${of}.d/overrides.conf";
  conf = name: etc name "banter/banter.conf";
  has = lib.flip lib.hasInfix;

  changed =
    from: to:
    lib.attrNames (lib.filterAttrs (file: text: text != rendered.${from}.files.${file} or "") rendered.${to}.files);
  # The keys of a unit's lines that differ.
  keysChanged =
    from: to: file:
    let
      lines = name: lib.splitString "\n" rendered.${name}.files.${file};
    in
    lib.unique (
      map (line: lib.head (lib.splitString "=" line)) (
        lib.subtractLists (lines from) (lines to) ++ lib.subtractLists (lines to) (lines from)
      )
    );

  # Every option, from its declaration.
  options = lib.collect lib.isOption (builtins.removeAttrs (evaluate [ ]).options.services.banter [ "_module" ]);

  expectations = {
    "a disabled module sets nothing" =
      let
        config = (evaluate [ ]).config;
      in
      config.systemd.services == { } && config.environment.etc == { } && config.users.users == { };
    "every setting has the option that settings.nix names" =
      let
        declared = (evaluate [ ]).options.services.banter;
      in
      lib.all (setting: lib.isOption (lib.attrByPath (lib.splitString "." setting.option) null declared)) (
        lib.attrValues (import ../../nix/settings.nix { inherit lib; })
      );
    "every option has a description" = lib.all (option: option ? description && option.description != "") options;
    "no secret: told how to make one" = says { enable = true; } "head -c 32 /dev/urandom";
    "a secret in the store is refused" = refuses (good // { jwtSecretFile = "${builtins.storeDir}/x/jwt"; });
    "a secret as a path literal, which Nix would copy into the store, is refused" = refuses (
      good // { jwtSecretFile = ./evaluate.nix; }
    );
    "a relative secret is refused" = refuses (good // { jwtSecretFile = "jwt"; });
    "no workers are refused" = refuses (good // { workers = 0; });
    "two answers to where Redis is" = says (good // { redis.url = "redis://h:1"; }) "createLocally = false";
    "a URL and a file with one" = says (
      good
      // {
        redis = {
          createLocally = false;
          url = "redis://192.0.2.1:6379";
          urlFile = "/run/keys/redis";
          addresses = [ "192.0.2.1" ];
        };
      }
    ) "both url and urlFile";
    "a Redis by TCP without its address" = says (
      good
      // {
        redis = {
          createLocally = false;
          url = "redis://192.0.2.1:6379";
        };
      }
    ) "redis.addresses is empty";
    "a URL that is none is refused" = refuses (good // { redis.url = "192.0.2.1:6379"; });
    "a line break in a setting is refused" = refuses (good // { logLevel = "info\nJWT_SECRET=x"; });
    "good configurations have no complaints" = lib.all (one: complaints one.config == [ ]) (
      lib.attrValues configurations
    );
    "all but the rollout are drop-ins, the instances too" = lib.all (
      one: one.whole == [ "banter-rollout.service" ]
    ) (lib.attrValues rendered);
    "the template has no drop-in, which those of its instances would hide" = lib.all (
      one: !(one.files ? "systemd/system/banter-worker@.service.d/overrides.conf")
    ) (lib.attrValues rendered);
    "no unit has a PATH, which would restart it with every new coreutils" = lib.all (
      one: lib.all (text: !(has text "Environment=\"PATH=")) (lib.attrValues one.files)
    ) (lib.attrValues rendered);

    "changing the number of workers changes no unit that stays" =
      removeAttrs rendered.four.files [
        "systemd/system/banter-worker@2.service.d/overrides.conf"
        "systemd/system/banter-worker@3.service.d/overrides.conf"
      ] == rendered.two.files;
    "a limit reloads the master, and nothing else changes" =
      changed "two" "limited" == [
        "banter/banter.conf"
        "systemd/system/banter.service.d/overrides.conf"
      ]
      && keysChanged "two" "limited" "systemd/system/banter.service.d/overrides.conf" == [ "X-Reload-Triggers" ];
    "what takes a restart reloads the rollout" = lib.all (
      to:
      keysChanged "two" to "systemd/system/banter-rollout.service" == [ "X-Reload-Triggers" ]
    ) [ "embedded" "traced" "remote-redis" ];
    "no service is restarted by the switch itself" = lib.all (
      one:
      lib.all (file: has one.files.${file} "\nX-RestartIfChanged=false\n") (
        lib.filter (lib.hasSuffix ".service.d/overrides.conf") (lib.attrNames one.files)
      )
    ) (lib.attrValues rendered);

    "a local Redis is used by its socket" = has (conf "minimal") "\nREDIS_URL=unix:/run/redis-banter/redis.sock\n";
    "a local Redis syncs what it acknowledges" =
      let
        redis = configurations.minimal.config.services.redis.servers.banter;
      in
      redis.enable && redis.port == 0 && redis.appendOnly && redis.appendFsync == "always";
    "Banter may use the socket" =
      configurations.minimal.config.users.users.banter.extraGroups == [ "redis-banter" ];
    "the embedded store takes no Redis" =
      !(has (conf "embedded") "REDIS_URL")
      && configurations.embedded.config.services.redis.servers == { }
      && !(has (unit "embedded" "banter.service") "redis");
    "a URL with a password is only named" =
      !(has (conf "remote-redis") "REDIS_URL")
      && has (unit "remote-redis" "banter.service") "\nEnvironmentFile=/run/keys/banter-redis\n"
      && has (unit "remote-redis" "banter-worker@1.service") "\nEnvironmentFile=/run/keys/banter-redis\n";
    "% is itself" =
      has (unit "remote-redis" "banter-worker@0.service") "\nLoadCredential=jwt-secret:/run/keys/100%%/jwt\n"
      && has (unit "remote-redis" "banter.service") ''Environment="SOME=100%% of it"'';
    "nginx has the directives of docs/proxies/nginx.conf" =
      let
        location = configurations.behind-nginx.config.services.nginx.virtualHosts."chat.example.org".locations."/";
        directives =
          text: lib.filter (line: line != "" && !(lib.hasPrefix "#" line)) (map lib.trim (lib.splitString "\n" text));
        documented = directives (
          lib.head (lib.splitString "}" (lib.last (lib.splitString "location / {" (builtins.readFile ../../docs/proxies/nginx.conf))))
        );
        # NixOS writes these for proxyPass and proxyWebsockets.
        ofNixos = [
          "proxy_pass http://127.0.0.1:8000;"
          "proxy_http_version 1.1;"
          "proxy_set_header Upgrade $http_upgrade;"
          "proxy_set_header Connection $banter_connection;"
        ];
      in
      location.proxyPass == "http://127.0.0.1:8000"
      && location.proxyWebsockets
      && !location.recommendedProxySettings
      && lib.subtractLists ofNixos documented == directives location.extraConfig;
    "nginx is believed, and alone reaches Banter" =
      has (conf "behind-nginx") "\nBANTER_TRUST_PROXY=10.0.0.0/8,127.0.0.1\n"
      && has (unit "behind-nginx" "banter.socket") "ListenStream=\nListenStream=127.0.0.1:8000\n";
    "the firewall stays shut unless asked" =
      configurations.minimal.config.networking.firewall.allowedTCPPorts == [ ]
      && configurations.embedded.config.networking.firewall.allowedTCPPorts == [ 9000 ];
  };

  # The outputs of the flake, over a nixpkgs whose functions give back what they are given.
  package =
    arguments:
    arguments
    // {
      nativeBuildInputs = arguments.nativeBuildInputs or [ ];
      override = more: package (arguments // more);
      overrideAttrs = change: package (arguments // change (package arguments));
    };
  # Debian's nix does not know builtins.readFileType, which filesets need.
  flakeLib = lib.extend (
    _: previous: {
      filesystem = previous.filesystem // {
        pathType = path: (builtins.readDir (dirOf path)).${baseNameOf path};
      };
      fileset = previous.fileset // {
        toSource = source: toString source.root;
      };
      getExe' = package: name: "${package}/bin/${name}";
      getExe =
        package: if lib.isString package then "/nix/store/${package}/bin/${package}" else "/nix/store/banter/bin/${package.meta.mainProgram}";
    }
  );
  callPackage =
    file: more:
    let
      function = import file;
      available = {
        lib = flakeLib;
        rustPlatform.buildRustPackage = package;
        coreutils = "/nix/store/coreutils";
        redis = "redis";
      };
    in
    function (builtins.intersectAttrs (builtins.functionArgs function) available // more);
  nixpkgs = {
    lib = flakeLib;
    legacyPackages = lib.genAttrs lib.systems.flakeExposed (
      system:
      lib.genAttrs [
        "caddy"
        "cargo"
        "cargo-deny"
        "chromium"
        "clippy"
        "haproxy"
        "nginx"
        "nixfmt-tree"
        "nodejs"
        "python3"
        "redis"
        "rust-analyzer"
        "rustc"
        "rustfmt"
      ] lib.id
      // {
        inherit callPackage;
        stdenv.hostPlatform.system = system;
        mkShell = lib.id;
        runCommand = name: attributes: script: attributes // { inherit name script; };
        writeShellScript = name: text: "/nix/store/${name}";
        testers.runNixOSTest = lib.id;
      }
    );
  };
  flake = import ../../flake.nix;
  outputs = flake.outputs {
    self = outputs;
    inherit nixpkgs;
  };
  systems = [
    "aarch64-linux"
    "x86_64-linux"
  ];
  ofFlake = kind: name: map (system: outputs.${kind}.${system}.${name}) systems;
  packaged = outputs.packages.x86_64-linux.default;
  source =
    doCheck:
    map (file: lib.removePrefix "${toString ../..}/" (toString file)) (
      flakeLib.fileset.toList
        (import ../../nix/package.nix {
          inherit doCheck;
          lib = flakeLib // {
            fileset = flakeLib.fileset // {
              toSource = given: given.fileset;
            };
          };
          rustPlatform.buildRustPackage = lib.id;
          coreutils = "";
          redis = "";
        }).src
    );
  withOverlay = lib.fix (final: { inherit callPackage; } // outputs.overlays.default final { });

  outputExpectations = {
    "both systems have a package, an app, a shell and a formatter" = lib.all (
      kind: lib.attrNames outputs.${kind} == systems
    ) [ "packages" "apps" "devShells" "formatter" "checks" ];
    "the package takes name and version from Cargo.toml" =
      packaged.pname == "banter" && packaged.version == (lib.importTOML ../../Cargo.toml).package.version;
    "dependencies come from Cargo.lock, without hashes" = packaged.cargoLock == { lockFile = ../../Cargo.lock; };
    "a deployment builds without tests, the check with them" =
      lib.all (one: !one.doCheck) (ofFlake "packages" "default")
      && lib.all (one: one.doCheck) (ofFlake "checks" "package");
    "nix run serves" = lib.all (app: app.type == "app" && app.program == "/nix/store/banter-serve") (
      ofFlake "apps" "default"
    );
    "checks are the package's tests, clippy, fmt and the machine" = lib.all (
      checks:
      lib.attrNames checks == [
        "clippy"
        "fmt"
        "package"
        "vm"
      ]
    ) (lib.attrValues outputs.checks);
    "clippy runs on the package's source and dependencies" = lib.all (
      one: one.cargoLock == packaged.cargoLock && lib.elem "clippy" one.nativeBuildInputs && has one.buildPhase "-D warnings"
    ) (ofFlake "checks" "clippy");
    "the shell has what is named" = lib.all (
      shell: lib.all lib.isString shell.packages && shell.CHROMIUM == "/nix/store/chromium/bin/chromium"
    ) (ofFlake "devShells" "default");
    "the formatter is nixfmt" = outputs.formatter.x86_64-linux == "nixfmt-tree";
    "the overlay has the package" = withOverlay.banter.pname == "banter";
    "the module's package is that of the system" =
      let
        module = outputs.nixosModules.default { pkgs.stdenv.hostPlatform.system = "aarch64-linux"; };
      in
      module.services.banter.package.content.pname == "banter" && module.imports == [ ../../nix/module.nix ];
    "the lock file has the branch that the flake names" =
      let
        locked = (lib.importJSON ../../flake.lock).nodes.nixpkgs;
      in
      flake.inputs.nixpkgs.url == "github:NixOS/nixpkgs/${locked.original.ref}"
      && lib.hasPrefix "sha256-" locked.locked.narHash;
    "the source has what the build reads, and with the tests what they read" =
      let
        build = [
          "Cargo.lock"
          "Cargo.toml"
          "README.md"
          "benches/store.rs"
          "src/main.rs"
          "systemd/banter.service"
        ];
        tests = [
          ".env.example"
          "clippy.toml"
          "docker-compose.yml"
          "nix/module.nix"
          "nix/settings.nix"
          "rustfmt.toml"
          "tests/settings.rs"
        ];
      in
      lib.all (file: lib.elem file (source false)) build
      && lib.all (file: lib.elem file (source true)) (build ++ tests)
      && lib.intersectLists tests (source false) == [ ];
    "the source has nothing that changes without them" = lib.all (
      file: !(lib.any (prefix: lib.hasPrefix prefix file) [ "target/" "tests/clients" "tests/nix" "tests/systemd" "flake" "Makefile" ])
    ) (source true);
  };
in
{
  inherit rendered;
  inherit (packaged) postInstall;
  failed = lib.attrNames (lib.filterAttrs (_: held: !held) (expectations // outputExpectations));
  count = lib.length (lib.attrNames (expectations // outputExpectations));
}
