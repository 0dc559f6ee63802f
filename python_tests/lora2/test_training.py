"""RankAllocator and orthogonal_penalty against their equations, written out again here value by value."""

import copy
import math

import pytest
import torch
from torch import nn

import nlora_kernels as nk
from nlora_kernels.backends.cpu import lora2 as native
from nlora_kernels.lora2 import RankAllocator, orthogonal_penalty

SCHEDULE = {"target_rank": 2, "total_steps": 30, "t_init": 4, "t_final": 8, "delta_t": 3}
# r and k of the layers of the test model: equal ones, and all orders of r and k.
RANKS = [(6, 3), (4, 4), (6, 3), (3, 5)]


@pytest.fixture(autouse=True, params=["C++", "PyTorch"])
def path(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "_C", None)
    elif native._C is None:
        pytest.skip("the package was built without its C++ kernels")
    return request.param


class Net(nn.Module):
    def __init__(self, ranks=RANKS, width=12, dtype=torch.float32):
        super().__init__()
        linears = [nn.Linear(width, width, dtype=dtype) for _ in ranks]
        self.layers = nn.ModuleList(
            nk.LoRA2Linear.from_linear(linear, r, k) for linear, (r, k) in zip(linears, ranks, strict=True)
        )
        with torch.no_grad():
            for layer in self.layers:
                for t in (layer.lora_v, layer.lora_u, layer.lora_U, layer.lora_V):
                    t.mul_(20)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, 12, generator=generator) for _ in range(2))
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.item()


def train(model, optimizer, allocator, steps):
    budgets = []
    for step in steps:
        backward(model, step)
        optimizer.step()
        budgets.append(allocator.step())
        optimizer.zero_grad()
    return budgets


