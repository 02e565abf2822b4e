"""Runs a test script of NixOS on the machine that this runs on: `driver.py SCRIPT`.

It knows those of the real driver's functions that nix/vm-test/script.py uses.
"""

import contextlib
import subprocess
import sys
import time

DEADLINE = 120


class Machine:
    """This machine, with the methods that the test driver of NixOS has for a virtual one."""

    def execute(self, command):
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail; {command}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=DEADLINE,
        )
        return done.returncode, done.stdout

    def succeed(self, command):
        code, output = self.execute(command)
        assert code == 0, f"`{command}` failed with {code}: {output}"
        return output

    def fail(self, command):
        code, output = self.execute(command)
        assert code != 0, f"`{command}` succeeded: {output}"
        return output

    def _wait(self, command, succeeds):
        deadline = time.monotonic() + DEADLINE
        while True:
            code, output = self.execute(command)
            if (code == 0) == succeeds:
                return output
            assert time.monotonic() < deadline, f"`{command}` still ends with {code}: {output}"
            time.sleep(0.1)

    def wait_until_succeeds(self, command):
        return self._wait(command, True)

    def wait_until_fails(self, command):
        return self._wait(command, False)

    def wait_for_unit(self, unit):
        self._wait(f"systemctl is-active {unit}", True)


@contextlib.contextmanager
def subtest(name):
    begun = time.monotonic()
    try:
        yield
    except Exception:
        print(f"not ok: {name}", flush=True)
        raise
    print(f"ok: {name} ({time.monotonic() - begun:.1f} s)", flush=True)


with open(sys.argv[1], encoding="utf-8") as script:
    exec(compile(script.read(), sys.argv[1], "exec"), {"machine": Machine(), "subtest": subtest})
