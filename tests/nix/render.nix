# What NixOS would put into /etc for a configuration, as far as Banter is concerned:
# files (path to text) and links (path to target), in the form and with the names that NixOS gives them.
{ lib, config }:
let
  inherit (config) systemd;

  section =
    name: values:
    "[${name}]\n"
    + lib.concatStrings (
      lib.flatten (
        lib.mapAttrsToList (
          key: value: map (one: "${key}=${if lib.isBool one then lib.boolToString one else toString one}\n") (lib.toList value)
        ) values
      )
    );

  # In NixOS a path in the store, which stands for the text just as well.
  trigger = texts: builtins.substring 0 32 (builtins.hashString "sha256" (toString texts));

  dependencies =
    unit:
    lib.optionalAttrs (unit.after != [ ]) { After = toString unit.after; }
    // lib.optionalAttrs (unit.wants != [ ]) { Wants = toString unit.wants; }
    // lib.optionalAttrs (unit.partOf != [ ]) { PartOf = toString unit.partOf; }
    // lib.optionalAttrs (unit.description != "") { Description = unit.description; };

  service =
    unit:
    section "Unit" (
      dependencies unit
      // lib.optionalAttrs (unit.reloadTriggers != [ ]) { X-Reload-Triggers = trigger unit.reloadTriggers; }
    )
    + "\n[Service]\n"
    + lib.concatStrings (
      lib.mapAttrsToList (name: value: "Environment=${builtins.toJSON "${name}=${value}"}\n") (
        lib.optionalAttrs (unit.path != [ ]) { PATH = lib.concatStringsSep ":" unit.path; } // unit.environment
      )
    )
    + lib.optionalString (!unit.restartIfChanged) "X-RestartIfChanged=false\n"
    + lib.removePrefix "[Service]\n" (section "Service" unit.serviceConfig);

  socket =
    unit:
    section "Unit" (dependencies unit)
    + "\n"
    + section "Socket" (
      lib.optionalAttrs (unit.listenStreams != [ ]) { ListenStream = unit.listenStreams; }
    );

  target = unit: section "Unit" (dependencies unit);

  kinds = {
    service = service;
    socket = socket;
    target = target;
  };

  units = lib.concatMapAttrs (
    kind: text:
    lib.mapAttrs' (
      name: unit:
      lib.nameValuePair "${name}.${kind}" {
        inherit (unit) wantedBy overrideStrategy;
        text = text unit;
      }
    ) systemd."${kind}s"
  ) kinds;

  packaged = builtins.readDir ../../systemd;
  isDropIn = name: unit: unit.overrideStrategy == "asDropin" || packaged ? ${name};
in
{
  files =
    lib.mapAttrs' (
      name: unit:
      lib.nameValuePair "systemd/system/${name}${lib.optionalString (isDropIn name unit) ".d/overrides.conf"}" unit.text
    ) units
    // lib.mapAttrs' (name: file: lib.nameValuePair name file.text) config.environment.etc
    // {
      "tmpfiles.d/00-nixos.conf" = lib.concatMapStrings (rule: "${rule}\n") systemd.tmpfiles.rules;
    };

  links = lib.listToAttrs (
    lib.concatLists (
      lib.mapAttrsToList (
        name: unit:
        map (wanting: lib.nameValuePair "systemd/system/${wanting}.wants/${name}" "../${name}") unit.wantedBy
      ) units
    )
  );

  # Units that are not a drop-in of a packaged one.
  whole = lib.attrNames (lib.filterAttrs (name: unit: !isDropIn name unit) units);
}
