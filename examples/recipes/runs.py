"""A run: its folder and checkpoints, its training through transformers.Trainer, Ctrl-C and --resume, its measures."""

import importlib
import json
import math
import os
import platform
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from .arguments import OPTIMIZERS, read_object
from .methods import prepare_trainer
from .processes import ALONE, Processes, on_cpu

INTERRUPTED = 128 + signal.SIGINT


def check_output(args) -> None:
    existing = next(path for path in (args.output.absolute(), *args.output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise SystemExit(f"--output {args.output}: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise SystemExit(f"--output {args.output}: {existing} cannot be written to")
    methods = args.method
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


def last_checkpoint(folder: Path) -> Path | None:
    """What the Trainer wrote last for a run that has not ended."""
    found = {
        int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()
    }
    return found[max(found)] if found else None


def count_steps(examples: float, args) -> int:
    """Optimizer steps of a run on so many examples a process, --epochs being turned into them."""
    return math.ceil(args.epochs * examples / (args.batch_size * args.accumulation)) if args.epochs else args.steps


class Trained(NamedTuple):
    trainer: Any
    speed: float  # tokens per second, padding not counted
    seconds: float
    peak: int  # bytes that were resident at most while this method trained, or on the accelerator if there is one
    others: float | None  # cores that other programs kept busy meanwhile; None where the system does not tell
    step: int
    steps: int

    @property
    def measures(self) -> dict[str, Any]:
        """For the entry of a result; "curve" is [step, training loss] of every entry of the log."""
        measured = {"seconds": self.seconds, "tokens_per_second": self.speed, "others": self.others}
        curve = [[entry["step"], entry["loss"]] for entry in self.trainer.state.log_history if "loss" in entry]
        return {**measured, "peak_bytes": self.peak, "curve": curve}


def train(
    model, method: str, lr: float, args, group: Processes = ALONE, *, train_dataset, data_collator, **settings
) -> Trained:
    """Trains in place, to the end or to the step at which Ctrl-C comes. args.steps counts."""
    import torch
    import transformers

    class StopWhenAsked(transformers.TrainerCallback):
        asked = False

        def ask(self, *_):
            self.asked = True
            print("\nstopping after this step; Ctrl-C again stops at once", flush=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        def on_step_end(self, args, state, control, **kwargs):
            if self.asked:
                control.should_training_stop = True
                # The optimizer of a model in parts is not saved.
                control.should_save = not group.apart

    arguments = transformers.TrainingArguments(
        output_dir=args.output / method,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=lr,
        optim=OPTIMIZERS[args.optim],
        weight_decay=args.weight_decay,
        lr_scheduler_type=args.scheduler,
        warmup_steps=args.warmup,
        seed=args.seed,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or args.steps,
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=on_cpu(),
        **settings,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=train_dataset, data_collator=data_collator)
    if group.apart:
        # By which those that share a layer are given the same batches.
        trainer.accelerator.state.device_mesh = group.mesh
    prepare_trainer(trainer, method, args)
    stop = StopWhenAsked()
    trainer.add_callback(stop)
    # Only who asks goes on: a folder may hold what another run left when it was stopped.
    checkpoint = last_checkpoint(args.output / method) if args.resume else None
    seen = read_object(checkpoint / "trainer_state.json").get("num_input_tokens_seen", 0) if checkpoint else 0
    forget_peak()
    others, start = other_seconds(), time.perf_counter()
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
    others = None if others is None else max(0.0, other_seconds() - others) / seconds
    model.eval()
    speed = (trainer.state.num_input_tokens_seen - seen) / seconds
    return Trained(trainer, speed, seconds, peak(), others, trainer.state.global_step, args.steps)


def other_seconds() -> float | None:
    """CPU time that was taken from this machine by others than this process, the host of a virtual one included."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    own = sum(os.times()[:2])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own


def forget_peak() -> None:
    """Begins a new measurement of `peak`."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # NOTE: Linux alone can; elsewhere the peak is that of the process so far.
    if Path("/proc/self/clear_refs").exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # A container may forbid it.
            return


def peak() -> int:
    """Bytes on the accelerator at most since `forget_peak`, or, without one, resident in memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_result(file: Path | None, entries: list[dict]) -> None:
    """What was measured, one entry for each method, for `examples/compare.py`; in one step."""
    if file:
        from nlora_kernels import cache

        machine = conditions()
        entries = [entry | {"machine": machine} for entry in entries]
        cache.write(file, json.dumps(entries, indent=1) + "\n")


def conditions() -> dict[str, Any]:
    """What the numbers of a run depend on beside its arguments."""
    import torch

    from nlora_kernels.backends.cpu import records
    from nlora_kernels.backends.native import _C

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else records.processor()["model name"]
    names = ("nlora_kernels", "torch", "transformers", "peft")
    versions = {name: importlib.import_module(name).__version__ for name in names}
    versions["python"] = platform.python_version()
    kernels = _C.cpu_tier() if _C else None
    return {"device": device, "kernels": kernels, "threads": torch.get_num_threads(), "versions": versions}


def settings_of(args) -> dict:
    """The arguments as JSON; of files and folders their names, whatever machine they are on."""
    left_out = ("output", "result", "resume", "save_steps", "preset", "method", "tp", "fsdp")
    return {name: without_place(value) for name, value in vars(args).items() if name not in left_out}


def without_place(value):
    return Path(value).name if isinstance(value, str | Path) and os.path.exists(value) else value
