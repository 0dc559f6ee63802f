"""Tiny models built from configurations, for tests of the PEFT integration. Nothing is downloaded."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nlora_kernels.peft.layer import FusedLinear

VOCABULARY = 64


def llama(dtype: torch.dtype = torch.float32, layers: int = 2) -> LlamaForCausalLM:
    """nn.Linear layers without bias, of different shapes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return _enlarged(LlamaForCausalLM(config)).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Conv1D layers with bias."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _enlarged(GPT2LMHeadModel(config)).to(dtype).eval()


def mixtral():
    """Experts with weights (E, out, in), gate and up one after the other."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return _mixture(MixtralForCausalLM, MixtralConfig, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 8}
    return _mixture(Qwen3MoeForCausalLM, Qwen3MoeConfig, **sizes)


def gpt_oss():
    """Experts with weights (E, in, out) and biases, gate and up by turns."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return _mixture(GptOssForCausalLM, GptOssConfig, **sizes)


def deepseek_v3():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 8, "q_lora_rank": 8}
    sizes |= {"num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    return _mixture(DeepseekV3ForCausalLM, DeepseekV3Config, **sizes)


MIXTURES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def _mixture(model, config, **sizes) -> nn.Module:
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = model(config(vocab_size=VOCABULARY, max_position_embeddings=64, **shared | sizes))
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data.mul_(5)
    return _enlarged(model).eval()


def tokens(batch: int = 3, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _enlarged(model: nn.Module) -> nn.Module:
    # With the usual std of 0.02 a tiny model hardly reacts to its input, and no test would see a fault.
    for module in model.modules():
        if hasattr(module, "weight") and module.weight.dim() == 2:
            module.weight.data.mul_(5)
    return model


def perturb(model: nn.Module, scale: float = 0.1, adapter: str = "") -> None:
    """Moves every trainable parameter (of one adapter), as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and f".{adapter}" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


@contextlib.contextmanager
def counted_fusions():
    """Gives a list that grows by one whenever a layer and its adapter are computed as one operation."""
    calls, patch = [], pytest.MonkeyPatch()

    def counting(original):
        def fused(layer, *args):
            calls.append(layer)
            return original(layer, *args)

        return fused

    patch.setattr(FusedLinear, "_fused", counting(FusedLinear._fused))
    try:
        yield calls
    finally:
        patch.undo()
