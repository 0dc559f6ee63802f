"""What other code does for LoRA, by its type, its classes or the names lora_A and lora_B, happens here or is refused.

PLACES lists every function of PEFT, transformers, TRL and diffusers that asks for one of them, with what becomes of
plain LoRA ("as LoRA" unless said) and of an adapter with a core: NLoRA, SLoRA, IntTune and LoRA².
"""

import ast
import copy
import importlib.util
import pickle
import re
import warnings
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter
from peft.utils.other import fsdp_auto_wrap_policy
from peft.utils.warning import PeftWarning
from torch import nn

from nlora_kernels.peft import LoRA2Config, LoRA2Model, NLoraConfig, NLoraLinear, NLoraModel, fuse
from nlora_kernels.peft.layer import FusedLinear
from python_tests.peft.adapters import adapted, close, config, logits
from python_tests.tiny import gpt2, llama, perturb, tokens

CORES = ("nlora", "slora", "inttune", "nlora_residual", "inttune_residual", "lora2")
PLAIN = {"stock": partial(peft.LoraConfig, r=4), "plain": partial(NLoraConfig, r=4, init_lora_weights=True)}

QUESTION = re.compile(
    r"PeftType\.LORA\b|([\"'])LORA\1|isinstance\([^)]*\bLora(Config|Model|Layer)\b|\blora_[AB]\b|\.default\."
)
# Other methods of PEFT; LoRA's own layers and variants, which a core refuses; the models of transformers; diffusers'
# tables from other formats, whose adapters are LoRA.
ELSEWHERE = re.compile(
    r"peft/tuners/(?!lora/|mixed/|tuners_utils)|peft/tuners/lora/(aqlm|arrow|awq|bnb|dora|eetq|gptq|hqq|inc|layer|te|"
    r"torchao|tp_layer|variants)\.py|transformers/models/|diffusers/loaders/lora_(conversion_utils|pipeline)|"
    r"diffusers/utils/state_dict_utils"
)
PLACES = {
    "peft/helpers.py::rescale_adapter_scale": "every adapter",
    "peft/helpers.py::MontecloraTrainerMixin.compute_loss": "a variant, which a core refuses",
    "peft/mapping_func.py::get_peft_model": "EVA, an initialisation of plain LoRA",
    "peft/optimizers/lorafa.py::create_lorafa_optimizer": "a core is refused",
    "peft/optimizers/loraplus.py::create_loraplus_optimizer": "lora_B and lora_V at the higher rate",
    "peft/optimizers/riemannian.py::_collect_lora_pairs": "a core is refused by the function that calls it",
    "peft/optimizers/riemannian.py::create_riemannian_optimizer": "a core is refused",
    "peft/peft_model.py::PeftModel.save_pretrained": "path_initial_model_for_weight_conversion: a core is refused",
    "peft/peft_model.py::PeftModel._get_peft_specific_model_tags": "the tag lora, for LoRA alone",
    "peft/tuners/lora/config.py::LoraConfig.__post_init__": "NLoraConfig and LoRA2Config set the type anew",
    "peft/tuners/lora/conversion.py::_convert_miss_module_to_lora": "of another method",
    "peft/tuners/lora/conversion.py::_convert_module_to_lora": "from get_delta_weight, of every adapter",
    "peft/tuners/lora/conversion.py::convert_to_lora": "warns that LoRA is LoRA; a core is converted",
    "peft/tuners/lora/eva.py::_load_eva_state_dict": "refuses all but init_lora_weights='eva'",
    "peft/tuners/lora/intruders.py::reduce_intruder_dimension": "a core is refused",
    "peft/tuners/lora/model.py::LoraModel._create_and_replace": "the tuner's own; plans are hidden from it",
    "peft/tuners/lora/model.py::LoraModel._enable_peft_forward_hooks": "mixed batches, of every adapter",
    "peft/tuners/lora/model.py::LoraModel._enable_peft_forward_hooks.forward_pre_hook": "mixed batches",
    "peft/tuners/lora/model.py::LoraModel.add_weighted_adapter": "a core is refused",
    "peft/tuners/lora/model.py::LoraModel._svd_generalized_task_arithmetic_weighted_adapter": "a core is refused",
    "peft/tuners/lora/model.py::LoraModel._generalized_task_arithmetic_weighted_adapter": "a core is refused",
    "peft/tuners/lora/model.py::LoraModel.subtract_mutated_init": "a core is refused before",
    "peft/tuners/lora/model.py::LoraModel._get_monteclora_loss": "a variant, which a core refuses",
    "peft/tuners/lora/model.py::LoraModel._get_kasa_loss": "a variant, which a core refuses",
    "peft/tuners/mixed/model.py::": "a core is refused",
    "peft/tuners/mixed/model.py::MixedModel._create_and_replace": "PEFT's layers",
    "peft/tuners/mixed/model.py::MixedModel._create_new_module": "PEFT's layers",
    "peft/tuners/tuners_utils.py::_check_lora_target_modules_mamba": "refused alike",
    "peft/utils/hotswap.py::": "of a core, equal ranks too",
    "peft/utils/hotswap.py::_convert_scalings_to_tensor": "every adapter",
    "peft/utils/hotswap.py::_pad_lora_weights": "lora_A, lora_B, lora_v and lora_V grow, the core stays",
    "peft/utils/hotswap.py::hotswap_adapter_from_state_dict": "of convolutions, where a core is refused",
    "peft/utils/loftq_utils.py::loftq_init": "an initialisation of LoRA",
    "peft/utils/loftq_utils.py::replace_lora_weights_loftq": "raises unless there are layers of bitsandbytes of PEFT",
    "peft/utils/peft_types.py::PeftType": "the name",
    "peft/utils/save_and_load.py::_validate_lora_adapter_state_dict": "of a core, a warning of our own",
    "peft/utils/save_and_load.py::get_peft_model_state_dict": "of a core, a warning of our own",
    "peft/utils/save_and_load.py::_maybe_shard_state_dict_for_tp": "of transformers before DTensors",
    "peft/utils/transformers_weight_conversion.py::build_peft_weight_mapping": "of checkpoints of before",
    "peft/utils/transformers_weight_conversion.py::convert_peft_config_for_transformers": "asked by the tuner itself",
    "peft/utils/transformers_weight_conversion.py::convert_peft_adapter_state_dict_for_transformers": "experts",
    "transformers/integrations/peft.py::PeftAdapterMixin.load_adapter": "hot swap: a core is refused",
    "trl/experimental/async_distillation/async_distillation_trainer.py::_iter_vllm_named_params": "modules_to_save",
    "trl/experimental/async_distillation/async_distillation_trainer.py::validate_lora_for_vllm_sync": "vLLM refuses",
    "trl/experimental/async_grpo/async_grpo_trainer.py::_iter_vllm_named_params": "modules_to_save",
    "trl/experimental/async_grpo/async_grpo_trainer.py::validate_lora_for_vllm_sync": "vLLM refuses lora_N",
    "trl/experimental/online_dpo/online_dpo_trainer.py::OnlineDPOTrainer._sync_fsdp2_params_to_vllm": "modules_to_save",
    "trl/experimental/online_dpo/online_dpo_trainer.py::OnlineDPOTrainer._move_model_to_vllm_inner": "modules_to_save",
    "trl/experimental/sdft/teacher_sync.py::is_pure_lora_training": "a core is no pure LoRA",
    "trl/experimental/sdpo/teacher_sync.py::is_pure_lora_training": "a core is no pure LoRA",
    "trl/generation/vllm_generation.py::VLLMGeneration._iter_fsdp2_params": "modules_to_save",
    "trl/generation/vllm_generation.py::VLLMGeneration._iter_named_params": "modules_to_save",
    **{
        f"trl/trainer/{name.lower()}_trainer.py::{name}Trainer.__init__": "the reference is a copy of every parameter"
        for name in ("DPO", "GRPO", "KTO", "RLOO")
    },
    "diffusers/loaders/lora_base.py::_load_lora_into_text_encoder": "from other formats",
    "diffusers/loaders/lora_base.py::LoraBaseMixin.set_lora_device": "moves A and B; a core left behind raises",
    "diffusers/loaders/peft.py::PeftAdapterMixin.load_lora_adapter": "a LoraConfig from the shapes; warns of lora_N",
    "diffusers/loaders/peft.py::PeftAdapterMixin.load_lora_adapter.map_state_dict_for_hotswap": "keys without a core",
    "diffusers/utils/peft_utils.py::recurse_remove_peft_layers": "of an older PEFT",
    "diffusers/utils/peft_utils.py::get_peft_kwargs": "a LoraConfig from the shapes",
}


