"""What is compared: every implementation of one layer as a function of the same tensors.

The floor is the frozen layer alone. PEFT stands as its users have it (adapters in fp32 whatever the base is), with
adapters in the dtype of the base, and compiled; it has no N, so it trains A and B. The others compute the cell's own
method. What is timed is what is checked: the tensors that a call returns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nlora_kernels as nk
from bench.cells import WITH_BIAS, Cell
from nlora_kernels import testing

PEFT = ("peft", "peft_base_dtype", "peft_compiled")


class Layer(NamedTuple):
    """A function called with `tensors` by name, which trains `wrt`, and the budget that its results must keep."""

    function: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    wrt: list[str]
    budget: testing.Budget


def names(cell: Cell) -> list[str]:
    """The implementations of a cell that can run here, the floor first."""
    ours = [name for name, reason in nk.backends.available().items() if _runs(name, reason)]
    peft = [name for name in PEFT if name != "peft_base_dtype" or cell.dtype != "float32"]
    # Compiling takes longer than the smoke set may.
    return ["floor", *(name for name in peft if not (cell.smoke and name == "peft_compiled")), "eager3", *ours]


def _runs(name: str, reason: str | None) -> bool:
    # Triton's interpreter takes CPU tensors too, but its times mean nothing.
    return reason is None and name not in ("reference", "triton")


@functools.lru_cache(2)
def tensors_of(cell: Cell) -> tuple[dict[str, Tensor], Tensor, float]:
    """The tensors of a cell by name, dy, and the scaling."""
    dtype, bias = getattr(torch, cell.dtype), cell.model in WITH_BIAS
    p = testing.problem(*cell.size, dtype=dtype, adapter_dtype=torch.float32, bias=bias, device=cell.device)
    tensors = {n: t for n in testing.TENSORS if (t := getattr(p, n)) is not None}
    if cell.method == "lora2":
        generator = torch.Generator(cell.device).manual_seed(1)
        sizes = (cell.r, cell.r), (cell.r,), (cell.r, cell.r)
        u, E, U = (torch.randn(s, generator=generator, device=cell.device) for s in sizes)
        inner = {"lora_u": u, "lora_E": E, "lora_U": U / cell.r}
        outer = {"lora_v": tensors.pop("lora_A"), "lora_V": tensors.pop("lora_B")}
        del tensors["lora_N"]
        tensors |= outer | inner
    return tensors, p.dy, p.scaling


def layer(name: str, cell: Cell, fresh: bool = False) -> Layer:
    """`fresh`: with copies of the cell's tensors."""
    tensors, dy, scaling = tensors_of(cell)
    if fresh:
        tensors = {n: t.clone() for n, t in tensors.items()}
    if name == "floor":
        tensors = {n: tensors[n] for n in ("x", "weight", "bias") if n in tensors}
        return Layer(_base, tensors, ["x"], _budget("floor", cell))
    if name in PEFT:
        tensors = _lora_tensors(tensors, name == "peft_base_dtype")
        wrt = ["x", "lora_A", "lora_B"]
        kind = "peft_base_dtype" if name == "peft_base_dtype" else "peft"
        return Layer(_peft(tensors, scaling, name), tensors, wrt, _budget(kind, cell))
    if name == "eager3":
        function = functools.partial(_plain(cell.method), scaling=scaling)
    else:
        function = nk.lora2_linear if cell.method == "lora2" else nk.lora_linear
        function = functools.partial(function, scaling=scaling, backend=name)
    return Layer(function, tensors, _trained(cell, tensors), _budget("own", cell))


def step(layer: Layer, dy: Tensor, op: str) -> Callable[[], dict[str, Tensor]]:
    """The part of a training step that `op` names, as a function that returns its results by name."""
    leaves = {n: t.detach().requires_grad_(n in layer.wrt) for n, t in layer.tensors.items()}
    # The layer may hold parameters of its own, as PEFT's does, in place of those it is called with.
    leaves |= {n: p for n, p in getattr(layer.function, "parameters", {}).items()}
    wrt = [leaves[n] for n in layer.wrt]

    def forward():
        return {"y": layer.function(**leaves)}

    def gradients(y, retain=False):
        grads = torch.autograd.grad(y, wrt, dy, retain_graph=retain)
        return {f"d{n}": grad for n, grad in zip(layer.wrt, grads, strict=True)}

    def both():
        y = layer.function(**leaves)
        return {"y": y, **gradients(y)}

    if op != "backward":
        return {"forward": forward, "both": both}[op]
    y = layer.function(**leaves)
    return lambda: gradients(y, retain=True)


