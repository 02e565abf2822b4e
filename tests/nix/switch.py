"""What `nixos-rebuild switch` does to units, by the rules of the NixOS manual (Unit handling):

    switch.py ETC       makes the files below ETC those of /etc, and acts on what has changed

/etc/systemd/system is compared with ETC/systemd/system, packaged units included. Only what Banter's
units use of the rules is here: other sections and kinds of units are refused.
"""

import pathlib
import re
import shutil
import subprocess
import sys

NOW = pathlib.Path("/etc")
UNITS = "systemd/system"
# A change of these keys of [Unit] is no reason to restart.
IGNORED = {"Description", "Documentation", "OnFailure", "RefuseManualStart", "StopWhenUnneeded"}


def systemctl(verb, units):
    if units:
        print(f"{verb}: {' '.join(sorted(units))}", flush=True)
        subprocess.run(["systemctl", verb, *sorted(units)], check=True)


def active_units():
    listed = subprocess.run(
        ["systemctl", "list-units", "--state=active,activating,reloading", "--plain", "--no-legend", "--full"],
        check=True, stdout=subprocess.PIPE, text=True,
    )
    return [line.split()[0] for line in listed.stdout.splitlines()]


def drop_ins(etc, unit):
    return sorted((etc / UNITS / f"{unit}.d").glob("*.conf"))


def read(etc, unit, base):
    """A unit's settings, `(section, key)` to a list of values, drop-ins included."""
    values = {}
    files = [etc / UNITS / base, *drop_ins(etc, base)]
    if unit != base:
        files += drop_ins(etc, unit)
    for file in files:
        section = None
        for line in file.read_text(encoding="utf-8").splitlines():
            if match := re.fullmatch(r"\[(\w+)\]", line):
                section = match[1]
            elif line and not line.startswith("#") and section != "Install":
                key, value = line.split("=", 1)
                known = values.setdefault((section, key), [])
                if value:
                    known.append(value)
                else:
                    known.clear()
    return values


def flag(values, key, default):
    given = values.get(("Service", key))
    return given[-1] in ("true", "yes", "1") if given else default


def plan(new):
    """What is to be done with which units."""
    todo = {verb: set() for verb in ("stop", "reload", "restart", "start")}
    for unit in active_units():
        base = unit
        if "@" in unit and not (NOW / UNITS / unit).exists() and not (new / UNITS / unit).exists():
            base = re.sub(r"@[^.]*\.", "@.", unit)
        if not (NOW / UNITS / base).exists():
            continue  # not NixOS' own
        gone = unit != base and drop_ins(NOW, unit) and not drop_ins(new, unit)
        if gone or not (new / UNITS / base).exists():
            todo["stop"].add(unit)
        elif unit.endswith(".target"):
            todo["start"].add(unit)
        elif unit.endswith(".service"):
            old_values, new_values = read(NOW, unit, base), read(new, unit, base)
            changed = {key for key in old_values | new_values if old_values.get(key) != new_values.get(key)}
            changed -= {("Unit", key) for key in IGNORED}
            if changed <= {("Unit", "X-Reload-Triggers"), ("Service", "ExecReload")}:
                if changed:
                    todo["reload"].add(unit)
            elif flag(new_values, "X-RestartIfChanged", True):
                if not flag(new_values, "X-StopIfChanged", True):
                    todo["restart"].add(unit)
                    continue
                todo["stop"].add(unit)
                sockets = " ".join(new_values.get(("Service", "Sockets"), [f"{unit.split('.')[0]}.socket"])).split()
                known = [socket for socket in sockets if (new / UNITS / socket).exists()]
                todo["stop"].update(known)
                todo["start"].update(known or [unit])
    return todo


def replace(new):
    """/etc becomes what is below `new`, as far as the latter has a say there."""
    for top in {path.relative_to(new).parts[0] for path in new.rglob("*")}:
        target = NOW / UNITS if top == "systemd" else NOW / top
        source = new / UNITS if top == "systemd" else new / top
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, symlinks=True)


def main(new):
    todo = plan(new)
    # sockets.target and multi-user.target are always active, and started anew by every switch.
    todo["start"].add("sockets.target")
    systemctl("stop", todo["stop"])
    replace(new)
    subprocess.run(["systemd-tmpfiles", "--create", "/etc/tmpfiles.d/00-nixos.conf"], check=True)
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    for verb in ("reload", "restart", "start"):
        systemctl(verb, todo[verb])


main(pathlib.Path(sys.argv[1]))