def found_in(package: str) -> set[str]:
    folder = Path(importlib.util.find_spec(package).origin).parent
    found = set()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder.parent).as_posix()
        text = path.read_text(encoding="utf-8")
        if not ELSEWHERE.match(name) and QUESTION.search(text):
            found |= {f"{name}::{function}" for function in functions_that_ask(text)}
    return found


def functions_that_ask(text: str) -> set[str]:
    tree = ast.parse(text)
    spans, strings = [], set()

    def walk(node, name):
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}".lstrip(".")
                spans.append((child.lineno, child.end_lineno, inner))
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                strings.update(range(child.lineno, child.end_lineno + 1))
            walk(child, inner)

    walk(tree, "")
    asking = set()
    for number, line in enumerate(text.splitlines(), 1):
        if number not in strings and QUESTION.search(line.partition("#")[0]):
            asking.add(max((span for span in spans if span[0] <= number <= span[1]), default=(0, 0, ""))[2])
    return asking


@pytest.mark.parametrize("package", ["peft", "transformers", "trl", "diffusers"])
def test_every_place_is_listed(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    listed = {place for place in PLACES if place.startswith(f"{package}/")}
    found = found_in(package)
    assert not found - listed, "new places: see what becomes of NLoraConfig and LoRA2Config there"
    assert not listed - found, "places that are gone"


# The type


def test_types():
    plain, core, lora2 = NLoraConfig(init_lora_weights=True), NLoraConfig(), LoRA2Config()
    assert plain.peft_type == peft.PeftType.LORA == plain.peft_type and plain.peft_type in {"LORA"}
    for other in (core, lora2):
        assert other.peft_type != peft.PeftType.LORA and peft.PeftType.LORA != other.peft_type
        assert other.peft_type not in {"LORA"}
    assert core.peft_type != lora2.peft_type and plain.peft_type != lora2.peft_type
    # They may stand on one model.
    assert not core.peft_type != plain.peft_type and not plain.peft_type != core.peft_type
    for each in (plain, core, lora2):
        for again in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert again == each and type(again.peft_type) is type(each.peft_type)


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_saved_configurations_are_read_as_what_they_were(name, tmp_path):
    config(name).save_pretrained(tmp_path)
    assert f'"peft_type": "{"LORA2" if name == "lora2" else "NLORA"}"' in (tmp_path / "adapter_config.json").read_text()
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(read) is type(config(name)) and read.peft_type == config(name).peft_type


def test_tuners():
    models = {name: peft.get_peft_model(llama(), config(name)) for name in ("lora", "slora", "lora2")}
    tuners = [model.base_model for model in models.values()]
    assert isinstance(tuners[0], NLoraModel) and [type(tuner) for tuner in tuners[1:]] == [NLoraModel, LoRA2Model]
    stock = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert type(stock.base_model) is LoraModel
    assert {type(m) for m in stock.modules() if isinstance(m, Linear)} == {Linear}
    assert type(copy.deepcopy(models["lora"]).base_model) is type(tuners[0])


@pytest.mark.parametrize(("first", "second"), [("plain", "stock"), ("stock", "plain")])
def test_configurations_of_plain_lora_stand_on_one_model(first, second):
    model = peft.get_peft_model(llama(), PLAIN[first](target_modules=["q_proj"]))
    model.add_adapter("second", PLAIN[second](target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = logits(model)
    model.set_adapter("second")
    assert (logits(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_status_and_card(name):
    model = peft.get_peft_model(llama(), config(name))
    assert model.get_model_status().peft_types == {"default": {"lora": "LORA", "lora2": "LORA2"}.get(name, "NLORA")}
    assert ("lora" in model._get_peft_specific_model_tags()) == (name == "lora")


# Where adapters may stand


def mixtral():
    size = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**size, num_key_value_heads=2, num_local_experts=2)
    )


def qwen3_moe():
    size = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    size |= dict(moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, head_dim=8, num_key_value_heads=2)
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**size))


EXPERTS = {
    "mixtral": (mixtral, ["q_proj", "w1", "w2", "w3"]),
    "mixtral-experts": (mixtral, ["w1", "w2", "w3"]),
    "mixtral-router": (mixtral, ["q_proj", "gate"]),
    "mixtral-all": (mixtral, "all-linear"),
    "qwen3": (qwen3_moe, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    "qwen3-regex": (qwen3_moe, r".*\.(v_proj|gate_proj|up_proj)"),
    "qwen3-all": (qwen3_moe, "all-linear"),
}


@pytest.mark.parametrize(("make", "targets"), EXPERTS.values(), ids=EXPERTS)
def test_plain_lora_trains_the_experts_that_peft_trains(make, targets, tmp_path):
    models = [peft.get_peft_model(make(), plain(target_modules=targets)) for plain in PLAIN.values()]
    stock, ours = ({n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in models)
    assert ours == stock and any("expert" in name or "gate" in name for name in ours)
    perturb(models[1])
    models[1].save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    close(logits(loaded), logits(models[1]))


@pytest.mark.parametrize("name", [name for name in CORES if name != "lora2"])
@pytest.mark.parametrize(("make", "targets"), EXPERTS.values(), ids=EXPERTS)
@pytest.mark.filterwarnings("ignore:.* layers have fewer rows or columns than r")
def test_a_core_trains_the_experts_that_peft_trains(make, targets, name, tmp_path):
    options = {"r": 2, "target_modules": targets}
    stock = peft.get_peft_model(make(), PLAIN["stock"](**options))
    model = peft.get_peft_model(make(), config(name, **options))
    frozen = {n for n, p in model.named_parameters() if ".lora_" in n and not p.requires_grad}
    found = {n: p.shape for n, p in model.named_parameters() if p.requires_grad or n in frozen}
    expected = {n: p.shape for n, p in stock.named_parameters() if p.requires_grad}
    assert {n: shape for n, shape in found.items() if ".lora_A." in n or ".lora_B." in n} == expected
    assert {n.replace("lora_N", "lora_A") for n in found if ".lora_N." in n} == {n for n in found if ".lora_A." in n}
    perturb(model)
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), logits(model))


@pytest.mark.parametrize(("make", "targets"), EXPERTS.values(), ids=EXPERTS)
def test_lora2_trains_the_experts_that_peft_trains(make, targets, tmp_path):
    stock = peft.get_peft_model(make(), PLAIN["stock"](r=2, target_modules=targets))
    model = peft.get_peft_model(make(), config("lora2", r=2, k=2, target_modules=targets))
    outer = {".lora_v.": ".lora_A.", ".lora_V.": ".lora_B."}
    found = {n.replace(of, to) for n, _ in model.named_parameters() for of, to in outer.items() if of in n}
    assert found == {n for n, p in stock.named_parameters() if p.requires_grad}
    perturb(model)
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), logits(model))