def flops(cell: Cell, adapter: bool = True) -> int:
    """Multiplications and additions of a cell's products; without the adapter, those of the floor."""
    M, K, N, R = cell.size
    base, rank = K * N, R * (K + N + R)
    # Backward: dx of the base; G, H, H·A; and if all matrices train dA, dN, dB, else dN alone.
    passes = {"forward": (1, 1), "backward": (1, 1), "both": (2, 2)}[cell.op]
    extra = rank if cell.method != "inttune" else R * R
    extra = extra if cell.op != "forward" else 0
    return 2 * M * (passes[0] * base + adapter * (passes[1] * rank + extra))


def bytes_moved(cell: Cell) -> int:
    """What must pass between memory and the cores at least: every tensor read or written once in each direction."""
    M, K, N, R = cell.size
    weights = K * N + R * (K + N + R)
    forward, backward = weights + M * (K + N), weights + M * (2 * K + N) + R * (K + N + R)
    amount = {"forward": forward, "backward": backward, "both": forward + backward}[cell.op]
    return amount * getattr(torch, cell.dtype).itemsize


def flop_bound(cell: Cell) -> float:
    """The least ratio to the floor that counting multiplications allows."""
    return flops(cell) / flops(cell, adapter=False)


# As many as all rows of a cell need, that of the fp32 floor included: each is a layer in fp64.
@functools.lru_cache(5)
def _budget(kind: str, cell: Cell) -> testing.Budget:
    tensors, dy, scaling = tensors_of(cell)
    if kind == "floor":
        tensors = {n: tensors[n] for n in ("x", "weight", "bias") if n in tensors}
        return testing.Budget(_base, _base, tensors, dy, ["x"])
    if kind in PEFT:
        plain, tensors = testing.plain_linear, _lora_tensors(tensors, kind == "peft_base_dtype")
        wrt = ["x", "lora_A", "lora_B"]
    else:
        plain, wrt = _plain(cell.method), _trained(cell, tensors)
    own, without = (functools.partial(plain, scaling=s) for s in (scaling, 0.0))
    return testing.Budget(own, without, tensors, dy, wrt)


def _base(x, weight, bias=None) -> Tensor:
    return F.linear(x, weight, bias)


def _plain(method: str) -> Callable[..., Tensor]:
    return plain_lora2 if method == "lora2" else testing.plain_linear


def plain_lora2(x, weight, lora_v, lora_u, lora_E, lora_U, lora_V, bias=None, *, scaling=1.0) -> Tensor:
    """The chain of LoRA² as its paper writes it, every factor applied to the tokens."""
    v, u, E, U, V = (t.to(x.dtype) for t in (lora_v, lora_u, lora_E, lora_U, lora_V))
    P = F.linear(F.linear(F.linear(x, v), u) * E, U)  # [M, k]
    return F.linear(x, weight, bias) + scaling * F.linear(P, V)


def _trained(cell: Cell, tensors: dict[str, Tensor]) -> list[str]:
    return ["x", *(n for n in tensors if n.startswith("lora_") and (cell.method != "inttune" or n == "lora_N"))]


def _lora_tensors(tensors: dict[str, Tensor], base_dtype: bool) -> dict[str, Tensor]:
    """A cell's tensors for plain LoRA: no core, and for LoRA² its outer matrices."""
    tensors = {n.replace("lora_v", "lora_A").replace("lora_V", "lora_B"): t for n, t in tensors.items()}
    kept = {n: t for n, t in tensors.items() if n in ("x", "weight", "bias", "lora_A", "lora_B")}
    return {n: t.to(kept["x"].dtype) for n, t in kept.items()} if base_dtype else kept


def _peft(tensors: dict[str, Tensor], scaling: float, name: str) -> Callable[..., Tensor]:
    """PEFT's layer on the tensors of a cell; it holds its parameters itself, which `step` finds in `parameters`."""
    from peft import LoraConfig, get_peft_model

    r = tensors["lora_A"].shape[0]
    (N, K), bias = tensors["weight"].shape, tensors.get("bias")
    base = nn.Sequential(nn.Linear(K, N, bias=bias is not None, device="meta", dtype=tensors["weight"].dtype))
    own = {"weight": tensors["weight"]} | ({} if bias is None else {"bias": bias})
    base[0].load_state_dict(own, assign=True)
    config = LoraConfig(r=r, lora_alpha=scaling * r, target_modules=["0"])
    module = get_peft_model(base, config, autocast_adapter_dtype=name != "peft_base_dtype").base_model.model[0]
    parameters = {n: getattr(module, n)["default"].weight for n in ("lora_A", "lora_B")}
    for n, parameter in parameters.items():
        parameter.data = tensors[n].clone()
    if name == "peft_compiled":
        # Else Dynamo counts the layers of other cells as recompilations of one function, and gives up in silence.
        torch.compiler.reset()
        module = torch.compile(module, dynamic=False, fullgraph=True)

    def function(x, **_):
        return module(x)

    function.parameters = parameters
    return function