def assert_same(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        assert_same(list(actual.values()), list(expected.values()))
    elif isinstance(expected, list):
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    else:
        assert actual == expected


class Equations:
    """The published equations, one singular value after the other, in double precision."""

    def __init__(self, model, target_rank, total_steps, t_init, t_final, delta_t, beta=0.85, scores="rows"):
        self.adapters = list(model.layers)
        self.full = scores == "full"
        self.T, self.t_init, self.t_final, self.delta_t, self.beta = total_steps, t_init, t_final, delta_t, beta
        self.b0 = sum(a.r for a in self.adapters)
        self.bT = target_rank * len(self.adapters)
        self.t = 0
        self.averages = {}

    @property
    def scored(self):
        return ("lora_E", "lora_u", "lora_U", *(("lora_v", "lora_V") if self.full else ()))

    def smooth(self, parameter, place):
        product = (parameter.detach().double() * parameter.grad.double()).abs()
        mean, spread = self.averages.get(place, (torch.zeros_like(product), torch.zeros_like(product)))
        mean = self.beta * mean + (1 - self.beta) * product
        spread = self.beta * spread + (1 - self.beta) * (product - mean).abs()
        self.averages[place] = mean, spread

    def scores(self):
        result = {}
        for n, adapter in enumerate(self.adapters):
            S = {name: math.prod(self.averages[n, name]) for name in self.scored}
            for i in range(adapter.r):
                result[n, i] = (
                    S["lora_E"][i].item()
                    + sum(S["lora_u"][i, c].item() for c in range(adapter.k)) / adapter.k
                    + sum(S["lora_U"][c, i].item() for c in range(adapter.k)) / adapter.k
                    + sum(S[name].sum().item() for name in self.scored[3:]) / adapter.k
                )
        return result

    @torch.no_grad()
    def step(self):
        self.t += 1
        last = self.T - self.t_final
        if self.t < last:
            for n, adapter in enumerate(self.adapters):
                for name in self.scored:
                    self.smooth(getattr(adapter, name), (n, name))
        if self.t <= self.t_init:
            return self.b0
        budget = self.bT
        if self.t < last:
            part = 1 - (self.t - self.t_init) / (self.T - self.t_final - self.t_init)
            budget = int((self.b0 - self.bT) * part**3 + self.bT)
        if self.t == last or (self.t < last and self.t % self.delta_t == 0):
            scores = self.scores()
            kept = set(sorted(scores, key=lambda place: (-scores[place], *place))[:budget])
            for n, i in scores.keys() - kept:
                self.adapters[n].lora_E[i] = 0
                if self.t == last:
                    self.adapters[n].lora_mask[i] = 0
        return budget


@pytest.mark.parametrize("scores", ["rows", "full"])
@pytest.mark.parametrize("seed", range(3))
def test_a_whole_run_equals_the_equations(seed, scores):
    model, twin = net(seed), net(seed)
    optimizer, twin_optimizer = optimizer_of(model), optimizer_of(twin)
    schedule = {**SCHEDULE, "scores": scores}
    allocator, equations = RankAllocator(model, **schedule), Equations(twin, **schedule)
    zeroed = 0
    for step in range(SCHEDULE["total_steps"]):
        assert backward(model, step) == pytest.approx(backward(twin, step), rel=1e-6)
        optimizer.step()
        twin_optimizer.step()
        assert allocator.step() == equations.step()
        expected = equations.scores()
        actual = {(n, i): s for n, scores in enumerate(allocator.importance().values()) for i, s in enumerate(scores)}
        assert actual.keys() == expected.keys()
        for place, score in expected.items():
            assert actual[place].item() == pytest.approx(score, rel=1e-5, abs=1e-12)
        for layer, other in zip(model.layers, twin.layers, strict=True):
            assert torch.equal(layer.lora_mask, other.lora_mask)
            assert torch.equal(layer.lora_E == 0, other.lora_E == 0)
            assert allocator.t >= 22 or layer.lora_mask.all()
            zeroed += int((layer.lora_E == 0).sum()) if allocator.t < 22 else 0
        optimizer.zero_grad()
        twin_optimizer.zero_grad()
    kept = {(n, i) for n, layer in enumerate(model.layers) for i in range(layer.r) if layer.lora_mask[i]}
    assert len(kept) == SCHEDULE["target_rank"] * len(RANKS)
    assert list(allocator.ranks().values()) == [int(layer.lora_mask.sum()) for layer in model.layers]
    assert zeroed > 19


def test_a_masked_value_may_regrow_until_the_mask_is_frozen():
    model = net(ranks=[(2, 1), (2, 1)])
    allocator = RankAllocator(model, target_rank=1, total_steps=5, t_init=0, t_final=2, delta_t=1)
    kept = []
    for strong in ([0, 0, 1, 1], [8, 0, 0, 8], [8, 0, 0, 8], [0, 8, 0, 8]):
        for layer, values in zip(model.layers, torch.tensor(strong).view(2, 2), strict=True):
            layer.lora_E.data += 1
            layer.lora_E.grad = values.float()
            layer.lora_u.grad = layer.lora_U.grad = None
        budget = allocator.step()
        E = torch.stack([layer.lora_E.data for layer in model.layers]).flatten()
        kept.append((budget, E.tolist()))
    assert kept == [(2, [0, 0, 1, 1]), (2, [1, 0, 0, 2]), (2, [2, 0, 0, 3]), (2, [3, 1, 1, 4])]
    assert [layer.lora_mask.tolist() for layer in model.layers] == [[1, 0], [0, 1]]


def test_the_frozen_mask_holds_against_weight_decay_and_momentum():
    model = net()
    optimizer, allocator = optimizer_of(model), RankAllocator(model, **SCHEDULE)
    train(model, optimizer, allocator, range(30))
    revived = 0
    for layer in model.layers:
        # Momentum moves the parameter itself; the function must not see it.
        revived += int(layer.lora_E[layer.lora_mask == 0].count_nonzero())
        core = nk.lora2_core(layer.lora_u, layer.lora_E * layer.lora_mask, layer.lora_U)
        assert torch.equal(layer.matrices()[1], core)
    assert revived


@pytest.mark.parametrize("scores", ["rows", "full"])
@pytest.mark.parametrize("at", [2, 10, 12, 22, 25])
def test_resuming_changes_nothing(at, scores, tmp_path):
    model, schedule = net(), {**SCHEDULE, "scores": scores}
    optimizer, allocator = optimizer_of(model), RankAllocator(model, **schedule)
    budgets = train(model, optimizer, allocator, range(30))

    half = net()
    half_optimizer, half_allocator = optimizer_of(half), RankAllocator(half, **schedule)
    first = train(half, half_optimizer, half_allocator, range(at))
    torch.save([half.state_dict(), half_optimizer.state_dict(), half_allocator.state_dict()], tmp_path / "state.pt")

    resumed = net(seed=7)
    resumed_optimizer, resumed_allocator = optimizer_of(resumed), RankAllocator(resumed, **schedule)
    parts = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip((resumed, resumed_optimizer, resumed_allocator), parts, strict=True):
        part.load_state_dict(state)
    assert resumed_allocator.ranks() == half_allocator.ranks()
    assert first + train(resumed, resumed_optimizer, resumed_allocator, range(at, 30)) == budgets
    assert_same(resumed_allocator.state_dict(), allocator.state_dict())
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))


