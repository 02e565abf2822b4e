{
  lib,
  rustPlatform,
  coreutils,
  redis,
  # They take longer than the build: `nix flake check` runs them, a deployment need not.
  doCheck ? false,
}:

rustPlatform.buildRustPackage {
  pname = "banter";
  inherit ((lib.importTOML ../Cargo.toml).package) version;

  # What is not named here can change without a rebuild.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions (
      [
        ../Cargo.toml
        ../Cargo.lock
        ../src
        # Named in Cargo.toml.
        ../benches/store.rs
        ../systemd
        ../docs
        ../README.md
        ../CHANGELOG.md
        ../LICENSE
      ]
      ++ lib.optionals doCheck [
        ../clippy.toml
        ../rustfmt.toml
        (lib.fileset.fileFilter (file: file.hasExt "rs") ../tests)
        # tests/settings.rs reads them.
        ./module.nix
        ./settings.nix
        ../.env.example
        ../docker-compose.yml
      ]
    );
  };

  cargoLock.lockFile = ../Cargo.lock;

  inherit doCheck;
  # Tests start a Redis of their own.
  nativeCheckInputs = [ redis ];

  postInstall = ''
    for unit in systemd/*.service systemd/*.socket systemd/*.target; do
      install -Dm 644 "$unit" -t "$out/lib/systemd/system"
    done
    # NixOS has neither /usr/bin nor /bin/kill.
    substituteInPlace "$out"/lib/systemd/system/{banter,banter-worker@}.service \
      --replace-fail /usr/bin/banter "$out/bin/banter" \
      --replace-fail /bin/kill ${lib.getExe' coreutils "kill"}
    # For other distributions; the NixOS module has its own.
    install -Dm 644 systemd/sysusers.conf "$out/lib/sysusers.d/banter.conf"
    install -Dm 644 systemd/tmpfiles.conf "$out/lib/tmpfiles.d/banter.conf"
    doc="$out/share/doc/banter"
    install -Dm 644 README.md CHANGELOG.md LICENSE -t "$doc"
    install -Dm 644 systemd/redis-tcp.conf -t "$doc/examples"
    cp -r docs/. "$doc"
  '';

  meta = {
    description = "A self-hosted chat server: REST and Socket.IO, one master and its worker processes";
    license = lib.licenses.mit;
    mainProgram = "banter";
    platforms = lib.platforms.linux;
  };
}
