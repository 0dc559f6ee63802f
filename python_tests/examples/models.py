"""A small language model that reads bytes."""

import torch
import transformers


def byte_tokenizer(chat_template: str | None = None):
    """One token a byte, and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def byte_llama(tokenizer, **options) -> transformers.LlamaForCausalLM:
    """A random one for the tokenizer, of two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        **{"hidden_size": 32, "intermediate_size": 48} | options,
    )
    return transformers.LlamaForCausalLM(config).eval()
