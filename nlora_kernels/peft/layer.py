"""PEFT's LoRA linear layer with base layer and adapter computed as one operation."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..backends import quantised
from ..backends.base import PLAIN
from ..backends.quantised import Unreadable
from ..backends.quantised.torchao import name_of_type
from ..commit import commit
from ..layers import branch as branches
from ..layers import engines
from ..layers.branch import Branch, Lora2Branch, tensor_of
from . import base as base_weights
from . import sharing, tensor_parallel


class Term(NamedTuple):
    """One adapter's part in a forward."""

    name: str
    # Which samples of the batch take part; None for all.
    rows: list[int] | None = None
    # The factor of the adapter's initial product, if the term is that product; None if it is the adapter.
    initial: float | None = None


class FusedLinear(Linear):
    """y = x·Wᵀ + bias + Σ s·((x·Aᵀ)·Nᵀ)·Bᵀ over the active adapters

    The active adapters are one operation with their base layer, as one of summed rank; one alone with its dropout too,
    where the backend takes that in. What cannot be fused is added by a branch of its own, and where nothing can, the
    base layer is called, as in PEFT.
    """

    # The mappings whose modules, of these types, hold the matrices of an adapter, in the order in which x meets them.
    # An adapter may be missing in one of them.
    factor_names: tuple[str, ...] = ("lora_A", "lora_B")
    factor_types: tuple[type[nn.Module], ...] = (nn.Linear,)
    # PEFT's layer in whose place it stands: module and name.
    stock = Linear.__module__, Linear.__name__
    # Its place in the model, for messages.
    layer_name = ""
    # Where PEFT's layer on a quantised weight has not said it.
    is_target_conv_1d_layer = False

    def branch(self, name: str) -> Branch | Lora2Branch:
        """What an adapter adds now."""
        return self._branch_of(name, self.weights(name))

    def _branch_of(self, name: str, weights: list[Tensor]) -> Branch | Lora2Branch:
        return Branch(*self._matrices_of(name, weights), self.scaling[name], self.dropped(name))

    def matrices(self, name: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """(A (r, in), N (r, r) or None, B (out, r)) of an adapter."""
        return self._matrices_of(name, self.weights(name))

    def _matrices_of(self, name: str, weights: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        A, B = weights
        return A, None, B

    def weights(self, name: str) -> list[Tensor]:
        """The weights of an adapter's modules."""
        return [tensor_of(factor, "weight") for factor in self.factors(name)]

    def _plain_weights(self, name: str, base: bool = True) -> list[Tensor] | None:
        """The same, if at a look nothing is in the way of fusing the modules that hold them, nor the base layer."""
        return branches.plain_weights(self, name, self.factor_names, self.factor_types, base)

    def factors(self, name: str) -> tuple[nn.Module, ...]:
        """The modules that hold the matrices of an adapter: hooks on them must run."""
        mappings = [self._modules[mapping]._modules for mapping in self.factor_names]
        return tuple([modules[name] for modules in mappings if name in modules])

    def _outer(self) -> dict[str, nn.Module]:
        """The module of every adapter that x is multiplied by first."""
        # NOTE: here and below from the dictionaries, for it is done in every forward, and a module's attributes that
        # are modules cost ten times as much.
        return self._modules[self.adapter_layer_names[0]]._modules

    def obstacle(self, name: str | None = None) -> str | None:
        """None if the base layer and an adapter, by default what is active, can be one operation, else why not."""
        base = self._modules["base_layer"]
        reason = branches.obstacle(base)
        split = tensor_parallel.split_of(base) if reason else None
        if reason and split is None:
            return reason
        if name is None:
            return self._obstacle_to_active()
        if split is not None:
            reason = tensor_parallel.obstacle(self.factors(name))
        elif self._plain_weights(name, base=False) is None:
            # A hook on FSDP1's wrapper would be given the weight, for which alone it is called.
            kinds, factors = self.factor_types, self.factors(name)
            found = (branches.obstacle_of(engines.inside(f), kinds) or branches.altered(f) for f in factors)
            reason = next(filter(None, found), None)
        if reason:
            return f"a matrix of adapter {name!r} cannot be fused: {reason}"
        return self._obstacle_to_branch(name)

    def _obstacle_to_branch(self, name: str) -> str | None:
        """The same of what an adapter has beside its matrices."""
        dropout = self._modules["lora_dropout"]._modules[name]
        reason, kind = branches.altered(dropout), type(dropout)
        if kind is nn.Dropout:
            reason = reason or (branches.dropout_obstacle(self._modules["base_layer"]) if dropout.training else None)
        elif kind is not nn.Identity:
            reason = f"its type is {kind.__qualname__}"
        if reason:
            return f"adapter {name!r} has dropout: {reason}"
        if self.lora_bias.get(name):
            return f"adapter {name!r} has a bias"
        scaling = self.scaling[name]
        if isinstance(scaling, Tensor):
            return f"the scaling of adapter {name!r} is a tensor"
        if not scaling:
            return f"adapter {name!r} weighs nothing, and the base layer's own bits are kept"
        return None

    def _obstacle_to_active(self) -> str | None:
        if self.lora_variant:
            return f"the adapter {next(iter(self.lora_variant))!r} is of a variant that computes itself"
        terms = self._terms(None)
        for term in terms:
            if reason := self._obstacle_to(term):
                return reason
        dropping = [term.name for term in terms if term.initial is None and self.dropped(term.name)]
        if dropping and len(terms) > 1:
            return f"adapter {dropping[0]!r} has dropout, and is not all that is added"
        return None

    def _obstacle_to(self, term: Term) -> str | None:
        """None if the base layer can take in a term, else why not."""
        return self.obstacle(term.name)

    def dropped(self, name: str) -> float:
        """The probability of dropout that is in effect, where it is PyTorch's own."""
        dropout = self._modules["lora_dropout"]._modules[name]
        return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return tensor_parallel.sides(module, super()._get_in_out_features(module))

    def base(self, x: Tensor) -> Tensor:
        """The base layer's output."""
        return self._modules["base_layer"](x)

    def taken(self, x: Tensor) -> sharing.Taken | None:
        """What the layer computes of x now, if that is one operation on dense tensors and all that calling it does."""
        if self.lora_variant or not branches.is_called_plainly(self) or not branches.is_plain(x):
            return None
        if self._disable_adapters and self.merged_adapters:
            return None
        terms, base = self._terms(None), self._modules["base_layer"]
        if len(terms) > 1 or branches.obstacle(base):
            return None
        weight, bias = branches.weight_of(base), tensor_of(base, "bias")
        if not branches.has_dense(base, weight):
            return None
        if not terms:
            return sharing.Taken(weight, bias)
        branch = self._fusible(terms[0], x)
        return branch and sharing.Taken(weight, bias, branch, self._held(terms[0].name))

    def _held(self, name: str) -> tuple[Tensor, ...]:
        """The tensors that an adapter is made of."""
        return tuple(self.weights(name))

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        shared = sharing.current()
        if shared is not None and not args and not kwargs:
            y = shared.output(self, x)
            if y is not None:
                return y
        if self.lora_variant:
            return super().forward(x, *args, **kwargs)
        adapter_names = None
        if kwargs:
            self._check_forward_args(x, *args, **kwargs)
            adapter_names = kwargs.pop("adapter_names", None)
            for key in VARIANT_KWARG_KEYS:
                kwargs.pop(key, None)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        terms = self._terms(adapter_names)
        branch = None
        if terms and not args and not kwargs:
            branch, terms = self._together(terms, x)
        base = self._modules["base_layer"]
        if branch is not None or (not args and not kwargs and self._decodes(terms, x)):
            result = self._fused(x, branch)
        elif tensor_parallel.split_of(base) is not None:
            if not tensor_parallel.is_distributed(self):
                # The matrices of PEFT's own LoRA communicate by themselves.
                return super().forward(x, *args, adapter_names=adapter_names, **kwargs)
            for term in terms:
                self._check_split(term.name)
            return tensor_parallel.apart(base, x, [(self._branch(term), term.rows) for term in terms])
        else:
            result = base(x, *args, **kwargs)
        if not terms:
            return result
        dtype = result.dtype
        for term in terms:
            if term.rows is None:
                result = result + self._part(term, x)
            else:
                result[term.rows] += self._part(term, x[term.rows]).to(dtype)
        return result.to(dtype)

    def _together(self, terms: list[Term], x: Tensor) -> tuple[Branch | Lora2Branch | None, list[Term]]:
        """What the terms that the base layer can take in add, as one branch, and the terms that are left."""
        if len(terms) == 1 and terms[0].rows is None:
            # NOTE: the usual call, and no lists for it.
            branch = self._fusible(terms[0], x)
            return branch, terms if branch is None else []
        split = tensor_parallel.split_of(self._modules["base_layer"]) is not None
        found, apart = [], []
        for term in terms:
            branch = self._fusible(term, x) if term.rows is None else None
            if branch is None:
                apart.append(term)
            else:
                found.append((term, tensor_parallel.own(branch) if split else branch))
        if len(found) > 1 and any([branch.dropout for _, branch in found]):
            # Each drops by a mask of its own.
            drops = [each for each in found if each[1].dropout]
            found = [each for each in found if not each[1].dropout] or [drops.pop(0)]
            apart += [term for term, _ in drops]
        if split and apart:
            # The rest cannot be added outside of the base layer's call, where its ranks sum.
            return None, terms
        return (branches.together([branch for _, branch in found]) if found else None), apart

    def _decodes(self, terms: list[Term], x: Tensor) -> bool:
        """Whether to decode the base layer's weight though no term can be taken in. That is faster than to call it, and
        where something is added nobody asks for its own bits."""
        if not terms or not branches.decodes(self._modules["base_layer"], x):
            return False
        weights = [self.scaling[term.name] if term.initial is None else term.initial for term in terms]
        return any(term.rows is None and (isinstance(s, Tensor) or s) for term, s in zip(terms, weights, strict=True))

    def _check_split(self, name: str) -> None:
        """ValueError if calling a matrix of an adapter does more than multiply: a split layer calls none of them."""
        if reason := tensor_parallel.obstacle(self.factors(name)):
            raise ValueError(
                f"layer {self.layer_name!r}: the matrices of adapter {name!r} must be left as they are where tensor "
                f"parallelism splits the layer, got one with a change: {reason}"
            )

    def _fused(self, x: Tensor, branch: Branch | Lora2Branch | None) -> Tensor:
        base = self._modules["base_layer"]
        if type(tensor_of(base, "weight")) not in PLAIN and tensor_parallel.split_of(base) is not None:
            return tensor_parallel.fused(base, x, branch)
        try:
            return branches.fused(branch, x, base)
        except Unreadable as error:
            raise Unreadable(f"layer {self.layer_name!r}: {error}") from error

    def _fusible(self, term: Term, x: Tensor) -> Branch | Lora2Branch | None:
        """What a term adds, if the base layer can take it in."""
        if type(x) not in PLAIN and tensor_parallel.split_of(self._modules["base_layer"]) is None:
            return None
        if x.is_nested:
            return None
        # NOTE: the usual adapter at one look, a third of what the answers to every question by itself take.
        plain = term.initial is None and self._plain_weights(term.name)
        if plain:
            branch = None if self._obstacle_to_branch(term.name) else self._branch_of(term.name, plain)
        else:
            branch = None if self._obstacle_to(term) else self._branch(term)
        if branch is None:
            return None
        # Where casting is switched off, the branch takes x as it is.
        return branch if self.cast_input_dtype_enabled or x.dtype == branch[0].dtype else None

    def _branch(self, term: Term) -> Branch | Lora2Branch:
        """What a term adds now."""
        return self.branch(term.name)

    def _part(self, term: Term, x: Tensor) -> Tensor:
        """What a term adds, in the adapter's dtype, by calling the modules."""
        name = term.name
        x = self._cast_input_dtype(x, self._outer()[name].weight.dtype)
        return self._apart(name, self.lora_dropout[name](x)) * self.scaling[name]

    def _apart(self, name: str, x: Tensor) -> Tensor:
        """((x·Aᵀ)·Nᵀ)·Bᵀ of an adapter."""
        A, B = self.factors(name)
        return B(A(x))

    def _terms(self, adapter_names: list[str] | None) -> list[Term]:
        if self._disable_adapters or (self.merged_adapters and adapter_names is None):
            return []
        present = self._outer()
        if adapter_names is None:
            active = self._active_adapter
            return [Term(name) for name in ((active,) if type(active) is str else active) if name in present]
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            if name in present:
                rows.setdefault(name, []).append(row)
        return [Term(name, indices) for name, indices in rows.items()]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in that weight's layout and the adapter's dtype.

        Where tensor parallelism splits the weight, to the part that this rank has.
        """
        return self._stored(tensor_parallel.own(self.branch(adapter)).collapsed.product())

    def _stored(self, product: Tensor) -> Tensor:
        """In the layout of the base layer's weight."""
        return product.T if self.fan_in_fan_out else product

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W ← W + s·B·N·A for each of the adapters, by default the active ones; a quantised W is quantised again.

        What is added is made first. Then weight and `merged_adapters` change in one step that nothing can interrupt.

        Raises:
            ValueError: W is of a kind that cannot be added to, or with safe_merge the sum is not finite.
        """
        if self.lora_variant:
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._merge(name, safe_merge)

    def _merge(self, name: str, safe: bool) -> None:
        commit(*self._adding(name, 1, safe), partial(self.merged_adapters.append, name))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes every merged adapter out of the base weight, the last first: undoes `merge` up to one rounding of W."""
        if self.lora_variant or not self.merged:
            super().unmerge()
            return
        while self.merged_adapters:
            self._unmerge(self.merged_adapters[-1])

    def _unmerge(self, name: str) -> None:
        # An adapter that was deleted since stays in the weight, as in PEFT.
        steps = self._adding(name, -1) if name in self.lora_A else ()
        commit(*steps, self.merged_adapters.pop)

    def _adding(self, name: str, sign: int, safe: bool = False) -> tuple[Callable[[], object], ...]:
        """Steps for `commit` that add what the adapter adds to the base layer, or take it away."""
        base = self.get_base_layer()
        check = partial(check_finite, name) if safe else None
        torchao = self.kwargs.get("get_apply_tensor_subclass") or vars(self).get("get_apply_tensor_subclass")
        steps = base_weights.adding(base, self._shift(name), sign, check=check, torchao=torchao)
        if self.lora_bias[name]:
            if base.bias is None:
                raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
            branches.check_kept(base, "bias")
            bias = self.lora_B[name].bias * self.scaling[name]
            if check is not None:
                check(base.bias + bias)
            steps = (*steps, partial(Tensor.add_, base.bias.data, bias, alpha=sign))
        return steps

    def _shift(self, name: str) -> Tensor:
        """What merging the adapter adds to the base weight as it is."""
        return self.get_delta_weight(name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, holding what PEFT's unload and merge_and_unload promise."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def _get_name(self) -> str:
        # Printed, plain LoRA is PEFT's own layer, as it is to whoever asks for its type.
        return self.stock[1] if type(self) in FUSED.values() else super()._get_name()

    def extra_repr(self) -> str:
        return "fused by nlora_kernels"


class FusedLinear4bit(FusedLinear):
    """The same in the place of PEFT's layer on a 4-bit one of bitsandbytes."""

    stock = "peft.tuners.lora.bnb", "Linear4bit"


class FusedLinear8bitLt(FusedLinear):
    """On an 8-bit one of bitsandbytes."""

    stock = "peft.tuners.lora.bnb", "Linear8bitLt"


class FusedTorchaoLinear(FusedLinear):
    """On one whose weight is torchao's."""

    stock = "peft.tuners.lora.torchao", "TorchaoLoraLinear"


# {PEFT's layer of plain LoRA: ours}, by name, because theirs are there only where the quantising library is.
FUSED = {kind.stock: kind for kind in (FusedLinear, FusedLinear4bit, FusedLinear8bitLt, FusedTorchaoLinear)}


def plain_layer(base: nn.Module) -> type[FusedLinear]:
    """The class of plain LoRA on such a base layer."""
    if quantised.is_layer(type(base)):
        return FusedLinear8bitLt if type(base).__name__ == "Linear8bitLt" else FusedLinear4bit
    return FusedTorchaoLinear if name_of_type(base.weight) else FusedLinear


def check_finite(adapter: str, merged: Tensor) -> None:
    if not torch.isfinite(merged).all():
        # In the words of PEFT, which its users look for.
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
