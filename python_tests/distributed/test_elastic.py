"""A job under torchrun of which ranks are killed at random goes on from its last checkpoint, to the same end."""

import json
import os
import random
import subprocess
import sys

from python_tests import ROOT
from python_tests.ranks import needs_gloo

pytestmark = needs_gloo


def job(folder, steps: int, kills: list[tuple[int, float]]) -> list[list[str]]:
    """[[step, loss], ...] as it leaves them, one for every step that was made."""
    folder.mkdir()
    (folder / "kills").write_text(json.dumps(kills))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(len(kills)), ROOT / "python_tests/distributed/elastic.py", folder, str(steps)]
    # Else a start reads the addresses of the last one, from the store that the agent keeps.
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **own}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "kills").read_text()) == [], "a rank was to be killed and the job was done before"
    return [line.split() for line in (folder / "losses").read_text().splitlines()]


def test_a_job_whose_ranks_are_killed_ends_as_one_that_was_let_be(request, tmp_path):
    count = request.config.getoption("--rank-kills")
    generator = random.Random(request.config.getoption("--seed"))
    # Within forward, backward, the steps and the writing of the checkpoint, wherever that falls.
    kills = [(generator.randrange(3), generator.uniform(0, 0.05)) for _ in range(count)]
    steps = 8 + 4 * count
    undisturbed = job(tmp_path / "undisturbed", steps, [])
    assert [int(step) for step, _ in undisturbed] == list(range(1, steps + 1))
    found = job(tmp_path / "killed", steps, kills)
    # Steps after the last checkpoint are made again, to the same loss, and none is left out.
    assert len(found) >= len(undisturbed) and {tuple(line) for line in found} == {tuple(line) for line in undisturbed}
