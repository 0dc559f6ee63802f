"""The adapter layers of LoRA, SLoRA, NLoRA and IntTune on parameters: the experts of a mixture."""

import copy
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from .. import init
from ..commit import commit
from ..layers import branch as branches
from ..layers import experts
from ..layers.branch import Branch
from .config import NLoraConfig
from .layer import check_finite
from .nlora import HasCore, Kept


class FusedExperts(ParamWrapper):
    """W_e·x + s·B_e·((N_e·)(A_e·x)) for the experts e of one parameter W (E, out, in) or (E, in, out)

    PEFT stands a wrapper about a module for each of its parameters, one about the other; lora_A holds a layer with
    weight (E·r, in), lora_B one with (out, r·E), in which the experts of one r lie side by side. The outermost wrapper
    computes the layers of transformers' experts as one grouped product each, with what the wrappers within it add.
    Everything else, as experts of other kinds and parameters of two dimensions, runs as in PEFT, which adds the product
    of the adapter to the parameter for the forward.
    """

    # The types of the modules among the factors.
    factor_types: tuple[type[nn.Module], ...] = (nn.Linear,)

    def branch(self, name: str) -> Branch:
        """What an adapter adds now."""
        return Branch(*self.matrices(name), self.scaling[name])

    def matrices(self, name: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """(A (E, r, in), N (E, r, r) or None, B (E, out, r)) of an adapter, views of its weights."""
        return self._A(self.lora_A[name].weight), None, self._B(self.lora_B[name].weight)

    def _A(self, packed: Tensor) -> Tensor:
        return packed.unflatten(0, (self.num_experts, -1))

    def _B(self, packed: Tensor) -> Tensor:
        return packed.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)

    def factors(self, name: str) -> tuple[nn.Module, ...]:
        """The modules that hold the matrices of an adapter."""
        return self.lora_A[name], self.lora_B[name]

    def obstacle(self) -> str | None:
        """None if the experts within and the active adapters are computed as grouped products, else why not."""
        found = self._branches()
        return found if isinstance(found, str) else None

    def _branches(self) -> dict[str, Branch] | str:
        """What the wrappers from here inwards add, by the names of their parameters, or why it cannot be fused."""
        base = self.get_base_layer()
        if reason := experts.obstacle(base):
            return reason
        found, layer = {}, self
        while isinstance(layer, ParamWrapper):
            if layer.parameter_name not in experts.layers_of(base):
                return f"{layer.parameter_name} is not the weight of a layer"
            if layer is not self and (reason := branches.altered(layer)):
                return f"the wrapper of {layer.parameter_name}: {reason}"
            active = [] if layer.merged else [name for name in layer.active_adapters if name in layer.lora_A]
            for name in active:
                for factor in layer.factors(name):
                    if reason := branches.obstacle_of(factor, layer.factor_types):
                        return f"a matrix of adapter {name!r} cannot be fused: {reason}"
            if active:
                found[layer.parameter_name] = branches.together([layer.branch(name) for name in active])
            layer = layer.base_layer
        return found

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if len(args) == 2 and not kwargs and not self.disable_adapters:
            adapters = self._branches()
            # Where nothing is added, transformers' own way has its own bits.
            if adapters and not isinstance(adapters, str):
                return experts.forward(self.get_base_layer(), x, *args, adapters)
        return super().forward(x, *args, **kwargs)

    def weight(self) -> Tensor:
        """The parameter as (E, out, in)."""
        return self._stacked(self.get_param().detach())

    def _stacked(self, parameter: Tensor) -> Tensor:
        if parameter.dim() == 2:
            return parameter[None]
        return parameter if self._did_swap_in_out_features else parameter.transpose(1, 2)

    def get_delta_weight(self, adapter_name: str, *args, **kwargs) -> Tensor:
        """What the adapter adds to the parameter, in that parameter's layout and dtype."""
        delta, parameter = self._delta(adapter_name), self.get_param()
        return delta.to(parameter.device, parameter.dtype if branches.is_dense(parameter) else delta.dtype)

    def _delta(self, name: str) -> Tensor:
        product = self.branch(name).product()
        return product[0] if self.get_param().dim() == 2 else self._stacked(product)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """(left, right, scaling), whose product is what the adapter adds to the parameter."""
        A, N, B, scaling, _ = self.branch(adapter_name)
        dtype = self.get_param().dtype
        left, right = (B if N is None else B.to(N.dtype) @ N).to(dtype), A.to(dtype)
        if not self._did_swap_in_out_features:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        return left, right, scaling

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W_e ← W_e + s·B_e·N_e·A_e for each of the adapters, by default the active ones.

        What is added is made first; then parameter and `merged_adapters` change in one step.

        Raises:
            ValueError: the parameter is made anew in every forward, or with safe_merge the sum is not finite.
        """
        branches.check_kept(self.get_base_layer(), self.parameter_name)
        if not branches.is_dense(self.get_param()):
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                parameter, delta = self.get_param().data, self._delta(name)
                if safe_merge:
                    check_finite(name, parameter + delta)
                commit(partial(Tensor.add_, parameter, delta), partial(self.merged_adapters.append, name))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes every merged adapter out of the parameter, the last first: undoes `merge` up to one rounding of W."""
        if not self.merged or not branches.is_dense(self.get_param()):
            super().unmerge()
            return
        while self.merged_adapters:
            branches.check_kept(self.get_base_layer(), self.parameter_name)
            name = self.merged_adapters[-1]
            # An adapter that was deleted since stays in the parameter, as in PEFT.
            if name in self.lora_A:
                commit(partial(Tensor.sub_, self.get_param().data, self._delta(name)), self.merged_adapters.pop)
            else:
                self.merged_adapters.pop()


