"""Tensor parallelism on 2 and 4 processes: losses, checkpoints and merges are those of one process, and every layer is
one operation on what a rank has of it."""

import functools
import traceback

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from nlora_kernels import init
from nlora_kernels import peft as nk_peft
from nlora_kernels.layers import unfused
from nlora_kernels.layers.branch import local
from nlora_kernels.lora2 import RankAllocator, shards
from nlora_kernels.peft import tensor_parallel
from python_tests import training
from python_tests.peft.adapters import adapter_layers, close, config, logits
from python_tests.ranks import needs_gloo
from python_tests.ranks import run as in_processes
from python_tests.tiny import VOCABULARY, counted_fusions, tokens

METHODS = (
    "lora",
    "slora",
    "nlora",
    "nlora_optimal",
    "nlora_residual",
    "inttune",
    "inttune_residual",
    "lora2",
    "lora2_pruned",
)
COLUMN_WISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_WISE = ("self_attn.o_proj", "mlp.down_proj")

pytestmark = needs_gloo


def base_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(3)
    return model.eval()


def adapter_config(method):
    return config(method.removesuffix("_pruned"))


def adapted(base, method):
    torch.manual_seed(0)
    return peft.get_peft_model(base, adapter_config(method)).train()


def train(model, ids, method, steps):
    schedule = {"target_rank": 1, "total_steps": steps, "t_init": 0, "t_final": 0, "delta_t": 1}
    allocator = RankAllocator(model, **schedule) if method == "lora2_pruned" else None
    return training.losses(model, ids, steps, training.adamw(model.parameters()), allocator)


def split_by_torch(mesh):
    model = base_model()
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in COLUMN_WISE}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ROW_WISE}
    return parallelize_module(model, mesh, plan)


def split_by_transformers(folder):
    return LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto")


class Traffic(TorchDispatchMode):
    """Counts the values that a rank gives to collectives."""

    def __init__(self):
        super().__init__()
        self.values: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "device_mesh") for kind in types):
            return NotImplemented
        if func.namespace in ("_c10d_functional", "c10d") and "w" not in func.__name__[:5]:
            given = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            name = func.__name__.split(".")[0].rstrip("_").replace("_", "")
            self.values[name] = self.values.get(name, 0) + sum(t.numel() for t in given)
        return func(*args, **(kwargs or {}))


class Run:
    """What every process of a run does."""

    def __init__(self, rank, folder):
        self.rank, self.ranks, self.folder, self.found = rank, dist.get_world_size(), folder, {}
        self.mesh = init_device_mesh("cpu", (self.ranks,))

    def split(self, engine):
        return split_by_torch(self.mesh) if engine == "torch" else split_by_transformers(self.folder)

    def trained(self, engine, method, steps):
        model = adapted(self.split(engine), method)
        layers = adapter_layers(model)
        assert len(layers) == 7 and unfused(model) == {}, unfused(model)
        with counted_fusions() as calls:
            losses = train(model, tokens(batch=4), method, steps)
        assert len(calls) == steps * len(layers)
        self.found[engine, method] = losses, logits(model.eval())
        return model

    def saved(self, model, engine, method):
        model.save_pretrained(self.folder / f"{engine}{self.ranks}" / method, is_main_process=self.rank == 0)
        dist.barrier()

    def loaded(self, engine, method, source):
        model = peft.PeftModel.from_pretrained(self.split(engine), self.folder / source / method)
        assert unfused(model) == {}
        self.found[engine, method, source] = logits(model)


def parallel(rank, folder, steps, jobs, dtype):
    torch.set_default_dtype(dtype)
    run = Run(rank, folder)
    for engine, methods in jobs[run.ranks].items():
        for method in methods:
            if engine == "fsdp2":
                beside_fsdp2(run, method, steps)
                continue
            run.saved(run.trained(engine, method, steps), engine, method)
            run.loaded(engine, method, "one")
            if run.ranks == 2 and method in jobs[4].get(engine, ()):
                run.loaded(engine, method, f"{engine}4")
    if run.ranks == 2 and dtype is torch.float32:
        for check in CHECKS:
            run.found["check", check.__name__] = outcome(check, run)
    return run.found


