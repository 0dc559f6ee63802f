"""The adapter layer of LoRA, SLoRA, NLoRA and IntTune."""

import contextlib
import copy
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import onload_layer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from .. import init, saved
from ..backends.quantised import Quantised
from ..commit import attributes, commit
from ..layers import branch as branches
from ..layers import engines
from ..layers.branch import Branch, Lora2Branch, local
from ..layers.modules import check_alpha, check_subtraction
from . import base as base_weights
from . import residual, tensor_parallel
from .config import NLoraConfig
from .layer import FUSED, FusedLinear, Term, plain_layer

_deferring = ContextVar("deferring", default=False)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While an adapter is loaded nothing is subtracted, so that a load that fails has changed no base weight."""
    token = _deferring.set(True)
    try:
        yield
    finally:
        _deferring.reset(token)


class Kept(nn.Module):
    """A matrix as it was at the start, frozen."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def __setattr__(self, name: str, value) -> None:
        # Also where a loader puts a parameter of its own, which would train.
        if isinstance(value, nn.Parameter):
            value.requires_grad_(False)
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A copy, because some load into the tensors of a model's state dict and then hand that in: what is out of the
        # base weight is known until then.
        if not keep_vars:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].clone()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.detach())


class HasCore:
    """What an adapter with a core has beside PEFT's own, of a layer and of experts alike."""

    def _make_room(self) -> None:
        self.lora_N, self.lora_A0, self.lora_N0, self.lora_B0 = (nn.ModuleDict() for _ in range(4))
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def _forget(self, name: str) -> None:
        """Leaves nothing of an adapter that is made anew under its name."""
        for kept in (self.lora_N, self.lora_A0, self.lora_N0, self.lora_B0, self.frozen_peft_weight_names):
            if name in kept:
                del kept[name]

    def _sides(self) -> tuple[int, int]:
        """in and out of W."""
        raise TypeError(f"{type(self).__name__} must define _sides()")

    def _initial_matrices(self, r: int, method: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """A, N and B as `init.adapter` makes them with these options, in the layout of the layer's own."""
        raise TypeError(f"{type(self).__name__} must define _initial_matrices()")

    def _check_core(self, r: int, lora_alpha: float, config: NLoraConfig) -> None:
        nystrom = config.init_lora_weights == "nystrom"
        init.check_rank(r, *((min(self._sides()), "min(out, in)") if nystrom else ()))
        check_alpha(lora_alpha, "lora_alpha")
        tensor_parallel.check(self.get_base_layer(), f"init_lora_weights={config.init_lora_weights!r}")

    @torch.no_grad()
    def _initialise(self, name: str, r: int, config: NLoraConfig, target_name: str) -> None:
        options: dict[str, Any] = {}
        if config.init_lora_weights == "nystrom":
            # The same rows and columns wherever the model is built again: on every rank, and where the adapter is
            # loaded, whose initial product then is out of the weight already.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{config.select_seed} {target_name}".encode()))
            options = {"core": config.core, "select": config.select, "generator": generator}
        made = self._initial_matrices(r, config.init_lora_weights, options)
        for matrices in ((self.lora_A, self.lora_N, self.lora_B), (self.lora_A0, self.lora_N0, self.lora_B0)):
            for matrix, tensor in zip(matrices, made, strict=True):
                if name in matrix:
                    matrix[name].weight.copy_(tensor)

    def idle(self, name: str) -> str | None:
        """Why no gradient reaches any matrix of an adapter that is new and not about to be loaded, or None."""
        if name not in self.lora_N or _deferring.get():
            return None
        weights = [matrix[name].weight for matrix in (self.lora_A, self.lora_N, self.lora_B)]
        train = "core" if name in self.frozen_peft_weight_names else "all"
        return init.idle(*weights, train) if all(map(branches.is_dense, weights)) else None


class NLoraLinear(HasCore, FusedLinear):
    """y = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ,  s = alpha / r, per adapter

    lora_A, lora_N and lora_B hold nn.Linear modules by adapter name; an adapter of plain LoRA has no lora_N.

    With residual=True the effect of an adapter is s·(B·N·A − B₀·N₀·A₀). The initial matrices are kept, frozen, in
    lora_A0, lora_N0 and lora_B0. So that one adapter is one operation, the base weight of the layer at rest is
    W − s·B₀·N₀·A₀ with the product of one such adapter, the first by name: it is `subtracted`. A forward adds whatever
    multiple of an initial product is then too much or missing, and merging, unloading and deleting put the product
    back. Where nothing is subtracted, as in a quantised or sharded weight, the second product is a term like the first.
    With train="core" W stays as it is, the core is N − N₀, and only lora_N0 is kept.
    """

    adapter_layer_names = (*FusedLinear.adapter_layer_names, "lora_N")
    factor_names = ("lora_A", "lora_N", "lora_B")
    other_param_names = (*FusedLinear.other_param_names, "lora_A0", "lora_N0", "lora_B0", "initial_scaling")

    @classmethod
    def adopt(cls, layer: nn.Module) -> bool:
        """Makes a layer of plain LoRA one of this class, with the adapters that it has; whether it is one now."""
        kind = type(layer)
        if kind in FUSED.values() or (kind.__module__, kind.__name__) in FUSED:
            layer.__class__ = cls
            layer._make_room()
        return isinstance(layer, cls)

    def _make_room(self) -> None:
        """For cores, and for what belongs to them."""
        # Known from the layer: a model can hold both kinds, and the configuration has one flag.
        self.fan_in_fan_out = branches.is_conv1d(self.get_base_layer())
        super()._make_room()
        self.initial_scaling: dict[str, float] = {}
        self._subtracted: str | None = None
        # With what a base weight is to come that is not there: "all" tensors of the layer, or "none", if the initial
        # matrices have come before it.
        self._awaited = ""
        # Whether the base weight is memory without values, which to_empty() makes of one on the meta device.
        self._is_blank = False

    @property
    def subtracted(self) -> str | None:
        """The adapter whose initial product is out of the base weight now."""
        if self._awaited:
            self._settle()
        return self._subtracted

    def _settle(self) -> None:
        """Decides what is out of a base weight that some loader has put in place tensor by tensor."""
        base = self.get_base_layer()
        if base.weight.is_meta and not base_weights.is_offloaded(base):
            return
        if self._awaited == "none":
            raise ValueError(
                f"layer {self.layer_name!r}: the base weight has come after the residual adapter, and nothing says "
                "whether an initial product is out of it: load the base model first, or the state dict of the whole "
                "model by load_state_dict(…, assign=True)"
            )
        self._awaited, self._subtracted = "", min(self.lora_A0, default=None)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: NLoraConfig, **kwargs) -> None:
        # NOTE: not in __init__, because PEFT's __init__ adds the first adapter.
        if "lora_N" not in self._modules:
            self._make_room()
        if not getattr(config, "has_core", False):
            self._forget(adapter_name)
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
            return
        self._check_core(r, lora_alpha, config)
        if config.residual and config.train == "all":
            base = self.get_base_layer()
            check_subtraction(base, tensor_parallel.resident(base), config.core)
        self._forget(adapter_name)
        # Before PEFT's part, which moves, freezes and thaws what is there.
        self.lora_N[adapter_name] = nn.Linear(r, r, bias=False)
        if config.train == "core":
            self.frozen_peft_weight_names[adapter_name] = ("lora_A", "lora_B")
        if config.residual:
            self.lora_N0[adapter_name] = Kept(r, r)
            if config.train == "all":
                self.lora_A0[adapter_name] = Kept(r, self.in_features)
                self.lora_B0[adapter_name] = Kept(self.out_features, r)
                if base.weight.is_meta and not base_weights.is_offloaded(base):
                    self._awaited = "all"
        uninitialised = copy.copy(config)
        uninitialised.init_lora_weights = False
        super().update_layer(adapter_name, r, lora_alpha, uninitialised, **kwargs)
        self.initial_scaling[adapter_name] = self.scaling[adapter_name]
        # Tensors on the meta device are left to whoever loads them.
        if not self.lora_N[adapter_name].weight.is_meta:
            self._initialise(adapter_name, r, config, kwargs.get("target_name", ""))

    def _forget(self, name: str) -> None:
        """Its product is not left out of the weight either."""
        if name == self.subtracted:
            with onload_layer(self):
                self.add_initial()
        super()._forget(name)

    def _sides(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def _initial_matrices(self, r: int, method: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        base = self.get_base_layer()
        with gather_params_ctx(base.weight):
            # Random matrices need the weight's shape alone.
            W = self._base_weight() if options else torch.empty(()).expand(self.out_features, self.in_features)
            split = tensor_parallel.split_of(base) if options else None
            if split is not None:
                return tensor_parallel.nystrom(split, W, r, **options)
            return init.adapter(W, r, method, **options)

    def _base_weight(self) -> Tensor | Quantised:
        """W as (out, in) for reading, with the product that is subtracted from it; split, this rank's part."""
        base = self.get_base_layer()
        is_split = tensor_parallel.split_of(base) is not None
        W = tensor_parallel.resident(base) if is_split else base_weights.readable(base)
        if self.subtracted is None:
            return W
        return init.subtract_(W.clone(), *self._initial(self.subtracted), -self.initial_scaling[self.subtracted])

    # Forward

    def _matrices_of(self, name: str, weights: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        if len(weights) == 2:
            return super()._matrices_of(name, weights)
        A, N, B = weights
        if self._core_moves(name):
            N = N - self.lora_N0[name].weight
        # Padded for compiled hot swaps, A and B alone have grown.
        r = N.shape[0]
        return (A, N, B) if A.shape[0] == r else (A[:r], N, B[:, :r])

    def initial(self, name: str, scaling: float) -> Branch:
        """The initial product of an adapter, which is left out of its effect, as a branch of its own."""
        return Branch(*[t.detach() for t in self._initial(name)], scaling)

    def _initial(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, N, B = (local(t) for t in self._kept(name))
        return A, N, B

    def _kept(self, name: str) -> list[nn.Parameter]:
        return [kept.weight for kept in self._keeping(name)]

    def _keeping(self, name: str) -> list[nn.Module]:
        """The modules that hold the initial matrices of an adapter."""
        return [self._modules[kind]._modules[name] for kind in residual.KEPT]

    def _apart(self, name: str, x: Tensor) -> Tensor:
        A, *core, B = self.factors(name)
        if not core:
            return B(A(x))
        T = branches.resized(A(x), core[0])
        P = core[0](T)
        if self._core_moves(name):
            P = P - self.lora_N0[name](T)
        return B(branches.resized(P, B))

    def _held(self, name: str) -> tuple[Tensor, ...]:
        held = super()._held(name)
        return (*held, self.lora_N0[name].weight) if self._core_moves(name) else held

    def _core_moves(self, name: str) -> bool:
        modules = self._modules
        return name in modules["lora_N0"]._modules and name not in modules["lora_A0"]._modules

    def _terms(self, adapter_names: list[str] | None) -> list[Term]:
        terms = super()._terms(adapter_names)
        kept = self._modules["lora_A0"]._modules
        if not kept:
            return terms
        if adapter_names is None or self.disable_adapters:
            active = {term.name for term in terms}
            parts = [(name, name in active, None) for name in kept]
        else:
            rows_of = {term.name: term.rows for term in terms}
            others = {name: [i for i, of in enumerate(adapter_names) if of != name] for name in kept}
            parts = [(name, True, rows_of[name]) for name in kept if name in rows_of]
            parts += [(name, False, rows) for name, rows in others.items() if rows]
        for name, is_active, rows in parts:
            factor = self._initial_factor(name, is_active)
            if isinstance(factor, Tensor) or factor:
                terms.append(Term(name, rows, factor))
        return terms

    def _initial_factor(self, name: str, active: bool):
        """Which multiple of an adapter's initial product a forward adds."""
        out = self.initial_scaling[name] if name == self.subtracted else 0.0
        return out - self.scaling[name] if active else out

    def _obstacle_to(self, term: Term) -> str | None:
        if term.initial is None:
            return super()._obstacle_to(term)
        base = self._modules["base_layer"]
        reason = branches.obstacle(base)
        if reason:
            return reason
        for kept in self._keeping(term.name):
            reason = branches.obstacle_of(kept, (Kept,))
            if reason:
                return f"an initial matrix of adapter {term.name!r} cannot be fused: {reason}"
        return f"the scaling of adapter {term.name!r} is a tensor" if isinstance(term.initial, Tensor) else None

    def _branch(self, term: Term) -> Branch | Lora2Branch:
        return super()._branch(term) if term.initial is None else self.initial(term.name, term.initial)

    def _part(self, term: Term, x: Tensor) -> Tensor:
        if term.initial is None:
            return super()._part(term, x)
        # By calling the modules, whose hooks may bring the weights along.
        A, N, B = self._keeping(term.name)
        return term.initial * B(N(A(x.to(A.weight.dtype))))

    # Residual life cycle

    def know_offloaded(self) -> None:
        """Settles that of a base weight for which PEFT has loaded an adapter: the hooks that it renews bring W."""
        if self._awaited == "none" and base_weights.is_offloaded(self.get_base_layer()):
            self._awaited = ""

    @torch.no_grad()
    def subtract_initial(self) -> None:
        """Takes the initial product out of the base weight, if that can be and nothing is merged.

        Called when an adapter is complete, and by train() and eval(): until then an injection that fails has changed no
        weight, and a loader may replace what is kept.
        """
        name = None if _deferring.get() else self._subtractable()
        if name is not None:
            self.add_initial()
            base = self.get_base_layer()
            subtracted = attributes(self, _subtracted=name)
            with gather_params_ctx(base.weight):
                weight = local(branches.weight_of(base)).data
                init.add_product(weight, *self._initial(name), -self.initial_scaling[name], subtracted)

    @torch.no_grad()
    def add_initial(self) -> None:
        """Puts the initial product back that is subtracted from the base weight."""
        if self.subtracted is not None:
            self._move_initial(self.subtracted, 1)

    def _subtract_again(self) -> None:
        name = self._subtractable()
        if name is not None:
            self._move_initial(name, -1)

    def _subtractable(self, merged: bool = False) -> str | None:
        """The adapter whose initial product is to be out of the base weight, if that can be now and it is not yet.

        It is the first by name, so that the tensors of a layer at rest say by themselves which it is.
        """
        if not self.lora_A0 or self.merged != merged:
            return None
        subtracted = self.subtracted
        if subtracted is not None and subtracted == min(self.lora_A0):
            return None
        base = self.get_base_layer()
        weight = tensor_parallel.resident(base)
        if weight.is_meta or not branches.can_be_added_to(base, weight):
            return None
        first = min((name for name in self.lora_A0 if self._are_there(self._kept(name))), default=None)
        return None if first == subtracted else first

    def _are_there(self, kept: list[nn.Parameter]) -> bool:
        split = tensor_parallel.split_of(self.get_base_layer()) is not None
        return not any(t.is_meta or (type(t) is not nn.Parameter and not split) for t in kept)

    @torch.no_grad()
    def _move_initial(self, name: str, sign: int) -> None:
        # Not as `subtract_initial` does, faster: one rounded product, added and subtracted by turns, does not drift.
        base = self.get_base_layer()
        with gather_params_ctx(base.weight):
            product = self._stored(self.initial(name, self.initial_scaling[name]).product())
            commit(*base_weights.adding(base, product, sign), attributes(self, _subtracted=None if sign > 0 else name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NLoraLinear":
        base = self.get_base_layer()
        was_meta = base.weight.is_meta
        super()._apply(fn, recurse)
        self._is_blank |= was_meta and not base.weight.is_meta
        return self

    def train(self, mode: bool = True) -> "NLoraLinear":
        self.subtract_initial()
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        saved.describe(destination, prefix, residual.ENTRY, self.described())

    def described(self) -> dict[str, Any]:
        """What a state dict says of the base weight, if that is there and residual adapters are."""
        return residual.described(self) if self.lora_A0 and not self.get_base_layer().weight.is_meta else {}

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        """Loading never recomputes the initial product: the one that comes is out of the base weight afterwards."""
        base, assigned = self.get_base_layer(), local_metadata.get("assign_to_params_buffers", False)
        weight = state_dict.get(f"{prefix}base_layer.weight")
        out = residual.check(self, state_dict, prefix, local_metadata.get(residual.ENTRY))
        if out is not None:
            # PyTorch leaves what is on the meta device there, unless it is given the tensors themselves.
            if assigned or not base.weight.is_meta:
                self._take_over(out, weight, state_dict, prefix)
        elif weight is None and not self.merged:
            for name in self.lora_A0:
                loaded = [state_dict.get(f"{prefix}{kind}.{name}.weight") for kind in residual.KEPT]
                if all(isinstance(t, Tensor) for t in loaded):
                    self._exchange(name, loaded)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _take_over(self, out: residual.Out, weight: Tensor, state_dict, prefix: str) -> None:
        """Puts a base weight in place with what is out of it."""
        base, own, steps = self.get_base_layer(), tensor_parallel.resident(self.get_base_layer()), []
        kept = [] if out.name is None else self._kept(out.name)
        loaded = [state_dict[f"{prefix}{kind}.{out.name}.weight"] for kind in residual.KEPT[: len(kept)]]
        shapes = [t.shape for t in loaded] == [t.shape for t in kept]
        if shapes and not own.is_meta and branches.is_dense(own) and self._are_there(kept):
            steps = [partial(Tensor.copy_, own.data, _part_like(weight, base.weight))]
            for old, new in zip(kept, loaded, strict=True):
                steps.append(partial(Tensor.copy_, local(old).data, _part_like(new, old)))
        if out.scaling is not None:
            steps.append(partial(self.initial_scaling.update, {out.name: out.scaling}))
        commit(*steps, attributes(self, _subtracted=out.name, _awaited="", _is_blank=False))

    def _exchange(self, name: str, loaded: list[Tensor]) -> None:
        """Puts initial matrices in place that come without a base weight."""
        base, kept = self.get_base_layer(), self._kept(name)
        if self._awaited and base.weight.is_meta:
            self._awaited = "none"
        if self.subtracted != name or [t.shape for t in loaded] != [t.shape for t in kept]:
            return
        own, are_there = tensor_parallel.resident(base), self._are_there(kept)
        loaded = [_part_like(new, old) for new, old in zip(loaded, kept, strict=True)]
        kept = [local(t) for t in kept]
        if any(t.is_meta for t in (*kept, *loaded)) or all(map(_same, loaded, kept)):
            return
        if own.is_meta or not are_there or not branches.is_dense(own):
            raise ValueError(
                f"layer {self.layer_name!r}: adapter {name!r} comes with other initial matrices than those whose "
                "product is out of the base weight, which is sharded or offloaded now: load it before that, or the "
                "state dict of the whole model"
            )
        copies = tuple(partial(Tensor.copy_, old.data, new) for old, new in zip(kept, loaded, strict=True))
        # Out with the new and in with the old product at once: the weight is rounded once.
        change = self._stored(self.initial(name, self.initial_scaling[name]).product())
        loaded = [t.to(change.device, change.dtype) for t in loaded]
        change = change - self._stored(Branch(*loaded, self.initial_scaling[name]).product())
        with gather_params_ctx(base.weight):
            commit(*base_weights.adding(base, change, 1), *copies)

    # Merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = super().get_delta_weight(adapter)
        if adapter not in self.lora_A0:
            return delta
        return delta - self._stored(self.initial(adapter, self.scaling[adapter]).product())

    def _moves_along(self, name: str) -> bool:
        """Whether the initial product goes back in with merging the adapter, or comes out with unmerging it."""
        if self.merged:
            return self.merged_adapters == [name] and name == self._subtractable(merged=True)
        return self.subtracted == name

    def _shift(self, name: str) -> Tensor:
        if not self._moves_along(name):
            return super()._shift(name)
        shift = super().get_delta_weight(name)
        factor = self.initial_scaling[name] - self.scaling[name]
        return shift + self._stored(self.initial(name, factor).product()) if factor else shift

    def _adding(self, name: str, sign: int, safe: bool = False) -> tuple[Callable[[], object], ...]:
        steps = super()._adding(name, sign, safe)
        return (*steps, attributes(self, _subtracted=None if sign > 0 else name)) if self._moves_along(name) else steps

    def _merge(self, name: str, safe: bool) -> None:
        if self.subtracted != name:
            self.add_initial()
        super()._merge(name, safe)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            self._subtract_again()

    def unmerge(self) -> None:
        super().unmerge()
        self._subtract_again()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name != self.subtracted:
            super().delete_adapter(adapter_name)
        else:
            # An offloaded weight is brought back and away again.
            with onload_layer(self):
                self.add_initial()
                super().delete_adapter(adapter_name)
                self._subtract_again()
        if not self.lora_N:
            # What is left is plain LoRA, until a core is added again.
            for name in ("lora_N", *residual.KEPT, "initial_scaling", "_subtracted", "_awaited", "_is_blank"):
                delattr(self, name)
            self.__class__ = plain_layer(self.get_base_layer())

    def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names) -> nn.Module:
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        self.add_initial()
        return base


def _same(loaded: Tensor, kept: Tensor) -> bool:
    return torch.equal(loaded.to(kept), kept)


def _part_like(t: Tensor, held: Tensor) -> Tensor:
    """What a rank has of a tensor where it has what it has of the one that is held."""
    if not engines.is_dtensor(held):
        return t.full_tensor() if engines.is_dtensor(t) else t
    if engines.is_dtensor(t):
        return local(t.redistribute(placements=held.placements))
    return t[engines.slices(held)]


def subtract_initial(model: nn.Module) -> None:
    """The same for every layer of a model that PEFT has injected or loaded an adapter into."""
    for module in model.modules():
        if isinstance(module, NLoraLinear):
            module.know_offloaded()
            module.subtract_initial()
