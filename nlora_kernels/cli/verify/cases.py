"""What a backend must show before it is chosen on a GPU, for one dtype: data that the parent and the child share.

Sizes are M, K, N, R: rows of x, in, out, rank.
"""

from typing import NamedTuple

import torch

from ... import backends

# What trains, by method. LoRA² has its own five; "dropout" is SLoRA with the mask inside the operation, "experts" on a
# mixture of EXPERTS layers, "group" on two layers that share x, and "four_bits" with a weight of codes.
METHODS = {
    "lora": ("x", "lora_A", "lora_B"),
    "slora": ("x", "weight", "lora_A", "lora_B", "lora_N", "bias"),
    "nlora": ("x", "lora_A", "lora_B", "lora_N"),
    "inttune": ("x", "lora_N"),
    "lora2": ("x", "lora_v", "lora_u", "lora_E", "lora_U", "lora_V"),
    "dropout": ("x", "lora_A", "lora_B", "lora_N"),
    "experts": ("x", "lora_A", "lora_B", "lora_N"),
    "group": ("x", "lora_A", "lora_B", "lora_N"),
    "four_bits": ("x", "lora_A", "lora_B", "lora_N"),
}
EXPERTS = 4
# Of a captured graph.
REPLAYS = 3
# Results that the parent computes again.
WITNESS = 37, 96, 80, 16


class Sizes(NamedTuple):
    """What is run on: a GPU, or on the CPU in rehearsal.

    checked: shapes of the error budget. repeated, replayed: of bitwise repeats and of CUDA graphs. timed, dropped,
    mixtures, coded: of times, those with dropout, those of experts and those with a weight in four bits, which has few
    rows and is decoded in the product, by themselves. initialised: in, out and r of Nyström
    initialisation. cores: r and k of the core of LoRA². trained: r, k, layers and features of a model that trains
    LoRA². runs: repeats of a shape. rounds: of timing.
    """

    checked: tuple[tuple[int, int, int, int], ...]
    repeated: tuple[tuple[int, int, int, int], ...]
    replayed: tuple[tuple[int, int, int, int], ...]
    timed: tuple[tuple[int, int, int, int], ...]
    dropped: tuple[tuple[int, int, int, int], ...]
    mixtures: tuple[tuple[int, int, int, int], ...]
    coded: tuple[tuple[int, int, int, int], ...]
    initialised: tuple[tuple[int, int, int], ...]
    cores: tuple[tuple[int, int], ...]
    trained: tuple[tuple[int, int, int, int], ...]
    runs: int
    rounds: int


# Ragged, decode, the edges of ranks and tiles, and layers of LLaMA-2-7B and BERT that take every form of launch.
REAL = Sizes(
    checked=(
        (1, 33, 17, 5),
        (7, 65, 31, 13),
        (1, 4096, 4096, 16),
        (16, 4096, 11008, 64),
        (64, 768, 768, 8),
        (100, 768, 768, 100),
        (333, 1000, 520, 256),
        (70, 512, 640, 300),
        (257, 768, 3072, 32),
        (2048, 768, 768, 16),
        (2500, 3072, 768, 64),
        (2100, 4096, 4096, 128),
    ),
    repeated=((1000, 520, 392, 24), (2048, 768, 768, 16), (2048, 4096, 4096, 64)),
    replayed=((16, 4096, 4096, 64), (2048, 4096, 4096, 64)),
    timed=(
        (1, 4096, 4096, 16),
        (16, 4096, 4096, 64),
        (128, 4096, 4096, 16),
        (512, 768, 768, 8),
        (4096, 768, 768, 64),
        (4096, 768, 3072, 16),
        (2048, 4096, 4096, 16),
        (2048, 4096, 4096, 128),
        (8192, 4096, 4096, 64),
        (8192, 4096, 4096, 256),
        (4096, 4096, 11008, 64),
        (4096, 11008, 4096, 64),
    ),
    dropped=((2048, 768, 768, 16), (2048, 4096, 4096, 16), (8192, 4096, 4096, 64)),
    mixtures=((64, 2048, 1536, 16), (2048, 2048, 1536, 16), (16384, 2048, 1536, 16)),
    coded=((1, 4096, 4096, 16), (16, 4096, 11008, 64), (64, 4096, 4096, 64)),
    initialised=((768, 768, 8), (4096, 4096, 128), (4096, 11008, 64)),
    cores=((8, 8), (64, 32)),
    trained=((8, 8, 24, 768), (32, 16, 4, 4096)),
    runs=200,
    rounds=15,
)
REHEARSED = Sizes(
    checked=((1, 33, 17, 5), (23, 64, 48, 8)),
    repeated=((23, 64, 48, 8),),
    replayed=((23, 64, 48, 8),),
    timed=((16, 64, 64, 8),),
    dropped=((16, 64, 64, 8),),
    mixtures=((16, 64, 64, 8),),
    coded=((16, 64, 64, 8),),
    initialised=((40, 48, 8),),
    cores=((8, 8),),
    trained=((4, 3, 2, 24),),
    runs=2,
    rounds=2,
)


