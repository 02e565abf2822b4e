# The script of nix/vm-test.nix. tests/systemd/nix.test.js runs it too, by tests/nix/driver.py, on the
# units that the module renders.
import json

SOCKETS = ["banter.socket", "banter-control.socket", "banter-handoff.socket"]
SECRET = "/var/lib/secrets/banter-jwt"
STEADY = ["banter.service", "banter-worker@0.service", "banter-worker@1.service"]


def client(*arguments: str) -> str:
    return machine.succeed("python3 /etc/banter-test/client.py " + " ".join(arguments))


def pids(units: list[str]) -> list[str]:
    return [machine.succeed(f"systemctl show --property=MainPID --value {unit}").strip() for unit in units]


def are_active(units: list[str]) -> None:
    # With several units, `is-active` is content with one.
    for unit in units:
        machine.succeed(f"systemctl is-active {unit}")


def status_says(unit: str, words: str) -> None:
    machine.wait_until_succeeds(f"systemctl show --property=StatusText {unit} | grep -F '{words}'")


def switch(name: str) -> None:
    """To one of the specialisations, or to the configuration itself ("")."""
    where = f"/run/booted-system/specialisation/{name}" if name else "/run/booted-system"
    machine.succeed(f"{where}/bin/switch-to-configuration test >&2")


def start_knocking() -> None:
    machine.succeed("rm -f /run/knocks.json")
    machine.succeed("systemd-run --quiet --unit=knocker python3 /etc/banter-test/client.py knock /run/knocks.json")


def nobody_was_refused() -> None:
    machine.succeed("systemctl stop knocker.service")
    outcomes = json.loads(machine.succeed("cat /run/knocks.json"))
    print(f"newcomers: {outcomes}")
    assert list(outcomes) == ["200"], f"newcomers: {outcomes}"


machine.wait_for_unit("multi-user.target")

with subtest("nothing runs before the first connection"):
    are_active(SOCKETS)
    for unit in [*STEADY, "banter.target"]:
        machine.fail(f"systemctl is-active {unit}")
    machine.fail("pgrep -x banter")

with subtest("a missing and a weak secret are told in one line, with the way out"):
    machine.succeed("systemd-run --quiet --unit=early python3 /etc/banter-test/client.py serving 0 1")
    status_says("banter-worker@0.service", "no JWT secret")
    status_says("banter-worker@1.service", "make one with: ")
    machine.succeed(f"mkdir -p -m 700 $(dirname {SECRET}) && echo shhhh > {SECRET}")
    status_says("banter-worker@0.service", "JWT secret is")
    machine.succeed(f"rm {SECRET}; (umask 077; head -c 32 /dev/urandom | base64 > {SECRET})")
    # Who has waited since is answered now.
    machine.wait_until_fails("systemctl is-active early.service")
    machine.fail("systemctl is-failed early.service")

with subtest("the first connection starts everything"):
    machine.succeed("systemctl stop banter.target")
    for unit in [*STEADY, *SOCKETS]:
        machine.wait_until_succeeds(f"systemctl show --property=ActiveState {unit} | grep -x ActiveState=inactive")
    machine.succeed("systemctl start " + " ".join(SOCKETS))
    machine.fail("pgrep -x banter")
    client("serving", "0", "1")
    are_active(["banter.target", *STEADY])

with subtest("the secret is readable by nobody else, and in no process' environment"):
    assert machine.succeed(f"stat -c '%U %a' {SECRET}").strip() == "root 600"
    machine.fail(f"runuser -u banter -- cat {SECRET}")
    machine.fail(f"cat /proc/$(systemctl show --property=MainPID --value banter-worker@0)/environ | grep -F $(cat {SECRET})")

with subtest("two people on two workers chat"):
    client("chat", "0", "1")

with subtest("a worker that is killed comes back"):
    before = pids(STEADY)
    machine.succeed("systemctl kill --signal=KILL banter-worker@1.service")
    machine.wait_until_succeeds(
        "systemctl is-active banter-worker@1.service && "
        f"test $(systemctl show --property=MainPID --value banter-worker@1.service) != {before[2]}"
    )
    client("serving", "0", "1")
    client("chat", "0", "1")
    assert pids(STEADY)[:2] == before[:2], "the others were left alone"

with subtest("a restart of the master refuses nobody"):
    start_knocking()
    before = pids(STEADY)
    machine.succeed("systemctl restart banter.service")
    client("serving", "0", "1")
    nobody_was_refused()
    assert pids(STEADY)[1:] == before[1:], "the workers were left alone"
    client("chat", "0", "1")

with subtest("a restart of Redis stops nothing"):
    before = pids(STEADY)
    machine.succeed("systemctl restart redis-banter.service")
    client("chat", "0", "1")
    assert pids(STEADY) == before

with subtest("a switch to four workers starts two, and back stops just these"):
    start_knocking()
    before = pids(STEADY)
    switch("four")
    client("serving", "0", "1", "2", "3")
    client("chat", "2", "3")
    assert pids(STEADY) == before, "the others were left alone"
    switch("")
    client("serving", "0", "1")
    for number in [2, 3]:
        machine.fail(f"systemctl is-active banter-worker@{number}.service")
    nobody_was_refused()
    assert pids(STEADY) == before, "the others were left alone"

with subtest("a switch to other limits is a reload"):
    before = pids(STEADY)
    switch("limited")
    client("limited")
    switch("")
    client("chat", "0", "1")
    assert pids(STEADY) == before

with subtest("a switch that restarts everything refuses nobody"):
    start_knocking()
    before = pids(STEADY)
    switch("traced")
    client("serving", "0", "1")
    client("chat", "0", "1")
    assert not set(pids(STEADY)) & set(before), "all are new"
    switch("")
    client("serving", "0", "1")
    nobody_was_refused()