class Registered(Linear):
    """A layer that a user has written for LoRA on linear layers."""


def of_the_user(config):
    config._register_custom_module({nn.Linear: Registered})
    return config


def test_layers_registered_by_the_user_come_first():
    model = peft.get_peft_model(llama(), of_the_user(config("lora", target_modules=["q_proj"])))
    assert {type(layer) for layer in model.modules() if isinstance(layer, Linear)} == {Registered}


@pytest.mark.parametrize("name", CORES)
def test_layers_registered_by_the_user_are_refused_for_a_core(name):
    model = llama()
    with pytest.raises(ValueError, match=r"_register_custom_module .* got one for .*\.q_proj"):
        model = peft.get_peft_model(model, of_the_user(config(name, target_modules=["q_proj"])))
    assert not any(isinstance(module, Linear) for module in model.modules())


@pytest.mark.parametrize("make", [llama, gpt2], ids=["linear", "conv1d"])
def test_plain_lora_prints_as_lora(make):
    stock = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules="all-linear"))
    plain = peft.get_peft_model(make(), config("lora"))
    printed = [str(next(m for m in model.modules() if isinstance(m, Linear))) for model in (stock, plain)]
    printed.append(str(next(m for m in fuse(stock).modules() if isinstance(m, Linear))))
    assert all(text.startswith("lora.Linear(") for text in printed)
    assert ["nlora_kernels" in text for text in printed] == [False, True, True]