def beside_fsdp2(run, method, steps):
    """Losses and fusions where FSDP2 has one dimension of the mesh and tensor parallelism the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = adapted(split_by_torch(mesh["tp"]), method)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    assert unfused(model) == {}, unfused(model)
    ids = tokens(batch=4).chunk(2)[mesh["dp"].get_local_rank()]
    with counted_fusions() as calls:
        losses = train(model, ids, method, steps)
    assert len(calls) == steps * len(adapter_layers(model))
    dist.all_reduce(losses, group=mesh["dp"].get_group())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(run.folder / "fsdp2" / method, state_dict=state, is_main_process=run.rank == 0)
    run.found["fsdp2", method] = losses / 2, None


def pair(method, mesh=None, biased=False, seed=1, **options):
    """A column-wise and a row-wise layer, and the same on one process where there is no mesh."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, bias=biased), nn.Linear(12, 8, bias=biased))
    if mesh is not None:
        styles = options.pop("styles", (ColwiseParallel(), RowwiseParallel()))
        parallelize_module(model, mesh, dict(zip("01", styles, strict=True)))
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config(method, target_modules=["0", "1"], **options)).train()


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gradients(model, x):
    model(x).square().sum().backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name])


def backward_sums_what_is_less(run):
    """Of few tokens r values each, of many the gradients of what is whole; PEFT's own LoRA moves r a token always."""
    for method in ("lora", "nlora", "inttune", "lora2"):
        for count in (3, 200):
            x = torch.randn(count, 16, generator=torch.Generator().manual_seed(2))
            model = pair(method, run.mesh)
            assert unfused(model) == {}
            with Traffic() as forward:
                model(x)
            assert forward.values == {"allreduce": count * 8}
            with Traffic() as moved:
                found = gradients(model, x)
            same(found, gradients(pair(method), x))
            # Beside the forward: of x no gradient is asked for, and that of a row-wise layer's input is not moved.
            r, extra = 2 if method == "lora2" else 4, moved.values["allreduce"] - count * 8
            near = {"0": "B", "1": "A"} if method != "lora2" else {"0": "V", "1": "v"}
            sizes = dict.fromkeys(near, 0)
            for name, p in model.named_parameters():
                layer = name.split(".")[2]
                if p.requires_grad and f"lora_{near[layer]}." not in name:
                    sizes[layer] += p.numel()
            assert extra == sum(min(count * r, size) for size in sizes.values()) <= 2 * count * r


def moves_no_more_than_peft(run):
    ids, moved = tokens(batch=4), []
    stock = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    ours = config("lora", target_modules=["q_proj", "v_proj"])
    for each in (stock, ours):
        model = peft.get_peft_model(run.split("transformers"), each)
        with Traffic() as counted:
            model(ids, labels=ids).loss.backward()
        moved.append(sum(counted.values.values()))
    assert moved[1] <= moved[0], moved


def gathers_rows_and_columns_alone(run):
    layer = parallelize_module(nn.Linear(32, 24, bias=False), run.mesh, ColwiseParallel())
    W = layer.weight.full_tensor().detach()
    for style in (ColwiseParallel, RowwiseParallel):
        layer = nn.Linear(32, 24, bias=False)
        layer.weight = nn.Parameter(W.clone())
        layer = parallelize_module(layer, run.mesh, style())
        split, part = tensor_parallel.split_of(layer), layer.weight.detach().to_local()
        for select in init.SELECTIONS:
            for core in init.CORES:
                options = {"core": core, "select": select}
                with Traffic() as moved:
                    made = tensor_parallel.nystrom(
                        split, part, 4, generator=torch.Generator().manual_seed(3), **options
                    )
                generator = torch.Generator().manual_seed(3)
                for actual, expected in zip(made, init.nystrom(W, 4, generator=generator, **options), strict=True):
                    assert torch.equal(actual, expected)
                by_index = core != "optimal" and select in ("leading", "uniform")
                # And whether the weight is finite.
                assert moved.values == {"allreduce": 1 + (4 * (32 + 24) if by_index else W.numel())}
        part[0, 0] = torch.nan if run.rank else 0
        with pytest.raises(ValueError, match="weight must be finite"):
            tensor_parallel.nystrom(split, part, 4, core="sample", select="leading", generator=None)


