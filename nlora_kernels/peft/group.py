"""Layers of a model that share x as one operation: q, k and v of its attention, and its gated MLPs."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import internals
from ..layers import branch as branches
from ..ops import lora_mlp
from ..ops.checks import check_module
from ..ops.mlp import ACTIVATIONS
from . import sharing
from .layer import FusedLinear

# What layers that share x are called. In a forward that feeds them otherwise their group dissolves.
NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def group(model: nn.Module, *, recompute: bool = False, **inputs) -> nn.Module:
    """Has adapter layers of a model that share x computed as one operation: `lora_group_linear` and `lora_mlp`

    The layers of an attention that get the same x, with an adapter or without, are computed when the first of them is
    called. An MLP that is down(act(gate(x)) ⊙ up(x)), which is tried out on random numbers, is one operation that keeps
    half as much for backward. Outputs, parameters and state dict stay as they are, and so does the model's code;
    `ungroup` takes it back. A layer that cannot take part as it is (hooks, a quantised base, several adapters at once,
    dropout where the backend has none) computes by itself for as long as that is so. Where layers turn out not to get
    the same x, their group dissolves, with one warning for the model. Code that torch.compile traces cannot tell an x
    that has been changed in place between its layers: run such a model once before, or group it with inputs.

    Args:
        model: a PEFT model of this package, or after `fuse`.
        recompute: has backward make the outputs of gate and up again, too.
        inputs: of a forward, which is then run once to see which layers get the same x; without them the names that
            Llama, Mistral, Qwen, Gemma, Phi, BERT, DeBERTa, ViT and their kin give them say so.

    Returns:
        The model itself.

    Raises:
        TypeError: model is no module. ValueError: it has no such layers.
    """
    ungroup(model)
    parents = {name: module for name, module in model.named_modules() if _candidates(module)}
    try:
        for parent in parents.values():
            _take_part(_candidates(parent))
        seen = _watched(model, inputs) if inputs else None
        notice = _Notice()
        for name, parent in parents.items():
            groups, mlp = _groups(parent, seen), _mlp_of(parent, recompute)
            if groups or mlp:
                parent.__dict__["_sharing"] = Sharing(name, groups, mlp, notice)
                parent.__class__ = _scope(type(parent))
    finally:
        for parent in parents.values():
            _stand_aside(parent)
    if not any(isinstance(module, Scope) for module in model.modules()):
        raise ValueError(
            "model must have fused adapter layers that share x, got none: is it a PEFT model of this package?"
        )
    return model


def ungroup(model: nn.Module) -> nn.Module:
    """Takes `group` back and returns the model. Raises TypeError if it is no module."""
    check_module(model)
    for module in list(model.modules()):
        if isinstance(module, Scope):
            module.__class__ = type(module).kind
            del module.__dict__["_sharing"]
            _stand_aside(module)
    return model


class SharedLinear(nn.Linear):
    """A linear layer without an adapter that may be part of a group."""

    # What else is known to be one may stand around it.
    computes_linear = True

    def forward(self, x: Tensor) -> Tensor:
        forward = sharing.current()
        if forward is not None:
            y = forward.output(self, x)
            if y is not None:
                return y
        return super().forward(x)

    def base(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def taken(self, x: Tensor) -> sharing.Taken | None:
        """What it computes of x now, if that is all it does."""
        if branches.obstacle(self) or not branches.is_plain(x):
            return None
        return sharing.Taken(self.weight, self.bias)

    def _get_name(self) -> str:
        return nn.Linear.__name__


class Scope:
    """What the class of a module with groups has beside its own: its layers find each other in its forward."""

    # The module's own class.
    kind: type[nn.Module]

    def __reduce_ex__(self, protocol):
        # A class that is made at run time is not found by its name.
        return _made, (type(self).kind,), *super().__reduce_ex__(protocol)[2:]


def _made(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(_scope(kind))


def _scope(kind: type[nn.Module]) -> type[nn.Module]:
    return _scope_of(kind, kind.forward)


@functools.cache
def _scope_of(kind: type[nn.Module], known: Callable) -> type[nn.Module]:
    @functools.wraps(known)
    def forward(self, *args, **kwargs):
        # It may have been replaced since by one that computes anything else.
        function = kind.forward
        return self.__dict__["_sharing"].forward(self, function, function is known, args, kwargs)

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (Scope, kind), {**names, "kind": kind, "forward": forward})


class _Notice:
    """Whether a model has warned of a group that dissolved."""

    given = False


class Mlp(NamedTuple):
    """The children that are its parts."""

    gate: str
    up: str
    down: str
    act: str
    activation: str
    recompute: bool
    # The module `act` as it was when it computed that activation.
    made_of: tuple

    def output(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """That of the module, or None if its parts are to be called."""
        children = module._modules
        if not all(branches.is_called_plainly(children[name]) for name in self[:4]):
            return None
        if not _is_made_of(children[self.act], self.made_of):
            return None
        layers = [children[name] for name in self[:3]]
        parts = [sharing.taken(layer, x) for layer in layers]
        if None in parts:
            return None
        return lora_mlp(x, *[part.projection() for part in parts], self.activation, recompute=self.recompute)


class Sharing:
    """What the layers of a module share: the names of children that get the same x, and of those that are an MLP."""

    def __init__(self, name: str, groups: list[tuple[str, ...]], mlp: Mlp | None, notice: _Notice):
        self.name, self.groups, self.mlp, self.notice = name, groups, mlp, notice
        # The groups of the last forward: what a checkpoint computes again in backward must be computed alike.
        self.last = groups

    def forward(self, module: nn.Module, function: Callable, known: bool, args: tuple, kwargs: dict):
        """function(module, …); whether it is `known`, the one that was looked at."""
        if self.mlp is not None and known and len(args) == 1 and not kwargs:
            y = self.mlp.output(module, args[0])
            if y is not None:
                return y
        names = self._active()
        children = module._modules
        groups = [sharing.Group(tuple([children[name] for name in group])) for group in names]
        before = sharing.enter(sharing.Forward(groups))
        try:
            result = function(module, *args, **kwargs)
        finally:
            sharing.enter(before)
        if not torch.compiler.is_compiling():
            for group, of in zip(groups, names, strict=True):
                if group.left:
                    self._dissolve(of, [of[i] for i in group.left])
        return result

    def _active(self) -> list[tuple[str, ...]]:
        if torch.compiler.is_compiling():
            return self.groups
        if not internals.in_backward():
            self.last = self.groups
        return self.last

    def _dissolve(self, group: tuple[str, ...], missed: list[str]) -> None:
        self.groups = [of for of in self.groups if of != group]
        if not self.notice.given:
            self.notice.given = True
            warnings.warn(
                f"{' and '.join(missed)} of {self.name or 'the model'} did not get the x of the layers beside: that "
                "group is computed one by one from now on, and so will be every other of which it is true",
                stacklevel=2,
            )


# Finding them


def _candidates(module: nn.Module) -> list[nn.Module]:
    """The linear children of a module, if adapters are among them."""
    children = [child for child in module._modules.values() if _is_linear(child)]
    return children if any(isinstance(child, FusedLinear) for child in children) and len(children) > 1 else []


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, FusedLinear) or type(module) in (nn.Linear, SharedLinear)


def _take_part(layers: list[nn.Module]) -> None:
    for layer in layers:
        if type(layer) is nn.Linear:
            layer.__class__ = SharedLinear


def _stand_aside(parent: nn.Module) -> None:
    """Makes children that are in no group nn.Linear again, also where an adapter has been put around them since."""
    own = parent.__dict__.get("_sharing")
    names = {name for group in own.groups for name in group} | set(own.mlp[:3] if own.mlp else ()) if own else ()
    for name, child in parent._modules.items():
        base = child.get_base_layer() if isinstance(child, FusedLinear) else child
        if type(base) is SharedLinear and (base is not child or name not in names):
            base.__class__ = nn.Linear


def _watched(model: nn.Module, inputs: dict) -> dict[nn.Module, tuple[Tensor, int]]:
    """{layer: the first x that it gets in a forward, and its version}"""
    watch = sharing.Watch()
    before = sharing.enter(watch)
    try:
        # In inference mode no tensor counts its changes.
        with torch.inference_mode(False), torch.no_grad():
            model(**inputs)
    finally:
        sharing.enter(before)
    return watch.seen


def _groups(parent: nn.Module, seen: dict | None) -> list[tuple[str, ...]]:
    children = {name: child for name, child in parent._modules.items() if _is_linear(child)}
    if seen is None:
        found = [tuple(name for name in names if name in children) for names in NAMES]
        # One and a half of a name is no group: {q_proj, k_proj} without v_proj is not known.
        found = [of for of, names in zip(found, NAMES, strict=True) if of == names]
        found = [of for of in found if len({children[name].in_features for name in of}) == 1]
    else:
        by_x: dict[tuple[int, int], list[str]] = {}
        for name, child in children.items():
            if child in seen:
                x, version = seen[child]
                by_x.setdefault((id(x), version), []).append(name)
        found = [tuple(names) for names in by_x.values() if len(names) > 1]
    return [of for of in found if any(isinstance(children[name], FusedLinear) for name in of)]


def _mlp_of(module: nn.Module, recompute: bool) -> Mlp | None:
    """Its parts, if a module is a gated MLP: its code names nothing but its children, and it computes what one does."""
    linear = {name: child for name, child in module._modules.items() if _is_linear(child)}
    others = [name for name, child in module._modules.items() if name not in linear]
    code = getattr(type(module).forward, "__code__", None)
    if len(linear) != 3 or len(others) != 1 or code is None or set(code.co_names) - {*linear, *others}:
        return None
    # What a decorator wraps is named by no code.
    if code.co_freevars or len(inspect.signature(module.forward).parameters) != 1 or not _is_function(module, *others):
        return None
    for down in linear:
        gate, up = (name for name in linear if name != down)
        weights = [branches.tensor_of(_base(layer), "weight") for layer in linear.values()]
        if not all(branches.is_dense(w) and not w.is_meta and w.dtype is weights[0].dtype for w in weights):
            return None
        if linear[gate].in_features != linear[up].in_features:
            continue
        for names in ((gate, up, down), (up, gate, down)):
            activation = _tried(module, *names, others[0])
            if activation:
                return Mlp(*names, others[0], activation, recompute, _made_of(module._modules[others[0]]))
    return None


def _is_function(module: nn.Module, name: str) -> bool:
    """Whether a child is a module of no parts and no tensors."""
    child = module._modules[name]
    inside = *child.children(), *child.parameters(), *child.buffers()
    return not inside and not any(isinstance(value, Tensor) for value in _made_of(child)[1].values())


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _made_of(module: nn.Module) -> tuple[type[nn.Module], dict]:
    """The class of a module and its own attributes, which with it say what such a module computes."""
    return type(module), {name: value for name, value in module.__dict__.items() if name not in _OF_EVERY_MODULE}


def _is_made_of(module: nn.Module, before: tuple[type[nn.Module], dict]) -> bool:
    """Whether it is what it was; private marks that it has got since, as FSDP2 sets, are of no account."""
    kind, own = before
    now = {name: value for name, value in _made_of(module)[1].items() if name in own or not name.startswith("_")}
    return type(module) is kind and now == own


def _base(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, FusedLinear) else layer


@torch.no_grad()
def _tried(module: nn.Module, gate: str, up: str, down: str, act: str) -> str | None:
    """The activation with which the module computes down(act(gate(x)) ⊙ up(x)), to the last bit."""
    layers = [module._modules[name] for name in (gate, up, down)]
    weight = branches.tensor_of(_base(layers[0]), "weight")
    # None of the user's random numbers is used up.
    numbers = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(8, layers[0].in_features, dtype=weight.dtype, device=weight.device, generator=numbers)
    probe = sharing.Probe()
    before = sharing.enter(probe)
    try:
        y = type(module).forward(module, x)
        calls = [probe.calls.get(layer) for layer in layers]
        if None in calls:
            return None
        (x_gate, g), (x_up, u), (product, out) = calls
        activated = module._modules[act](g)
    finally:
        sharing.enter(before)
    if not (x_gate is x and x_up is x and out is y and torch.equal(activated * u, product)):
        return None
    return next((name for name, of in ACTIVATIONS.items() if torch.equal(of(g), activated)), None)
