{
  description = "Banter, a self-hosted chat server";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      forEach = make: lib.genAttrs systems (system: make nixpkgs.legacyPackages.${system});
      own = pkgs: self.packages.${pkgs.stdenv.hostPlatform.system}.default;
    in
    {
      packages = forEach (pkgs: {
        default = pkgs.callPackage ./nix/package.nix { };
      });

      apps = forEach (pkgs: {
        default = {
          type = "app";
          program = toString (
            pkgs.writeShellScript "banter-serve" ''exec ${lib.getExe (own pkgs)} serve "$@"''
          );
          meta.description = "Run a chat server with a database of its own";
        };
      });

      overlays.default = final: _prev: {
        banter = final.callPackage ./nix/package.nix { };
      };

      nixosModules.default =
        { pkgs, ... }:
        {
          imports = [ ./nix/module.nix ];
          # Built with the nixpkgs that Banter was tested with, and no overlay needed.
          services.banter.package = lib.mkDefault (own pkgs);
        };

      # The toolchain, and what the tests start.
      devShells = forEach (pkgs: {
        default = pkgs.mkShell {
          packages = [
            pkgs.cargo
            pkgs.cargo-deny
            pkgs.clippy
            pkgs.rust-analyzer
            pkgs.rustc
            pkgs.rustfmt
            pkgs.nodejs
            pkgs.python3
            pkgs.redis
            pkgs.caddy
            pkgs.haproxy
            pkgs.nginx
          ];
          # Where tests/browser looks.
          CHROMIUM = lib.getExe pkgs.chromium;
        };
      });

      formatter = forEach (pkgs: pkgs.nixfmt-tree);

      checks = forEach (
        pkgs:
        let
          # With the tests that need neither network, root, nor npm.
          package = (own pkgs).override { doCheck = true; };
        in
        {
          inherit package;

          clippy = package.overrideAttrs (old: {
            pname = "banter-clippy";
            doCheck = false;
            nativeBuildInputs = old.nativeBuildInputs ++ [ pkgs.clippy ];
            buildPhase = "cargo clippy --locked --offline --all-targets -- -D warnings";
            installPhase = "touch $out";
            # What the package does afterwards has nothing to work on.
            postInstall = "";
            dontFixup = true;
          });

          fmt =
            pkgs.runCommand "banter-fmt"
              {
                nativeBuildInputs = [
                  pkgs.cargo
                  pkgs.rustfmt
                ];
              }
              ''
                cd ${package.src}
                cargo fmt --check
                touch $out
              '';

          vm = pkgs.testers.runNixOSTest {
            imports = [ ./nix/vm-test.nix ];
            nodes.machine.imports = [ self.nixosModules.default ];
          };
        }
      );
    };
}
