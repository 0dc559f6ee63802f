"""A training step of a whole model, and the memory it takes: forward, backward and AdamW over every linear layer.

PEFT's LoRA, its fused twin, NLoRA, IntTune and LoRA² on one set of random weights, some of them also with layers that
share x as one operation ("grouped", or "recomputed" in their MLPs). The floor is forward and backward
of the frozen model, down to its embeddings. Logits and gradients are checked against fp64 before anything is timed, and
either may be off by twice what plain PyTorch is off, plus eps; not the loss, whose last bits are one draw of luck.
"""

import copy
import functools
from typing import NamedTuple

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import cells, rows
from bench.timing import peak_bytes, saved_bytes
from nlora_kernels import backends
from nlora_kernels.peft import LoRA2Config, NLoraConfig, fuse, group


class Case(NamedTuple):
    model: str
    blocks: int
    heads: tuple[int, int]  # of queries, of keys and values
    vocabulary: int
    tokens: int
    r: int
    smoke: bool = False

    def build(self) -> LlamaForCausalLM:
        layers = cells.MODELS[self.model]
        hidden, intermediate = layers["gate_proj"]
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).requires_grad_(False)

    def __str__(self) -> str:
        return f"{'smoke-' if self.smoke else ''}{self.model}-blocks{self.blocks}-M{self.tokens}-r{self.r}"


CASES = [
    Case("SmolLM2-135M", 2, (9, 3), 1024, 128, 8, smoke=True),
    Case("SmolLM2-135M", 30, (9, 3), 49152, 256, 8),
    Case("Llama-2-7B", 1, (32, 32), 1024, 256, 64),
]
ALL = {"target_modules": "all-linear"}
METHODS = {
    "floor": None,
    "peft": lambda r: peft.LoraConfig(r=r, lora_alpha=r, **ALL),
    "lora": lambda r: peft.LoraConfig(r=r, lora_alpha=r, **ALL),
    "nlora": lambda r: NLoraConfig(r=r, lora_alpha=r, init_lora_weights="nystrom", **ALL),
    "inttune": lambda r: NLoraConfig(r=r, lora_alpha=r, init_lora_weights="nystrom", train="core", **ALL),
    "lora2": lambda r: LoRA2Config(r=r, k=r, lora_alpha=r, **ALL),
}
GROUPED = {"": None, "grouped": {}, "recomputed": {"recompute": True}}
ROWS = [
    rows.long(case, method, way, when=not case.smoke, id="-".join(filter(None, (str(case), method, way))))
    for case in CASES
    for method in METHODS
    for way in GROUPED
    # One block of large layers is a group of bench/test_group.py.
    if not way
    or (method == "nlora" and case.blocks > 1)
    or (method in ("inttune", "lora2") and way == "grouped" and case.smoke)
]


class Training:
    """A model with adapters of one method, or none, and one step of its training."""

    def __init__(self, case: Case, method: str, way: str = ""):
        self.method, self.model = method, case.build()
        if METHODS[method]:
            self.model = peft.get_peft_model(self.model, METHODS[method](case.r))
            generator = torch.Generator().manual_seed(1)
            for parameter in self.trained():
                # Zeros, which adapters start from, would hide faults.
                if not parameter.any():
                    parameter.data.normal_(0, 0.02, generator=generator)
            self.optimizer = torch.optim.AdamW(self.trained(), lr=1e-5)
        if method == "lora":
            fuse(self.model)
        if way:
            group(self.model, **GROUPED[way])
        self.ids = torch.randint(case.vocabulary, (1, case.tokens), generator=torch.Generator().manual_seed(2))

    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def output(self):
        embedded = self.model.get_input_embeddings()(self.ids)
        # So that the gradient of x goes through every layer, as it does below an embedding that trains.
        return self.model(inputs_embeds=embedded.requires_grad_(), labels=self.ids)

    def __call__(self) -> None:
        self.output().loss.backward()
        if METHODS[self.method]:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def results(self) -> dict[str, torch.Tensor]:
        """The logits, and all gradients as one vector."""
        output = self.output()
        grads = torch.autograd.grad(output.loss, self.trained()) if METHODS[self.method] else ()
        vectors = {"logits": [output.logits.detach()], "gradients": grads}
        return {name: torch.cat([t.flatten() for t in ts]) for name, ts in vectors.items() if ts}

    def check(self) -> float:
        actual = self.results()
        twin = copy.copy(self)
        with pytest.MonkeyPatch.context() as patch:
            # PEFT's own layers stand against their fused twins in plain PyTorch.
            patch.setattr(backends, "_preferred", "reference")
            twin.model = copy.deepcopy(self.model)
            if self.method == "peft":
                fuse(twin.model)
            plain = twin.results()
            twin.model.double()
            exact = twin.results()
        return rows.error(actual, plain, exact, f"{self.method}: ")


# Of what every row of a case is compared with, and of what its ways are: to check a whole model takes longer than to
# time it.
@functools.lru_cache(3)
def checked(case: Case, method: str, way: str = "") -> tuple[Training, float]:
    """A training that has passed its check and run once, and its error."""
    training = Training(case, method, way)
    error = training.check()
    training()
    return training, error


@pytest.mark.parametrize("case, method, way", ROWS)
def test_step(benchmark, request, case, method, way):
    others = {name: checked(case, name)[0] for name in ("floor", "peft")}
    training, error = checked(case, method)
    if way:
        others["apart"] = training
        # Not through the cache, where it would take the place of another.
        training, error = checked.__wrapped__(case, method, way)
    ours = backends.select(None, torch.empty(0)).name
    whole = "" if case.blocks > 2 else f", {case.blocks} block{'s' * (case.blocks > 1)}"
    info = {"model": case.model, "M": case.tokens, "shape": f"{case.model}{whole}, {case.tokens} tokens", "r": case.r}
    info |= {"impl": method if method in ("floor", "peft") else ours, "op": "step", "dtype": "float32"}
    method = "lora" if method == "peft" else method
    info |= {"method": f"{method}, {way}" if way else method, "error": error, "peak_bytes": peak_bytes(training)}
    info |= {"trained": sum(p.numel() for p in training.trained())}
    known = [*training.model.parameters(), *training.model.buffers()]
    info |= {"saved_bytes": saved_bytes(training.output, known)}
    if others.pop(info["impl"], None):
        # What a row is compared with is a row too, and is not timed twice there.
        info |= {f"ratio_to_{info['impl']}": 1.0, f"ratio_to_{info['impl']}_p20_p80": [1.0, 1.0]}
    rows.record(benchmark, training, others, info, request)
