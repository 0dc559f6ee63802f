"""The state dict of a whole model with residual adapters, saved and loaded in every way: right, or an error that names
the layer and changes nothing. PEFT's own files are in test_residual.py."""

import copy
import io

import accelerate
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from python_tests.peft.adapters import close, config
from python_tests.tiny import perturb

X = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
SELECTS = {"a": "leading", "b": "uniform", "c": "norm"}


def network(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 36, **options), nn.Linear(36, 40, **options))


def built(*names, base=None, method="nlora_residual", **options):
    """A model with adapters in the order of their names here, all of them active."""
    base = network() if base is None else base
    configs = {
        name: config(method, target_modules=["0", "1"], select=SELECTS[name], select_seed=7, **options)
        for name in names
    }
    model = peft.get_peft_model(base, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    model.base_model.set_adapter(list(names))
    return model


def trained(*names, **options):
    model = built(*names, **options)
    perturb(model)
    return model.eval()


def y(model):
    with torch.no_grad():
        return model(X)


def check_same(loaded, saved):
    """In both modes, disabled, and with each adapter alone, and at last without any."""
    for mode in (True, False):
        close(y(loaded.train(mode)), y(saved))
    names = list(saved.peft_config)
    for name in names:
        for model in (loaded, saved):
            model.base_model.set_adapter([name])
        close(y(loaded), y(saved))
    for model in (loaded, saved):
        model.base_model.set_adapter(names)
    with loaded.disable_adapter(), saved.disable_adapter():
        close(y(loaded), y(saved))
    close(y(loaded.merge_and_unload()), y(saved))


def check_refused(model, load, match):
    """Nothing is changed, but what a loader has written into the model's own tensors before it asked."""
    before, expected = copy.deepcopy(model.state_dict()), y(model)
    with pytest.raises(ValueError, match=match):
        load(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    for mode in (True, False):
        close(y(model.train(mode)), expected)


# Ways from a saved model to another


def by_torch(saved, model, folder):
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))


def by_assigning(saved, model, folder):
    model.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)


def by_plain_dict(saved, model, folder):
    model.load_state_dict({key: tensor.clone() for key, tensor in saved.state_dict().items()})


def by_safetensors(saved, model, folder):
    save_model(saved, str(folder / "model.safetensors"))
    load_model(model, str(folder / "model.safetensors"))


def by_accelerate(saved, model, folder):
    save_file(saved.state_dict(), folder / "model.safetensors", {"format": "pt"})
    accelerate.load_checkpoint_in_model(model, str(folder))


def by_accelerate_tensor_by_tensor(saved, model, folder):
    save_file(saved.state_dict(), folder / "model.safetensors", {"format": "pt"})
    accelerate.load_checkpoint_in_model(model, str(folder), device_map={"": "cpu"})


def by_dcp(saved, model, folder):
    dcp.save({"model": get_model_state_dict(saved)}, checkpoint_id=folder, no_dist=True)
    found = {"model": get_model_state_dict(model)}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(model, found["model"])


def by_dcp_copies(saved, model, folder):
    set_model_state_dict(model, copy.deepcopy(get_model_state_dict(saved)), options=StateDictOptions(strict=True))


