"""Checks what there is for Nix as far as that goes without the packages of nixpkgs: `make nix-check`.

Every .nix file is parsed. With NIXPKGS_LIB, the path of a nixpkgs or of its lib, the module and the
flake are evaluated (evaluate.nix), and what the module renders is compared with rendered/, which
BANTER_UPDATE_RENDERED=1 writes. The packaged units, with that beside them, must please
`systemd-analyze verify`.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import tree

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/nix"
RENDERED = HERE / "rendered"
FILES = [ROOT / "flake.nix", *sorted((ROOT / "nix").rglob("*.nix")), *sorted(HERE.rglob("*.nix"))]
KILL = "/nix/store/coreutils/bin/kill"
# Bash's part of nixpkgs' standard environment that the package uses.
SUBSTITUTE = r"""
substituteInPlace() {
	local files=() file text
	while [ "$1" != --replace-fail ]; do files+=("$1"); shift; done
	for file in "${files[@]}"; do
		set -- "$@"
		local args=("$@")
		while [ ${#args[@]} -gt 0 ]; do
			[ "${args[0]}" = --replace-fail ] || { echo "substituteInPlace: ${args[0]}" >&2; exit 1; }
			text=$(cat "$file"; echo x)
			case $text in *"${args[1]}"*) ;; *) echo "$file: no ${args[1]}" >&2; exit 1 ;; esac
			text=${text//"${args[1]}"/"${args[2]}"}
			printf %s "${text%x}" >"$file"
			args=("${args[@]:3}")
		done
	done
}
"""


def run(*command, **more):
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )
    if done.returncode != 0:
        sys.exit(f"nix-check: {' '.join(map(str, command))[:200]}: exit code {done.returncode}\n{done.stderr or done.stdout}")
    return done.stdout, done.stderr


def nix(*arguments):
    # Nothing is built, and nothing gets into a store.
    return run("nix-instantiate", "--store", "dummy://", "--readonly-mode", *arguments)[0]


def evaluate(lib, attribute):
    return json.loads(
        nix("--eval", "--strict", "--json", HERE / "evaluate.nix", "--arg", "lib", lib, "--attr", attribute)
    )


def install_package(script, out):
    """What the package's postInstall puts into `out`, beside a program to be found there."""
    (out / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", out / "bin/banter")
    run("bash", "-euo", "pipefail", "-c", SUBSTITUTE + script, cwd=ROOT, env={**os.environ, "out": str(out)})
    for unit in ["banter.service", "banter-worker@.service"]:
        text = (out / "lib/systemd/system" / unit).read_text(encoding="utf-8")
        for path in ["/usr/", " /bin/", "=/bin/"]:
            if path in text:
                sys.exit(f"nix-check: {unit} names {path}, which NixOS does not have")
    shipped = {file.name for kind in ("service", "socket", "target") for file in (ROOT / "systemd").glob(f"*.{kind}")}
    packaged = {file.name for file in (out / "lib/systemd/system").iterdir()}
    if shipped != packaged:
        sys.exit(f"nix-check: the package has the units {sorted(packaged)}, systemd/ has {sorted(shipped)}")


def verify(name, text, package, etc):
    """systemd's opinion of a configuration's units."""
    units = etc / "systemd/system"
    shutil.copytree(package / "lib/systemd/system", units)
    for unit in units.glob("*.service"):
        # The package's path of `kill` is a stand-in.
        unit.write_text(unit.read_text(encoding="utf-8").replace(KILL, "/bin/kill"), encoding="utf-8")
    tree.unpack(text, etc)
    shutil.copy(HERE / "redis-banter.service", units)
    instances = [link.name for link in (units / "banter.target.wants").iterdir()]
    names = ["banter.service", "banter.target", "banter.socket", "banter-control.socket", "banter-handoff.socket"]
    output, errors = run("systemd-analyze", "verify", "--man=no", *names, *instances, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"})
    if output or errors:
        sys.exit(f"nix-check: systemd-analyze verify, {name}:\n{output}{errors}")


def check_lock(scratch):
    """Nix itself must find the flake well formed, and its lock file complete."""
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if git.returncode != 0:
        print("nix-check: NOT A GIT CHECKOUT: flake.lock was not checked")
        return
    run(
        "nix", "--extra-experimental-features", "nix-command flakes", "--store", scratch / "store",
        "flake", "metadata", "--offline", "--no-update-lock-file", "--json", f"git+file://{ROOT}",
        env={**os.environ, "HOME": str(scratch), "XDG_CACHE_HOME": str(scratch / "cache")},
    )
    print("nix-check: flake.lock is complete")


def main():
    for file in FILES:
        nix("--parse", file)
    print(f"nix-check: {len(FILES)} files parsed")

    with tempfile.TemporaryDirectory(prefix="banter-nix-") as scratch:
        check_lock(pathlib.Path(scratch))

    given = os.environ.get("NIXPKGS_LIB")
    if not given:
        print("nix-check: NOT EVALUATED: set NIXPKGS_LIB to a nixpkgs, or its lib, for that")
        return
    lib = next((path for path in (pathlib.Path(given) / "lib", pathlib.Path(given)) if (path / "default.nix").exists()), None)
    if lib is None or not (lib / "modules.nix").exists():
        sys.exit(f"nix-check: NIXPKGS_LIB={given} is neither a nixpkgs nor its lib")

    lib = lib.resolve()
    failed = evaluate(lib, "failed")
    if failed:
        sys.exit("nix-check: does not hold: " + "; ".join(failed))
    print(f"nix-check: {evaluate(lib, 'count')} expectations hold of module and flake")

    with tempfile.TemporaryDirectory(prefix="banter-nix-") as scratch:
        scratch = pathlib.Path(scratch)
        rendered = {f"{name}.txt": tree.pack(one) for name, one in evaluate(lib, "rendered").items()}
        if os.environ.get("BANTER_UPDATE_RENDERED"):
            shutil.rmtree(RENDERED, ignore_errors=True)
            RENDERED.mkdir()
            for name, text in rendered.items():
                (RENDERED / name).write_text(text, encoding="utf-8")
        known = {file.name: file.read_text(encoding="utf-8") for file in RENDERED.glob("*")}
        differing = sorted(name for name in rendered | known if rendered.get(name) != known.get(name))
        if differing:
            sys.exit(f"nix-check: tests/nix/rendered is behind; BANTER_UPDATE_RENDERED=1 writes: {' '.join(differing)}")
        print(f"nix-check: what {len(rendered)} configurations render is what is tested in tests/systemd")

        package = scratch / "package"
        install_package(evaluate(lib, "postInstall"), package)
        for name, text in rendered.items():
            verify(name, text, package, scratch / name)
        print("nix-check: systemd-analyze verify has nothing to say")


main()