def test_a_state_that_is_held_stands_still():
    model = net()
    optimizer, allocator = optimizer_of(model), RankAllocator(model, **SCHEDULE)
    train(model, optimizer, allocator, range(5))
    state = allocator.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, allocator, range(5, 30))
    assert_same(state, before)


def test_ties_go_to_the_earlier_layer_then_the_smaller_index():
    model = net()
    for t in (t for layer in model.layers for t in (layer.lora_E, layer.lora_u, layer.lora_U)):
        t.grad = torch.zeros_like(t)
    allocator = RankAllocator(model, target_rank=2, total_steps=2, t_init=0, t_final=1, delta_t=1)
    assert allocator.step() == 8
    assert [layer.lora_mask.tolist() for layer in model.layers] == [[1] * 6, [1, 1, 0, 0], [0] * 6, [0] * 3]
    assert list(allocator.ranks().values()) == [6, 2, 0, 0]


def test_other_dtypes_strides_and_parameters_without_gradient():
    model, twin = net(), net()
    twin.layers[1].bfloat16()
    model.layers[1].load_state_dict(twin.layers[1].state_dict())
    for m in (model, twin):
        for n, layer in enumerate(m.layers):
            generator = torch.Generator().manual_seed(n)
            layer.lora_E.data.fill_(0.5)
            for t in (layer.lora_E, layer.lora_u, layer.lora_U):
                t.grad = torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype)
    model.layers[2].lora_u.grad.zero_()
    twin.layers[2].lora_u.grad = None
    twin.layers[3].lora_u.data = twin.layers[3].lora_u.data.T.contiguous().T
    twin.layers[3].lora_U.grad = twin.layers[3].lora_U.grad.T.contiguous().T
    allocators = [RankAllocator(m, **SCHEDULE) for m in (model, twin)]
    for allocator in allocators:
        allocator.step()
    scores, twin_scores = (a.importance() for a in allocators)
    for name, expected in scores.items():
        torch.testing.assert_close(twin_scores[name], expected, rtol=1e-6, atol=0)
        assert (expected > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("scores", "tensor"),
    [*(("rows", name) for name in ("lora_E", "lora_u", "lora_U")), *(("full", name) for name in ("lora_v", "lora_V"))],
)
@pytest.mark.parametrize("at", [3, 5])
def test_a_non_finite_gradient_leaves_everything_as_it_was(value, scores, tensor, at):
    model = net()
    optimizer, allocator = optimizer_of(model), RankAllocator(model, scores=scores, **SCHEDULE)
    train(model, optimizer, allocator, range(at))
    backward(model, at)
    grad = getattr(model.layers[2], tensor).grad
    good = grad.clone()
    grad.view(-1)[-1] = value
    before = copy.deepcopy([dict(model.state_dict()), allocator.state_dict()])
    with pytest.raises(nk.lora2.NonFiniteGradientError, match=f"{tensor}.* must be finite, got NaN or infinity"):
        allocator.step()
    assert_same([dict(model.state_dict()), allocator.state_dict()], before)
    # Skipped, the clock goes on and the scores stand.
    scores = copy.deepcopy(allocator.importance())
    assert allocator.step(skip_nonfinite=True) == allocator.budget(at + 1)
    assert allocator.t == at + 1 and allocator.skipped == 1
    assert_same(allocator.importance(), scores)
    grad.copy_(good)
    allocator.step()
    assert allocator.skipped == 1 and allocator.exp_avg.isfinite().all()


