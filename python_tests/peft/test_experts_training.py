"""Mixtures with adapters on their experts as they are trained and served."""

import copy

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nlora_kernels as nk
from python_tests import training
from python_tests.peft.adapters import close, config, logits
from python_tests.peft.mixtures import TARGETS, adapted, counted, gradients, to_all_experts, wrappers
from python_tests.ranks import needs_gloo, run
from python_tests.tiny import MIXTURES, perturb, tokens

METHODS = ("lora", "nlora", "nlora_residual", "lora2")


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing(mixture, use_reentrant):
    model = adapted(mixture, "nlora")
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, grad in gradients(model.train()).items():
        close(grad, expected[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(mixture, method, dtype, prefer):
    model = to_all_experts(adapted(mixture, method))
    prefer("reference")
    exact = logits(model)
    with torch.autocast("cpu", dtype):
        plain = logits(model)
    prefer(None)
    with torch.autocast("cpu", dtype):
        output = model(tokens(), labels=tokens())
    output.loss.backward()
    bound = 2 * (plain - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (output.logits - exact).norm() <= bound
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("method", ["nlora_residual", "lora2"])
def test_compiled_models(mixture, method):
    model = adapted(mixture, method)
    expected, grads = logits(model), gradients(model)
    torch._dynamo.reset()
    model.zero_grad()
    output = torch.compile(model, backend="aot_eager")(tokens(), labels=tokens())
    output.loss.backward()
    close(output.logits.detach(), expected, atol=1e-4)
    for name, p in model.named_parameters():
        if p.requires_grad:
            close(p.grad, grads[name], atol=1e-4)


def test_the_loss_that_balances_the_router_and_its_gradients():
    model = adapted(MIXTURES["mixtral"](), "nlora")
    merged = copy.deepcopy(model).merge_and_unload()
    outputs = [each(tokens(), labels=tokens(), output_router_logits=True) for each in (model, merged)]
    assert outputs[0].aux_loss > 0
    close(outputs[0].aux_loss, outputs[1].aux_loss, atol=1e-4)
    close(outputs[0].loss, outputs[1].loss, atol=1e-4)
    routers = [next(p for name, p in each.named_parameters() if "gate.weight" in name) for each in (model, merged)]
    for router in routers:
        router.requires_grad_()
    outputs = [each(tokens(), labels=tokens(), output_router_logits=True) for each in (model, merged)]
    grads = [torch.autograd.grad(output.loss, router)[0] for router, output in zip(routers, outputs, strict=True)]
    close(grads[0], grads[1], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_generating_one_token_after_another(mixture, method):
    model = adapted(mixture, method)
    ids = tokens(2, 4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    found = model.generate(input_ids=ids, **options)
    assert torch.equal(found, model.merge_and_unload().generate(input_ids=ids, **options))


def test_no_tokens(mixture):
    layer = wrappers(adapted(mixture, "nlora"))[0]
    x, weights = torch.randn(0, 32, requires_grad=True), torch.rand(0, 2, requires_grad=True)
    y = layer(x, torch.zeros(0, 2, dtype=torch.long), weights)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 32) and weights.grad.shape == (0, 2)
    assert not layer.lora_N["default"].weight.grad.any()


def test_batches_of_several_adapters_are_refused_as_by_peft(mixture):
    model = adapted(mixture, "nlora").eval()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(tokens(), adapter_names=["default", "__base__", "default"])


# Two processes


PARALLEL = ("ddp", "fsdp2")


def build(kind, method):
    torch.manual_seed(0)
    model = peft.get_peft_model(MIXTURES[kind](), config(method, **TARGETS)).train()
    perturb(model)
    return model


def train(model, ids):
    return training.losses(model, ids, 3, training.adamw(model.parameters()))


def parallel(rank):
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for kind in MIXTURES:
        for method in METHODS:
            for way in PARALLEL:
                model = build(kind, method)
                if way == "ddp":
                    model = DistributedDataParallel(model)
                else:
                    for layer in model.base_model.model.model.layers:
                        fully_shard(layer, mesh=mesh)
                    fully_shard(model, mesh=mesh)
                with pytest.MonkeyPatch.context() as patch:
                    calls = counted(patch)
                    losses = train(model, tokens(batch=4).chunk(2)[rank])
                dist.all_reduce(losses)
                results[kind, method, way] = losses / 2, len(calls), nk.layers.unfused(model)
    return results


@pytest.fixture(scope="module")
def of_two_processes():
    return run(parallel, 2)


@needs_gloo
@pytest.mark.parametrize("way", PARALLEL)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MIXTURES)
def test_two_processes_train_as_one(kind, method, way, of_two_processes):
    losses, calls, unfused = of_two_processes[kind, method, way]
    # Two layers in each of two mixtures, three steps.
    assert calls == 12 and not unfused
    torch.testing.assert_close(losses, train(build(kind, method), tokens(batch=4)), rtol=1e-5, atol=1e-5)
