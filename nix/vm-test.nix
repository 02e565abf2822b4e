# The whole deployment in a virtual machine: `nix build .#checks.x86_64-linux.vm`.
{ lib, ... }:
let
  configurations = import ../tests/nix/configurations.nix { inherit lib; };
in
{
  name = "banter";

  nodes.machine =
    { pkgs, ... }:
    {
      imports = [ configurations.two ];
      environment.systemPackages = [ pkgs.python3 ];
      environment.etc."banter-test/client.py".source = ./vm-test/client.py;

      # Test machines have no switch-to-configuration otherwise.
      system.switch.enable = true;
      specialisation = lib.genAttrs [ "four" "limited" "traced" ] (name: {
        configuration = configurations.${name};
      });
    };

  testScript = builtins.readFile ./vm-test/script.py;
}