def test_on_other_devices_non_finite_gradients_are_reported_at_the_next_masking(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(RankAllocator, "_reports_at_once", False)
    model, twin = net(), net()
    allocator, expected = RankAllocator(model, **SCHEDULE), RankAllocator(twin, **SCHEDULE)
    optimizer = optimizer_of(model)
    train(twin, optimizer_of(twin), expected, range(3))
    train(model, optimizer, allocator, range(3))
    backward(model, 3)
    model.layers[0].lora_E.grad[0] = math.nan
    assert allocator.step() == allocator.budget(4)
    assert_same(allocator.importance(), expected.importance())
    optimizer.zero_grad()
    train(model, optimizer, allocator, [4])
    backward(model, 5)
    before = copy.deepcopy([dict(model.state_dict()), allocator.importance(), allocator.t])
    with pytest.raises(nk.lora2.NonFiniteGradientError, match="1 step"):
        allocator.step()
    assert_same([dict(model.state_dict()), allocator.importance(), allocator.t], before)
    # Said once, it is over.
    assert allocator.step() == allocator.budget(6)


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
def test_steps_that_a_gradient_scaler_skips(clipped):
    model = net()
    optimizer, allocator = optimizer_of(model), RankAllocator(model, **SCHEDULE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(30):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean() * (1 if clipped or step not in (4, 5, 12) else math.inf)
        scaler.scale(loss).backward()
        if clipped:
            # One that is not scored: the clipping makes zeros of all gradients but this.
            model.layers[0].lora_v.grad[0, 0] *= math.inf if step in (4, 5, 12) else 1
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        averages = allocator.exp_avg.clone(), allocator.exp_unc.clone()
        allocator.step(skip_nonfinite=True, skipped=clipped and scaler.get_scale() < scale)
        if step in (4, 5, 12):
            assert_same([allocator.exp_avg, allocator.exp_unc], list(averages))
        optimizer.zero_grad()
    assert allocator.skipped == 3 and sum(allocator.ranks().values()) == 8
    assert all(t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.parametrize("scores", ["rows", "full"])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_second_run_revives_nothing_and_counts_what_lives(scores, penalty):
    """What is masked for good has stale values and the penalty's gradient, and must not compete with what is alive."""
    model = net()
    train(model, optimizer_of(model), RankAllocator(model, **SCHEDULE), range(30))
    masks = [layer.lora_mask.clone() for layer in model.layers]
    for layer, mask in zip(model.layers, masks, strict=True):
        # As momentum leaves them, and far above what is alive.
        layer.lora_E.data[mask == 0] = 50.0
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, **{**SCHEDULE, "target_rank": 1}, scores=scores)
    assert allocator.budget(1) == 8 and list(allocator.ranks().values()) == [int(mask.sum()) for mask in masks]
    for step in range(30):
        backward(model, step)
        (penalty * orthogonal_penalty(model)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        for importance, mask in zip(allocator.importance().values(), masks, strict=True):
            assert torch.equal(importance == -math.inf, mask == 0)
        if step == 11:
            # What goes on from here knows it too, though the model it is of came later.
            resumed = RankAllocator(net(), **{**SCHEDULE, "target_rank": 1}, scores=scores)
            resumed.load_state_dict(allocator.state_dict())
            assert resumed.budget(1) == 8
            assert_same(resumed.importance(), allocator.importance())
    for layer, mask in zip(model.layers, masks, strict=True):
        assert not layer.lora_mask[mask == 0].any()
    assert sum(int(layer.lora_mask.sum()) for layer in model.layers) == sum(allocator.ranks().values()) == 4
    with pytest.raises(ValueError, match="at most the mean r of the layers, 1, got 2"):
        RankAllocator(model, **SCHEDULE)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"t_init": 22}, ValueError, r"t_init \+ t_final must be below total_steps = 30, got 22 \+ 8"),
        ({"target_rank": 5}, ValueError, r"target_rank must be at most the mean r of the layers, 4.75, got 5"),
        ({"target_rank": 0}, ValueError, "target_rank must be at least 1, got 0"),
        ({"delta_t": 0}, ValueError, "delta_t must be at least 1, got 0"),
        ({"t_final": -1}, ValueError, "t_final must be at least 0, got -1"),
        ({"total_steps": 30.0}, TypeError, "total_steps must be an integer, got float"),
        ({"beta1": 1.0}, ValueError, "beta1 must be at least 0 and below 1, got 1.0"),
        ({"scores": "columns"}, ValueError, "scores must be one of rows, full, got 'columns'"),
        ({"beta2": -0.1}, ValueError, "beta2"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model must have layers with an active LoRA² adapter, got none"),
    ],
)
def test_bad_schedules(changed, error, message):
    model = changed.get("model") or net()
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(error, match=message):
        RankAllocator(**{"model": model, **SCHEDULE, **changed})
    assert_same(dict(model.state_dict()), before)


