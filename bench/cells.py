"""What is measured: the layers of real models, and the cells of the tables, as data."""

from typing import NamedTuple

# in, out of each linear layer of a block, under the names that the models give them.
LLAMA_2 = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096)}
GROUPED = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096)}
MODELS = {
    "Llama-2-7B": {**LLAMA_2, "gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)},
    "Mistral-7B": {**GROUPED, "gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)},
    "Llama-3-8B": {**GROUPED, "gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)},
    "DeBERTa-v3-base": {
        "query_proj": (768, 768),
        "key_proj": (768, 768),
        "value_proj": (768, 768),
        "attention.output.dense": (768, 768),
        "intermediate.dense": (768, 3072),
        "output.dense": (3072, 768),
    },
    "RoBERTa-large": {
        "query": (1024, 1024),
        "key": (1024, 1024),
        "value": (1024, 1024),
        "attention.output.dense": (1024, 1024),
        "intermediate.dense": (1024, 4096),
        "output.dense": (4096, 1024),
    },
    "SmolLM2-135M": {
        "q_proj": (576, 576),
        "k_proj": (576, 192),
        "v_proj": (576, 192),
        "o_proj": (576, 576),
        "gate_proj": (576, 1536),
        "up_proj": (576, 1536),
        "down_proj": (1536, 576),
    },
}
WITH_BIAS = {"DeBERTa-v3-base", "RoBERTa-large"}


class Cell(NamedTuple):
    """One layer, one method and one part of a training step, measured for every implementation."""

    model: str
    layer: str
    M: int  # rows of x: tokens
    r: int
    method: str = "nlora"  # or inttune (the core alone trains), lora2 (k = r)
    op: str = "both"  # forward (that of training), backward, both
    dtype: str = "float32"
    smoke: bool = False
    device: str = "cpu"

    @property
    def size(self) -> tuple[int, int, int, int]:
        """M, K, N, R"""
        return self.M, *MODELS[self.model][self.layer], self.r

    def __str__(self) -> str:
        name = f"{self.model}.{self.layer}-M{self.M}-r{self.r}-{self.dtype}-{self.method}-{self.op}"
        return f"smoke-{name}" if self.smoke else name


SMALL, WIDE = ("DeBERTa-v3-base", "query_proj"), ("DeBERTa-v3-base", "intermediate.dense")
CELLS = [
    Cell(*SMALL, 512, 8, op="forward", smoke=True),
    Cell(*SMALL, 512, 8, op="backward"),
    Cell(*SMALL, 512, 8, smoke=True),
    Cell(*SMALL, 512, 8, "inttune", smoke=True),
    Cell(*SMALL, 512, 8, "lora2", smoke=True),
    Cell(*SMALL, 16, 8, op="forward", smoke=True),
    Cell(*SMALL, 16, 8),
    Cell(*SMALL, 512, 64),
    Cell(*SMALL, 512, 128),
    Cell(*SMALL, 512, 128, "inttune"),
    Cell(*SMALL, 2048, 8),
    Cell(*SMALL, 512, 8, op="forward", dtype="bfloat16"),
    Cell(*SMALL, 512, 8, dtype="bfloat16", smoke=True),
    Cell(*WIDE, 512, 8),
    Cell("DeBERTa-v3-base", "output.dense", 512, 8),
    Cell("RoBERTa-large", "query", 512, 8),
    Cell("RoBERTa-large", "intermediate.dense", 512, 64),
    Cell("SmolLM2-135M", "q_proj", 1024, 8),
    Cell("SmolLM2-135M", "k_proj", 1024, 8),
    Cell("SmolLM2-135M", "gate_proj", 1024, 64),
    Cell("Llama-2-7B", "q_proj", 1, 16, op="forward"),
    Cell("Llama-2-7B", "q_proj", 512, 16),
    Cell("Llama-2-7B", "q_proj", 512, 128),
    Cell("Llama-2-7B", "q_proj", 512, 128, "inttune"),
    Cell("Llama-2-7B", "q_proj", 512, 64, dtype="bfloat16"),
    Cell("Llama-2-7B", "down_proj", 256, 64, op="forward"),
    Cell("Mistral-7B", "k_proj", 512, 64),
    Cell("Mistral-7B", "gate_proj", 256, 64, op="forward"),
    Cell("Llama-3-8B", "v_proj", 512, 16),
    Cell("Llama-3-8B", "down_proj", 256, 64, op="forward"),
]
