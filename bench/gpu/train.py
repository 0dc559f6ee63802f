"""One step of fine-tuning a model of a billion parameters, random weights, with NLoRA in every linear layer."""

import functools
import statistics

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import nlora_kernels.peft as nlora
from bench.gpu.bench import sounder
from bench.implementations import PEFT
from nlora_kernels import backends

# Hidden size, size of the feed-forward part, layers, heads, their keys and values, vocabulary: as Llama-3.2-1B.
MODEL, SHAPE = "Llama-3.2-1B", (2048, 8192, 16, 32, 8, 32_000)
# Sequences, their tokens, and the rank.
BATCH, FEW = (4, 1024, 64), (1, 16, 8)
SMALL = (64, 128, 2, 4, 2, 100)


def cells(machine) -> dict:
    methods = sounder(machine, ("peft", "lean", "cuda", "triton", "peft_base_dtype"))
    return {method: functools.partial(step, machine, method) for method in methods}


def compiled(machine) -> dict:
    return {"peft_compiled": functools.partial(step, machine, "peft_compiled")}


def step(machine, method) -> dict:
    """Forward, backward and AdamW's step: tokens in a second, the memory it takes, and the loss, which must fall."""
    hidden, inner, layers, heads, keys, words = machine.pick(SHAPE, SMALL)
    batch, length, r = machine.pick(BATCH, FEW)
    dtype = machine.pick(torch.bfloat16, torch.float32)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=words,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(machine.name):
        model = LlamaForCausalLM(config).to(dtype)
    options = dict(r=r, lora_alpha=r, target_modules="all-linear")
    if method in PEFT:
        config = LoraConfig(**options, init_lora_weights=True)
        model = get_peft_model(model, config, autocast_adapter_dtype=method != "peft_base_dtype")
        if method == "peft_compiled":
            # One code for all layers: to compile the model as a whole takes minutes.
            for layer in model.base_model.model.model.layers:
                layer.compile(dynamic=False)
    else:
        backends.prefer("lean" if machine.rehearsal else method)
        model = get_peft_model(model, nlora.NLoraConfig(**options, init_lora_weights="slora"))
    planned = machine.schedule()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    generator = torch.Generator(machine.name).manual_seed(0)
    tokens = torch.randint(0, words, (batch, length), generator=generator, device=machine.name)
    losses = []

    def run():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    peak = machine.peak(run)
    times = machine.by_turns({"step": run}, rounds=8, warm_ms=500)["step"]
    first, last = losses[0].item(), losses[-1].item()
    assert last < first, f"the loss went from {first} to {last}"
    milliseconds = statistics.median(times)
    return {
        "ms": round(milliseconds, 1),
        "ms_least_most": [round(min(times), 1), round(max(times), 1)],
        **machine.clock(),
        **planned,
        "tokens_per_s": round(1000 * batch * length / milliseconds),
        "peak_gib": round(peak / 2**30, 2),
        "loss": [round(first, 4), round(last, 4)],
    }
