"""What this machine can run, which way a layer takes, and what is wrong: `python -m nlora_kernels doctor`.

Every backend that can run is tried on a small layer and held to the error budget against fp64, so "ready" means that
it ran here and was right. Problems are what makes results wrong or slow; notes are what one may want to know.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, ops, saved, testing
from ..backends import Call, native, verified
from ..backends.cpu import plans, records
from ..backends.triton.tuning import tables
from ..layers import branch as branches
from ..versions import READ_ONLY_A_AND_B, __version__

HELP = "say what this machine can run and what is wrong, with exit status 1 if anything is"

# Oldest versions that work, as in pyproject.toml, and what each optional package is for.
OLDEST = {"torch": "2.11", "triton": "3.6", "peft": "0.21", "transformers": "5"}
OPTIONAL = {
    "triton": ("triton", "the backend triton"),
    "peft": ("peft", "nlora_kernels.peft, trainer and checkpoint"),
    "transformers": ("peft", "nlora_kernels.trainer"),
    "safetensors": ("peft", "nlora_kernels.checkpoint"),
    "matplotlib": ("plot", "PNG files of `plot`"),
    "pytest_benchmark": ("bench", "bench/"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TRIED = ("float32", "bfloat16", "float16")
# The instruction sets that decide between kernels, as Linux names them.
INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "bf16"),
)
UNPROVEN = "it has not passed its tests on such hardware"
SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        metavar=("M", "K", "N", "R"),
        help="say which way a layer takes: tokens, in, out, rank",
    )
    parser.add_argument("--dtype", help="of that layer, default float32")
    parser.add_argument("--model", metavar="DIR", help="folder of a saved model whose configuration is checked too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.dtype is not None and args.shape is None:
        raise ValueError("--dtype is that of a layer: give its --shape too")
    found = report(args.shape, "float32" if args.dtype is None else args.dtype, args.model)
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 1 if found["problems"] else 0


def report(
    shape: tuple[int, int, int, int] | None = None, dtype: str = "float32", model: nn.Module | str | Path | None = None
) -> dict[str, Any]:
    """Everything that doctor knows, as numbers, strings, lists and dicts.

    Args:
        shape: (M, K, N, R) of a layer whose path is wanted: tokens, in, out, rank.
        dtype: of that layer's x and weight; the adapter is float32 for the 16-bit ones, as PEFT has it.
        model: a model with adapters, to name its layers that cannot be fused; or the folder of a saved one, whose
            configuration is read.

    Returns:
        {"versions", "build", "cpu", "gpus", "backends", "verified", "tuned", "layer", "notes", "problems"}; "layer"
        only with a shape.

    Raises:
        ValueError: a size below 1, or an unknown dtype. FileNotFoundError: the folder has no config.json.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    notes: list[str] = []
    problems: list[str] = []
    found = {
        "versions": _versions(notes, problems),
        "build": _build(problems),
        "cpu": _cpu(notes),
        "gpus": _gpus(),
        "backends": _backends(problems),
        "verified": _verified(notes),
        "tuned": _tuned(notes, problems),
    }
    _traps(notes, problems)
    if model is not None:
        _inspect(model, problems)
    if shape is not None:
        found["layer"] = _layer(shape, dtype, problems)
    return {**found, "notes": notes, "problems": problems}


def text(found: dict[str, Any]) -> str:
    """A report for people."""
    lines = ["versions"]
    lines += [f"  {name:<17}{version or 'not installed'}" for name, version in found["versions"].items()]
    lines += ["", "machine", *_machine_lines(found)]
    lines += ["", "backends, in order of preference", *_backend_lines(found["backends"])]
    if found["verified"]:
        lines += ["", "verified GPUs", *_verified_lines(found["verified"])]
    lines += ["", "tuned tables"]
    lines += [f"  {t['device']}: {t['entries']} entries{', in use' if t['in_use'] else ''}" for t in found["tuned"]]
    lines += [] if found["tuned"] else ["  none: tiles are chosen by rule"]
    if layer := found.get("layer"):
        sizes = "M={} K={} N={} R={}".format(*layer["shape"])
        lines += ["", f"a layer of {sizes}, {layer['dtype']}, adapter {layer['adapter_dtype']}, on {layer['device']}"]
        lines += [f"  {'takes':<17}{layer['backend'] or 'nothing'}{': ' + layer['path'] if layer['path'] else ''}"]
        lines += [f"  {'not ' + name:<17}{why}" for name, why in layer["passed_over"].items()]
    for title in ("notes", "problems"):
        if found[title]:
            lines += ["", title, *(f"  - {line}" for line in found[title])]
    if not found["problems"]:
        lines += ["", "no problems found"]
    return "\n".join(lines)