def merges_as_on_one_process(run):
    for method in ("nlora", "nlora_residual", "inttune_residual", "lora2"):
        base = run.split("torch")
        before = logits(base)
        model = adapted(base, method).eval()
        perturbed(model)
        expected = logits(model)
        model.merge_adapter(safe_merge=True)
        close(logits(model), expected)
        model.unmerge_adapter()
        close(logits(model), expected)
        with model.disable_adapter():
            close(logits(model), before)
        merged = model.merge_and_unload()
        close(logits(merged), expected)
        assert not adapter_layers(merged)


def perturbed(model):
    """Every matrix a little other, and the same as on one process."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                change = 0.1 * torch.randn(p.shape, generator=generator)
                local(p).add_(change[shards.slices(p)] if hasattr(p, "device_mesh") else change)


def takes_several_adapters_and_mixed_batches(run):
    found, gradients_of = [], []
    for base in (run.split("torch"), base_model()):
        model = adapted(base, "nlora_residual").eval()
        model.add_adapter("other", adapter_config("slora"))
        model.add_adapter("plain", adapter_config("lora"))
        for name in ("default", "other", "plain"):
            model.set_adapter(name)
            perturbed(model)
        mixed = logits(model, adapter_names=["other", "default", "plain"])
        model.base_model.set_adapter(["default", "other"])
        with counted_fusions() as calls:
            both = logits(model)
        assert len(calls) == 7 and unfused(model) == {}
        model(tokens(), labels=tokens()).loss.backward()
        gradients_of.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        model.delete_adapter("default")
        found.append((mixed, both, logits(model)))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)
    assert any(".other." in name for name in gradients_of[1]) and any(".default." in name for name in gradients_of[1])
    same(*gradients_of)


def drops_alike_on_every_rank(run):
    model = pair("nlora", run.mesh, lora_dropout=0.5)
    assert all("dropout" in reason for reason in unfused(model).values())
    torch.manual_seed(5)
    found = gradients(model, torch.ones(6, 16))
    assert all(grad.isfinite().all() and grad.any() for grad in found.values())
    for p in model.parameters():
        if p.grad is not None and p.placements[0].is_replicate():
            sums = p.grad.to_local().clone()
            dist.all_reduce(sums)
            close(sums, run.ranks * p.grad.to_local())


def starts_as_the_first_rank(run):
    for method in ("lora", "slora", "lora2"):
        torch.manual_seed(run.rank)
        for name, p in pair(method, run.mesh, seed=run.rank).named_parameters():
            if ".lora_" in name:
                first = whole(p.detach()).clone()
                dist.broadcast(first, 0)
                assert torch.equal(whole(p.detach()), first), name
                assert p.shape == dict(pair(method).named_parameters())[name].shape


def takes_parts_of_different_sizes(run):
    """11 columns on 2 ranks: 6 and 5."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    for method in ("nlora_residual", "lora2"):
        found = []
        for mesh in (run.mesh, None):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 11))
            if mesh is not None:
                parallelize_module(model, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
            torch.manual_seed(1)
            model = peft.get_peft_model(model, config(method, target_modules=["0"]))
            perturbed(model)
            found.append((model(x), gradients(model, x)))
        close(found[0][0], found[1][0])
        same(found[0][1], found[1][1])


def checkpoints_activations_and_clips(run):
    found, ids = [], tokens(batch=4)
    for base in (run.split("transformers"), base_model()):
        model = adapted(base, "nlora")
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
        found.append((whole(norm), {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}))
    close(found[0][0], found[1][0])
    same(found[0][1], found[1][1])


def loads_onto_the_meta_device(run):
    model = adapted(base_model(), "nlora_residual").eval()
    perturbed(model)
    if run.rank == 0:
        model.save_pretrained(run.folder / "meta")
    dist.barrier()
    expected = logits(model)
    model = peft.PeftModel.from_pretrained(run.split("torch"), run.folder / "meta", low_cpu_mem_usage=True)
    close(logits(model), expected)
    model.load_adapter(run.folder / "meta", "again")
    model.set_adapter("again")
    close(logits(model), expected)


def trains_biases_once(run):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    for options in ({"bias": "all"}, {}):
        model, alone = (pair("nlora", mesh, True, **options) for mesh in (run.mesh, None))
        assert unfused(model) == {}
        close(whole(model(x)), alone(x))
        same(gradients(model, x), gradients(alone, x))


def takes_and_gives_distributed_tensors(run):
    """Split by the sequence outside, as sequence parallelism has it, and handed on as DTensors between the two."""
    styles = (
        ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        RowwiseParallel(output_layouts=Shard(1)),
    )
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2))
    part = x.chunk(run.ranks, 1)[run.rank].contiguous()
    model, alone = pair("nlora", run.mesh, styles=styles), pair("nlora")
    with counted_fusions() as calls:
        y = model(part)
    assert len(calls) == 2
    close(y, alone(x).chunk(run.ranks, 1)[run.rank])
    same(gradients(model, part), gradients(alone, x))


