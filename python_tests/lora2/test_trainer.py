"""RankAllocatorCallback and add_orthogonal_penalty in transformers.Trainer."""

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import nlora_kernels as nk
from python_tests.ranks import run
from python_tests.tiny import llama, tokens

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import peft
from transformers import Trainer, TrainingArguments

from nlora_kernels.lora2 import RankAllocator
from nlora_kernels.peft import LoRA2Config
from nlora_kernels.trainer import RankAllocatorCallback, add_orthogonal_penalty

NUMBERS = {"target_rank": 2, "t_init": 3, "t_final": 4, "delta_t": 2}
STEPS = 14


class Classifier(nn.Module):
    """Plain layers, and a loss that is the mean over a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nk.LoRA2Linear.from_linear(nn.Linear(8, 8), 5, 3) for _ in range(3)]
        self.layers = nn.Sequential(*layers)
        for p in self.parameters():
            p.data.mul_(5)

    def forward(self, x, labels):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"loss": nn.functional.cross_entropy(x, labels), "logits": x}


def plain_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    return [{"x": row, "labels": row[:8].argmax()} for row in x]


def peft_model(**options):
    torch.manual_seed(0)
    config = LoRA2Config(r=5, k=3, lora_alpha=20, target_modules="all-linear", **options)
    return peft.get_peft_model(llama(), config)


def peft_data():
    return [{"input_ids": row, "labels": row} for row in tokens(64, 9)]


MODELS = {"plain": (Classifier, plain_data), "peft": (peft_model, peft_data)}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def trainer_of(kind, folder, *, numbers=NUMBERS, weight=0.01, model=None, callbacks=(), optimizer=None, **arguments):
    make, data = MODELS[kind]
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **arguments,
    }
    trainer = Trainer(
        model or make(),
        TrainingArguments(**arguments),
        train_dataset=data(),
        eval_dataset=data()[:8],
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )
    callback = RankAllocatorCallback(**numbers)
    trainer.add_callback(callback)
    if weight:
        add_orthogonal_penalty(trainer, weight)
    return trainer, callback


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_run_prunes_to_the_budget_it_logs(kind, tmp_path):
    trainer, callback = trainer_of(kind, tmp_path)
    trainer.train()
    layers = nk.lora2.layers(trainer.model)
    budgets = history(trainer, "rank_budget")
    assert budgets == [callback.allocator.budget(t) for t in range(1, STEPS + 1)]
    assert budgets[0] == 5 * len(layers) and budgets[-1] == 2 * len(layers)
    assert (
        sum(int(layer.lora_mask.sum()) for layer in layers) == budgets[-1] == sum(callback.allocator.ranks().values())
    )


def test_the_penalty_is_part_of_the_training_loss_alone(kind, tmp_path):
    (with_it, _), (without, _) = (trainer_of(kind, tmp_path, weight=weight) for weight in (0.01, 0))
    expected = without.evaluate()["eval_loss"]
    assert with_it.evaluate()["eval_loss"] == expected
    penalty = 0.01 * nk.lora2.orthogonal_penalty(without.model).item()
    for trainer in (with_it, without):
        trainer.train()
    assert history(with_it)[0] == pytest.approx(history(without)[0] + penalty, rel=1e-4)
    assert penalty > 1e-3 * expected


def test_accumulated_batches_train_as_one_large_batch(kind, tmp_path):
    whole, whole_callback = trainer_of(kind, tmp_path, per_device_train_batch_size=8, max_grad_norm=0)
    parts, parts_callback = trainer_of(kind, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0)
    for trainer in (whole, parts):
        trainer.train()
    torch.testing.assert_close(history(parts), history(whole), rtol=2e-4, atol=0)
    assert history(parts, "rank_budget") == history(whole, "rank_budget")
    assert parts_callback.allocator.ranks() == whole_callback.allocator.ranks()


# Steps before the first pruning, amid them and after the last.
@pytest.mark.parametrize("at, restore", [(2, False), (7, False), (7, True), (11, False)])
def test_a_resumed_run_goes_on_as_if_never_stopped(kind, at, restore, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": at, "restore_callback_states_from_checkpoint": restore}
    trainer, callback = trainer_of(kind, tmp_path, **arguments)
    trainer.train()
    resumed, resumed_callback = trainer_of(kind, tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert history(resumed) == history(trainer)
    # The one that the user holds, whether the Trainer restores callbacks or not.
    assert resumed_callback.allocator.ranks() == callback.allocator.ranks()
    assert history(resumed, "rank_budget") == history(trainer, "rank_budget")
    expected = parameters(trainer)
    for name, p in parameters(resumed).items():
        assert torch.equal(p, expected[name]), name
    for layer, other in zip(nk.lora2.layers(resumed.model), nk.lora2.layers(trainer.model), strict=True):
        assert torch.equal(layer.lora_mask, other.lora_mask)
    [again] = [c for c in resumed.callback_handler.callbacks if isinstance(c, RankAllocatorCallback)]
    assert again.allocator.ranks() == callback.allocator.ranks()
    assert torch.equal(again.allocator.exp_avg, callback.allocator.exp_avg)


def test_restored_callbacks_are_those_that_were_added(tmp_path):
    class Another(RankAllocatorCallback):
        pass

    arguments = {"save_strategy": "steps", "save_steps": 7, "restore_callback_states_from_checkpoint": True}
    first, _ = trainer_of("plain", tmp_path, callbacks=[Another(**NUMBERS)], **arguments)
    first.train()
    # Of several runs in one process, each has its own.
    runs = []
    for _ in range(2):
        another = Another()
        run, callback = trainer_of("plain", tmp_path, numbers={}, callbacks=[another], **arguments)
        runs.append((run, callback, another))
    for run, callback, another in reversed(runs):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
        kept = [c for c in run.callback_handler.callbacks if isinstance(c, RankAllocatorCallback)]
        assert len(kept) == 2 and {id(c) for c in kept} == {id(callback), id(another)}
        # Numbers that were not given came from the checkpoint.
        assert callback.numbers["target_rank"] == another.numbers["target_rank"] == NUMBERS["target_rank"]
        assert callback.allocator is not None and another.allocator is not None
        assert type(another).__name__ == "Another" and isinstance(another, Another)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_of_a_callback_is_another(copied):
    callback = RankAllocatorCallback(**NUMBERS)
    other = copied(callback)
    assert other is not callback and other.numbers == callback.numbers and type(other)() is other


def test_mixed_precision(kind, tmp_path):
    trainer, callback = trainer_of(kind, tmp_path, bf16=True)
    trainer.train()
    assert all(map(math.isfinite, history(trainer)))
    assert callback.allocator.skipped == 0
    assert sum(callback.allocator.ranks().values()) == 2 * len(nk.lora2.layers(trainer.model))


def scale_gradients(trainer):
    """What fp16=True makes of a Trainer on a GPU, autocast and GradScaler; on a CPU accelerate refuses it."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    return trainer