class NLoraExperts(HasCore, FusedExperts):
    """The same with adapters that have a core: lora_N holds a layer with weight (E·r, r).

    With residual=True the effect is s·(B_e·N_e·A_e − B₀_e·N₀_e·A₀_e): one product of rank 2·r, whose second half,
    lora_A0, lora_N0 and lora_B0, is frozen, so that W stays as it is. With train="core" it is one of rank r with the
    core N − N₀.
    """

    adapter_layer_names = (*FusedExperts.adapter_layer_names, "lora_N")
    other_param_names = (*FusedExperts.other_param_names, "lora_A0", "lora_N0", "lora_B0")

    @classmethod
    def adopt(cls, layer: nn.Module) -> bool:
        """Makes a layer of plain LoRA one of this class, with the adapters that it has; whether it is one now."""
        if type(layer) in (ParamWrapper, FusedExperts):
            layer.__class__ = cls
            layer._make_room()
        return isinstance(layer, cls)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: NLoraConfig, **kwargs) -> None:
        # NOTE: not in __init__, because PEFT's __init__ adds the first adapter.
        if "lora_N" not in self._modules:
            self._make_room()
        has_core = getattr(config, "has_core", False)
        if has_core:
            self._check_core(r, lora_alpha, config)
        self._forget(adapter_name)
        if not has_core:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
            return
        E = self.num_experts
        # Before PEFT's part, which moves, freezes and thaws what is there.
        self.lora_N[adapter_name] = nn.Linear(r, E * r, bias=False)
        if config.train == "core":
            self.frozen_peft_weight_names[adapter_name] = ("lora_A", "lora_B")
        if config.residual:
            self.lora_N0[adapter_name] = Kept(E * r, r)
        uninitialised = copy.copy(config)
        uninitialised.init_lora_weights = False
        super().update_layer(adapter_name, r, lora_alpha, uninitialised, **kwargs)
        if config.residual and config.train == "all":
            for kept, layer in ((self.lora_A0, self.lora_A), (self.lora_B0, self.lora_B)):
                like = layer[adapter_name].weight
                kept[adapter_name] = Kept(*like.shape).to(like.device, like.dtype)
        # Tensors on the meta device are left to whoever loads them.
        if not self.lora_N[adapter_name].weight.is_meta:
            self._initialise(adapter_name, r, config, kwargs.get("target_name") or self.parameter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.frozen_peft_weight_names.pop(adapter_name, None)

    def _sides(self) -> tuple[int, int]:
        return self.weight().shape[1:]

    def _initial_matrices(self, r: int, method: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        with gather_params_ctx(self.get_param()):
            A, N, B = init.adapter(self.weight(), r, method, **options)
        return A.flatten(0, 1), N.flatten(0, 1), B.permute(1, 2, 0).flatten(1)

    def matrices(self, name: str) -> tuple[Tensor, Tensor | None, Tensor]:
        A, N, B = super().matrices(name)
        if name not in self.lora_N:
            return A, N, B
        N = self._A(self.lora_N[name].weight)
        if name in self.lora_N0 and name not in self.lora_A0:
            N = N - self._A(self.lora_N0[name].weight)
        return A, N, B

    def branch(self, name: str) -> Branch:
        own = super().branch(name)
        if name not in self.lora_A0:
            return own
        A0, N0, B0 = (kept[name].weight for kept in (self.lora_A0, self.lora_N0, self.lora_B0))
        return branches.together([own, Branch(self._A(A0), self._A(N0), self._B(B0), -own.scaling)])

    def factors(self, name: str) -> tuple[nn.Module, ...]:
        A, B = super().factors(name)
        return (A, self.lora_N[name], B) if name in self.lora_N else (A, B)


# NOTE: by this name PEFT asks whether a parameter has a wrapper already.
for _layer in (FusedExperts, NLoraExperts):
    _layer.__name__ = ParamWrapper.__name__