def _machine_lines(found: dict[str, Any]) -> list[str]:
    cpu, build = found["cpu"], found["build"]
    lines = [f"  {'cpu':<17}{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"]
    lines += [f"  {'instructions':<17}{' '.join(cpu['instructions']) or 'unknown'}; torch uses {cpu['torch_uses']}"]
    for gpu in found["gpus"]:
        size = f"{gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['processors']} processors"
        lines += [f"  {gpu['device']:<17}{gpu['name']}, capability {gpu['capability']}, {size}"]
    if not found["gpus"]:
        lines += [f"  {'gpu':<17}none that torch sees"]
    lines += [f"  {'compilers':<17}{', '.join(build['compilers'].values()) or 'none'}"]
    lines += [f"  {'C++ kernels':<17}{build['extension'] or 'not built'}"]
    if cpu["kernels_use"]:
        native_dtypes = ", ".join(cpu["multiplies"])
        lines += [f"  {'':<17}use {cpu['kernels_use']}; dtypes multiplied in hardware: {native_dtypes}"]
    for dtype, rates in cpu["products"].items():
        speeds = "library {library}, kernels {kernels} GFLOP/s".format(**rates)
        source = f"measured {rates['measured']}" if rates["measured"] else "built in, not measured"
        lines += [f"  {'' if dtype != TRIED[0] else 'products':<17}{dtype}: {speeds}, {source}"]
    return lines


def _backend_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, backend in found.items():
        if backend["unavailable"]:
            lines += [f"  {name:<17}cannot run: {backend['unavailable']}"]
            continue
        for device, entry in backend["devices"].items():
            ready = [dtype for dtype, reason in entry["dtypes"].items() if reason is None]
            chosen = ""
            if not entry["by_default"]:
                passed = [dtype for dtype in ready if dtype in entry["verified"]]
                chosen = f", chosen where faster: {', '.join(passed)}" if passed else f", by name only: {UNPROVEN}"
            if ready:
                lines += [f"  {name:<17}ready on {device}: {', '.join(ready)}{chosen}"]
            refused = {dtype: reason for dtype, reason in entry["dtypes"].items() if reason}
            lines += [f"  {'' if ready else name:<17}{device}, {dtype}: {why}" for dtype, why in refused.items()]
    return lines