class Case(NamedTuple):
    """One thing to show.

    kind: "witness", "budget", "repeats", "replay" or "time". detail: of METHODS, or the operation that is timed.
    optional: a backend may refuse it, for its sizes are such as kernels for matrix units need not take. more: results
    that only some backends give.
    """

    kind: str
    detail: str
    shape: tuple[int, int, int, int]
    adapter: str
    optional: bool = False
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind} {self.detail} {'x'.join(map(str, self.shape))} {self.adapter} adapter"

    @property
    def results(self) -> frozenset[str]:
        """The names of what has an error."""
        if self.kind in ("witness", "budget"):
            return frozenset(["y", *(f"d{name}" for name in METHODS[self.detail])])
        if self.kind == "time":
            return frozenset(RESULTS_OF[self.detail] + self.more)
        return frozenset()


RESULTS_OF = {
    "forward": ("y",),
    "backward": ("dx", "dlora_A", "dlora_B", "dlora_N"),
    "dropout": (),
    "experts": ("y", "dx", "dlora_A", "dlora_B", "dlora_N"),
    "initialisation": ("A", "N", "B", "weight"),
    "coded_forward": ("y",),
    "coded_backward": ("dx", "dlora_A", "dlora_B", "dlora_N"),
    "decode": ("weight",),
    "lora2_core": ("core", "du", "dE", "dU"),
    "lora2_training": ("penalty", "dv", "du", "dV", "dU", "mean", "spread", "E"),
}
# Of initialisation, where a backend has norms of rows and columns, and triangular solves, too.
NORMS_AND_SOLVES = {"triton": ("rows", "cols", "solution")}


def cases_of(backend: str, dtype: str, sizes: Sizes) -> list[Case]:
    """Everything that a backend must show for a dtype of x, in the order in which it is done."""
    drops = backends.TABLE[backend].drops_inside
    # PEFT keeps adapters in fp32 on a 16-bit base by default.
    adapters = list(dict.fromkeys(("float32", dtype)))
    found = [Case("witness", "nlora", WITNESS, adapter) for adapter in adapters]
    able = {"dropout": drops, "experts": takes_experts(backend), "group": takes_groups(backend)}
    able["four_bits"] = decodes(backend)
    methods = [method for method in METHODS if able.get(method, True)]
    # Those whose launches are others than those of a layer.
    together = [method for method in ("experts", "group") if able[method]]
    # With few rows.
    coded = [Case("repeats", "four_bits", sizes.coded[-1], adapters[0])]
    coded += [Case("replay", "four_bits", shape, adapters[0]) for shape in sizes.coded]
    coded += [
        Case("time", f"coded_{op}", shape, adapter)
        for adapter in adapters
        for shape in sizes.coded
        for op in ("forward", "backward")
    ]
    coded += [Case("time", "decode", (1, K, N, 1), dtype) for K, N in dict.fromkeys(s[1:3] for s in sizes.coded)]
    for i, shape in enumerate(sizes.checked):
        optional = any(size % 8 for size in shape[1:]) or shape[3] > 256
        # Every method with either adapter, in turn over the shapes.
        found += [
            Case("budget", method, shape, adapters[(i + j) % len(adapters)], optional)
            for j, method in enumerate(methods)
        ]
    found += [Case("repeats", "nlora", shape, adapters[0]) for shape in sizes.repeated]
    found += [Case("repeats", method, sizes.repeated[0], adapters[0]) for method in together]
    found += [Case("replay", "nlora", shape, adapter) for shape in sizes.replayed for adapter in adapters]
    found += [Case("replay", method, shape, adapters[0]) for shape in sizes.replayed for method in together]
    for adapter in adapters:
        found += [Case("time", op, shape, adapter) for shape in sizes.timed for op in ("forward", "backward")]
    if drops:
        found += [Case("time", "dropout", shape, "float32") for shape in sizes.dropped]
    if able["four_bits"]:
        found += coded
    if backends.TABLE[backend].proved_for and able["experts"]:
        found += [Case("time", "experts", shape, adapter) for shape in sizes.mixtures for adapter in adapters]
    if backends.TABLE[backend].proved_for:
        more = NORMS_AND_SOLVES.get(backend, ())
        shapes = [(1, *shape) for shape in sizes.initialised]
        found += [Case("time", "initialisation", shape, dtype, more=more) for shape in shapes]
    found += [Case("time", "lora2_core", (r, k, 1, 1), dtype) for r, k in sizes.cores]
    if backends.TABLE[backend].proved_for and trains_lora2(backend):
        found += [Case("time", "lora2_training", shape, dtype) for shape in sizes.trained]
    return found


def trains_lora2(backend: str) -> bool:
    """Whether a backend has kernels of its own for the rank allocator and the orthogonality penalty."""
    return type(backends.TABLE[backend]).lora2_training is not backends.Backend.lora2_training


def takes_experts(backend: str) -> bool:
    """Whether a backend has a way of its own to compute all experts of a mixture."""
    return "forward_experts" in vars(type(backends.TABLE[backend]))


def takes_groups(backend: str) -> bool:
    """Whether a backend has one for layers that share x."""
    return "forward_group" in vars(type(backends.TABLE[backend]))


def decodes(backend: str) -> bool:
    """Whether it has kernels of its own for weights in few bits, in a product and as a whole."""
    return "reads_quantised" in vars(type(backends.TABLE[backend])) and bool(backends.TABLE[backend].proved_for)


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)
