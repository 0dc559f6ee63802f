"""`python -m nlora_kernels verify`, by which a user's backends are chosen; its record goes to <out>/verify."""

import os
import subprocess
import sys


def cells(machine) -> dict:
    def verify():
        # A rehearsal of its own takes minutes, and is one of the tests.
        command = [sys.executable, "-m", "nlora_kernels", "verify", *machine.pick([], ["--help"])]
        environment = {**os.environ, "XDG_CACHE_HOME": str(machine.out / "verify")}
        status = subprocess.run(command, env=environment).returncode
        assert status == 0, f"exit status {status}: see proof.log, and the record"

    return {"verify": verify}