def refuses_by_name(run):
    with pytest.raises(ValueError, match="'0'.*use_dora=True is not supported on a tensor-parallel layer"):
        pair("lora", run.mesh, use_dora=True)
    with pytest.raises(ValueError, match="layer '.*0' cannot be unfused"):
        nk_peft.unfuse(pair("lora", run.mesh))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    for method in ("lora", "nlora", "lora2"):
        model = parallelize_module(nn.Sequential(nn.Linear(16, 12)), mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        with pytest.raises(ValueError, match="'0' cannot be adapted.* before fully_shard shards it too"):
            peft.get_peft_model(model, config(method, target_modules=["0"]))
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    for module in model:
        parallelize_module(module, run.mesh, ColwiseParallel())
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach().full_tensor(), run.mesh, [Replicate()]))
        module._hf_tp_plan = "packed_colwise"
    for method in ("nlora", "lora2"):
        with pytest.raises(ValueError, match="split by rows or by columns; got the plan 'packed_colwise' and a weight"):
            peft.get_peft_model(model, config(method, target_modules=["0"]))


def fuses_what_peft_has_split(run):
    found = []
    for fusing in (False, True):
        torch.manual_seed(0)
        stock = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(run.split("transformers"), stock)
        if fusing:
            nk_peft.fuse(model)
            assert unfused(model) == {}
        found.append(train(model, tokens(batch=4), "lora", 2))
    close(*found)
    nk_peft.unfuse(model)
    assert logits(model).isfinite().all()


def calls_what_is_more_than_its_matrices(run):
    """A bias and a hook on the matrix that is split count as in PEFT; where no matrix is called a hook is refused."""
    ids = tokens(batch=4)
    for change in ("bias", "hook"):
        found = []
        for fusing in (False, True):
            torch.manual_seed(0)
            stock = peft.LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_bias=change == "bias"
            )
            model = peft.get_peft_model(run.split("transformers"), stock).eval()
            for layer in adapter_layers(model):
                B = layer.lora_B["default"]
                if change == "hook":
                    B.register_forward_hook(lambda module, args, output: 3 * output)
                else:
                    nn.init.constant_(local(B.bias), 0.5)
            if fusing:
                nk_peft.fuse(model)
                assert len(unfused(model)) == 2
            found.append(logits(model, ids))
        close(*found)
        with model.disable_adapter():
            assert not torch.allclose(logits(model, ids), found[0])
    model = pair("nlora", run.mesh)
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda module, args, output: 3 * output)
    with pytest.raises(ValueError, match="layer '0': the matrices of adapter 'default' must be left .*: it has hooks"):
        model(torch.ones(6, 16))