@pytest.mark.parametrize("name", CORES)
def test_a_core_prints_as_its_own_layer(name):
    layer = next(m for m in adapted(llama(), name).modules() if isinstance(m, Linear))
    assert str(layer).startswith(f"lora.{type(layer).__name__}(")


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_mambas_projection_is_refused(name):
    size = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**size))
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        peft.get_peft_model(model, config(name, target_modules=["in_proj", "out_proj"]))
    assert not any("lora" in n for n, _ in model.named_modules())
    peft.get_peft_model(model, config(name, target_modules=["in_proj"]))


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **options).eval()


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("targets", [["out_proj"], ["linear1", "out_proj"], "all-linear", r".*out_proj"], ids=str)
def test_the_output_of_attention_is_refused_for_a_core(name, targets):
    model = encoder()
    with pytest.raises(ValueError, match=r"nn.MultiheadAttention reads the weight of 'layers.0.self_attn.out_proj'"):
        peft.get_peft_model(model, config(name, target_modules=targets))
    assert not any("lora" in n for n, _ in model.named_modules())
    peft.get_peft_model(model, config(name, target_modules="all-linear", exclude_modules=["out_proj"]))


def test_the_output_of_attention_with_plain_lora_is_as_in_peft_and_said():
    with pytest.warns(UserWarning, match="instead of calling it, so that an adapter there has no effect"):
        model = peft.get_peft_model(encoder(), config("lora", target_modules=["out_proj", "linear1"]))
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    assert [type(layer) is Linear for layer in layers] == [True, False] * 2


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_encoders_of_torch_with_padding(name):
    """In eval mode they pass nested tensors on."""
    x, padding = torch.randn(2, 5, 16), torch.arange(5)[None] >= torch.tensor([[5], [3]])
    model = peft.get_peft_model(encoder(), config(name, target_modules=["linear1", "linear2"]))
    perturb(model, 0.5)
    with torch.no_grad():
        evaluated, trained = (m(x, src_key_padding_mask=padding) for m in (model.eval(), copy.deepcopy(model).train()))
    close(evaluated[~padding], trained[~padding])


