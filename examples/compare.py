r"""Compare methods over learning rates, ranks and seeds on one task, and draw the study.

    python examples/compare.py study.json --methods lora nlora lora2 --seeds 0 1 2 -- --task sst2 --data glue_data

runs examples/glue.py (or, with --script finetune, examples/finetune.py) once for each method, rate, rank and seed; what
follows -- goes to every run. Every method has the same number of rates: its own default times each of --factors. With
--search-seeds N they are tried on the first N seeds, and the further seeds run at the best of them alone. Runs that
study.json has already are not run again, so that the same command goes on after Ctrl-C; --jobs run at once. At the end
the table is printed and written, with curves of the loss and a forest plot, as `nlora-kernels plot study` does.

--check N runs the N oldest cells again and compares their numbers: a study that was continued later may
hold cells made by older kernels.
"""

import argparse
import concurrent.futures
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from recipes.arguments import read_object, real, whole
from recipes.glue import TASKS
from recipes.methods import ADAPTERS, METHODS
from recipes.runs import without_place

# Which metric a study ranks by, and whether more of it is better.
SCRIPTS = {"glue": None, "finetune": ("loss", False)}


class Cell(NamedTuple):
    method: str
    rank: int
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method} rank={self.rank} lr={self.lr:g} seed={self.seed}"


def parse_args(argv=None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else list(argv)
    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", type=Path, help="the JSON file that the study is kept in")
    add("--script", choices=SCRIPTS, default="glue")
    add("--methods", nargs="+", choices=METHODS, default=["lora", "slora", "nlora", "inttune", "lora2"])
    add("--factors", nargs="+", type=real(0), default=[0.3, 1.0, 3.0], help="of each method's own learning rate")
    add("--ranks", nargs="+", type=whole(1), default=[8])
    add("--seeds", nargs="+", type=whole(0, 2**32 - 1), default=[0, 1, 2])
    add("--search-seeds", type=whole(1), metavar="N", help="try the rates on the first N seeds (default: on all)")
    add("--jobs", type=whole(1), default=1, help="runs at once, each with its share of the cores")
    add("--metric", help="(default: the task's first, or the held-out loss)")
    add("--check", type=whole(0), default=0, metavar="N", help="run the N oldest cells again and compare")
    args = parser.parse_args(own)
    args.rest, args.search_seeds = rest, args.search_seeds or len(args.seeds)
    if args.script == "finetune" and (wrong := [m for m in args.methods if m not in ADAPTERS]):
        parser.error(f"argument --methods: {wrong[0]} is not for --script finetune")
    own = {"--method", "--lr", "--rank", "--seed", "--result", "--output"}
    if taken := own & {word.partition("=")[0] for word in rest}:
        parser.error(f"after -- must be what all runs share, got {min(taken)}")
    existing = next(path for path in args.study.absolute().parents if path.exists())
    if not existing.is_dir():
        parser.error(f"argument study: {existing} is a file")
    # Whatever the script would refuse it refuses now, and not once for every cell.
    checked = importlib.import_module(args.script).parse_args([*rest, "--method", args.methods[0]])
    args.task = getattr(checked, "task", None)
    return args


def cells(args, seeds: list[int]) -> list[Cell]:
    """Every method, rank and rate. Seeds last: a study that is stopped early has all methods at few seeds."""
    rates = {m: METHODS[m].lr if args.script == "finetune" else METHODS[m].glue_lr for m in args.methods}
    return [
        Cell(method, rank, float(f"{factor * rates[method]:.3g}"), seed)
        for seed in seeds
        for rank in args.ranks
        for method in args.methods
        for factor in args.factors
    ]


def load_study(args) -> dict:
    suffix = next(iter(TASKS[args.task].heldout)) if args.task else ""
    metric, better = SCRIPTS[args.script] or (TASKS[args.task].metrics[0] + suffix, True)
    study = {
        "script": args.script,
        "arguments": list(map(without_place, args.rest)),
        "metric": args.metric or metric,
        "cells": {},
    }
    # Of all metrics here a loss alone is better the lower it is.
    study["higher_is_better"] = better if args.metric is None else not args.metric.endswith("loss")
    if args.study.exists():
        kept = read_object(args.study)
        for name in ("script", "arguments"):
            if kept.get(name) != study[name]:
                raise SystemExit(
                    f"{args.study} is a study with {name} {kept.get(name)}, not {study[name]}: take another"
                )
        study["cells"] = kept["cells"]
    return study


def environment(jobs: int) -> dict[str, str]:
    """That of every run, in which the same run has the same numbers.

    What a layer takes to compute rests on times in the cache folder, and other ways have other last bits: without one
    those built in hold. The folders of others are where they were.
    """
    own = os.environ
    caches = Path(own.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    others = {"OMP_NUM_THREADS": str(threads), "HF_HOME": f"{caches / 'huggingface'}"}
    others["MPLCONFIGDIR"] = f"{caches / 'matplotlib'}"
    return others | own | {"XDG_CACHE_HOME": os.devnull}


def run(cell: Cell, args) -> dict:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, str(Path(__file__).with_name(f"{args.script}.py")), *args.rest]
        command += ["--method", cell.method, "--rank", cell.rank, "--lr", cell.lr, "--seed", cell.seed]
        command += ["--output", folder, "--result", result]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(args.jobs))
        # Status 1 is of a run that ended: its loss did not fall, or its export disagrees.
        if not result.exists():
            last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise SystemExit(f"{cell.key}: {last}")
        [entry] = json.loads(result.read_text())
    if entry.get("agrees") is False:
        raise SystemExit(f"{cell.key}: the exported adapter disagrees with the one that was trained")
    return entry | {"rank": cell.rank, "seed": cell.seed}


