"""The adapter layer of LoRA, SLoRA, NLoRA and IntTune."""

import copy
import zlib

import torch
import torch.nn.functional as F
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from .. import fusion, init
from ..modules import check_alpha
from .config import NLoraConfig
from .layer import FusedLinear, Term, base_weight, check_whole

# Names the initial product of the residual adapter as a term of its own. No adapter can be called so.
_INITIAL = "initial.product"


class Kept(nn.Module):
    """A matrix as it was at the start, frozen. The name of its parameter is not that of its key in a checkpoint."""

    def __init__(self, *shape: int):
        super().__init__()
        self.kept = nn.Parameter(torch.empty(shape), requires_grad=False)


class NLoraLinear(FusedLinear):
    """y = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ,  s = alpha / r, per adapter

    lora_A, lora_N and lora_B hold nn.Linear modules by adapter name; an adapter of plain LoRA has no lora_N.

    With residual=True the layer keeps the initial matrices, frozen, in lora_A0, lora_N0 and lora_B0, and its base
    weight is W − s·B₀·N₀·A₀ for as long as nothing is merged. Whoever asks for the base function (another adapter,
    disabled adapters, merge, unload, delete) gets it with the product added back. With train="core" W stays as it is,
    the core is N − N₀, and only lora_N0 is kept.
    """

    adapter_layer_names = (*FusedLinear.adapter_layer_names, "lora_N")
    other_param_names = (*FusedLinear.other_param_names, "lora_A0", "lora_N0", "lora_B0", "initial_scaling")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: NLoraConfig, **kwargs) -> None:
        # NOTE: not in __init__, because PEFT's __init__ adds the first adapter.
        if "lora_N" not in self._modules:
            self.lora_N, self.lora_A0, self.lora_N0, self.lora_B0 = (nn.ModuleDict() for _ in range(4))
            self.initial_scaling: dict[str, float] = {}
            self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
            # The adapter whose initial product is out of the base weight now.
            self.held_out: str | None = None
        if not getattr(config, "has_core", False):
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
            return
        self._check_core(r, lora_alpha, config)
        # Before PEFT's part, which moves, freezes and thaws what is there.
        self.lora_N[adapter_name] = nn.Linear(r, r, bias=False)
        if config.train == "core":
            self.frozen_peft_weight_names[adapter_name] = ("lora_A", "lora_B")
        if config.residual:
            self.lora_N0[adapter_name] = Kept(r, r)
            if config.train == "all":
                self.lora_A0[adapter_name] = Kept(r, self.in_features)
                self.lora_B0[adapter_name] = Kept(self.out_features, r)
        uninitialised = copy.copy(config)
        uninitialised.init_lora_weights = False
        super().update_layer(adapter_name, r, lora_alpha, uninitialised, **kwargs)
        self.initial_scaling[adapter_name] = self.scaling[adapter_name]
        # Tensors on the meta device are left to whoever loads them.
        if not self.lora_N[adapter_name].weight.is_meta:
            self._initialise(adapter_name, r, config, kwargs.get("target_name", ""))

    def _check_core(self, r: int, lora_alpha: float, config: NLoraConfig) -> None:
        base = self.get_base_layer()
        nystrom = config.init_lora_weights == "nystrom"
        init.check_rank(r, *((min(self.in_features, self.out_features), "min(out, in)") if nystrom else ()))
        check_alpha(lora_alpha, "lora_alpha")
        check_whole(base, f"init_lora_weights={config.init_lora_weights!r}")
        if config.residual and self.lora_N0:
            raise ValueError(f"residual=True is for one adapter of a layer, and {next(iter(self.lora_N0))!r} is it")
        if config.residual and config.train == "all" and not fusion.is_dense(base.weight):
            raise ValueError(f"residual=True needs a dense base weight, got {type(base.weight).__qualname__}")

    @torch.no_grad()
    def _initialise(self, name: str, r: int, config: NLoraConfig, target_name: str) -> None:
        options, generator = {}, None
        if config.init_lora_weights == "nystrom":
            options = {"core": config.core, "select": config.select}
            # The same rows and columns wherever the model is built again: on every rank, and where the adapter is
            # loaded, whose initial product then is out of the weight already.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{config.select_seed} {target_name}".encode()))
        with gather_params_ctx(self.get_base_layer().weight):
            # Random matrices need the weight's shape alone.
            W = base_weight(self) if options else torch.empty(()).expand(self.out_features, self.in_features)
            A, N, B = init.adapter(W, r, config.init_lora_weights, generator=generator, **options)
        for matrix, tensor in zip((self.lora_A, self.lora_N, self.lora_B), (A, N, B), strict=True):
            matrix[name].weight.copy_(tensor)
        for matrix, tensor in zip((self.lora_A0, self.lora_N0, self.lora_B0), (A, N, B), strict=True):
            if name in matrix:
                matrix[name].kept.copy_(tensor)

    # Forward

    def matrices(self, name: str) -> tuple[Tensor, Tensor | None, Tensor]:
        if name == _INITIAL:
            return self._initial(self.held_out)
        A, _, B = super().matrices(name)
        if name not in self.lora_N:
            return A, None, B
        N = self.lora_N[name].weight
        if self._core_moves(name):
            N = N - self.lora_N0[name].kept
        # Padded for compiled hot swaps, A and B alone have grown.
        r = N.shape[0]
        return (A, N, B) if A.shape[0] == r else (A[:r], N, B[:, :r])

    def _initial(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A0[name].kept, self.lora_N0[name].kept, self.lora_B0[name].kept

    def factors(self, name: str) -> tuple[nn.Module, ...]:
        return (*super().factors(name), *((self.lora_N[name],) if name in self.lora_N else ()))

    def obstacle(self, name: str | None = None) -> str | None:
        return super().obstacle(None if name == _INITIAL else name)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.lora_A0[self.held_out].kept.dtype if name == _INITIAL else super().dtype_of(name)

    def scaling_of(self, name: str) -> float:
        return self.initial_scaling[self.held_out] if name == _INITIAL else super().scaling_of(name)

    def dropped(self, name: str) -> float:
        return 0.0 if name == _INITIAL else super().dropped(name)

    def branch(self, name: str, x: Tensor) -> Tensor:
        if name == _INITIAL:
            A, N, B = self.matrices(name)
            return fusion.branch(x, A, B, N, self.scaling_of(name))
        if name not in self.lora_N:
            return super().branch(name, x)
        A, B, N = self.factors(name)
        T = A(self.lora_dropout[name](self._cast_input_dtype(x, self.dtype_of(name))))
        T = fusion.resized(T, N)
        P = N(T)
        if self._core_moves(name):
            P = P - F.linear(T, self.lora_N0[name].kept)
        return B(fusion.resized(P, B)) * self.scaling[name]

    def _core_moves(self, name: str) -> bool:
        return name in self.lora_N0 and name not in self.lora_A0

    def _terms(self, adapter_names: list[str] | None) -> list[Term]:
        terms = super()._terms(adapter_names)
        if self.held_out is None:
            return terms
        if adapter_names is None or self.disable_adapters:
            lacking = [] if any(term.name == self.held_out for term in terms) else [Term(_INITIAL)]
        else:
            rows = [row for row, name in enumerate(adapter_names) if name != self.held_out]
            lacking = [Term(_INITIAL, rows)] if rows else []
        return terms + lacking

    # Residual life cycle

    @torch.no_grad()
    def settle(self, *, restore: bool = False) -> None:
        """Takes the initial product out of the base weight, or puts it back while something is merged or on demand.

        The tuner calls it when every layer is made, so that an injection that fails has changed no weight.
        """
        name = next(iter(self.lora_A0), None)
        wanted = None if restore or self.merged else name
        if wanted == self.held_out or self.lora_A0[name].kept.is_meta:
            return
        base = self.get_base_layer()
        if not fusion.is_dense(base.weight):
            raise ValueError(
                f"the initial product of adapter {name!r} can join or leave a dense base weight alone, "
                f"got {type(base.weight).__qualname__}"
            )
        A0, N0, B0 = self._initial(name)
        scaling = self.initial_scaling[name]
        with gather_params_ctx(base.weight):
            init.subtract_(fusion.weight_of(base).data, A0, N0, B0, scaling if wanted else -scaling)
        self.held_out = wanted

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Loading never recomputes the initial product: the one that comes is out of the base weight afterwards."""
        name = next(iter(self.lora_A0), None)
        keys = [f"{prefix}{kind}.{name}.kept" for kind in ("lora_A0", "lora_N0", "lora_B0")]
        if name is not None and not self.merged and all(key in state_dict for key in keys):
            self._hold_out(name, [state_dict[key] for key in keys], f"{prefix}base_layer.weight" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _hold_out(self, name: str, loaded: list[Tensor], with_base: bool) -> None:
        base = self.get_base_layer()
        kept = self._initial(name)
        if [t.shape for t in loaded] != [t.shape for t in kept] or base.weight.is_meta:
            return
        if self.held_out == name and all(map(_same, loaded, kept)):
            return
        # A base weight that comes along has its product out already.
        if not with_base:
            A, N, B = (_full(t).to(base.weight.device, torch.promote_types(t.dtype, torch.float32)) for t in loaded)
            BN = B @ N
            if self.held_out == name:
                # Out with the new and in with the old product at once: the weight is rounded once.
                A0, N0, B0 = (t.to(A) for t in kept)
                A, BN = torch.cat([A, A0]), torch.cat([BN, -(B0 @ N0)], dim=1)
            with gather_params_ctx(base.weight):
                init.subtract_(fusion.weight_of(base).data, A, None, BN, self.initial_scaling[name])
        self.held_out = name

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = super().get_delta_weight(adapter)
        if adapter not in self.lora_A0:
            return delta
        weight = delta.T if self.fan_in_fan_out else delta
        A0, N0, B0 = self._initial(adapter)
        init.subtract_(weight.detach(), A0, N0, B0, self.initial_scaling[adapter])
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            self.settle()

    def unmerge(self) -> None:
        super().unmerge()
        self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name == self.held_out:
            self.settle(restore=True)
        super().delete_adapter(adapter_name)

    def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names) -> nn.Module:
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        self.settle(restore=True)
        return base


def _same(loaded: Tensor, kept: Tensor) -> bool:
    return torch.equal(_full(loaded).to(kept.device), _full(kept))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
