"""NLoraLinear and LoRA2Linear."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nlora_kernels as nk

METHODS = {
    "lora": {"init": "lora"},
    "slora": {"init": "slora"},
    "slora_gaussian": {"init": "slora_gaussian"},
    "nlora": {},
    "nlora_optimal": {"core": "optimal", "select": "pivoted"},
    "nlora_residual": {"residual": True},
    "inttune": {"train": "core"},
    "optimal_residual": {"core": "optimal", "residual": True},
    "inttune_residual": {"train": "core", "residual": True, "core": "optimal"},
    "inttune_pinv": {"train": "core", "residual": True, "core": "pinv"},
    "pinv_residual": {"core": "pinv", "residual": True},
}


def adapted(method, *, dtype=torch.float32, bias=True, r=4, alpha=6):
    """(the layer, its base before adaptation)"""
    torch.manual_seed(0)
    linear = nn.Linear(24, 18, bias=bias, dtype=dtype)
    original = nn.Linear(24, 18, bias=bias, dtype=dtype)
    original.load_state_dict(linear.state_dict())
    if method == "lora2":
        return nk.LoRA2Linear.from_linear(linear, r, 3, alpha=alpha), original
    return nk.NLoraLinear.from_linear(linear, r, alpha=alpha, **METHODS[method]), original


def disturb(layer):
    """One step of training: every trainable tensor moves."""
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)


@pytest.mark.parametrize(
    "method", ["lora", "slora", "slora_gaussian", "nlora_residual", "inttune_residual", "pinv_residual", "lora2"]
)
def test_step_0_leaves_the_function_unchanged(method):
    layer, original = adapted(method)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), original(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["nlora_residual", "optimal_residual", "inttune_residual", "inttune_pinv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_step_0_of_a_16_bit_residual_moves_by_its_rounding_alone(dtype, method):
    layer, original = adapted(method, dtype=dtype)
    x = torch.randn(200, 24, dtype=dtype)
    exact = (x.double() @ original.weight.double().T) + original.bias.double()
    # What rounding W once changes, which the residual weight cannot avoid, and the output's own rounding.
    rounding = (
        x.double() @ (0.5 * torch.finfo(dtype).eps * torch.randn(18, 24).sign().double() * original.weight.double()).T
    )
    allowed = 2 * rounding.norm() + 2 * (original(x).double() - exact).norm()
    assert (layer(x).double() - exact).norm() <= allowed


def test_published_nystrom_moves_the_function_by_its_product():
    layer, original = adapted("nlora")
    assert torch.equal(layer.lora_A, original.weight[:4])
    assert torch.equal(layer.lora_N, original.weight[:4, :4])
    assert torch.equal(layer.lora_B, original.weight[:, :4])
    x = torch.randn(5, 24)
    moved = x @ (layer.scaling * layer.lora_B @ layer.lora_N @ layer.lora_A).T
    torch.testing.assert_close(layer(x), original(x) + moved)


@pytest.mark.parametrize("method", [*METHODS, "lora2"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_merged_equals_unmerged(method, bias):
    layer, _ = adapted(method, bias=bias)
    disturb(layer)
    x = torch.randn(7, 24)
    y, weight = layer(x), layer.base.weight.clone()
    layer.merge()
    layer.merge()
    assert layer.merged and not torch.equal(layer.base.weight, weight)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.base.weight - weight, layer.delta_weight(), rtol=1e-4, atol=1e-5)
    layer.unmerge()
    layer.unmerge()
    torch.testing.assert_close(layer.base.weight, weight)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "lora2"])
def test_the_state_dict_restores_the_layer(method):
    layer, _ = adapted(method)
    disturb(layer)
    other, _ = adapted(method)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("method", ["lora", "nlora_residual", "inttune_residual", "lora2"])
def test_a_state_dict_says_whether_the_adapter_is_in_the_base_weight(method, tmp_path):
    layer, _ = adapted(method)
    disturb(layer)
    x = torch.randn(3, 24)
    y = layer(x)
    layer.merge()
    torch.save(nn.Sequential(layer).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = nn.Sequential(adapted(method)[0])
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ValueError, match="layer '0': the adapter is not merged .* it is: bring both to the same"):
        other.load_state_dict(state)
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())
    other[0].merge()
    other.load_state_dict(state)
    for both in (lambda: None, lambda: [each.unmerge() for each in (layer, other[0])]):
        both()
        assert torch.equal(other(x), layer(x))
        torch.testing.assert_close(other(x), y, rtol=1e-5, atol=1e-5)
    other[0].merge()
    with pytest.raises(ValueError, match="layer '': the adapter is merged .* it is not: bring"):
        other[0].load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="the adapter is merged .* an adapter alone"):
        other[0].load_state_dict({k: t for k, t in layer.state_dict().items() if "lora" in k}, strict=False)


def test_a_residual_base_weight_brings_the_scaling_with_which_it_was_made():
    layer, original = adapted("nlora_residual", alpha=6)
    disturb(layer)
    other, _ = adapted("nlora_residual", alpha=24)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 24)
    torch.testing.assert_close(other(x) - original(x), 4 * (layer(x) - original(x)), rtol=1e-4, atol=1e-5)
    again, _ = adapted("nlora_residual", alpha=6)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(x), layer(x))


def trainable(layer):
    return {name for name, p in layer.named_parameters() if p.requires_grad}


def test_what_trains():
    assert trainable(adapted("lora")[0]) == {"lora_A", "lora_B"}
    assert trainable(adapted("nlora")[0]) == {"lora_A", "lora_N", "lora_B"}
    assert trainable(adapted("inttune")[0]) == {"lora_N"}
    assert trainable(adapted("lora2")[0]) == {"lora_v", "lora_u", "lora_E", "lora_U", "lora_V"}
    assert "lora_mask" in adapted("lora2")[0].state_dict()


@pytest.mark.parametrize("method", [*METHODS, "lora2"])
def test_training_lowers_the_loss(method):
    layer, _ = adapted(method)
    if method == "lora2":
        # Both sides of the chain are 0.02-sized and E is 0: give the gradient something to work with.
        nn.init.normal_(layer.lora_E)
    x, target = torch.randn(64, 24), torch.randn(64, 18)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("method", ["nlora", "inttune", "lora2"])
def test_activation_checkpointing(method, use_reentrant):
    layer, _ = adapted(method)
    disturb(layer)
    x = torch.randn(5, 24, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def gradients(y):
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    plain = gradients(layer(x))
    for recomputed, expected in zip(gradients(checkpoint(layer, x, use_reentrant=use_reentrant)), plain, strict=True):
        assert torch.equal(recomputed, expected)


def test_a_masked_singular_value_has_no_say():
    layer, _ = adapted("lora2")
    disturb(layer)
    x = torch.randn(3, 24)
    layer.lora_mask[1] = 0
    y = layer(x)
    with torch.no_grad():
        layer.lora_E[1] = 100.0
    assert torch.equal(layer(x), y)
    layer(x).sum().backward()
    assert layer.lora_E.grad[1] == 0 and layer.lora_E.grad[0] != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_on_a_16_bit_base_are_fp32_unless_asked_otherwise(dtype):
    layer, original = adapted("nlora", dtype=dtype)
    assert layer.lora_A.dtype == torch.float32 and torch.equal(layer.lora_A, original.weight[:4].float())
    assert layer(torch.randn(2, 24, dtype=dtype)).dtype == dtype
    same = nk.NLoraLinear.from_linear(nn.Linear(24, 18, dtype=dtype), 4, dtype=dtype)
    assert same.lora_N.dtype == dtype


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("method", ["nlora", "inttune_residual", "lora2"])
def test_a_base_that_computes_something_else_keeps_its_own_forward(method):
    layer, _ = adapted(method)
    disturb(layer)
    x = torch.randn(3, 24)
    branch = layer(x) - layer.base(x)
    hook = layer.base.register_forward_hook(lambda module, args, y: 3 * y)
    torch.testing.assert_close(layer(x), layer.base(x) + branch)
    hook.remove()
    layer.base.__class__ = Doubled
    torch.testing.assert_close(layer(x), layer.base(x) + branch)


def test_scaling():
    assert adapted("nlora", r=4, alpha=6)[0].scaling == 1.5
    assert nk.NLoraLinear.from_linear(nn.Linear(8, 8), 4).scaling == 1.0
    assert nk.LoRA2Linear.from_linear(nn.Linear(8, 8), 4, 2, alpha=8).scaling == 2.0
    assert "r=4, alpha=6" in repr(adapted("nlora")[0]) and "k=3" in repr(adapted("lora2")[0])


BAD = {
    "module": (lambda: nk.NLoraLinear.from_linear(nn.Conv1d(4, 4, 1), 2), TypeError, "linear must be an nn.Linear"),
    "lora2_module": (lambda: nk.LoRA2Linear.from_linear(3, 2, 2), TypeError, "linear must be an nn.Linear, got int"),
    "lazy": (
        lambda: nk.NLoraLinear.from_linear(nn.LazyLinear(3), 2),
        ValueError,
        "weight of linear must be initialised, got a LazyLinear that was not called yet",
    ),
    "lora2_lazy": (lambda: nk.LoRA2Linear.from_linear(nn.LazyLinear(3), 2, 2), ValueError, "must be initialised"),
    "lazy_base": (
        lambda: nk.NLoraLinear(nn.LazyLinear(6), torch.ones(2, 8), torch.ones(6, 2)),
        ValueError,
        "weight of base must be initialised",
    ),
    "alpha_nan": (
        lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, alpha=float("nan")),
        ValueError,
        "alpha must be finite, got nan",
    ),
    "alpha": (lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, alpha="16"), TypeError, "alpha must be a real"),
    "init": (lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, init="pissa"), ValueError, "init must be one of"),
    "train": (lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, train="A"), ValueError, "train must be one of"),
    "rank": (lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 9), ValueError, "r must be at least 1"),
    "core_of_lora": (
        lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, init="lora", train="core"),
        ValueError,
        "train='core' needs a lora_N",
    ),
    "residual": (
        lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, init="slora", residual=True),
        ValueError,
        "residual=True needs",
    ),
    "core_of_slora": (
        lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, init="slora", core="smaple"),
        ValueError,
        "core must be one of sample, optimal, pinv, got 'smaple'",
    ),
    "residual_text": (
        lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, residual="no"),
        ValueError,
        "residual must be true or false, got 'no'",
    ),
    "pinv": (lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2, core="pinv"), ValueError, "needs residual=True"),
    "pinv_of_16_bits": (
        lambda: nk.NLoraLinear.from_linear(nn.Linear(8, 8).half(), 2, core="pinv", residual=True),
        ValueError,
        "needs a base weight in float32, got torch.float16",
    ),
}


@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


MATRICES = {"lora_A": (2, 8), "lora_B": (6, 2), "lora_N": (2, 2)}
FACTORS = {"lora_v": (2, 8), "lora_u": (3, 2), "lora_E": (3,), "lora_U": (2, 3), "lora_V": (6, 2)}
WRONG = {
    "vector": (lambda t: t.flatten()[:1], ValueError, "must have shape"),
    "wider": (lambda t: torch.cat([t, t], -1), ValueError, "must have shape"),
    "stacked": (lambda t: t[None], ValueError, "must have shape"),
    "complex": (lambda t: t.to(torch.complex64), TypeError, "must be one of .*, got torch.complex64"),
    "integer": (lambda t: t.int(), TypeError, "must be one of .*, got torch.int32"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), TypeError, "must be one of .*, got torch.float8_e4m3fn"),
    "list": (lambda t: t.tolist(), TypeError, "must be a Tensor, got list"),
}


@pytest.mark.parametrize("wrong, error, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", [nk.NLoraLinear, nk.LoRA2Linear])
def test_matrices_that_do_not_fit_leave_the_layer(kind, residual, wrong, error, message):
    shapes, options = (MATRICES, {"residual": residual}) if kind is nk.NLoraLinear else (FACTORS, {})
    linear = nn.Linear(8, 6)
    before = linear.weight.clone()
    for name in shapes:
        given = {each: torch.ones(shape) for each, shape in shapes.items()}
        given[name] = wrong(given[name])
        with pytest.raises(error, match=message):
            kind(linear, **given, **options)
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad and linear.bias.requires_grad


def test_a_residual_needs_a_core_and_its_device():
    linear = nn.Linear(8, 6)
    before = linear.weight.clone()
    A, B, N = (torch.ones(shape) for shape in MATRICES.values())
    with pytest.raises(ValueError, match="residual=True needs a lora_N"):
        nk.NLoraLinear(linear, A, B, residual=True)
    with pytest.raises(ValueError, match="A must be on cpu .*, got meta"):
        nk.NLoraLinear(linear, *(t.to("meta") for t in (A, B, N)), residual=True)
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad


def freed(t):
    t.untyped_storage().resize_(0)
    return t


def test_memory_that_was_freed_is_named():
    linear = nn.Linear(8, 6)
    before = linear.weight.clone()
    A, B, N = (torch.ones(shape) for shape in MATRICES.values())
    with pytest.raises(ValueError, match="lora_N has no memory"):
        nk.NLoraLinear(linear, A, B, freed(N), residual=True)
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad
    freed(linear.weight.data)
    for residual in (False, True):
        with pytest.raises(ValueError, match="weight has no memory"):
            nk.NLoraLinear.from_linear(linear, 2, residual=residual)
    assert linear.weight.requires_grad


def test_matrices_fit_the_weight_that_a_layer_has_now():
    linear = nn.Linear(8, 6)
    linear.weight = nn.Parameter(linear.weight.detach()[:, :4].clone())
    assert nk.NLoraLinear.from_linear(linear, 2)(torch.ones(1, 4)).shape == (1, 6)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int32, "fp32", [torch.float32]], ids=str)
@pytest.mark.parametrize("options", [{"r": 2, "residual": True}, {"r": 2}, {"r": 2, "k": 2}], ids=str)
def test_a_dtype_that_no_operation_takes_is_refused(options, dtype):
    linear = nn.Linear(8, 8)
    before = linear.weight.clone()
    with pytest.raises(TypeError, match="dtype must be one of bfloat16, float16, float32, float64, got "):
        (nk.LoRA2Linear if "k" in options else nk.NLoraLinear).from_linear(linear, **options, dtype=dtype)
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad


def test_a_refused_layer_is_left_as_it_was():
    linear = nn.Linear(8, 8)
    before = linear.weight.clone()
    for options in ({"alpha": "16"}, {"train": "A"}, {"core": "pinv"}, {"init": "slora"}):
        with pytest.raises((ValueError, TypeError)):
            nk.NLoraLinear.from_linear(linear, 2, **{"residual": options != {"core": "pinv"}} | options)
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad
