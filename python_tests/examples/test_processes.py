"""examples/finetune.py under torchrun: every method comes to what one process does, and what it saves loads on one."""

import json
import os
import subprocess
import sys

import pytest

from python_tests import ROOT
from python_tests.examples.models import byte_llama, byte_tokenizer
from python_tests.ranks import needs_gloo

pytestmark = needs_gloo

SCRIPT = ROOT / "examples" / "finetune.py"
METHODS = ("lora", "pissa", "slora", "nlora", "inttune", "lora2")
# So many examples are the batch of a step, on however many processes.
ROWS = 8


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    byte_llama(tokenizer, num_key_value_heads=2).save_pretrained(folder / "model")
    rows = [{"query": f"What is {i}+{j}?", "response": f"It is {i + j}."} for i in range(4) for j in range(4)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common = ["--model", folder / "model", "--data", folder / "sums.jsonl", "--train-size", ROWS, "--heldout-size", 4]
    common += ["--steps", 6, "--rank", 4, "--k", 4, "--target-rank", 2, "--penalty", 0.1, "--max-length", 64]
    return list(map(str, common))


@pytest.fixture(scope="module")
def tried(request) -> tuple[str, ...]:
    return METHODS if request.config.getoption("--engines") else ("nlora", "lora2")


def trained(launcher, arguments, folder, methods) -> dict[str, dict[str, float]]:
    """{method: its losses} of a run, which has compared every adapter with what it loads."""
    command = [*launcher, SCRIPT, *arguments, "--output", folder, "--result", folder / "result.json"]
    command += ["--method", *methods]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {entry["method"]: entry["metrics"] for entry in json.loads((folder / "result.json").read_text())}


def torchrun(count: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


@pytest.fixture(scope="module")
def alone(common, tried, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return trained([sys.executable], [*common, "--batch-size", str(ROWS)], folder, tried)


@pytest.mark.parametrize(
    "count, flags", [(2, ["--fsdp"]), (2, ["--tp", "2"]), (2, []), (4, ["--fsdp", "--tp", "2"])], ids=str
)
def test_processes_come_to_what_one_does(count, flags, common, tried, alone, request, tmp_path):
    if (count == 4 or not flags) and not request.config.getoption("--engines"):
        pytest.skip("needs --engines")
    batches = 1 if flags == ["--tp", "2"] else 2
    # Of a part of a weight there is no decomposition.
    methods = [method for method in tried if method != "pissa" or "--tp" not in flags]
    arguments = [*common, *flags, "--batch-size", str(ROWS // batches)]
    found = trained(torchrun(count), arguments, tmp_path, methods)
    assert list(found) == methods
    for method in methods:
        assert found[method] == pytest.approx(alone[method], rel=1e-4), method


@pytest.mark.parametrize(
    "arguments, count, message",
    [
        (["--tp", "2"], 1, "--tp: must divide the number of processes, 1, got 2"),
        (["--fsdp"], 1, "--fsdp: needs more processes than --tp 1 has, got 1; torchrun starts them"),
        (["--fsdp", "--tp", "2"], 2, "--fsdp: needs more processes than --tp 2 has, got 2"),
        (["--tp", "2"], 4, "--tp: 2 of 4 processes leave some that only --fsdp takes"),
        (["--fsdp", "--resume"], 2, "--resume: needs a model that is whole on every process, got --tp or --fsdp"),
        (["--tp", "2", "--method", "pissa"], 2, "--tp: pissa decomposes base weights, of which a process has a part"),
        (["--tp", "2", "--load", "nf4"], 2, "--load: needs a model that is whole on every process"),
    ],
)
def test_refused_arguments(arguments, count, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import finetune

    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(SystemExit):
        finetune.parse_args(arguments)
    assert message in capsys.readouterr().err
