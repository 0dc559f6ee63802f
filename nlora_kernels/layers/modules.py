"""Adapter layers as plain nn.Modules: a frozen linear layer and its trainable matrices. No PEFT needed.

The linear layer may be a quantised one of bitsandbytes or torchao.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import saved
from ..backends import Factors
from ..commit import attributes, commit
from ..init import CORES, METHODS, SELECTIONS, check_choice, idle, subtract_
from ..init import adapter as initial_adapter
from ..init import lora2 as initial_lora2
from ..ops.checks import (
    LORA2_NAMES,
    check_adapter,
    check_dropout,
    check_dtype,
    check_memory,
    check_real,
    check_tensors,
    core_of,
)
from . import branch as branches
from .branch import Branch, Lora2Branch, tensor_of

TRAIN = ("all", "core")
# The name of what a state dict says of the base weight in it, which its tensors do not tell.
ENTRY = "base"


class _AdapterLinear(nn.Module):
    """A base linear layer and an adapter, which a subclass gives as its `branch`.

    A subclass checks its matrices by `_check` before, and freezes the base when nothing is refused any more.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float | None, dropout: float = 0.0):
        super().__init__()
        if alpha is None:
            alpha = r
        check_alpha(alpha)
        check_dropout(dropout)
        self.base = base
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / r
        self.dropout = dropout
        self.merged = False

    def branch(self) -> Branch | Lora2Branch:
        """What the adapter adds now."""
        raise TypeError(f"{type(self).__name__} must define branch()")

    def matrices(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """(A (r, in), N (r, r) or None, B (out, r)): the adapter adds s·B·N·A to the base weight."""
        return self.branch().collapsed[:3]

    def obstacle(self) -> str | None:
        """None if forward is one operation, else why the base layer is called and the adapter added."""
        base = self._modules["base"]
        reason = branches.obstacle(base)
        if reason or not self.dropped:
            return reason
        if self._excess() is not None:
            return "it has dropout, and its initial product has none"
        return branches.dropout_obstacle(base)

    def forward(self, x: Tensor) -> Tensor:
        base = self._modules["base"]
        if self.merged:
            return base(x)
        branch, excess = self.branch(), self._excess()
        if not self.obstacle():
            return branches.fused(branch if excess is None else branches.together((branch, excess)), x, base)
        y = branches.fused(None, x, base) if branches.decodes(base, x) else base(x)
        y = y + branch.collapsed(x).to(x.dtype)
        return y if excess is None else y + excess(x).to(x.dtype)

    def _excess(self) -> Branch | None:
        """What else has to be added, because the base weight is not the one that the layer was made of."""
        return None

    @property
    def dropped(self) -> float:
        """The probability of dropout that is in effect: none in eval mode."""
        return self.dropout if self.training else 0.0

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """s·B·N·A, (out, in), what `merge` adds to the base weight; computed in `dtype`, by default the adapter's."""
        delta, excess = self.branch().collapsed.product(dtype), self._excess()
        return delta if excess is None else delta + excess.product(delta.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + s·B·N·A in place; forward is then the base layer alone. Nothing happens if merged already.

        The product is made first, in memory of W's size, and added at once: an interrupt leaves weight and `merged` as
        they were or both changed.

        Raises TypeError for a quantised weight, which the layers of `nlora_kernels.peft` quantise again, and ValueError
        for one that the layer makes anew in every forward.
        """
        if not self.merged:
            self._shift(Tensor.add_, merged=True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W ← W − s·B·N·A in place: undoes `merge`, up to one rounding of W that doing both again does not repeat."""
        if self.merged:
            self._shift(Tensor.sub_, merged=False)

    def _shift(self, change: Callable[[Tensor, Tensor], Tensor], merged: bool) -> None:
        branches.check_kept(self.base)
        if not branches.is_dense(self.base.weight):
            kind = type(self.base.weight).__qualname__
            raise TypeError(
                f"merge needs a dense weight, got a {kind}: the layers of nlora_kernels.peft merge into one"
            )
        # Rounded on its own, so that what is taken away is bitwise what was added.
        delta = self.delta_weight(torch.promote_types(self.base.weight.dtype, torch.float32))
        commit(partial(change, self.base.weight, delta), attributes(self, merged=merged))

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, merged={self.merged}"

    def described(self) -> dict[str, Any]:
        """What the base weight is now: the linear layer's, or with the adapter merged into it."""
        return {"merged": self.merged}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        saved.describe(destination, prefix, ENTRY, self.described())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        """Raises ValueError where the adapter would be in the base weight twice, or be taken out while not in it.

        A state dict of tensors alone, as safetensors keeps it, is taken to be of a layer that is merged as this one is.
        """
        own = [f"{prefix}{name}" for name in (*self._parameters, *self._buffers) if name.startswith("lora_")]
        saved.check_state(state_dict, own)
        has = f"{prefix}base.weight" in state_dict
        merged = local_metadata.get(ENTRY, {}).get("merged", self.merged) if has else False
        if merged != self.merged and any(key in state_dict for key in own):
            said, mine = ("is" if each else "is not" for each in (merged, self.merged))
            there = f"in that of the state dict it {said}" if has else "the state dict has an adapter alone"
            raise ValueError(
                f"layer {prefix.removesuffix('.')!r}: the adapter {mine} merged into the base weight, {there}: bring "
                "both to the same by merge() or unmerge()"
            )
        self._before_loading(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _before_loading(self, state_dict, prefix: str) -> None:
        """What is to be done of a state dict that nothing is wrong with."""


class NLoraLinear(_AdapterLinear):
    """y = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ,  s = alpha / r

    LoRA, SLoRA, NLoRA and IntTune (arXiv 2502.14482) on one nn.Linear, which is kept as `base` and frozen. With
    residual=True its weight changes in place, also for another module that shares it, as a tied embedding does.

    Parameters: lora_A (r, in), lora_N (r, r) or None, lora_B (out, r).
    """

    def __init__(
        self,
        base: nn.Linear,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_N: Tensor | None = None,
        *,
        alpha: float | None = None,
        train: str = "all",
        residual: bool = False,
        dropout: float = 0.0,
    ):
        check_choice("train", train, TRAIN)
        saved.check_flag("residual", residual)
        if lora_N is None and (residual or train == "core"):
            option = "train='core'" if train == "core" else "residual=True"
            raise ValueError(f"{option} needs a lora_N, which init='lora' has not")
        _check(base, {"lora_A": lora_A, "lora_B": lora_B, "lora_N": lora_N})
        super().__init__(base, lora_A.shape[0], alpha, dropout)
        outer = train == "all"
        self.lora_A = nn.Parameter(lora_A, requires_grad=outer)
        self.lora_B = nn.Parameter(lora_B, requires_grad=outer)
        self.lora_N = None if lora_N is None else nn.Parameter(lora_N)
        self.train_matrices = train
        self.residual = residual
        # The initial product leaves W (train="all") or the core (train="core", where it keeps W as it is).
        if residual:
            self.register_buffer("lora_N0", lora_N.detach().clone())
        if residual and outer:
            self.register_buffer("lora_A0", lora_A.detach().clone())
            self.register_buffer("lora_B0", lora_B.detach().clone())
            # A weight that is quantised, or made anew in every forward, stays as it is, and all of the product is an
            # excess.
            self.initial_scaling = self.scaling if branches.can_be_added_to(base, base.weight) else 0.0
            if self.initial_scaling:
                subtract_(base.weight, self.lora_A0, self.lora_N0, self.lora_B0, self.scaling)
        base.requires_grad_(False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        *,
        alpha: float | None = None,
        init: str = "nystrom",
        train: str = "all",
        core: str = "sample",
        select: str = "leading",
        residual: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> "NLoraLinear":
        """The adapter of `linear`, which it keeps (no copy) and freezes.

        Args:
            r: rank. alpha: s·r, default r, so s = 1.
            init: "nystrom" (NLoRA), "slora", "slora_gaussian" or "lora", see `nk.init.adapter`; `core` and `select`
                are for "nystrom". At step 0 all but "nystrom" leave the layer's function unchanged.
            train: "all", or "core" for lora_N alone (IntTune, with init="nystrom").
            residual: make step 0 exact for "nystrom" too, by W ← W − s·B·N·A (in place), or, with train="core", by
                using lora_N − lora_N0 and leaving W alone. Setting `scaling` scales the whole effect: 0 is the linear
                layer as it came. The change of W reaches every module that shares it, which no layer can see: do not
                use it with train="all" on a tied head.
            dropout: of the adapter's input in training, from 0 to 1.
            generator: for the random initialisations.
            dtype: of the adapter; default fp32 on a 16-bit base, else the base's.

        Raises:
            TypeError: linear is no nn.Linear, alpha or dropout no number, r no integer, dtype not fp32, bf16, fp16 or
                fp64.
            ValueError: r or dropout out of range, an unknown name, train="core" with init="lora", residual with another
                init than "nystrom"; with that, NaN or infinity in the weight, and core="pinv" without residual, or with
                it and train="all" on a weight of 16 bits.
        """
        _check_linear("linear", linear)
        if dtype is not None:
            check_dtype("dtype", dtype)
        check_choice("init", init, METHODS)
        check_method(init, core, select, residual)
        if residual and train == "all":
            check_subtraction(linear, linear.weight, core)
        weight = branches.readable_weight(linear)
        A, N, B = initial_adapter(weight, r, init, core=core, select=select, generator=generator)
        if N is not None and (reason := idle(A, N, B, train)):
            warnings.warn(f"the adapter gets no gradient and cannot train, because {reason}", stacklevel=2)
        A, N, B = (None if t is None else t.to(dtype or adapter_dtype(weight)) for t in (A, N, B))
        return cls(linear, A, B, N, alpha=alpha, train=train, residual=residual, dropout=dropout)

    def branch(self) -> Branch:
        N = tensor_of(self, "lora_N")
        if self.residual and self.train_matrices == "core":
            N = N - self.lora_N0
        return Branch(tensor_of(self, "lora_A"), N, tensor_of(self, "lora_B"), self.scaling, self.dropped)

    def _excess(self) -> Branch | None:
        # What of B₀·N₀·A₀ is out of the base weight too much since `scaling` was changed.
        if "lora_A0" not in self._buffers or self.scaling == self.initial_scaling:
            return None
        return Branch(*self._initial(), self.initial_scaling - self.scaling)

    def _initial(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A0, self.lora_N0, self.lora_B0

    def described(self) -> dict[str, Any]:
        """The same, and by which factor the initial product is out of it."""
        taken = {"scaling": self.initial_scaling} if "lora_A0" in self._buffers else {}
        return super().described() | taken

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if f"{prefix}base.weight" in state_dict and "lora_A0" in self._buffers:
            self.initial_scaling = local_metadata.get(ENTRY, {}).get("scaling", self.initial_scaling)

    @torch.no_grad()
    def _before_loading(self, state_dict, prefix: str) -> None:
        """The product of initial matrices that come without a base weight is out of the one that is here afterwards."""
        if "lora_A0" not in self._buffers or f"{prefix}base.weight" in state_dict or self.merged:
            return
        kept = self._initial()
        loaded = [state_dict.get(f"{prefix}{kind}") for kind in ("lora_A0", "lora_N0", "lora_B0")]
        if all(new is not None and new.shape == old.shape for new, old in zip(loaded, kept, strict=True)):
            self._exchange(kept, loaded)

    def _exchange(self, kept: tuple[Tensor, ...], loaded: list[Tensor]) -> None:
        if all(torch.equal(new.to(old), old) for new, old in zip(loaded, kept, strict=True)):
            return
        if not branches.can_be_added_to(self.base, self.base.weight):
            # Nothing is out of it, and the matrices are loaded as they come.
            return
        weight = self.base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        (A0, N0, B0), (A, N, B) = ([t.to(weight.device, dtype) for t in each] for each in (kept, loaded))
        change = self.initial_scaling * (B0 @ N0 @ A0 - B @ N @ A)
        copies = (partial(Tensor.copy_, old, new) for old, new in zip(kept, loaded, strict=True))
        commit(partial(Tensor.add_, weight, change), *copies)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, train={self.train_matrices!r}, residual={self.residual}"


class LoRA2Linear(_AdapterLinear):
    """y = x·Wᵀ + bias + s·((x·vᵀ)·Cᵀ)·Vᵀ  with  C = U·diag(E ⊙ mask)·u,  s = alpha / r

    LoRA² (arXiv 2408.06854, sec. 3) on one nn.Linear, which is kept as `base` and frozen.

    Parameters: lora_v (k, in), lora_u (r, k), lora_E (r), lora_U (k, r), lora_V (out, k). Buffer: lora_mask (r), ones
    until singular values are pruned.
    """

    def __init__(
        self,
        base: nn.Linear,
        lora_v: Tensor,
        lora_u: Tensor,
        lora_E: Tensor,
        lora_U: Tensor,
        lora_V: Tensor,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
    ):
        core = core_of(Factors(lora_u, lora_E, lora_U, None))
        _check(base, dict(zip(LORA2_NAMES, (lora_v, lora_V, core), strict=True)))
        super().__init__(base, lora_E.shape[0], alpha, dropout)
        self.k = lora_v.shape[0]
        self.lora_v = nn.Parameter(lora_v)
        self.lora_u = nn.Parameter(lora_u)
        self.lora_E = nn.Parameter(lora_E)
        self.lora_U = nn.Parameter(lora_U)
        self.lora_V = nn.Parameter(lora_V)
        self.register_buffer("lora_mask", torch.ones_like(lora_E))
        base.requires_grad_(False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        k: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        vectors: str = "gaussian",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LoRA2Linear":
        """The LoRA² adapter of `linear`, which it keeps (no copy) and freezes; its function is unchanged at step 0.

        Args:
            r: number of singular values.
            k: rank of the outer pair.
            alpha: s·r, default r.
            dropout: as for `NLoraLinear.from_linear`, and so are generator and dtype.
            vectors: "gaussian" or "orthogonal", see `nk.init.lora2`.

        Raises TypeError and ValueError as `NLoraLinear.from_linear` does.
        """
        _check_linear("linear", linear)
        if dtype is not None:
            check_dtype("dtype", dtype)
        weight = branches.readable_weight(linear)
        tensors = initial_lora2(weight, r, k, vectors, generator=generator)
        return cls(linear, *(t.to(dtype or adapter_dtype(weight)) for t in tensors), alpha=alpha, dropout=dropout)

    def branch(self) -> Lora2Branch:
        tensors = [tensor_of(self, name) for name in ("lora_v", "lora_u", "lora_E", "lora_U", "lora_V")]
        return Lora2Branch(*tensors, self._buffers["lora_mask"], self.scaling, self.dropped)

    def extra_repr(self) -> str:
        return f"k={self.k}, {super().extra_repr()}"


def _check(base, matrices: dict[str, Tensor | None]) -> None:
    """TypeError or ValueError, by name, unless A, B and N of an adapter fit the layer, wherever it lies."""
    _check_linear("base", base)
    check_tensors(matrices, optional=tuple(matrices)[2:])
    check_memory(**matrices)
    weight = base._parameters.get("weight")
    # The attributes are not renewed where a weight is swapped, and codes or a shard have another shape.
    known = weight is not None and weight.dim() == 2 and branches.has_dense(base, weight)
    check_adapter(weight.shape if known else (base.out_features, base.in_features), matrices)


def _check_linear(name: str, linear) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} must be an nn.Linear, got {type(linear).__name__}")
    branches.check_initialised(linear, f"weight of {name}")


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """fp32 for a 16-bit base, as PEFT does by default, so that small updates are not rounded away; else the base's."""
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype


def check_alpha(alpha, name: str = "alpha") -> None:
    check_real(name, alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"{name} must be finite, got {alpha}")


def check_method(method, core: str, select: str, residual: bool) -> None:
    """ValueError for an unknown core or selection, and for options that make no sense with the method."""
    saved.check_flag("residual", residual)
    check_choice("core", core, CORES)
    check_choice("select", select, SELECTIONS)
    if residual and method != "nystrom":
        raise ValueError(f"residual=True needs the init 'nystrom', got {method!r}")
    if core == "pinv" and method == "nystrom" and not residual:
        raise ValueError(
            "core='pinv' needs residual=True: without it the initial adapter moves the output by several times its size"
        )


def check_subtraction(linear: nn.Module, weight: Tensor, core: str) -> None:
    """ValueError where the initial product that residual=True takes out of a weight would take its low bits along."""
    if core == "pinv" and weight.dtype.itemsize < 4 and branches.can_be_added_to(linear, weight):
        raise ValueError(
            f"core='pinv' with residual=True needs a base weight in float32, got {weight.dtype}: its product is much "
            "larger, and what is left of W would be rounded as coarsely; train='core' and core='optimal' need none"
        )
