"""LoRA² training with transformers.Trainer, by two lines:

trainer.add_callback(RankAllocatorCallback(target_rank=2, t_init=100, t_final=300, delta_t=10))
add_orthogonal_penalty(trainer)
"""

import base64
import io
import warnings
from collections.abc import Sequence

import torch

from .lora2 import WEIGHTS, RankAllocator, orthogonal_penalty

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    # What transformers itself lacks is its own to say.
    if error.name != "transformers":
        raise
    raise ImportError("nlora_kernels.trainer needs transformers: pip install 'nlora_kernels[peft]'") from error

# How far Adam must be able to move a matrix of LoRA² for its product to be seen at all, measured on language models and
# classifiers: four matrices of N(0, 0.02) stand around E, and all of them have to grow.
_LEAST_WAY = 0.1


class RankAllocatorCallback(TrainerCallback, ExportableState):
    """Steps a `RankAllocator` after every optimizer step of a transformers.Trainer.

    Its averages are saved in trainer_state.json, and a run that is resumed from a checkpoint goes on with them. Where
    the Trainer restores callbacks from it, this object stays in place and takes the checkpoint's numbers. Every log
    entry that has a loss gets the current budget as "rank_budget". Steps that a gradient scaler skips, and others with
    non-finite gradients, do not enter the averages and are counted in `allocator.skipped`. Where torch.distributed
    runs, the first rank decides for all.

    Args:
        target_rank: of `RankAllocator`, as are the others. Those left out are those of the model's LoRA2Config; without
            one, betas are 0.85.
        total_steps: the length of the run by default.
        scores: "rows" by default.

    Attributes:
        allocator: None before the training begins.

    Warns, when the training begins, of a learning rate at which Adam cannot move LoRA² in as many steps.

    Raises, when the training begins:
        ValueError: as `RankAllocator` does; or a number is nowhere given; or total_steps is below the length of the
            run; or the checkpoint resumed from has no averages, or those of another step.
    """

    def __new__(cls, *args, **kwargs):
        # With restore_callback_states_from_checkpoint the Trainer puts type(callback)(**saved) in the callback's place.
        # Of a class that knows of this one object that is the object itself, which the user holds.
        callback = super().__new__(cls)
        callback.__class__ = type(cls.__name__, (cls,), {"__new__": lambda *args, **kwargs: callback})
        return callback

    def __reduce__(self):
        made = type(self).__bases__[0]
        return made.__new__, (made,), vars(self)

    def __init__(
        self,
        *,
        target_rank: int | None = None,
        total_steps: int | None = None,
        t_init: int | None = None,
        t_final: int | None = None,
        delta_t: int | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        scores: str | None = None,
    ):
        self.numbers = {
            "target_rank": target_rank,
            "total_steps": total_steps,
            "t_init": t_init,
            "t_final": t_final,
            "delta_t": delta_t,
            "beta1": beta1,
            "beta2": beta2,
            "scores": scores,
        }
        self.allocator: RankAllocator | None = None
        self.budget: int | None = None

    def state(self) -> dict:
        """What trainer_state.json keeps of the callback, as ExportableState asks for it."""
        saved = None
        if self.allocator is not None:
            buffer = io.BytesIO()
            torch.save(self.allocator.state_dict(), buffer)
            saved = base64.b64encode(buffer.getvalue()).decode()
        return {"args": self.numbers, "attributes": {"saved": saved}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        numbers = {"total_steps": state.max_steps, "beta1": 0.85, "beta2": 0.85, "scores": "rows"}
        config = _active_config(model)
        numbers |= {name: value for name in self.numbers if (value := getattr(config, name, None)) is not None}
        numbers |= {name: value for name, value in self.numbers.items() if value is not None}
        if missing := [name for name in self.numbers if name not in numbers]:
            raise ValueError(f"RankAllocatorCallback or the model's LoRA2Config must give {', '.join(missing)}")
        if numbers["total_steps"] < state.max_steps:
            raise ValueError(f"total_steps must be at least {state.max_steps}, got {numbers['total_steps']}")
        group = torch.distributed.group.WORLD if _is_distributed() else None
        allocator = RankAllocator(model, **numbers, group=group)
        # Under Adam no step is longer than its rate.
        way, begins_small = args.learning_rate * state.max_steps, getattr(config, "init_lora_weights", True) is True
        if begins_small and way < _LEAST_WAY:
            warnings.warn(
                f"LoRA² hardly moves at learning_rate {args.learning_rate:g} in {state.max_steps} steps: their product "
                f"should be at least {_LEAST_WAY:g}, got {way:.2g}; rates of 3e-3 to 3e-2 are usual, and "
                "init_lora_weights='orthogonal' begins with larger vectors",
                stacklevel=2,
            )
        if state.global_step:
            _resume(allocator, state.stateful_callbacks.get(type(self).__name__), state.global_step)
        self.allocator, self.budget = allocator, allocator.budget(allocator.t)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._scale = _scale(optimizer)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # Accelerate's wrapper of an optimizer knows what DeepSpeed made of its step, but not that a fused one has
        # skipped it by itself: then the scaler has gone back.
        skipped = getattr(optimizer, "step_was_skipped", False) or _scale(optimizer) < self._scale
        self.budget = self.allocator.step(skip_nonfinite=True, skipped=skipped)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            logs["rank_budget"] = state.log_history[-1]["rank_budget"] = self.budget


def add_orthogonal_penalty(
    trainer: Trainer,
    weight: float | None = None,
    form: str = "reference",
    terms: Sequence[str] | None = None,
) -> None:
    """loss ← loss + weight·orthogonal_penalty(model, form, terms), in training and not in evaluation.

    Without a weight it is that of the form, `nlora_kernels.lora2.WEIGHTS`. It counts once per optimizer step however
    many batches are accumulated, and the loss that is logged includes it. To be called once, on any Trainer, before
    train().

    Raises ValueError if the model has no LoRA² layers, or for an unknown form or term.
    """
    with torch.no_grad():
        orthogonal_penalty(trainer.model, form, terms)
    weight = WEIGHTS[form] if weight is None else weight
    compute_loss = trainer.compute_loss

    def with_penalty(model, inputs, return_outputs=False, num_items_in_batch=None):
        result = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return result
        loss, *outputs = result if return_outputs else (result,)
        # A loss that is not yet scaled for accumulation will be divided by the number of batches, and the penalty too.
        share = 1 / trainer.current_gradient_accumulation_steps if _is_scaled(trainer, num_items_in_batch) else 1
        loss = loss + share * weight * orthogonal_penalty(trainer.model, form, terms).to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    trainer.compute_loss = with_penalty


def _is_scaled(trainer: Trainer, num_items_in_batch) -> bool:
    if (stated := getattr(trainer, "loss_is_scaled_for_ga", None)) is not None:
        return stated
    by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_model or trainer.compute_loss_func is not None


def _scale(optimizer) -> float:
    """Of the losses, by the gradient scaler of accelerate's wrapper of an optimizer, if there is one."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _active_config(model):
    configs = getattr(model, "peft_config", {})
    return configs.get(getattr(model, "active_adapter", None)) if isinstance(configs, dict) else None


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _resume(allocator: RankAllocator, entry: dict | None, global_step: int) -> None:
    saved = (entry or {}).get("attributes", {}).get("saved")
    if saved is None:
        raise ValueError("the checkpoint must hold the state of a RankAllocatorCallback, got none")
    allocator.load_state_dict(torch.load(io.BytesIO(base64.b64decode(saved)), weights_only=True))
    if allocator.t != global_step:
        raise ValueError(f"the checkpoint must hold the averages of step {global_step}, got those of {allocator.t}")