def _verified_lines(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for record in found:
        stale = "" if record["holds"] else ", of another driver or package: not in force"
        lines += [f"  {record['gpu']}, {record['written']}{stale}"]
        for result in record["results"]:
            why = f", {result['reason']}" if result["reason"] else ""
            lines += [f"    {result['backend']} {result['dtype']}: {result['status']}{why}"]
    return lines


def _versions(notes: list[str], problems: list[str]) -> dict[str, str | None]:
    versions = {"nlora_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name, (extra, purpose) in OPTIONAL.items():
        versions[name] = _version(name)
        if versions[name] is None:
            notes.append(f"without {name} there is no {purpose}: pip install 'nlora_kernels[{extra}]'")
    for name, oldest in OLDEST.items():
        if versions[name] and _numbers(versions[name]) < _numbers(oldest):
            problems.append(f"{name} must be {oldest} or newer, got {versions[name]}")
    if versions["peft"]:
        try:
            importlib.import_module("nlora_kernels.peft")
        except Exception as error:  # noqa: BLE001 - whatever breaks in there is the finding
            problems.append(f"nlora_kernels.peft cannot be imported: {_said(error)}")
    return versions


def _version(name: str) -> str | None:
    """The version of a package that can be imported; it is not imported."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split(".")) if version[0].isdigit() else ()


def _build(problems: list[str]) -> dict[str, Any]:
    built = native._C is not None
    compilers = {name: path for name in ("g++", "clang++", "nvcc") if (path := shutil.which(name))}
    if not built:
        remedy = "then install it again" if {"g++", "clang++"} & compilers.keys() else "install g++ first"
        problems.append(f"no C++ kernels, so the CPU runs library products: {native.missing()}; {remedy}")
        stale = sorted(path.name for path in verified.PACKAGE.glob("_C.*"))
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if stale and f"_C{suffix}" not in stale:
            problems.append(f"the kernels were built for another Python: found {', '.join(stale)}, expected _C{suffix}")
    return {"extension": native._C.__file__ if built else None, "compilers": compilers}


def _cpu(notes: list[str]) -> dict[str, Any]:
    fields = records.processor()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    if threads != usable:
        notes.append(f"torch runs {threads} threads on {usable} usable cores: OMP_NUM_THREADS sets their number")
    C = native._C
    return {
        "name": fields["model name"],
        "machine": platform.machine(),
        "cores": usable,
        "threads": threads,
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "kernels_use": C.cpu_tier() if C else None,
        "multiplies": [name for name in TRIED if C.cpu_multiplies(getattr(C, name))] if C else [],
        "products": {name: _products(DTYPES[name]) for name in TRIED} if C else {},
    }


def _products(dtype: torch.dtype) -> dict[str, Any]:
    """How fast large products of a dtype are, as the choice of a plan takes them to be."""
    costs = plans.costs(plans.setting(dtype))
    rates = {"library": costs.library, "kernels": costs.many}
    return {name: round(2e-9 / line.multiply, 1) for name, line in rates.items()} | {"measured": costs.written}


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        capability = f"{p.major}.{p.minor}"
        size = {"memory_bytes": p.total_memory, "processors": p.multi_processor_count}
        found.append({"device": f"cuda:{index}", "name": p.name, "capability": capability, **size})
    return found


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _backends(problems: list[str]) -> dict[str, Any]:
    found = {}
    for name, reason in backends.available().items():
        found[name] = {"unavailable": reason, "devices": {}}
        if reason:
            continue
        for device in _devices():
            tried = {dtype: _try(name, device, DTYPES[dtype]) for dtype in TRIED}
            refusals = {dtype: refusal for dtype, (refusal, _) in tried.items()}
            faults = {dtype: fault for dtype, (_, fault) in tried.items() if fault}
            problems += [f"backend {name!r} on {device}, {dtype}: {fault}" for dtype, fault in faults.items()]
            # A backend that takes nothing on a device is none for that device.
            if len(set(refusals.values())) > 1 or None in refusals.values():
                found[name]["devices"][device] = {
                    "dtypes": {**refusals, **faults},
                    "by_default": device in backends.TABLE[name].verified_on,
                    "verified": _passed(name, device),
                }
    return found


def _passed(name: str, device: str) -> list[str]:
    """The dtypes for which a backend passed `verify` on the GPU at hand."""
    record = verified.record(torch.cuda.current_device()) if device == "cuda" else None
    return [dtype for dtype in DTYPES if record and record.passed(name, DTYPES[dtype])]


def _verified(notes: list[str]) -> list[dict[str, Any]]:
    gpus, found = range(torch.cuda.device_count()), verified.records()
    holding = [record for index in gpus if (record := verified.record(index))]
    if any(backends.TABLE[name].unavailable() is None for name in backends.ON_GPU):
        # Several GPUs of one model have one record.
        notes += dict.fromkeys(verified.awaits(index) for index in gpus if not verified.record(index))
    notes += [f"{file} is no record of `verify`, and is passed over" for file in verified.files() if file not in found]
    return [
        {
            "gpu": record.identity.get("gpu"),
            "written": record.written,
            "holds": record in holding,
            "results": [
                {"backend": backend, "dtype": dtype, "status": status, "reason": reason}
                for (backend, dtype), (status, reason) in record.results.items()
            ],
            "file": str(file),
        }
        for file, record in found.items()
    ]


def _try(name: str, device: str, dtype: torch.dtype) -> tuple[str | None, str | None]:
    """(why a backend does not take a small layer, what went wrong when it did)"""
    p = testing.problem(19, 40, 24, 5, dtype=dtype, device=device)
    refusal = backends.TABLE[name].unsupported(Call(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N))
    if refusal:
        return refusal, None
    try:
        testing.assert_within_budget(testing.results(p, ops.lora_linear, backend=name), p)
    except AssertionError as error:
        return None, f"wrong results: {error}"
    except Exception as error:  # noqa: BLE001 - whatever breaks in there is the finding
        return None, f"fails: {_said(error)}"
    return None, None


def _tuned(notes: list[str], problems: list[str]) -> list[dict[str, Any]]:
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    files = {tables.file_name(name): name for name in names}
    found = []
    for file in (file for folder in tables.folders() for file in sorted(folder.glob("*.json"))):
        try:
            table = tables.read(file)
        except (OSError, ValueError) as error:
            problems.append(f"{file} is no table of tiles, and is passed over: {error}")
            continue
        entries, in_use = len(table["entries"]), file.name in files
        found.append(
            {"device": table.get("device", file.stem), "entries": entries, "in_use": in_use, "file": str(file)}
        )
    present = {Path(table["file"]).name for table in found}
    notes += [f"no measured tiles for {name}: the rule chooses" for file, name in files.items() if file not in present]
    return found


def _traps(notes: list[str], problems: list[str]) -> None:
    for name in READ_ONLY_A_AND_B:
        says = f"{name} computes LoRA by itself from lora_A and lora_B and would leave the core out"
        if name in sys.modules:
            problems.append(f"{name} is loaded: {says}. Switch its LoRA kernels off")
        elif importlib.util.find_spec(name):
            notes.append(f"{name} is installed: {says}. Do not use it with SLoRA, NLoRA, IntTune or LoRA²")
    for variable, system in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            notes.append(
                f"{variable} is set: under {system} a layer whose weight is a shard while it is called runs as base "
                "layer plus adapter, right but not fused; one that is gathered for the call is fused"
            )
    if named := backends.preferred():
        notes.append(f"NLORA_BACKEND={named} takes the choice away from every call that names no backend")
        try:
            backends.select(None, torch.empty(0))
        except ValueError as error:
            problems.append(f"NLORA_BACKEND: {error}")
    if native._C and native._C.forked():
        notes.append("this process is a child of fork(): the C++ kernels run on one thread in it")


def _inspect(model: nn.Module | str | Path, problems: list[str]) -> None:
    if isinstance(model, nn.Module):
        found = branches.unfused(model)
        problems += [f"layer {name} cannot be fused: {reason}" for name, reason in found.items()]
        return
    file = Path(model, "config.json")
    if not file.is_file():
        raise FileNotFoundError(f"model must be a folder with a config.json, got {model}")
    quantised = saved.json_object(file).get("quantization_config") or {}
    if not isinstance(quantised, dict):
        raise ValueError(f"{file} must hold an object as quantization_config, got {type(quantised).__name__}")
    if quantised and quantised.get("quant_method") not in ("bitsandbytes", "torchao"):
        problems.append(
            f"{model} is quantised ({quantised.get('quant_method', 'unknown method')}): plain LoRA runs as base layer "
            "plus adapter, right but not fused, and other methods are refused; bitsandbytes and torchao alone are fused"
        )


def _layer(shape: tuple[int, int, int, int], dtype: str, problems: list[str]) -> dict[str, Any]:
    for name, size in zip("MKNR", shape, strict=True):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    M, K, N, R = shape
    device, adapter = _devices()[-1], "float32" if DTYPES[dtype].itemsize == 2 else dtype

    def empty(rows: int, cols: int, to: str) -> Tensor:
        return torch.empty(rows, cols, dtype=DTYPES[to], device=device)

    try:
        call = Call(empty(M, K, dtype), empty(N, K, dtype), *(empty(*s, adapter) for s in ((R, K), (N, R), (R, R))))
    except RuntimeError as error:
        raise ValueError(f"a layer of the shape {M} {K} {N} {R} has no room on {device}: {error}") from error
    chosen, path = None, None
    try:
        backend = backends.select(None, call.x, call)
        chosen, path = backend.name, backend.describe(call)
    except ValueError as error:
        problems.append(f"the layer cannot run: {error}")
    passed_over = {}
    for name, module in backends.TABLE.items():
        if name == chosen:
            break
        reason = module.unavailable() or module.unsupported(call)
        if not reason and not backends.preferred() and device not in module.verified_on:
            slower = dtype in _passed(name, device)
            reason = "what is chosen was faster in `verify`" if slower else f"by name only: {UNPROVEN}"
        passed_over[name] = reason or f"NLORA_BACKEND={backends.preferred()}"
    return {
        "shape": list(shape),
        "dtype": dtype,
        "adapter_dtype": adapter,
        "device": device,
        "backend": chosen,
        "path": path,
        "passed_over": passed_over,
    }


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
