"""What computes does so on the meta device, too, which has shapes and dtypes alone and no autocast."""

import accelerate
import peft
import pytest
import torch
from torch import nn

import nlora_kernels as nk
from nlora_kernels.lora2 import orthogonal_penalty
from python_tests.peft.adapters import METHODS, config
from python_tests.peft.mixtures import TARGETS
from python_tests.tiny import MIXTURES, VOCABULARY

M, K, N, R, C, E = 5, 8, 6, 3, 2, 4


class Made(list):
    """Makes tensors and keeps those that are to get a gradient."""

    def __call__(self, *shape, dtype=torch.float32):
        self.append(torch.empty(shape, device="meta", dtype=dtype, requires_grad=True))
        return self[-1]

    def adapter(self, K, N, *experts):
        return self(*experts, R, K), self(*experts, N, R), self(*experts, R, R)

    def factors(self):
        return self(R, C), self(R), self(C, R)

    def projection(self, K, N):
        return self(N, K), self.adapter(K, N), self(N), 2.0, 0.1

    def parameters(self, model):
        self += [p for p in model.parameters() if p.requires_grad]
        return model


def lora_linear(made, dropout):
    return nk.lora_linear(made(2, M, K), made(N, K), *made.adapter(K, N), made(N), dropout=dropout)


def lora2_core(made):
    return nk.lora2_core(*made.factors(), torch.ones(R, device="meta"))


def lora2_linear(made):
    x, weight, v, V = made(M, K), made(N, K), made(C, K), made(N, C)
    return nk.lora2_linear(x, weight, v, *made.factors(), V, dropout=0.1)


def lora_group_linear(made):
    adapters = [made.adapter(K, N), None]
    return sum(nk.lora_group_linear(made(2, M, K), [made(N, K), made(N, K)], adapters, [made(N), None]))


def lora_mlp(made, recompute):
    projections = made.projection(K, 7), made.projection(K, 7), made.projection(7, N)
    return nk.lora_mlp(made(2, M, K), *projections, recompute=recompute)


def lora_grouped_linear(made):
    offsets = torch.empty(E, device="meta", dtype=torch.int32)
    return nk.lora_grouped_linear(made(M, K), offsets, made(E, N, K), *made.adapter(K, N, E), made(E, N))


def plain(made, kind, **options):
    base = nn.Linear(K, N, device="meta", dtype=torch.bfloat16)
    layer = made.parameters(kind.from_linear(base, R, dropout=0.1, **options))
    return layer(made(2, M, K, dtype=torch.bfloat16))


def of_peft(made, method):
    with accelerate.init_empty_weights():
        base = nn.Sequential(nn.Linear(K, 7), nn.Linear(7, N, bias=False))
        model = peft.get_peft_model(base, config(method, lora_dropout=0.1))
    return made.parameters(model)(made(2, M, K))


def experts(made, mixture, method):
    with accelerate.init_empty_weights():
        model = peft.get_peft_model(MIXTURES[mixture](), config(method, **TARGETS))
    return made.parameters(model)(torch.ones(2, M, device="meta", dtype=torch.long)).logits


def penalty(made, form):
    factors = "lora_v", "lora_u", "lora_U", "lora_V"
    layer = nk.LoRA2Linear.from_linear(nn.Linear(K, N, device="meta"), R, C)
    made += [getattr(layer, name) for name in factors]
    return orthogonal_penalty(layer, form)


# What is called, with which options, and the shape of what it gives.
CASES = {
    "lora_linear": (lora_linear, {"dropout": 0.0}, (2, M, N)),
    "dropout": (lora_linear, {"dropout": 0.1}, (2, M, N)),
    "lora2_core": (lora2_core, {}, (C, C)),
    "lora2_linear": (lora2_linear, {}, (M, N)),
    "lora_group_linear": (lora_group_linear, {}, (2, M, N)),
    "lora_mlp": (lora_mlp, {"recompute": False}, (2, M, N)),
    "recomputed": (lora_mlp, {"recompute": True}, (2, M, N)),
    "lora_grouped_linear": (lora_grouped_linear, {}, (M, N)),
    "NLoraLinear": (plain, {"kind": nk.NLoraLinear}, (2, M, N)),
    "LoRA2Linear": (plain, {"kind": nk.LoRA2Linear, "k": C}, (2, M, N)),
    **{form: (penalty, {"form": form}, ()) for form in ("paper", "reference")},
    **{method: (of_peft, {"method": method}, (2, M, N)) for method in METHODS},
    **{
        f"{mixture}-{method}": (experts, {"mixture": mixture, "method": method}, (2, M, VOCABULARY))
        for mixture in MIXTURES
        for method in ("lora", "nlora", "lora2")
    },
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_dtypes_of_results_and_gradients(case, autocast):
    function, options, shape = CASES[case]
    made = Made()
    with torch.autocast("cpu", enabled=autocast):
        y = function(made, **options)
        y.sum().backward()
    assert y.is_meta and (y.shape, y.dtype) == (shape, made[-1].dtype)
    assert [(t.grad.shape, t.grad.dtype) for t in made] == [(t.shape, t.dtype) for t in made]


@pytest.mark.parametrize("function", [lora2_core, lora2_linear, lora_group_linear, lora_grouped_linear])
def test_gradients_that_are_differentiated(function):
    made = Made()
    (grad,) = torch.autograd.grad(function(made).sum(), made[2:3], create_graph=True)
    assert grad.is_meta and grad.shape == made[2].shape and grad.requires_grad
    grad.sum().backward()


def test_dtypes_that_do_not_fit_are_named():
    made = Made()
    with pytest.raises(TypeError, match="weight must have x's dtype torch.float32, got torch.bfloat16"):
        nk.lora_linear(made(M, K), made(N, K, dtype=torch.bfloat16), *made.adapter(K, N))