@pytest.mark.parametrize("clipped", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_gradient_scaler_changes_no_decision(optim, clipped, tmp_path, monkeypatch):
    runs = [trainer_of("plain", tmp_path, max_grad_norm=float(clipped), optim=optim) for _ in range(2)]
    scale_gradients(runs[1][0])
    for trainer, _ in runs:
        if not clipped:
            # Who measures no norm leaves gradients scaled, and so does a fused optimizer.
            monkeypatch.setattr(trainer, "_get_grad_norm", lambda *_, **__: None)
        trainer.train()
    assert runs[1][0].accelerator.scaler.get_scale() > 2.0**14
    allocator, scaled = (callback.allocator for _, callback in runs)
    assert scaled.skipped == 0 and scaled.ranks() == allocator.ranks()
    # To the precision of fp16.
    assert (scaled.exp_avg - allocator.exp_avg).norm() <= 0.02 * allocator.exp_avg.norm()


def test_steps_that_the_gradient_scaler_skips_are_skipped_and_counted(tmp_path):
    trainer, callback = trainer_of("plain", tmp_path, max_grad_norm=0)
    compute_loss = trainer.compute_loss

    def sometimes_infinite(*args, **kwargs):
        return compute_loss(*args, **kwargs) * (math.inf if trainer.state.global_step in (1, 7) else 1)

    trainer.compute_loss = sometimes_infinite
    scale_gradients(trainer).train()
    assert callback.allocator.skipped == 2 and callback.allocator.t == STEPS
    assert callback.allocator.exp_avg.isfinite().all()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert sum(callback.allocator.ranks().values()) == 6


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_the_scaler_skips_are_seen_behind_clipping_too(optim, tmp_path):
    """An infinite gradient of a tensor that is not scored leaves zeros of all others."""
    trainer, callback = trainer_of("plain", tmp_path, max_grad_norm=1.0, optim=optim)

    def poisoned(grad):
        return grad * (math.inf if trainer.state.global_step in (1, 7) else 1)

    trainer.model.layers[0].lora_v.register_hook(poisoned)
    averages = []
    step = RankAllocator.step

    def watched(self, **options):
        averages.append(self.exp_avg.clone())
        return step(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankAllocator, "step", watched)
        scale_gradients(trainer).train()
    assert callback.allocator.skipped == 2 and callback.allocator.t == STEPS
    assert [i for i in range(9) if torch.equal(averages[i], averages[i + 1])] == [1, 7]


def test_numbers_come_from_the_configuration_where_none_are_given(tmp_path):
    model = peft_model(**NUMBERS, beta1=0.5)
    trainer, callback = trainer_of("peft", tmp_path, model=model, numbers={"delta_t": 5}, weight=0)
    trainer.train()
    allocator = callback.allocator
    assert (allocator.target_rank, allocator.t_init, allocator.t_final, allocator.delta_t) == (2, 3, 4, 5)
    assert (allocator.beta1, allocator.beta2, allocator.total_steps) == (0.5, 0.85, STEPS)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"target_rank": 2}, "must give t_init, t_final, delta_t"),
        ({**NUMBERS, "total_steps": 10}, "total_steps must be at least 14, got 10"),
        ({**NUMBERS, "t_final": 11}, "t_init"),
    ],
)
def test_bad_numbers(numbers, message, tmp_path):
    trainer, _ = trainer_of("plain", tmp_path, numbers=numbers)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_checkpoint_without_averages_is_refused(tmp_path):
    trainer, callback = trainer_of("plain", tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    path = tmp_path / "checkpoint-5" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RankAllocatorCallback"]
    path.write_text(json.dumps(state))
    resumed, _ = trainer_of("plain", tmp_path)
    with pytest.raises(ValueError, match="state of a RankAllocatorCallback, got none"):
        resumed.train(resume_from_checkpoint=str(path.parent))


def test_a_learning_rate_that_moves_nothing_is_warned_of(tmp_path):
    trainer, _ = trainer_of("plain", tmp_path, learning_rate=1e-3)
    with pytest.warns(UserWarning, match=r"hardly moves at learning_rate 0.001 in 14 steps: .* got 0.014"):
        trainer.train()
    orthogonal = peft_model(init_lora_weights="orthogonal")
    for kind, options in (("plain", {"learning_rate": 1e-2}), ("peft", {"learning_rate": 1e-3, "model": orthogonal})):
        trainer, _ = trainer_of(kind, tmp_path, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="LoRA² hardly moves")
            trainer.train()


def test_the_penalty_has_the_weight_of_its_form(tmp_path):
    for form, terms in (("paper", None), ("reference", None), ("reference", ("uv",))):
        losses = []
        for penalised in (False, True):
            numbers = {"target_rank": 2, "t_init": 0, "t_final": 0, "delta_t": 1}
            trainer, _ = trainer_of("plain", tmp_path, numbers=numbers, weight=0, max_steps=1)
            if penalised:
                penalty = nk.lora2.WEIGHTS[form] * nk.lora2.orthogonal_penalty(trainer.model, form, terms).item()
                add_orthogonal_penalty(trainer, form=form, terms=terms)
            trainer.train()
            losses.append(history(trainer)[0])
        assert losses[1] == pytest.approx(losses[0] + penalty, rel=1e-4)
        assert penalty > 1e-3 * losses[0]


def test_the_penalty_needs_lora2_layers(tmp_path):
    trainer, _ = trainer_of("plain", tmp_path, weight=0)
    trainer.model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="got none"):
        add_orthogonal_penalty(trainer)