def test_steps_out_of_place():
    model = net()
    allocator = RankAllocator(model, **{**SCHEDULE, "total_steps": 13})
    before = copy.deepcopy([dict(model.state_dict()), allocator.state_dict()])
    with pytest.raises(RuntimeError, match="between backward"):
        allocator.step()
    assert_same([dict(model.state_dict()), allocator.state_dict()], before)
    train(model, optimizer_of(model), allocator, range(13))
    backward(model, 0)
    before = copy.deepcopy([dict(model.state_dict()), allocator.state_dict()])
    with pytest.raises(RuntimeError, match="at most total_steps = 13 times, got call 14"):
        allocator.step()
    assert_same([dict(model.state_dict()), allocator.state_dict()], before)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("exp_unc"), "exp_unc"),
        (lambda s: s["layers"].update({"layers.0": [6, 4]}), r"\(r, k\) = \[6, 3\] of layer layers.0, got \[6, 4\]"),
        (lambda s: s["layers"].pop("layers.3"), "layers.3, got None"),
        (lambda s: s["layers"].update({"layers.9": [1, 1]}), "layers.9"),
        (lambda s: s.update(t=31), "up to total_steps = 30, got 31"),
        (lambda s: s.update(layers=dict(reversed(s["layers"].items()))), "must hold the layers in the order"),
        (lambda s: s.update(kept=s["kept"][1:]), r"kept must have shape \(19,\), got \(18,\)"),
    ],
)
def test_bad_states(change, message):
    model = net()
    allocator = RankAllocator(model, **SCHEDULE)
    train(model, optimizer_of(model), allocator, range(7))
    before = allocator.state_dict()
    state = copy.deepcopy(before)
    change(state)
    with pytest.raises(ValueError, match=message):
        allocator.load_state_dict(state)
    assert_same(allocator.state_dict(), before)


def test_the_penalty_takes_what_was_saved_in_other_strides():
    model = net()
    tensors = [p for layer in model.layers for p in (layer.lora_v, layer.lora_u, layer.lora_V, layer.lora_U)]
    expected = torch.autograd.grad(orthogonal_penalty(model), tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t, lambda t: t):
        value = orthogonal_penalty(model)
    torch.testing.assert_close(torch.autograd.grad(value, tensors), expected)


def penalty_by_definition(model, form, terms=None):
    def off(m):
        return m - torch.eye(len(m), dtype=m.dtype)

    distances = []
    for layer in model.layers:
        v, u, U, V = layer.lora_v, layer.lora_u, layer.lora_U, layer.lora_V
        P, Q = u @ v, V @ U
        products = {"uv": (v @ v.T, u.T @ u), "UV": (U @ U.T, V.T @ V), "PQ": (P @ P.T, Q.T @ Q)}
        named = terms or (("uv", "UV", "PQ") if form == "paper" else ("uv", "UV"))
        distances += [torch.linalg.matrix_norm(off(m)) for term in named for m in products[term]]
    distances = torch.stack(distances)
    return distances.square().sum() if form == "paper" else distances.mean()