CHECKS = (
    backward_sums_what_is_less,
    moves_no_more_than_peft,
    gathers_rows_and_columns_alone,
    merges_as_on_one_process,
    takes_several_adapters_and_mixed_batches,
    drops_alike_on_every_rank,
    starts_as_the_first_rank,
    takes_parts_of_different_sizes,
    checkpoints_activations_and_clips,
    loads_onto_the_meta_device,
    trains_biases_once,
    takes_and_gives_distributed_tensors,
    refuses_by_name,
    fuses_what_peft_has_split,
    calls_what_is_more_than_its_matrices,
)


def outcome(check, run):
    try:
        check(run)
    except Exception:
        return f"rank {run.rank}: {traceback.format_exc()}"
    return None


def results(folder, steps, jobs, dtype=torch.float32):
    base_model().save_pretrained(folder / "base")
    found = {}
    for method in METHODS:
        model = adapted(base_model(), method)
        found[1, "one", method] = train(model, tokens(batch=4), method, steps), logits(model.eval())
        model.save_pretrained(folder / "one" / method)
    for ranks in (4, 2):
        trained = in_processes(parallel, ranks, folder, steps, jobs, dtype)
        found |= {(ranks, *key): value for key, value in trained.items()}
    return found


# By the number of ranks, what is tried of each engine.
SOME = ("lora", "nlora_residual", "lora2_pruned")
JOBS = {
    4: {"transformers": SOME, "fsdp2": ("slora", "nlora_residual", "inttune", "lora2_pruned")},
    2: {"torch": METHODS, "transformers": SOME},
}
ENGINES = ("torch", "transformers")
ALL = {4: dict.fromkeys((*ENGINES, "fsdp2"), METHODS), 2: dict.fromkeys(ENGINES, METHODS)}


def cases(jobs):
    return [(ranks, engine, method) for ranks in jobs for engine, methods in jobs[ranks].items() for method in methods]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    return folder, results(folder, 3, JOBS)


@pytest.mark.parametrize("case", cases(JOBS), ids=lambda case: "-".join(map(str, case)))
def test_run_and_checkpoint_are_those_of_one_process(case, runs):
    check_run(*case, *runs)


def test_twenty_steps_of_everything(every_engine, tmp_path):
    """In fp64, where rounding turns no sign of a step of Adam; transformers computes the loss in fp32."""
    torch.set_default_dtype(torch.float64)
    try:
        found = results(tmp_path, 20, ALL, torch.float64)
        for case in cases(ALL):
            check_run(*case, tmp_path, found, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def check_run(ranks, engine, method, folder, found, atol=1e-5):
    """Losses and logits after training, and those of the checkpoint here and at other numbers of ranks."""
    close = functools.partial(torch.testing.assert_close, rtol=atol, atol=atol)
    losses, _ = found[ranks, engine, method]
    expected_losses, expected = found[1, "one", method]
    close(losses, expected_losses)
    saved = folder / (engine if engine == "fsdp2" else f"{engine}{ranks}") / method
    close(logits(peft.PeftModel.from_pretrained(base_model(), saved)), expected)
    if engine != "fsdp2":
        close(found[ranks, engine, method][1], expected)
        close(found[ranks, engine, method, "one"], expected)
    source = f"{engine}4"
    if (2, engine, method, source) in found:
        close(found[2, engine, method, source], expected)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_ranks_it(check, runs):
    folder, found = runs
    assert found[2, "check", check] is None, found[2, "check", check]