@pytest.mark.parametrize("name", ["lora", *CORES])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_encoders_of_torch_call_adapted_layers_in_eval_mode(name, grad):
    """Their fast path reads the weights of linear1 and linear2, past any adapter."""
    x = torch.randn(2, 5, 16)
    model = peft.get_peft_model(
        encoder(enable_nested_tensor=False), config(name, target_modules=["linear1", "linear2"])
    )
    perturb(model, 0.5)
    with torch.set_grad_enabled(grad):
        evaluated = model.eval()(x)
        close(evaluated, model.train()(x))
        model.eval()
        with model.disable_adapter():
            assert (model(x) - evaluated).abs().max() > 1e-3
    before = evaluated.detach()
    merged = model.merge_and_unload()
    close(merged(x), before, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in merged.modules())


# Mixed models, conversions


def test_mixed_models():
    model = peft.get_peft_model(llama(), config("lora", target_modules=["q_proj"]), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(r=2, target_modules=["v_proj"]))
    perturb(model)
    for name in CORES:
        with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
            peft.get_peft_model(llama(), config(name), mixed=True)


def test_intruder_dimensions():
    stock, ours = (peft.get_peft_model(llama(), make(target_modules=["q_proj"])) for make in PLAIN.values())
    peft.set_peft_model_state_dict(stock, peft.get_peft_model_state_dict(adapted_q(ours)))
    for model in (stock, ours):
        reduce_intruder_dimension(model, old_adapter_name="default", new_adapter_name="new", logging_sink=None)
        model.set_adapter("new")
    close(logits(ours), logits(stock), atol=1e-4)
    for name in CORES:
        model = peft.get_peft_model(llama(), config(name))
        with pytest.raises(ValueError, match="not using LoRA"):
            reduce_intruder_dimension(model, old_adapter_name="default", new_adapter_name="new")
        assert list(model.peft_config) == ["default"]


def adapted_q(model):
    perturb(model)
    return model


def test_intruder_dimensions_of_a_core_behind_plain_lora():
    model = peft.get_peft_model(llama(), config("lora"))
    model.add_adapter("core", config("nlora"))
    with pytest.raises(ValueError, match="must have a configuration of its own"):
        reduce_intruder_dimension(model, old_adapter_name="core", new_adapter_name="new", logging_sink=None)
    assert list(model.peft_config) == ["default", "core"]
    model.add_adapter("another", copy.deepcopy(model.peft_config["core"]))


def test_conversion_to_lora_warns_for_lora_alone():
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        peft.convert_to_lora(adapted(llama(), "lora"), rank=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.convert_to_lora(adapted(llama(), "slora"), rank=4)
    assert not any("already a LoRA adapter" in str(warning.message) for warning in caught)


def test_the_initial_model_of_plain_lora(tmp_path):
    model = peft.get_peft_model(llama(), NLoraConfig(r=4, init_lora_weights="olora", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "initial")
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "converted")), expected, atol=1e-4)


