"""Models whose layers that share x are computed as one operation: the same model, whatever is done to it."""

import copy
import functools
import gc
import pickle
import warnings
import weakref

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import nlora_kernels.peft as nkp
from nlora_kernels.peft import sharing
from nlora_kernels.peft.group import Scope, SharedLinear
from nlora_kernels.peft.layer import FusedLinear
from python_tests.peft.adapters import adapted, config
from python_tests.tiny import VOCABULARY, llama, perturb, tokens

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
GQA = {**SMALL, **TEXT, "num_key_value_heads": 2}


def build(name):
    torch.manual_seed(0)
    kinds = {
        "llama": lambda t: t.LlamaModel(t.LlamaConfig(**GQA)),
        "mistral": lambda t: t.MistralModel(t.MistralConfig(**GQA)),
        "qwen2": lambda t: t.Qwen2Model(t.Qwen2Config(**GQA)),
        "qwen3": lambda t: t.Qwen3Model(t.Qwen3Config(**GQA, head_dim=8)),
        "gemma": lambda t: t.GemmaModel(t.GemmaConfig(**GQA, head_dim=8)),
        "gemma2": lambda t: t.Gemma2Model(t.Gemma2Config(**GQA, head_dim=8)),
        "phi": lambda t: t.PhiModel(t.PhiConfig(**GQA)),
        "bert": lambda t: t.BertModel(t.BertConfig(**SMALL, **TEXT)),
        "roberta": lambda t: t.RobertaModel(t.RobertaConfig(**SMALL, **TEXT)),
        "deberta": lambda t: t.DebertaV2Model(
            t.DebertaV2Config(
                **SMALL,
                **TEXT,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                position_buckets=8,
            )
        ),
        "vit": lambda t: t.ViTModel(t.ViTConfig(**SMALL, image_size=16, patch_size=8)),
    }
    return kinds[name](transformers).eval()


def example(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": tokens()}


def step(model, inputs, wrt=None):
    """The output and all gradients of a model."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = model(**inputs)[0]
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(output, parameters, dy, allow_unused=True)
    return output.detach(), *grads


def same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each group has that is computed."""
    made, function = [], sharing.lora_group_linear
    monkeypatch.setattr(sharing, "lora_group_linear", lambda *a, **k: made.append(len(a[1])) or function(*a, **k))
    return made


MLPS = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma": 2, "gemma2": 2}
ATTENTIONS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "bert", "roberta", "deberta", "vit")