# The rows of table 3 of the paper, and what each form has by itself.
TERMS = {"own": None, "uv": ("uv",), "UV": ("UV",), "uv_UV": ("UV", "uv"), "PQ": ("PQ",), "all": ("uv", "UV", "PQ")}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("form", ["paper", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_both_penalties_equal_autograd_through_their_definitions(form, terms, dtype):
    model = net().to(dtype)
    exact = copy.deepcopy(model).double()
    expected = penalty_by_definition(exact, form, terms)
    (0.3 * expected).backward()
    with torch.autocast("cpu", torch.bfloat16):
        value = orthogonal_penalty(model, form, terms)
        (0.3 * value).backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert value.item() == pytest.approx(expected.item(), rel=min(tolerance, 1e-6))
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if name.split(".")[-1] in ("lora_v", "lora_u", "lora_U", "lora_V"):
            assert p.grad.dtype == dtype and p.grad.is_contiguous()
            if q.grad is None:
                # No term that was named has it.
                assert not p.grad.any()
                continue
            scale = q.grad.abs().max()
            torch.testing.assert_close(p.grad.double() / scale, q.grad / scale, rtol=0, atol=tolerance)
        else:
            assert p.grad is None


@pytest.mark.parametrize("form", ["paper", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_orthonormal_vectors_have_no_penalty_and_no_gradient(form, dtype):
    model = net(ranks=[(4, 4)], dtype=dtype)
    tensors = [getattr(model.layers[0], name) for name in ("lora_v", "lora_u", "lora_U", "lora_V")]
    for t in tensors:
        nn.init.eye_(t)
    value = orthogonal_penalty(model, form)
    assert value == 0 and not any(grad.any() for grad in torch.autograd.grad(value, tensors))


def test_the_penalty_is_a_citizen_of_autograd():
    model, twin = net(), net()
    seen = {}
    for m, penalty in ((model, orthogonal_penalty), (twin, penalty_by_definition)):
        m.layers[1].lora_V.requires_grad_(False)
        hooked = m.layers[0].lora_v
        hooked.register_hook(lambda grad: 2 * grad)
        hooked.register_post_accumulate_grad_hook(lambda p, m=m: seen.update({m: p.grad.clone()}))
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
        # Two batches accumulate; in each the penalty stands beside a loss, twice and in another form.
        for _ in range(2):
            value = penalty(m, "paper")
            (m(x).square().mean() + 0.1 * value * value + 0.2 * penalty(m, "reference")).backward()
        value = penalty(m, "paper")
        value.backward(retain_graph=True)
        value.backward()
    assert torch.allclose(seen[model], seen[twin], rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=2e-6 * q.grad.abs().max().item(), msg=name)
    tensors = [layer.lora_u for layer in model.layers]
    alone = torch.autograd.grad(orthogonal_penalty(model, "paper"), tensors)
    for a, b in zip(
        alone,
        torch.autograd.grad(penalty_by_definition(twin, "paper"), [layer.lora_u for layer in twin.layers]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    value = orthogonal_penalty(model, "paper")
    with torch.no_grad():
        tensors[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_the_penalty_of_orthogonal_vectors_and_its_gradient_are_zero(form):
    model = net(ranks=[(4, 4)] * 2)
    for layer in model.layers:
        for t in (layer.lora_v, layer.lora_u, layer.lora_U, layer.lora_V):
            t.data = torch.eye(*t.shape)
    value = orthogonal_penalty(model, form)
    value.backward()
    assert value == 0
    for layer in model.layers:
        assert not any(t.grad.any() for t in (layer.lora_v, layer.lora_u, layer.lora_U, layer.lora_V))


def test_the_penalty_names_what_it_does_not_take():
    with pytest.raises(ValueError, match="form must be one of paper, reference, got 'frobenius'"):
        orthogonal_penalty(net(), "frobenius")
    for terms in (("uv", "vu"), (), "all"):
        with pytest.raises(ValueError, match="terms must be some of uv, UV, PQ, got "):
            orthogonal_penalty(net(), terms=terms)
    with torch.no_grad():
        assert orthogonal_penalty(net(), terms="uv") == orthogonal_penalty(net(), terms=["uv"])
    with pytest.raises(ValueError, match="got none"):
        orthogonal_penalty(nn.Linear(2, 2))
    for function in (orthogonal_penalty, lambda model: RankAllocator(model, **SCHEDULE)):
        with pytest.raises(TypeError, match="model must be a module, got int"):
            function(3)


def pruned_net():
    model = net()
    train(model, optimizer_of(model), RankAllocator(model, **SCHEDULE), range(30))
    # A layer that lost everything: its last values have momentum, so that only the mask keeps them out.
    model.layers[3].lora_mask.zero_()
    return model


def test_a_compressed_model_is_the_masked_one():
    model = pruned_net()
    model.layers[0].alpha, model.layers[0].scaling = 9, 9 / 6
    x = torch.randn(7, 12)
    expected, masks = model(x), [layer.lora_mask.clone() for layer in model.layers]
    scalings = [layer.scaling for layer in model.layers]
    ranks = nk.lora2.compress(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert list(ranks.values()) == [max(1, int(mask.sum())) for mask in masks] and masks[3].sum() == 0
    for layer, scaling, mask in zip(model.layers, scalings, masks, strict=True):
        r, k = layer.r, layer.k
        shapes = [t.shape for t in (layer.lora_E, layer.lora_u, layer.lora_U, layer.lora_mask)]
        assert shapes == [(r,), (r, k), (k, r), (r,)]
        assert layer.scaling == scaling and layer.alpha / r == pytest.approx(scaling, rel=1e-15)
        assert all(p.requires_grad for name, p in layer.named_parameters() if name.startswith("lora"))
        assert bool(mask.sum()) == bool(layer.lora_E.any())
    assert not model.layers[3].lora_E.any()
    # Nothing is left to drop, and training goes on.
    state = copy.deepcopy(dict(model.state_dict()))
    assert nk.lora2.compress(model) == ranks
    assert_same(dict(model.state_dict()), state)
    backward(model, 0)


def test_compressing_before_pruning_changes_nothing():
    model = net()
    state = copy.deepcopy(dict(model.state_dict()))
    assert list(nk.lora2.compress(model).values()) == [r for r, _ in RANKS]
    assert_same(dict(model.state_dict()), state)