def run_all(todo: list[Cell], args, done) -> None:
    """Calls done(cell, entry) as each ends; the first that fails ends the study, with what has ended kept."""
    from tqdm import tqdm

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run") as bar:
        futures = {pool.submit(run, cell, args): cell for cell in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                done(futures[future], future.result())
                bar.set_postfix_str(futures[future].key)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv=None) -> int:
    args = parse_args(argv)
    from nlora_kernels import cache
    from nlora_kernels import study as report

    study = load_study(args)
    search = cells(args, args.seeds[: args.search_seeds])
    every, further = list(search), args.seeds[args.search_seeds :]

    def keep(cell: Cell, entry: dict) -> None:
        study["cells"][cell.key] = entry
        cache.write(args.study, json.dumps(study, indent=1) + "\n")

    def run_missing() -> None:
        run_all([cell for cell in every if cell.key not in study["cells"]], args, keep)

    same = True

    def compare(cell: Cell, entry: dict) -> None:
        nonlocal same
        kept = study["cells"][cell.key]
        agrees = (entry["metrics"], entry["curve"]) == (kept["metrics"], kept["curve"])
        same &= agrees
        where = "" if entry["machine"] == kept.get("machine") else " (kept ones of other conditions)"
        print(f"{cell.key}: {'the same numbers again' if agrees else 'OTHER NUMBERS'}{where}")

    try:
        run_missing()
        if further:
            found = {cell.key: study["cells"][cell.key] for cell in search}
            best = {(row.method, row.rank): row.lr for row in report.rows(study | {"cells": found})}
            every += [cell for cell in cells(args, further) if cell.lr == best[cell.method, cell.rank]]
            run_missing()
        ages = {key: age for age, key in enumerate(study["cells"])}
        run_all(sorted(every, key=lambda cell: ages[cell.key])[: args.check], args, compare)
    except KeyboardInterrupt:
        total = len(search) + len(further) * len(args.methods) * len(args.ranks)
        print(f"stopped with {len(study['cells'])} of {total} runs; the same command goes on", file=sys.stderr)
        return 130
    try:
        report.plot(args.study)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
