"""Which singular values to keep: scores, schedule and masks over all layers of a model at once."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..init import check_choice
from ..layers import engines
from ..ops.checks import check_real
from . import flat, shards, zero
from .kernels import kernels
from .layers import Layer, layers


class NonFiniteGradientError(ArithmeticError):
    """A gradient held NaN or infinity; the allocator's state is as it was before the step."""


SCORES = ("rows", "full")


_LEAST = {"target_rank": 1, "total_steps": 1, "t_init": 0, "t_final": 0, "delta_t": 1}


def check_schedule(*, t_init, t_final, beta1, beta2, **others) -> None:
    """TypeError or ValueError, by name, for numbers of a schedule out of range; target_rank, total_steps and delta_t
    may be left out."""
    for name, value in {"t_init": t_init, "t_final": t_final, **others}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < _LEAST[name]:
            raise ValueError(f"{name} must be at least {_LEAST[name]}, got {value}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        check_real(name, beta)
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {beta}")
    total_steps = others.get("total_steps", math.inf)
    if t_init + t_final >= total_steps:
        raise ValueError(f"t_init + t_final must be below total_steps = {total_steps}, got {t_init} + {t_final}")


class RankAllocator:
    """I(i) = S(E_i) + mean_k S(u[i, :]) + mean_k S(U[:, i]),  S = Ī·Ū

    with the moving averages of sensitivity and uncertainty, for every element w of E, u and U:

        Ī ← β1·Ī + (1 − β1)·|w·∂w|,   Ū ← β2·Ū + (1 − β2)·| |w·∂w| − Ī |

    Keeps the singular values of greatest importance over all layers of a model (LoRA², arXiv 2408.06854, sec. 3, after
    AdaLoRA, arXiv 2303.10512). This is eq. 9 of the paper, which scores the three small tensors of a layer alone: there
    Λ is E, and v and script V, with rows of length K, are what eq. 4 calls u and script U: lora_u and lora_U here.

    scores="full" is its eq. 8, with the sums over all of lora_v and lora_V, its u and script U, beside them:

        I(i) + (Σ S(v) + Σ S(V)) / k

    The paper drops them for being the same for all values of a layer; but the budget is shared by all layers, and among
    layers they do decide. They cost averages as large as the adapters, and the time of reading those and the gradients.

    The number of values kept is b(t), t = 1 at the first step, falling from b_0 = Σ r to b_T = target_rank·layers, of
    which each expert of a mixture is one:

        b(t) = b_0                                                                     t ≤ t_init
               int((b_0 − b_T)·(1 − (t − t_init)/(T − t_final − t_init))³ + b_T)       t_init < t < T − t_final
               b_T                                                                     t ≥ T − t_final

    Averages move while t < T − t_final. Values are masked where t > t_init is a multiple of delta_t, by zeros written
    into E, from which they may regrow, and at t = T − t_final for good, by zeros in `lora_mask` too. Of equal scores
    the earlier layer wins, then the smaller index.

    Values that an earlier run masked for good are out of the function and stay so: b_0 counts the others alone.

    Args:
        model: holds LoRA² layers, see `layers`; their order is that of model.named_modules().
        target_rank: singular values left per layer, on average, 1 … mean r, or mean of what an earlier run left.
        total_steps: T, optimizer steps of the run.
        t_init: steps before the first pruning.
        t_final: steps after the last.
        delta_t: steps between maskings.
        beta1: 0 ≤ β1 < 1.
        beta2: 0 ≤ β2 < 1.
        scores: "rows" (eq. 9) or "full" (eq. 8).
        group: process group of data-parallel ranks; the scores of its first rank then decide for all. None needs no
            communication and gives the same decisions wherever ranks hold equal parameters and gradients.

    Where FSDP2 keeps the adapters in shards, a step gathers the tensors that it scores and their gradients by one
    all-reduce, and decides the same on every rank; where FSDP1 does, whose units must be as PEFT's
    fsdp_auto_wrap_policy makes them, by one for the tensors and one for the gradients. Make the allocator after
    `fully_shard` or FullyShardedDataParallel, which replace parameters.
    So it is where DeepSpeed trains them, under any stage of ZeRO: make it after `deepspeed.initialize`, and call step()
    after the engine's step, whose gradients are caught before they are clipped.

    Raises:
        TypeError: a step count or rank is no integer, or a beta no real number.
        ValueError: the model has no LoRA² layers, or holds them on several devices; a number is out of range, or
            t_init + t_final ≥ total_steps.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_rank: int,
        total_steps: int,
        t_init: int,
        t_final: int,
        delta_t: int,
        beta1: float = 0.85,
        beta2: float = 0.85,
        scores: str = "rows",
        group: Any = None,
    ):
        check_choice("scores", scores, SCORES)
        self.layers, self.full = layers(model), scores == "full"
        self._find_tensors()
        found = self.layers
        check_schedule(
            target_rank=target_rank,
            total_steps=total_steps,
            t_init=t_init,
            t_final=t_final,
            delta_t=delta_t,
            beta1=beta1,
            beta2=beta2,
        )
        devices = {str(t.device) for t in (*self._scored, *self._columns)}
        if len(devices) > 1:
            raise ValueError(f"the LoRA² adapters must be on one device, got {', '.join(sorted(devices))}")
        self._count = sum(layer.count for layer in found)
        self._live_on(torch.cat([layer.lora_mask.detach() for layer in found]) != 0)
        if target_rank * self._count > self._first:
            mean = self._first / self._count
            raise ValueError(f"target_rank must be at most the mean r of the layers, {mean:g}, got {target_rank}")
        self.target_rank, self.total_steps, self.t_init, self.t_final = target_rank, total_steps, t_init, t_final
        self.delta_t, self.beta1, self.beta2, self.group = delta_t, beta1, beta2, group
        self.t = 0
        self.skipped = 0
        self._sizes = [size for layer in found for size in (layer.r, layer.k)]
        like, size = found[0].lora_E, sum(engines.shape(t).numel() for t in (*self._scored, *self._columns))
        self.exp_avg = torch.zeros(size, dtype=torch.promote_types(torch.float32, like.dtype), device=like.device)
        self.exp_unc = torch.zeros_like(self.exp_avg)
        self._kept = self._alive.clone()
        self._nonfinite, self._progress = torch.zeros(2, dtype=torch.int64, device=like.device)
        self._where, self._share = _score_index(found, self.exp_avg)
        each = [layer.r // layer.count for layer in found for _ in range(layer.count)]
        self._layer = torch.arange(self._count).repeat_interleave(torch.tensor(each)).to(like.device)
        # It puts hooks on them: last, when nothing is refused any more.
        tensors = self._scored + self._columns
        self._gradients = zero.Gradients(tensors) if any(map(zero.owns, tensors)) else None

    def budget(self, t: int) -> int:
        """b(t), how many singular values step t leaves."""
        first, last = self._first, self.target_rank * self._count
        if t <= self.t_init:
            return first
        if t >= self._freezing_step:
            return last
        remaining = 1 - (t - self.t_init) / (self._freezing_step - self.t_init)
        return int((first - last) * remaining**3 + last)

    @torch.no_grad()
    def step(self, *, skip_nonfinite: bool = False, skipped: bool = False) -> int:
        """One step of the schedule; returns b(t). Call it after optimizer.step() and before zero_grad().

        A tensor without a gradient counts as one with a zero gradient. A step whose gradients hold NaN or infinity
        does not enter the averages: it raises, with nothing changed, or with skip_nonfinite, for losses that are
        scaled, goes on with the scores as they were and is counted in `skipped`. On a device other than the CPU such
        a step is seen at the next masking and not before, where the host waits for the device anyway: nothing else
        here makes it wait.

        With `skipped`, for a step that the optimizer did not make, as a gradient scaler decides, no gradient is read:
        clipping by a norm of infinity leaves zeros of them, which are finite. It is counted alike.

        Raises:
            NonFiniteGradientError: see above.
            RuntimeError: no tensor has a gradient; or total_steps steps were made already.
        """
        t = self.t + 1
        if t > self.total_steps:
            raise RuntimeError(f"step() must be called at most total_steps = {self.total_steps} times, got call {t}")
        scoring, freeze = t < self._freezing_step, t == self._freezing_step
        masking = freeze or (scoring and t > self.t_init and t % self.delta_t == 0)
        passed_over = scoring and skipped
        scoring = scoring and not skipped
        if freeze:
            # Moving a model gives it new buffers.
            self.layers = [layer.again() for layer in self.layers]
            self._find_tensors()
        tensors = [*self._scored, *self._columns]
        if not scoring:
            grads = [None for _ in tensors]
            if self._gradients is not None:
                self._gradients.drop()
        else:
            grads = flat.gradients(tensors) if self._gradients is None else self._gradients.take()
        if scoring and all(grad is None for grad in grads):
            raise RuntimeError("step() must be called between backward() and zero_grad(), got no gradient at all")
        budget = self.budget(t)
        if scoring or masking:
            masks = [layer.lora_mask for layer in self.layers] if freeze else []
            if self._apart:
                tensors, grads = _gathered(tensors, grads)
            # The kernels read the small tensors alone, and take every value to be alive.
            by_kernels = not self.full and self._first == self._alive.numel()
            found = kernels([t for t in (*tensors, *grads, *masks) if t is not None]) if by_kernels else None
            options = {"scoring": scoring, "skip_nonfinite": skip_nonfinite}
            whole = found is not None and found.allocate is not None
            if whole and self.group is None:
                self._whole_step(found, tensors, grads, masks, budget if masking else None, **options)
            else:
                # In one call the group's first rank could not speak between scores and masks.
                self._step(None if whole else found, tensors, grads, masks, budget if masking else None, **options)
            if masking and self._apart:
                shards.write(self._scored[::3], tensors[: len(self._scored) : 3])
        self.t = t
        self.skipped += passed_over
        return budget

    def importance(self) -> dict[str, Tensor]:
        """{module name: scores (r,)}, higher is more important; −inf for what an earlier run masked for good."""
        return self._by_layer(self._scores())

    def ranks(self) -> dict[str, int]:
        """{module name: how many of its singular values the last masking kept}, before the first all that are alive."""
        return {name: sum(kept) for name, kept in self._by_layer(self._kept.cpu(), Tensor.tolist).items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly from here, beside the model's own parameters and buffers."""
        return {
            "layers": {layer.name: [layer.r, layer.k] for layer in self.layers},
            "t": self.t,
            "skipped": self.skipped,
            "exp_avg": self.exp_avg.clone(),
            "exp_unc": self.exp_unc.clone(),
            "kept": self._kept.clone(),
            "alive": self._alive.clone(),
            "nonfinite": int(self._nonfinite),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError, with nothing changed, if the state is of other layers, ranks or a longer schedule."""
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise ValueError(f"state must hold {', '.join(own)}, got none of {', '.join(sorted(missing))}")
        names = list(own["layers"])
        if sorted(names) == sorted(state["layers"]) and names != list(state["layers"]):
            raise ValueError(f"state must hold the layers in the order {names}, got {list(state['layers'])}")
        for name in own["layers"] | state["layers"]:
            expected, actual = own["layers"].get(name), state["layers"].get(name)
            if expected is None or actual is None or list(actual) != expected:
                raise ValueError(f"state must hold (r, k) = {expected} of layer {name}, got {actual}")
        if not 0 <= state["t"] <= self.total_steps:
            raise ValueError(f"state must be of a step up to total_steps = {self.total_steps}, got {state['t']}")
        for name in ("exp_avg", "exp_unc", "kept", "alive"):
            if state[name].shape != own[name].shape:
                raise ValueError(f"{name} must have shape {tuple(own[name].shape)}, got {tuple(state[name].shape)}")
        if self._gradients is not None:
            self._gradients.drop()
        self.t, self.skipped = state["t"], state["skipped"]
        self.exp_avg = state["exp_avg"].to(self.exp_avg, copy=True)
        self.exp_unc = state["exp_unc"].to(self.exp_unc, copy=True)
        self._kept = state["kept"].to(self._kept, copy=True)
        self._live_on(state["alive"].to(self._alive, copy=True))
        self._nonfinite.fill_(state["nonfinite"])

    def _live_on(self, alive: Tensor) -> None:
        """Of the values (Σr,) which are not masked for good as the schedule begins."""
        self._alive, self._first = alive, int(alive.sum())

    def _find_tensors(self) -> None:
        self._scored = [t for layer in self.layers for t in layer.scored]
        # In the flat averages they follow the small tensors.
        self._columns = [t for layer in self.layers for t in (layer.lora_v, layer.lora_V)] if self.full else []
        self._apart = any(map(shards.is_apart, (*self._scored, *self._columns)))

    @property
    def _freezing_step(self) -> int:
        return self.total_steps - self.t_final

    @property
    def _reports_at_once(self) -> bool:
        # Elsewhere reading the flag would make the host wait for the device.
        return self.exp_avg.is_cpu

    def _whole_step(
        self, found, tensors, grads, masks, budget: int | None, *, scoring: bool, skip_nonfinite: bool
    ) -> None:
        arguments = (
            self._sizes,
            tensors,
            grads,
            masks,
            self.exp_avg,
            self.exp_unc,
            self._kept,
            self.beta1,
            self.beta2,
        )
        if not found.allocate(*arguments, scoring=scoring, budget=budget):
            self._nonfinite += 1
            self._report(skip_nonfinite)
            found.allocate(*arguments, scoring=False, budget=budget)

    def _step(self, found, tensors, grads, masks, budget: int | None, *, scoring: bool, skip_nonfinite: bool) -> None:
        reporting = budget is not None or self._reports_at_once
        if scoring:
            # What is about to raise must have changed nothing.
            self._smooth(found, tensors, grads, hold=reporting and not skip_nonfinite)
        if reporting:
            self._report(skip_nonfinite)
        if budget is not None:
            self._mask(found, tensors[: len(self._scored) : 3], budget, masks)

    def _smooth(self, found, tensors, grads, *, hold: bool) -> None:
        """Moves the averages. If they must not, for a product is not finite, one is added to `_nonfinite`; with `hold`
        they stay too where that is not zero."""
        if found:
            return found.smooth(
                self._sizes,
                tensors,
                grads,
                self.exp_avg,
                self.exp_unc,
                self.beta1,
                self.beta2,
                nonfinite=self._nonfinite,
                progress=self._progress,
                hold=hold,
            )
        grads = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(tensors, grads, strict=True)]
        sensitivity = (self._flat(tensors) * self._flat(grads)).abs_()
        moves = sensitivity.isfinite().all()
        self._nonfinite += ~moves
        if hold:
            moves = self._nonfinite == 0
        exp_avg = self.beta1 * self.exp_avg + (1 - self.beta1) * sensitivity
        exp_unc = self.beta2 * self.exp_unc + (1 - self.beta2) * (sensitivity - exp_avg).abs_()
        self.exp_avg = torch.where(moves, exp_avg, self.exp_avg)
        self.exp_unc = torch.where(moves, exp_unc, self.exp_unc)

    def _flat(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors]).to(self.exp_avg.dtype)

    def _report(self, skip_nonfinite: bool) -> None:
        count = int(self._nonfinite)
        if not count:
            return
        self._nonfinite.zero_()
        if not skip_nonfinite:
            names = "lora_E, lora_u, lora_U, lora_v and lora_V" if self.full else "lora_E, lora_u and lora_U"
            raise NonFiniteGradientError(f"gradients of {names} must be finite, got NaN or infinity in {count} step(s)")
        self.skipped += count

    def _scores(self) -> Tensor:
        return self._scores_of_all().masked_fill_(~self._alive, -torch.inf)

    def _scores_of_all(self) -> Tensor:
        rows = ((self.exp_avg * self.exp_unc)[self._where] * self._share).sum(1)
        if not self.full:
            return rows
        start = sum(engines.shape(t).numel() for t in self._scored)
        sizes = [engines.shape(t).numel() for t in self._columns]
        products = (self.exp_avg[start:] * self.exp_unc[start:]).split(sizes)
        pairs = zip(self.layers, products[::2], products[1::2], strict=True)
        sums = [v.view(la.count, -1).sum(1) + V.view(-1, la.count).sum(0) for la, v, V in pairs]
        return rows + torch.cat(sums)[self._layer] * self._share[:, 1]

    def _mask(self, found, E: list[Tensor], budget: int, masks: list[Tensor]) -> None:
        scores = None
        if self.group is not None:
            scores = self._scores()
            torch.distributed.broadcast(scores, group_src=0, group=self.group)
        if found:
            averages = self.exp_avg, self.exp_unc
            return found.prune(E, masks, *averages, self._where, self._share, scores, self._kept, budget)
        order = (self._scores() if scores is None else scores).argsort(descending=True, stable=True)
        self._kept = torch.zeros_like(self._kept).index_fill_(0, order[:budget], True)
        kept = self._kept.to(self.exp_avg.dtype).split(self._sizes[::2])
        torch._foreach_mul_(E, kept)
        if masks:
            torch._foreach_copy_(masks, kept)

    def _by_layer(self, values: Tensor, convert=Tensor.clone) -> dict[str, Any]:
        parts = zip(self.layers, values.split(self._sizes[::2]), strict=True)
        return {layer.name: convert(part) for layer, part in parts}


def _gathered(tensors: list[Tensor], grads: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Both whole, by one sum where they are shards."""
    present = [grad for grad in grads if grad is not None]
    whole = shards.gathered([*tensors, *present])
    rest = iter(whole[len(tensors) :])
    return whole[: len(tensors)], [None if grad is None else next(rest) for grad in grads]


def _score_index(found: list[Layer], flat: Tensor) -> tuple[Tensor, Tensor]:
    """Which elements of the flat averages make up each singular value's score, and with what weight: (Σr, 1 + 2·max k).

    A sum over the second dimension is then the score, in a fixed order. Where a layer's k is smaller the rest of its
    rows weighs nothing.
    """
    width = 1 + 2 * max(layer.k for layer in found)
    where = torch.zeros(sum(layer.r for layer in found), width, dtype=torch.int64)
    share = torch.zeros(where.shape, dtype=flat.dtype)
    row = start = 0
    for layer in found:
        r, k = layer.r, layer.k
        E = start + torch.arange(r)[:, None]
        u = start + r + torch.arange(r * k).view(r, k)
        U = start + r + r * k + torch.arange(k * r).view(k, r)
        where[row : row + r, : 1 + 2 * k] = torch.cat([E, u, U.T], 1)
        share[row : row + r, 0] = 1
        share[row : row + r, 1 : 1 + 2 * k] = 1 / k
        row, start = row + r, start + r + 2 * r * k
    return where.to(flat.device), share.to(flat.device)