# Saving, swapping


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_shards_that_were_not_gathered_are_said(name, tmp_path):
    model = peft.get_peft_model(llama(), config(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        peft.get_peft_model_state_dict(model)
    kind = {"lora": "lora_B", "lora2": "lora_E"}.get(name, "lora_N")
    for n, parameter in model.named_parameters():
        if f"1.mlp.up_proj.{kind}." in n:
            parameter.data = parameter.data.new_empty(0)
    # All but the names of the tensors in the words of PEFT's own warning, by which filters find it.
    words = rf"1 LoRA tensor\(s\) have invalid shape: .*up_proj\.{kind}.* DeepSpeed ZeRO-3 / FSDP shards were not"
    with pytest.warns(PeftWarning, match=words):
        peft.get_peft_model_state_dict(model)


def test_transformers_hot_swaps_plain_lora(tmp_path):
    first, second = adapted(llama(), "lora"), peft.get_peft_model(llama(), config("lora"))
    perturb(second, 0.3)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = llama()
    model.load_adapter(tmp_path / "first", "default")
    close(logits(model), logits(first))
    model.load_adapter(tmp_path / "second", "default", hotswap=True)
    close(logits(model), logits(second))


def test_transformers_refuses_to_hot_swap_a_core(tmp_path):
    adapted(llama(), "nlora").save_pretrained(tmp_path)
    model = llama()
    model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(tmp_path, "default", hotswap=True)


def test_a_core_is_swapped_for_no_plain_lora(tmp_path):
    adapted(llama(), "nlora").save_pretrained(tmp_path)
    model = adapted(llama(), "lora")
    before = logits(model)
    with pytest.raises(RuntimeError, match="unexpected keys"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    close(logits(model), before, atol=0)


# Names of parameters


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_every_parameter_is_called_lora_adapter_weight(name):
    model = peft.get_peft_model(llama(), config(name))
    tensors = [n for n, _ in model.named_parameters() if ".lora_" in n] + [
        n for n, _ in model.named_buffers() if "lora_" in n
    ]
    assert all(re.fullmatch(r".*\.lora_\w+\.default\.weight", n) for n in tensors)


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_a_reference_adapter_filled_by_name(name):
    """As TRL's trainers make it: a second adapter of the same configuration, and a copy of every '.default.'."""
    model = adapted(llama(), name)
    for n, mask in model.named_buffers():
        if "lora_mask" in n:
            mask[1] = 0
    policy = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if ".default." in n:
                model.get_parameter(n.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    close(logits(model), policy, atol=1e-5 if name == "nlora_residual" else 0)
    with model.disable_adapter():
        assert (logits(model) - policy).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_lora_plus(name):
    model = peft.get_peft_model(llama(), config(name))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    names = {id(p): re.search(r"lora_\w+", n)[0] for n, p in model.named_parameters() if p.requires_grad}
    groups = [({names[id(p)] for p in group["params"]}, group["lr"]) for group in optimizer.param_groups]
    high = {n for kinds, lr in groups if lr > 1e-3 for n in kinds}
    assert high == ({"lora_V"} if name == "lora2" else set() if "inttune" in name else {"lora_B"})
    assert set.union(*(kinds for kinds, _ in groups)) == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_optimizers_for_the_product_of_two_refuse_a_core(name):
    makers = (
        lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3),
        lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3),
    )
    for make in makers:
        model = peft.get_peft_model(llama(), config(name))
        if name == "lora":
            assert isinstance(make(model), torch.optim.Optimizer)
            continue
        before = {n for n, p in model.named_parameters() if p.requires_grad}
        with pytest.raises(ValueError, match="product of lora_A and lora_B alone, and adapter 'default' has a core"):
            make(model)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == before


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_fsdps_policy_wraps_every_trained_matrix(name):
    model = peft.get_peft_model(llama(), config(name))
    policy = fsdp_auto_wrap_policy(model)
    for n, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            assert policy(module=module, recurse=False, nonwrapped_numel=sum(p.numel() for p in own)), n


@pytest.mark.parametrize("name", ["lora", *CORES])
def test_a_scaling_of_zero_gives_the_base_layers_own_bits(name):
    base = llama()
    model = adapted(base, name)
    for layer in [m for m in model.modules() if isinstance(m, Linear)]:
        layer.set_scale("default", 0)
    # A residual's base weight is a rounding away from the one that was.
    close(logits(model), logits(base), atol=1e-5 if name == "nlora_residual" else 0)


# Checkpoints of before


def old_names(tensors):
    return {re.sub(r"(\.lora_(?:[vuEUV]|mask)(?:\.default)?)\.weight$", r"\1", n): t for n, t in tensors.items()}


def masked(model):
    for n, mask in model.named_buffers():
        if "lora_mask" in n:
            mask[1] = 0
    return model


def test_lora2_checkpoints_with_the_older_names(tmp_path):
    from safetensors.torch import load_file, save_file

    model = masked(adapted(llama(), "lora2"))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    old = old_names(load_file(weights))
    assert any(n.endswith(".lora_v") for n in old)
    save_file(old, weights)
    close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model), atol=0)
    # And the state of a whole model.
    again = peft.get_peft_model(llama(), config("lora2"))
    again.load_state_dict(old_names(model.state_dict()))
    close(logits(again), logits(model), atol=0)