def _parallel(rank, folder):
    results = []
    for resume in (None, f"{folder}/checkpoint-7"):
        trainer, callback = trainer_of("plain", folder, **PARALLEL, ddp_backend="gloo")
        trainer.train(resume_from_checkpoint=resume)
        results.append((callback.allocator.state_dict(), dict(trainer.model.state_dict()), history(trainer)))

    # Gradients of one rank's own, as if nobody had averaged them.
    model, numbers = Classifier(), {**NUMBERS, "t_init": 0, "t_final": 1, "total_steps": 4}
    allocator = nk.lora2.RankAllocator(model, **numbers, group=torch.distributed.group.WORLD)
    torch.manual_seed(rank)
    for _ in range(3):
        for layer in model.layers:
            layer.lora_E.data.add_(0.1)
            for t in (layer.lora_E, layer.lora_u, layer.lora_U):
                t.grad = torch.randn_like(t)
        allocator.step()
    results.append(([layer.lora_mask for layer in model.layers], allocator.importance()))
    torch.save(results, folder / f"{rank}.pt")


PARALLEL = {"save_strategy": "steps", "save_steps": 7, "per_device_train_batch_size": 4, "max_grad_norm": 0}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two data-parallel processes came to: a whole run, a resumed one, and a disagreement."""
    folder = tmp_path_factory.mktemp("parallel")
    run(_parallel, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_dtype=True)


def test_two_processes_prune_as_one_does(ranks, tmp_path):
    one, callback = trainer_of("plain", tmp_path, **{**PARALLEL, "per_device_train_batch_size": 8})
    one.train()
    for whole, resumed, _ in ranks:
        for state in (whole, resumed):
            assert_same(list(state[1].values()), list(ranks[0][0][1].values()))
            assert state[0]["t"] == STEPS
            for name in ("exp_avg", "exp_unc", "kept"):
                assert_same(state[0][name], ranks[0][0][0][name])
        assert torch.equal(whole[0]["kept"], callback.allocator.state_dict()["kept"])
        assert whole[2] == pytest.approx(history(one), rel=1e-4) or not whole[2]
    assert ranks[0][0][2]


def test_every_rank_takes_the_decision_of_the_first(ranks):
    (masks, scores), (other_masks, other_scores) = (results[2] for results in ranks)
    assert all(torch.equal(a, b) for a, b in zip(masks, other_masks, strict=True))
    own = [torch.cat(list(s.values())).topk(6).indices.sort().values for s in (scores, other_scores)]
    assert not torch.equal(*own), "both ranks would have decided alike anyway, so the run shows nothing"
    assert torch.equal(torch.cat(masks).nonzero().flatten(), own[0])