WAYS = (
    by_torch,
    by_assigning,
    by_plain_dict,
    by_safetensors,
    by_accelerate,
    by_accelerate_tensor_by_tensor,
    by_dcp,
    by_dcp_copies,
)
DESCRIBED = (by_torch, by_assigning, by_dcp_copies)
INTO_COPIES = (by_torch, by_assigning, by_plain_dict, by_safetensors, by_accelerate, by_dcp_copies)


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other_base", [False, True], ids=["", "other_base"])
@pytest.mark.parametrize("order", ["a", "ab", "ba"])
def test_the_order_of_adapters_does_not_matter(way, order, other_base, tmp_path):
    saved = trained(*order)
    model = built(*sorted(order), base=network(seed=other_base))
    way(saved, model, tmp_path)
    check_same(model, saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("offloaded", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("order", ["a", "ba"])
def test_a_model_on_the_meta_device(way, order, offloaded, tmp_path):
    saved = trained(*order)
    with accelerate.init_empty_weights():
        model = built(*sorted(order))
    if not offloaded:
        if way not in (by_assigning, by_accelerate_tensor_by_tensor):
            # They load into what is there.
            model.to_empty(device="cpu").train()
        way(saved, model, tmp_path)
        check_same(model, saved)
        return
    save_file(saved.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    devices = {"base_model.model.0": "cpu", "base_model.model.1": "disk"}
    model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path), devices, offload_folder=tmp_path / "off")
    close(y(model), y(saved))
    close(y(model.eval()), y(saved))
    with model.disable_adapter(), saved.disable_adapter():
        close(y(model), y(saved))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before", ["as_loaded", "plain", "merged"])
def test_what_memory_held_before_it_was_given_to_a_model_says_nothing(way, before, tmp_path):
    saved = trained("b", "a")
    with accelerate.init_empty_weights():
        model = built("a", "b")
    model.to_empty(device="cpu")
    old = copy.deepcopy(saved)
    with torch.no_grad():
        if before == "merged":
            old.base_model.merge_adapter()
        for name, parameter in model.named_parameters():
            parameter.copy_(old.get_parameter(name))
        if before == "plain":
            for name, parameter in network().named_parameters():
                index, kind = name.split(".")
                model.base_model.model[int(index)].base_layer.get_parameter(kind).copy_(parameter)
    way(saved, model.train(), tmp_path)
    check_same(copy.deepcopy(model), copy.deepcopy(saved))
    if way is by_accelerate_tensor_by_tensor:
        # It tells no layer that values have come.
        return
    saved.base_model.merge_adapter()
    check_refused(model, lambda model: by_plain_dict(saved, model, tmp_path), "merged")


def test_a_base_weight_that_comes_after_an_adapter_of_peft_is_refused_by_name(tmp_path):
    saved = trained("a")
    saved.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = network()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a", low_cpu_mem_usage=True)
    model.base_model.model[0].base_layer.weight = nn.Parameter(network()[0].weight)
    with pytest.raises(ValueError, match="layer '0': the base weight has come after the residual adapter"):
        model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merged", [["a"], ["a", "b"]], ids=str)
@pytest.mark.parametrize("way", INTO_COPIES)
def test_a_state_saved_while_merged_is_refused(merged, way, tmp_path):
    saved = trained("a", "b")
    saved.merge_adapter(merged)
    match = "model.0'.*merged" if way in DESCRIBED else "model.0'.*saved while one was merged"
    check_refused(trained("a", "b"), lambda model: way(saved, model, tmp_path), match)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", INTO_COPIES)
def test_a_last_layer_that_is_refused_leaves_the_first_as_it_was(way, tmp_path):
    saved = trained("a")
    saved.base_model.model[1].merge()
    check_refused(built("a"), lambda model: way(saved, model, tmp_path), "model.1'.*merged")


@pytest.mark.parametrize("way", DESCRIBED)
def test_a_state_saved_while_merged_is_loaded_while_merged(way, tmp_path):
    saved, model = trained("a"), built("a")
    for each in (saved, model):
        each.merge_adapter()
    way(saved, model, tmp_path)
    close(y(model), y(saved))
    for each in (saved, model):
        each.unmerge_adapter()
    check_same(model, saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [*INTO_COPIES, by_dcp])
def test_a_merged_model_refuses_a_state_that_is_not(way, tmp_path):
    saved, model = trained("a"), trained("a")
    model.merge_adapter()
    if way is not by_dcp:
        check_refused(model, lambda model: way(saved, model, tmp_path), "model.0'.*merge_adapter")
        return
    # It has written into the model before the model is asked.
    with pytest.raises(ValueError, match="model.0'.*merge_adapter"):
        way(saved, model, tmp_path)


def with_nothing_out(*names):
    """A model in which nothing is subtracted, as one is that has not been complete."""
    saved = trained(*names)
    for module in (saved.base_model.model[0], saved.base_model.model[1]):
        module.add_initial()
    return saved


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", INTO_COPIES)
def test_a_state_with_nothing_out_of_it(way, tmp_path):
    saved, model = with_nothing_out("a"), trained("a")
    if way in DESCRIBED:
        way(saved, model, tmp_path)
        close(y(model), y(saved))
        check_same(model, saved)
    else:
        check_refused(model, lambda model: way(saved, model, tmp_path), "model.0'.*with no product out of it")


@pytest.mark.parametrize("way", [*INTO_COPIES, by_dcp])
def test_a_state_goes_into_a_model_with_nothing_out_of_its_weight(way, tmp_path):
    saved, model = trained("a"), with_nothing_out("a")
    if way is by_dcp:
        with pytest.raises(ValueError, match="model.0'.*call unmerge_adapter.. and eval"):
            way(saved, model, tmp_path)
        return
    way(saved, model, tmp_path)
    check_same(model, saved)


def test_a_state_saved_while_disabled(way, tmp_path):
    saved, model = trained("a"), built("a")
    with saved.disable_adapter():
        way(saved, model, tmp_path)
    check_same(model, saved)


def part(state, *names):
    """Of a state dict what belongs to the base model and to these adapters."""
    others = [name for name in "abc" if name not in names]
    for key in list(state):
        if any(f".{name}." in key for name in others):
            del state[key]
    return state


@pytest.mark.parametrize("described", [True, False])
def test_adapters_that_the_model_has_not_and_the_other_way_round(described):
    def state_of(model):
        state = copy.deepcopy(model.state_dict())
        return state if described else dict(state)

    saved = trained("a", "b")
    # The product of "a" is out of it.
    for state in (state_of(saved), part(state_of(saved), "b"))[: 2 if described else 1]:
        check_refused(
            trained("b"),
            lambda model, state=state: model.load_state_dict(state, strict=False),
            "model.0'.*adapter 'a', which this model has not",
        )
    # That of "b" is not.
    model = trained("a", "b")
    model.load_state_dict(part(state_of(saved), "a"), strict=False)
    check_same(model, saved)
    model, saved = trained("a"), trained("a", "b")
    model.load_state_dict(state_of(saved), strict=False)
    saved.base_model.set_adapter(["a"])
    close(y(model), y(saved))
    # A model that has one more.
    saved, model = trained("b"), trained("a", "b")
    model.load_state_dict(state_of(saved), strict=False)
    for each in (model, saved):
        each.base_model.set_adapter(["b"])
    close(y(model), y(saved))
    close(y(model.eval()), y(saved))
    close(y(model.unload()), y(network()))


def test_a_base_weight_without_initial_matrices():
    residual, plain = (
        copy.deepcopy(trained("a", method=method).state_dict()) for method in ("nlora_residual", "nlora")
    )
    bare = {f"base_model.model.{name.replace('.', '.base_layer.')}": t for name, t in network().state_dict().items()}
    refused = [("nlora_residual", state, "or after unload") for state in (plain, bare, dict(part(residual)))]
    refused += [("nlora_residual", part(residual), "whose initial matrices are not in it")]
    # Plain NLoRA has no place for what is out of it.
    whole = trained("a").state_dict()
    refused += [("nlora", state, "'a', which this model has not") for state in (whole, dict(whole))]
    for method, state, match in refused:
        check_refused(
            trained("a", method=method),
            lambda model, state=state: model.load_state_dict(state, strict=False),
            f"model.0'.*{match}",
        )


def test_16_bits():
    saved, model, other = (trained("a", base=network().bfloat16()) for _ in range(3))
    perturb(model)
    by_plain_dict(saved, model, None)
    x = X.bfloat16()
    assert torch.equal(model(x), saved(x))
    other.base_model.model[0].add_initial()
    with pytest.raises(ValueError, match="model.0'.*with no product out of it"):
        by_plain_dict(other, model, None)


def test_another_alpha():
    saved, model = trained("a"), built("a", lora_alpha=12)
    by_torch(saved, model, None)
    for each in (model, saved):
        with each.disable_adapter():
            close(y(each), y(network()))
    check_refused(built("a", lora_alpha=12), lambda m: by_plain_dict(saved, m, None), "model.0'.*does not say which")


def test_a_copy_of_a_model_is_loaded_as_the_model():
    saved = trained("b", "a")
    twin = copy.deepcopy(built("a", "b"))
    twin.load_state_dict(saved.state_dict())
    check_same(twin, saved)


def test_its_own_state_dict_is_no_change():
    model = trained("a")
    expected, state = y(model), model.state_dict()
    model.load_state_dict(state)
    close(y(model), expected)
    model.merge_adapter()
    # What was saved may have been written into it since, and nobody would know.
    check_refused(model, lambda model: model.load_state_dict(model.state_dict()), "model.0'.*unmerge_adapter")
    model.unmerge_adapter()
    for each in (state, dict(state)):
        model.load_state_dict(each)
        close(y(model), expected)


def test_adapters_alone_by_dcp(tmp_path):
    """Which writes into the tensors of the model's state dict, the initial matrices among them."""
    saved = trained("a")
    optimizer = torch.optim.SGD([p for p in saved.parameters() if p.requires_grad])

    def adapters(model, optimizer):
        tensors, moments = get_state_dict(model, optimizer)
        return {"adapters": {name: t for name, t in tensors.items() if ".lora_" in name}, "optimizer": moments}

    dcp.save(adapters(saved, optimizer), checkpoint_id=tmp_path, no_dist=True)
    # As one is built that starts from other rows and columns.
    model = peft.get_peft_model(
        network(), config("nlora_residual", target_modules=["0", "1"], select="norm"), adapter_name="a"
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    found = adapters(model, optimizer)
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    names = {"model_state_dict": found["adapters"], "optim_state_dict": found["optimizer"]}
    set_state_dict(model, optimizer, **names, options=StateDictOptions(strict=False))
    check_same(model, saved)