def test_plain_lora_is_told_by_pefts_own_names():
    """What PEFT prints of a model and of the types that it swaps is what it prints without this package."""
    base = nn.Sequential(nn.Linear(4, 4))
    model = peft.get_peft_model(base, NLoraConfig(r=2, init_lora_weights=True, target_modules=["0"]))
    assert model.get_model_status().adapter_model_type == "LoraModel"
    assert copy.deepcopy(model).get_model_status().adapter_model_type == "LoraModel"
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but IA3 was passed"):
        hotswap.check_hotswap_configs_compatible(peft.IA3Config(), peft.IA3Config())
    with pytest.raises(ValueError, match="for r, 4 != 8"):
        hotswap.check_hotswap_configs_compatible(NLoraConfig(r=4), NLoraConfig(r=8))


def names_itself(config, model) -> str:
    """What PEFT says where the adapter "foobar" is a module to save too."""
    config.modules_to_save = ["foobar"]
    with pytest.raises(ValueError, match="almost certainly not the intended behavior") as refused:
        peft.get_peft_model(model, config, "foobar")
    return str(refused.value)


def test_pefts_messages_name_its_own_layer():
    said = {
        name: names_itself(make(target_modules=["0"]), nn.Sequential(nn.Linear(6, 5))) for name, make in PLAIN.items()
    }
    assert said["plain"] == said["stock"] and str(Linear) in said["stock"]


def test_a_second_adapter_is_named_so_too_and_leaves_the_first_fused():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), PLAIN["plain"](target_modules=["0"]), "first")
    layer, state = model.base_model.model[0], copy.deepcopy(model.state_dict())
    assert type(layer) is FusedLinear
    config = PLAIN["plain"](target_modules=["0"], modules_to_save=["second"])
    with pytest.raises(ValueError, match=re.escape(f"is a child of {Linear}. ")):
        model.add_adapter("second", config)
    assert type(layer) is FusedLinear and state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("order", ["plain first", "core first"])
def test_plain_lora_and_a_core_on_one_layer(order, tmp_path):
    x, base = torch.randn(3, 6), nn.Sequential(nn.Linear(6, 5))
    configs = {"plain": PLAIN["plain"](target_modules=["0"]), "core": config("nlora_residual", target_modules=["0"])}
    first, second = configs if order == "plain first" else reversed(configs)
    model = peft.get_peft_model(copy.deepcopy(base), configs[first], first)
    model.add_adapter(second, configs[second])
    perturb(model)
    layer = model.base_model.model[0]
    assert isinstance(layer, NLoraLinear) and set(layer.lora_N) == {"core"} and layer.subtracted == "core"
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / first, first)
    loaded.load_adapter(tmp_path / second, second)
    for each in (model, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = each.base_model.model[0]
        for name in configs:
            each.set_adapter(name)
            delta = layer.get_delta_weight(name)
            torch.testing.assert_close(each(x), base(x) + x @ delta.T, rtol=1e-5, atol=1e-5)


def test_a_core_that_is_refused_leaves_plain_lora_as_it_was():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), PLAIN["plain"](target_modules=["0"]))
    layer, state, printed = model.base_model.model[0], copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(ValueError, match="'0' cannot be adapted: r must be"):
        model.add_adapter("core", config("nlora", target_modules=["0"], r=9))
    assert type(layer) is FusedLinear and str(model) == printed
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