@pytest.mark.parametrize("watched", [False, True], ids=["by_name", "watched"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_grouped_model_computes_what_it_did(name, watched, calls):
    inputs = example(name)
    model = peft.get_peft_model(build(name), config("nlora"))
    perturb(model)
    expected, state = step(model, inputs), set(model.state_dict())
    names = [n for n, _ in model.named_modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nkp.group(model, **(inputs if watched else {})) is model
        calls.clear()
        same(step(model, inputs), expected)
    assert calls == [3, 3]
    scopes = [m._sharing for m in model.modules() if isinstance(m, Scope)]
    assert sum(s.mlp is not None for s in scopes) == MLPS.get(name, 0)
    assert set(model.state_dict()) == state and [n for n, _ in model.named_modules()] == names
    nkp.ungroup(model)
    assert not any(isinstance(m, Scope | SharedLinear) for m in model.modules())
    calls.clear()
    same(step(model, inputs), expected)
    assert not calls


@pytest.mark.parametrize("method", ["lora", "slora", "inttune", "nlora_residual", "inttune_residual", "lora2"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_every_method_can_be_grouped(method, recompute):
    model, inputs = adapted(llama(), method), example("llama")
    expected = step(model, inputs)
    nkp.group(model, recompute=recompute)
    same(step(model, inputs), expected)


def test_layers_without_an_adapter_take_part(calls):
    model = adapted(llama(), "nlora", target_modules=["q_proj", "v_proj"])
    expected = step(model, example("llama"))
    nkp.group(model)
    attention = model.base_model.model.model.layers[0].self_attn
    assert isinstance(attention.k_proj, SharedLinear) and type(attention.o_proj) is nn.Linear
    same(step(model, example("llama")), expected)
    assert calls == [3, 3] and "SharedLinear" not in repr(model)
    # An adapter that comes later is fused with the layer as it is.
    model.add_adapter("second", config("nlora", target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert attention.k_proj.obstacle() is None
    expected = step(nkp.ungroup(copy.deepcopy(model)), example("llama"))
    same(step(model, example("llama")), expected)


def test_plain_lora_of_peft_is_grouped_after_fuse(calls):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="got none"):
        nkp.group(model)
    perturb(model)
    expected = step(model, example("llama"))
    nkp.group(nkp.fuse(model))
    same(step(model, example("llama")), expected)
    assert calls == [3, 3]


# What changes while a model is grouped


def hook(model):
    model.base_model.model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, a, y: 2 * y)


def pre_hook(model):
    model.base_model.model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda m, a: (2 * a[0],))


def hook_of_base(model):
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda m, a, y: 2 * y)


def hook_of_activation(model):
    model.base_model.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, a, y: 2 * y)


def another_activation(model):
    model.base_model.model.model.layers[0].mlp.act_fn = nn.ReLU()


def two_adapters(model):
    model.add_adapter("second", config("nlora", target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])


def merged(model):
    model.base_model.model.model.layers[0].self_attn.q_proj.merge()


def disabled(model):
    model.base_model.model.model.layers[1].mlp.gate_proj.enable_adapters(False)


def weightless(model):
    model.base_model.model.model.layers[1].mlp.down_proj.set_scale("default", 0.0)


def dropping(model):
    model.base_model.model.model.layers[1].mlp.down_proj.lora_dropout["default"] = nn.Dropout(1.0).train()


def deleted(model):
    model.add_adapter("second", config("lora", target_modules=["q_proj"]))
    model.base_model.set_adapter("second")
    model.delete_adapter("default")


CHANGES = [hook, pre_hook, hook_of_base, hook_of_activation, another_activation, two_adapters]
CHANGES += [merged, disabled, weightless, dropping, deleted]
QKV = {"target_modules": ["q_proj", "k_proj", "v_proj"]}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_layer_whose_conditions_change_drops_out_by_itself(change):
    model = adapted(llama(), "nlora")
    alone = copy.deepcopy(model)
    nkp.group(model)
    change(model)
    change(alone)
    perturb(model, adapter="second")
    alone.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(step(model, example("llama")), step(alone, example("llama")))


class Attention(nn.Module):
    """Projections that are called in an order and with inputs of their own."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        for name, width in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
            setattr(self, name, nn.Linear(8, width))

    def forward(self, x):
        if self.how == "k before q":
            k, q, v = self.k_proj(x), self.q_proj(x), self.v_proj(x)
        elif self.how == "without v":
            q, k = self.q_proj(x), self.k_proj(x)
            v = k
        elif self.how == "another x":
            q, k, v = self.q_proj(x), self.k_proj(x.flip(0)), self.v_proj(x)
        elif self.how == "changed in place":
            x = x + 0
            q, k = self.q_proj(x), self.k_proj(x)
            v = self.v_proj(x.mul_(2))
        elif self.how == "without gradients":
            q, k = self.q_proj(x), self.k_proj(x)
            with torch.no_grad():
                v = self.v_proj(x)
        elif self.how == "q twice":
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            q = q + self.q_proj(x.flip(0))
        return torch.cat((q, k * v), -1)


@pytest.mark.parametrize(
    "how, dissolves",
    [
        ("k before q", False),
        ("q twice", False),
        ("without v", True),
        ("another x", True),
        ("without gradients", True),
    ],
)
def test_layers_called_otherwise_compute_the_same(how, dissolves, calls):
    torch.manual_seed(0)
    two = nn.Sequential(Attention(how), nn.Linear(12, 8), Attention(how))
    model = peft.get_peft_model(two, config("lora", **QKV))
    perturb(model)
    inputs = {"input": torch.randn(5, 8)}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def results():
        y = model(**inputs)
        return y.detach(), *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True, materialize_grads=True)

    expected = results()
    nkp.group(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(results(), expected)
        same(results(), expected)
    said = [str(w.message) for w in caught if "did not get the x" in str(w.message)]
    assert len(said) == dissolves
    assert len(calls) == (2 if dissolves else 4)
    if how == "another x":
        calls.clear()
        nkp.group(model, **inputs)
        same(results(), expected)
        assert calls == [2, 2]


def test_an_x_that_changes_in_place_is_another():
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(Attention("changed in place")), config("lora", **QKV))
    perturb(model)
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected = model(x)
        nkp.group(model)
        with pytest.warns(UserWarning, match="did not get the x"):
            torch.testing.assert_close(model(x), expected)
        assert nkp.group(model, input=x) is model
        assert model.base_model.model[0]._sharing.groups == [("q_proj", "k_proj")]
        torch.testing.assert_close(model(x), expected)


class Called(Attention):
    """One that is called as a function of itself and x says."""

    def forward(self, x):
        return self.how(self, x)


def called(how):
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(Called(how)), config("lora", **QKV))
    perturb(model)
    return model


def changing_x(self, x):
    x = x + 0
    q, k = self.q_proj(x), self.k_proj(x)
    return torch.cat((q, k, self.v_proj(x.mul_(2))), -1)


BETWEEN = {
    "nothing": lambda layer: None,
    "weight": lambda layer: layer.base_layer.weight.mul_(2),
    "another weight": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight * 2)),
    "adapter": lambda layer: layer.lora_B["default"].weight.mul_(2),
    "data": lambda layer: setattr(layer.lora_B["default"].weight, "data", layer.lora_B["default"].weight * 2),
    "hook": lambda layer: layer.base_layer.register_forward_hook(lambda m, a, y: 2 * y),
    "disabled": lambda layer: layer.enable_adapters(False),
    "scale": lambda layer: layer.set_scale("default", 3.0),
    "merged": lambda layer: layer.merge(),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("method", ["lora", "nlora", "lora2", "inttune_residual"])
def test_a_layer_that_changes_between_the_calls_of_its_group_computes_as_it_is_then(between, method, calls):
    def how(self, x):
        q = self.q_proj(x)
        BETWEEN[between](self.k_proj)
        return torch.cat((q, self.k_proj(x), self.v_proj(x)), -1)

    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(Called(how)), config(method, **QKV))
    perturb(model)
    alone, x = copy.deepcopy(model), torch.randn(5, 8)
    nkp.group(model)
    counted, function = [], FusedLinear._fused
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        patch.setattr(FusedLinear, "_fused", lambda *a: counted.append(1) or function(*a))
        y = model(x)
    # What nothing has happened to is computed once.
    assert calls == [3] and (between != "nothing" or not counted)
    with torch.no_grad():
        torch.testing.assert_close(y, alone(x))


@pytest.mark.parametrize("value", [1.0, float("nan")], ids=["numbers", "nan"])
def test_an_x_that_changes_in_place_is_another_in_inference_mode_too(value, calls):
    model, x = called(changing_x), torch.randn(5, 8)
    x[0, 0] *= value
    with torch.inference_mode():
        expected = model(x)
        nkp.group(model)
        with pytest.warns(UserWarning, match="v_proj of base_model.model.0 did not get the x"):
            torch.testing.assert_close(model(x), expected, equal_nan=True)
        nkp.group(model, input=x)
        assert model.base_model.model[0]._sharing.groups == [("q_proj", "k_proj")]
        calls.clear()
        torch.testing.assert_close(model(x), expected, equal_nan=True)
    assert calls == [2]


def test_compiled_code_knows_of_a_group_that_has_dissolved():
    model, x = called(changing_x), torch.randn(5, 8)
    expected = model(x)
    nkp.group(model)
    with pytest.warns(UserWarning, match="did not get the x"):
        model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


def another_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        q, k = self.q_proj(x), self.k_proj(x)
    with torch.autocast("cpu", torch.float16):
        v = self.v_proj(x)
    return torch.cat((q.float(), k.float(), v.float().where(torch.tensor(v.dtype is torch.float16), 0)), -1)


def requiring_later(self, x):
    x = x.detach()
    with torch.autocast("cpu", enabled=False):
        q = self.q_proj(x)
        k, v = self.k_proj(x.requires_grad_()), self.v_proj(x)
    (dx,) = torch.autograd.grad(k.square().sum() + v.square().sum(), x)
    return torch.cat((q, dx), -1)


def in_two_dtypes(self, x):
    q, k = self.q_proj(x), self.k_proj(x)
    return torch.cat((q, k, self.v_proj.double()(x.double()).float()), -1)


@pytest.mark.parametrize("how", [another_autocast, requiring_later, in_two_dtypes], ids=lambda how: how.__name__)
def test_what_x_is_computed_with_changes_between_layers(how):
    model, x = called(how), torch.randn(5, 8)
    expected = copy.deepcopy(model)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            torch.testing.assert_close(nkp.group(model)(x), expected, rtol=1e-2, atol=1e-2)


# What else is done with models


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_gradient_checkpointing(reentrant, calls):
    model, ids = adapted(llama(), "nlora"), tokens()
    model.enable_input_require_grads()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def results():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), *[p.grad.clone() for p in parameters]

    model.train()
    expected = results()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(results(), expected)
    nkp.group(model)
    same(results(), expected)
    assert calls == [3] * 4


@pytest.mark.parametrize("how", ["without v", "another x"])
def test_a_checkpoint_of_a_group_that_dissolves_computes_it_again_alike(how):
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(Attention(how)), config("lora", **QKV))
    perturb(model)
    x = torch.randn(5, 8)
    expected = model(x)
    nkp.group(model)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            y.square().sum().backward()
        torch.testing.assert_close(y, expected)


def test_generation_with_a_cache(calls):
    model = adapted(llama(), "nlora")
    expected = model.generate(input_ids=tokens(2, 5), max_new_tokens=6, do_sample=False)
    nkp.group(model)
    assert torch.equal(model.generate(input_ids=tokens(2, 5), max_new_tokens=6, do_sample=False), expected)
    assert set(calls) == {3}
    with torch.inference_mode():
        assert torch.equal(model.generate(input_ids=tokens(2, 5), max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("method", ["nlora", "lora2"])
def test_compiled_whole(method, calls):
    model, inputs = adapted(llama(layers=1), method), example("llama")
    expected = step(model, inputs)
    nkp.group(model)
    compiled = torch.compile(model.base_model.model.model, backend="aot_eager", fullgraph=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = compiled(**inputs)[0]
    alone = nkp.ungroup(copy.deepcopy(model)).base_model.model.model(**inputs)[0]
    torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    assert all(p.grad is not None for p in parameters) and expected and calls


@pytest.mark.parametrize("method", ["lora", "nlora", "nlora_residual", "lora2"])
def test_gradients_of_single_samples_and_tangents_by_torch_func(method):
    model, inputs = adapted(llama(layers=1), method), example("llama")
    # PyTorch's fused attention has no forward mode.
    model.base_model.model.set_attn_implementation("eager")
    alone = copy.deepcopy(model)
    nkp.group(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}

    def loss(model, parameters, ids):
        # transformers looks at the values of a mask.
        mask = torch.ones(ids.shape[-1], ids.shape[-1]).tril().log()[None, None]
        made = torch.func.functional_call(model, parameters, (ids[None],), {"attention_mask": mask})
        return made.logits.square().mean()

    def found(model):
        of = functools.partial(loss, model)
        tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
        _, along = torch.func.jvp(lambda p: of(p, inputs["input_ids"][0]), (parameters,), (tangents,))
        return *torch.func.vmap(torch.func.grad(of), (None, 0))(parameters, inputs["input_ids"]).values(), along

    same(found(model), found(alone))


def test_copies_and_pickles_are_grouped_by_themselves(calls):
    model = nkp.group(adapted(llama(), "nlora"))
    expected = step(model, example("llama"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del calls[:]
        same(step(other, example("llama")), expected)
        assert calls == [3, 3]
        nkp.ungroup(other)
    assert isinstance(model.base_model.model.model.layers[0].mlp, Scope)
    # A layer that is copied drags no other along.
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    assert len(pickle.dumps(q)) < len(pickle.dumps(model.base_model.model.model.layers[0].self_attn)) / 2


def test_merging_and_unloading_give_the_base_model_back():
    model = adapted(llama(), "nlora")
    expected = copy.deepcopy(model).merge_and_unload()(**example("llama")).logits
    merged = nkp.ungroup(nkp.group(model).merge_and_unload())
    torch.testing.assert_close(merged(**example("llama")).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, Scope | SharedLinear) for m in merged.modules())


@pytest.mark.parametrize("how", ["k before q", "without v", "another x"])
def test_nothing_is_kept_longer_than_ungrouped(how):
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(Attention(how)), config("lora", **QKV))
    rows = 37

    def leave():
        """How many tensors of so many rows are there after a forward whose result is dropped."""
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(torch.randn(rows, 8))
        return sum(type(o) is torch.Tensor and o.dim() == 2 and len(o) == rows for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        assert leave() == 0
        nkp.group(model)
        assert [leave(), leave()] == [0, 0]
    finally:
        gc.enable()


def test_an_output_is_let_go_when_its_layer_has_been_called():
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(Attention("q twice")), config("lora", **QKV))
    attention = nkp.group(model).base_model.model[0]
    shared = sharing.Forward([sharing.Group((attention.q_proj, attention.k_proj))])
    before = sharing.enter(shared)
    try:
        x = torch.randn(5, 8)
        q = attention.q_proj(x)
        k = attention.k_proj(x)
        group = shared.groups[0]
        assert group.started and group.x is None and group.outputs == [None, None]
        refs = [weakref.ref(t) for t in (x, q, k)]
        del x, q, k
        assert [ref() for ref in refs] == [None] * 3
    finally:
        sharing.enter(before)


def test_an_error_in_a_forward_leaves_nothing_under_way():
    model = nkp.group(adapted(llama(), "nlora"))
    attention = model.base_model.model.model.layers[0].self_attn
    attention.v_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**example("llama"))
    assert sharing.current() is None


def test_an_mlp_that_computes_anything_else_is_none():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-1e9, 1e9))

    class Halved(Clamped):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)

    class Relu(Clamped):
        def __init__(self):
            super().__init__()
            self.act_fn = nn.ReLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Swapped(Clamped):
        def __init__(self):
            super().__init__()
            self.act_fn = nn.GELU()

        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    def doubled_in_training(function):
        return lambda self, x: function(self, x) * (1 + self.training)

    class Decorated(Relu):
        forward = doubled_in_training(lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    class Dropping(Relu):
        def __init__(self):
            super().__init__()
            self.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5)).eval()

    class Mixed(Relu):
        def __init__(self):
            super().__init__()
            self.act_fn = nn.SiLU()
            self.down_proj.double()

    found = {}
    for kind in (Clamped, Halved, Relu, Decorated, Dropping, Mixed, Swapped):
        model = nkp.group(peft.get_peft_model(nn.Sequential(kind()).eval(), config("lora")).eval())
        found[kind.__name__] = model.base_model.model[0]._sharing.mlp
    assert found.pop("Swapped")[:5] == ("up_proj", "gate_proj", "down_proj", "act_fn", "gelu")
    assert set(found.values()) == {None}
    x = 3 * torch.randn(5, 8)
    model.base_model.model[0].act_fn.approximate = "tanh"
    torch.testing.assert_close(model(x), nkp.ungroup(copy.deepcopy(model))(x), rtol=0, atol=1e-6)


def test_a_forward_that_replaces_that_of_its_class_is_called(monkeypatch, calls):
    kind = transformers.models.llama.modeling_llama.LlamaMLP
    model = nkp.group(adapted(llama(), "nlora"))
    before = kind.forward
    expected = model(**example("llama")).logits
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * before(self, x))
    changed = model(**example("llama")).logits
    assert not torch.allclose(changed, expected)
    calls.clear()
    torch.testing.assert_close(nkp.group(model)(**example("llama")).logits, changed)
    assert calls == [3, 2] * 2


def test_grouping_draws_no_random_numbers():
    model, before = adapted(llama(), "nlora"), torch.get_rng_state()
    nkp.group(model)
    assert torch.equal(torch.get_rng_state(), before)


class Handle(Attention):
    """One that says itself what is pickled of it."""

    def __getstate__(self):
        return {**self.__dict__, "how": "q twice"}


def test_a_class_that_pickles_itself_still_does():
    model = nkp.group(peft.get_peft_model(nn.Sequential(Handle("without v")), config("lora", **QKV)))
    assert pickle.loads(pickle.dumps(model.base_model.model[0])).how == "q twice"


def test_what_cannot_be_grouped_is_said():
    with pytest.raises(TypeError, match="model must be a module, got int"):
        nkp.group(1)
    with pytest.raises(TypeError, match="model must be a module, got int"):
        nkp.ungroup(1)
    with pytest.raises(ValueError, match="model must have fused adapter layers that share x, got none"):
        nkp.group(llama())
