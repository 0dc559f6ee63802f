"""Lays out the folder that the kernels hub takes, loads it by the package `kernels` and runs it: build/hub.

    build.toml, flake.nix, CARD.md, torch-ext/nlora_kernels/    what kernel-builder builds from
    build/torch-<backend>/                                      what `kernels` loads, with its metadata.json

It is the part in Python: Triton's kernels, the backends "lean" and "reference", operations, layers and LoRA²'s
training, which run with every build of torch. Two versions may be loaded into one process: the operators of each are
registered under its own name.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "build" / "hub"
NAME, VERSION, REPOSITORY = "nlora-kernels", 1, "nlora-kernels/nlora-kernels"
MODULE = NAME.replace("-", "_")
# Where Triton compiles, and the CPU for those who try it without.
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
# What belongs to an installed package: PEFT's adapter types, files of adapters, commands.
LEFT_OUT = ("__main__.py", "checkpoint.py", "cli", "peft", "plotting.py", "study.py", "trainer.py")

INIT = '''"""Fused three-matrix LoRA kernels: y = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ, and the LoRA² chain."""

from . import backends, init, layers, lora2
from .layers import LoRA2Linear, NLoraLinear
from .ops import *
from .versions import __version__
'''

BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[general.hub]
repo-id = "{REPOSITORY}"

[torch-noarch]
"""

FLAKE = """{
  description = "Fused three-matrix LoRA kernels";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = f"""---
library_name: kernels
license: apache-2.0
tags: [lora, peft, triton]
---

# {NAME}

LoRA, SLoRA, NLoRA, IntTune and LoRA² as one operation with the frozen linear layer:

```python
from kernels import get_kernel

nk = get_kernel("{REPOSITORY}", version={VERSION})
y = nk.lora_linear(x, weight, lora_A, lora_B, lora_N, scaling=1.0)
```

Python 3.11 or newer. On GPUs library calls compute until `backend="triton"` is named; those kernels have not run on a
GPU of the authors' yet. The kernels in C++ and CUDA C++ are in the wheels of the package, with PEFT's adapter types and
the commands: they are bound by pybind11 to each Python, where a kernel of the hub has to use torch's stable ABI.
"""

# Run with nothing but the folder: the kernel, a second version of it, and their results.
CHECK = """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

first, second = (get_local_kernel(Path(folder), backend="cpu") for folder in sys.argv[1:3])
assert first is not second and first.__name__ != second.__name__
assert not any(name == "nlora_kernels" or name.startswith("nlora_kernels.") for name in sys.modules)
x, weight, lora_A, lora_B, lora_N = (torch.randn(s) for s in ((3, 8), (6, 8), (2, 8), (6, 2), (2, 2)))
exact = x @ weight.T + x @ lora_A.T @ lora_N.T @ lora_B.T
for kernel in (first, second):
    for backend in (None, "reference"):
        lora_A = lora_A.detach().requires_grad_()
        y = kernel.lora_linear(x, weight, lora_A, lora_B, lora_N, backend=backend)
        torch.testing.assert_close(y, exact)
        y.sum().backward()
    compiled = torch.compile(kernel.lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, lora_A, lora_B, lora_N), exact)
    layer = kernel.NLoraLinear.from_linear(torch.nn.Linear(8, 6), r=2, residual=True)
    layer(x).sum().backward()
print("two versions loaded and run:", first.__name__, second.__name__)
"""


def main() -> None:
    shutil.rmtree(HUB, ignore_errors=True)
    lay_out(HUB, sources())
    # Another version of it, which differs in a comment alone.
    lay_out(HUB.with_name("hub-other"), {**sources(), "versions.py": sources()["versions.py"] + "# another\n"})
    check_build(HUB)
    command = [sys.executable, "-c", CHECK, HUB, HUB.with_name("hub-other")]
    done = subprocess.run(list(map(str, command)), cwd=HUB, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the laid out kernel does not run:\n{done.stdout}\n{done.stderr}")
    print(f"{done.stdout.strip()}\n{HUB}")


def sources() -> dict[str, str]:
    """{name: text} of the part that goes to the hub."""
    package = ROOT / "nlora_kernels"
    found = (file for file in package.rglob("*") if file.suffix in (".py", ".json"))
    files = {file.relative_to(package).as_posix(): file for file in found}
    kept = {name: file.read_text() for name, file in files.items() if name.split("/")[0] not in LEFT_OUT}
    return kept | {"__init__.py": INIT}


def lay_out(folder: Path, files: dict[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in {"build.toml": BUILD, "flake.nix": FLAKE, "CARD.md": CARD}.items():
        write(folder / name, text)
    write_all(folder / "torch-ext" / MODULE, files)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:7]
    for backend in BACKENDS:
        identity = f"_{MODULE}_{backend}_{digest}"
        variant = folder / "build" / f"torch-{backend}"
        write_all(variant, {name: renamed(text, identity) for name, text in files.items()})
        metadata = {"name": NAME, "id": identity, "version": VERSION, "license": "Apache-2.0", "python-depends": []}
        write(variant / "metadata.json", json.dumps(metadata | {"backend": {"type": backend}}, indent=2) + "\n")


def renamed(text: str, identity: str) -> str:
    """What the process knows by a name, operators and the extension, goes by the name of this version."""
    text = re.sub(r"\bnlora_kernels(?=::|\._C\b)", identity, text)
    return text.replace("torch.ops.nlora_kernels", f"torch.ops.{identity}")


def check_build(folder: Path) -> None:
    """build.toml and every metadata.json are read by `kernels` itself."""
    from kernels._rust import Build, Metadata

    assert {str(backend).lower() for backend in Build.open(folder).general.backends} == set(BACKENDS)
    for backend in BACKENDS:
        metadata = Metadata.read_from_file(folder / "build" / f"torch-{backend}" / "metadata.json")
        assert str(metadata.name) == NAME and metadata.version == VERSION


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def write_all(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        write(folder / name, text)


if __name__ == "__main__":
    main()
