"""The persistent GEMM on the emulator: right on every schedule, and every synchronisation call is needed."""

import functools
import re

import pytest
import torch

from python_tests.cuda.emulator import CUDA, GRID_WAIT, TILES, run_gemm, synchronisation_calls

# m, n, k, rank of wide, columns of p
SHAPES = [
    (1, 8, 8, 8, 8),
    (128, 128, 64, 64, 64),
    (129, 136, 72, 24, 48),
    (5, 520, 136, 0, 0),
    (300, 72, 8, 16, 16),
    (64, 256, 520, 40, 104),
    (257, 128, 48, 128, 128),
    (200, 264, 200, 0, 0),
    (384, 384, 136, 0, 72),
    (130, 392, 40, 200, 256),
]
# A shape, columns of t, slices of p[:, r:]ᵀ·t
GRADIENTS = [
    ((129, 136, 72, 24, 48), 24, 1),
    ((300, 72, 40, 0, 64), 56, 5),
    ((520, 136, 24, 72, 192), 112, 3),
]
SEEDS = range(10)


@functools.cache
def operands(shape, dtype):
    m, n, k, r, w = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = {"a": (m, k), "b": (n, k), "bias": (n,), "wide": (n, r), "shrink": (w, k)}
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in sizes.items() if all(s)}


@functools.cache
def reference(shape, dtype, with_bias, made):
    """name -> (fp64 result, error allowed): twice that of PyTorch in the same dtype, plus fp32 rounding."""

    def compute(a, b, bias, wide=None, shrink=None, p=None):
        c = torch.nn.functional.linear(a, b, bias if with_bias else None)
        if shrink is not None:
            p = a @ shrink.T if p is None else p
            c = c if wide is None else c + p[:, : wide.shape[1]] @ wide.T
        return {"c": c, "p": p}

    inputs = operands(shape, dtype)
    if not made:
        inputs = inputs | {"p": compute(**inputs)["p"]}
    exact = compute(**{name: None if t is None else t.double() for name, t in inputs.items()})
    bounds = {}
    for name, plain in compute(**inputs).items():
        if plain is not None:
            error = (plain.double() - exact[name]).abs().max().item()
            bounds[name] = exact[name], 2 * error + torch.finfo(torch.float32).eps * exact[name].abs().max().item()
    return bounds


def product(shape, dtype, *, with_bias=True, made=True, mn=False, gradient=None):
    """One launch for run_gemm; gradient: columns of t and number of slices."""
    inputs = dict(operands(shape, dtype), mn=mn)
    if gradient:
        columns, inputs["splits"] = gradient
        inputs["t"] = torch.randn(shape[0], columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    if not with_bias:
        del inputs["bias"]
    if not made and "shrink" in inputs:
        del inputs["shrink"]
        inputs["p"] = reference(shape, dtype, with_bias, made)["p"][0].to(dtype)
    return inputs


def slices_error(launched):
    """Of the slices against the p that the launch left in memory: no more than sums in fp32 may have."""
    p, t, splits = launched["p"].double(), launched["t"].double(), launched["splits"]
    beyond = p[:, launched["wide"].shape[1] if "wide" in launched else 0 :]
    steps = -(-len(t) // 64)
    for number, slice_ in enumerate(launched["slices"].chunk(splits)):
        share = slice(steps * number // splits * 64, steps * (number + 1) // splits * 64)
        budget = len(t) * torch.finfo(torch.float32).eps * (beyond[share].abs().T @ t[share].abs())
        if not ((slice_.double() - beyond[share].T @ t[share]).abs() <= budget).all():
            return f"slice {number} is wrong"
    return ""


def error_of(launched, bounds):
    """What is wrong with the results of one launch; empty: nothing."""
    for name, (exact, budget) in bounds.items():
        result = launched[name]
        rows, columns = result.shape
        if name == "c" or "shrink" in launched:
            between = result.as_strided((rows - 1, 8), result.stride(), columns)
            if not (between.contiguous().view(torch.int16) == -1).all():
                return f"{name}: written between the rows"
        error = (result.double() - exact).abs().max().item()
        if not error <= budget:
            return f"{name}: error must be at most {budget:.3g}, got {error:.3g}"
    return slices_error(launched) if "t" in launched else ""


def check(*shapes, seed, tile, mn=False, gradient=None, epoch=0, **options):
    """Launches one after the other; everything but tile, majors and the options follows from the seed."""
    dtype = (torch.bfloat16, torch.float16)[seed // 2 % 2]
    choice = {"with_bias": seed % 3 > 0, "made": seed % 4 < 3}
    launches = [product(shape, dtype, mn=mn, gradient=gradient, **choice) for shape in shapes]
    ticket, last, result = run_gemm(*launches, tile=tile, tall=1 + seed % 3, seed=seed, epoch=epoch, **options)
    assert not result.rule, result.text
    # Numbers of launches go round without 0.
    expected = (epoch + len(shapes) - 1) % (2**32 - 1) + 1
    assert (ticket, last) == (0, expected), "a launch must leave the ticket at 0 and the epoch one higher"
    for launched, shape in zip(launches, shapes, strict=True):
        problem = error_of(launched, reference(shape, dtype, **choice))
        assert not problem, f"{shape}: {problem}"
    return launches


def fitting(shape, tile):
    """The tile, or the next that can make so wide a p: in two pieces at most."""
    return tile if shape[4] <= 2 * TILES[tile][1] else (tile + 1) % len(TILES)


@pytest.mark.parametrize("lanes", [False, True], ids=["warps", "lanes"])
@pytest.mark.parametrize("resident", [1, 0], ids=["one-resident", "all-resident"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_gemm(shape, resident, lanes):
    for seed in SEEDS:
        tile, mn = fitting(shape, seed % len(TILES)), seed >= len(TILES)
        check(shape, seed=seed, tile=tile, mn=mn, resident=resident, lanes=lanes)


@pytest.mark.parametrize("lanes", [False, True], ids=["warps", "lanes"])
@pytest.mark.parametrize("resident", [1, 0], ids=["one-resident", "all-resident"])
@pytest.mark.parametrize(("shape", "columns", "splits"), GRADIENTS)
def test_slices_of_a_gradient_in_the_same_launch(shape, columns, splits, resident, lanes):
    for seed, (_, tile_columns, _) in enumerate(TILES):
        if max(columns, shape[4] // 2) <= tile_columns:
            options = {"resident": resident, "lanes": lanes, "gradient": (columns, splits)}
            check(shape, seed=seed, tile=seed, mn=True, **options)


@pytest.mark.parametrize("tile", range(len(TILES)), ids=lambda t: "{}x{}x{}".format(*TILES[t]))
def test_result_is_the_same_bits_on_every_schedule(tile):
    results = []
    for s in range(4):
        options = {"blocks": 2 + 2 * (s % 2), "resident": s % 2}
        results += check((200, 264, 136, 24, 48), seed=1 + 12 * s, tile=tile, mn=bool(tile % 2), **options)
    for other in results[1:]:
        assert torch.equal(results[0]["c"], other["c"])
        assert torch.equal(results[0]["p"], other["p"])


@pytest.mark.parametrize("tile", [0, 3])
def test_control_words_serve_launches_of_any_size(tile):
    for seed in range(4):
        shapes = [(200, 136, 72, 24, 48), (600, 136, 8, 8, 8), (129, 136, 72, 0, 0), (200, 136, 72, 24, 24)]
        check(*shapes, seed=seed, tile=tile, lanes=seed % 2 == 1, mn=seed > 1)


# What flags hold that were last raised long ago, or never: ahead of the epoch where numbers are compared signed.
@pytest.mark.parametrize(("epoch", "flags"), [(2**31 + 5, 1), (2**31 - 1, 2**32 - 1), (2**32 - 1, 0), (2**32 - 2, 5)])
def test_flags_of_old_launches_are_not_those_of_this_one(epoch, flags):
    for seed in range(4):
        check(*[(200, 136, 72, 24, 48)] * 2, seed=seed, tile=seed % 4, epoch=epoch, flags=flags)


def test_k_beyond_many_laps_of_the_ring():
    check((130, 136, 2056, 8, 8), seed=0, tile=4)


@pytest.mark.parametrize("resident", [1, 0], ids=["one-resident", "all-resident"])
@pytest.mark.parametrize("tile", [1, 3])
def test_items_of_p_two_tiles_high(tile, resident):
    # Rows of tiles: an odd number, one of which the last is all but empty, and one that begins a band.
    for rows in (5, 2, 9):
        shape = (128 * TILES[tile][2] * (rows - 1) + 8, 264, 136, 24, 128 if rows == 2 else 48)
        tall, alone = (
            product(shape, torch.float16, mn=rows == 5, gradient=(48, 3) if rows == 5 else None) for _ in range(2)
        )
        for launched, height in ((tall, 2), (alone, 1)):
            _, _, result = run_gemm(launched, tile=tile, tall=height, seed=rows, lanes=rows == 2, resident=resident)
            assert not result.rule, result.text
            assert not error_of(launched, reference(shape, torch.float16, True, True))
        assert all(torch.equal(tall[name], alone[name]) for name in ("c", "p"))


@pytest.mark.parametrize("resident", [1, 0])
@pytest.mark.parametrize("tile", [0, 2])
def test_rows_beyond_one_band_of_the_schedule(tile, resident):
    rows = 128 * TILES[tile][2]
    check((9 * rows + 8, 136, 8, 8, 136), seed=1, tile=tile, resident=resident)


def test_a_flag_that_never_comes_traps_with_its_name():
    lines = {name: line for line, name in CALLS.items() if name.startswith("flag_")}
    launches = [product((300, 136, 72, 24, 24), torch.bfloat16)]
    # The last store of a flag in the source is that of P's.
    skipped = max(line for line, name in CALLS.items() if name == "flag_release_store")
    for seed in range(3):
        options = {"seed": seed, "source": "gemm.cuh", "skipped_line": skipped, "epoch": 6, "flags": 5}
        result = run_gemm(*launches, tile=seed, bounded=True, **options)[2]
        assert result.rule == "deadlock", result.text
        # Whoever waits for the flag, or for what its reader loads.
        where, said = re.fullmatch(
            r"deadlock: \w+ at gemm\.cuh:(\d+) by block \d+ thread \d+ (.*) \[.*\]", result.text
        ).groups()
        if int(where) == lines["flag_wait"]:
            assert re.fullmatch(r"has lasted 2 s: the flag at 0x[0-9a-f]+ is 5 and must be 7", said)
        else:
            assert re.search(r"the phase of parity [01] of the mbarrier at 0x[0-9a-f]+ is not over", said)
            assert CALLS[int(where)].startswith("mbarrier_wait")


# Calls that may go without harm to the result, and why.
REDUNDANT = {
    "setmaxnreg_increase": "gives registers to a warp, orders nothing: without it the kernel is right and may spill",
}
# Launches with an adapter, without and with a cluster: two on the same control words; K so short that nothing waits for
# a slot; K of several laps round the ring of slots; items of P two tiles high.
MUTATED = [
    (0, 1, [(130, 136, 72, 24, 24)] * 2),
    (2, 1, [(600, 264, 72, 24, 24)]),
    (0, 1, [(300, 264, 72, 24, 24)]),
    (3, 1, [(300, 264, 456, 24, 24)]),
    (0, 1, [(200, 264, 456, 24, 24)]),
    (2, 2, [(600, 264, 72, 24, 24)]),
]


CALLS = synchronisation_calls("gemm.cuh")


@functools.cache
def executed_lines(index):
    tile, tall, shapes = MUTATED[index]
    return run_gemm(*(product(shape, torch.bfloat16) for shape in shapes), tile=tile, tall=tall)[2].lines


def test_every_synchronisation_call_of_the_source_runs():
    executed = {line for index in range(len(MUTATED)) for line in executed_lines(index)}
    assert executed == CALLS.keys() | synchronisation_calls("gemm.cuh", GRID_WAIT).keys()


@pytest.mark.parametrize("line", CALLS, ids=lambda n: f"line{n}-{CALLS[n]}")
def test_deleting_a_synchronisation_call_is_caught(line):
    name = CALLS[line]
    caught = {}
    for index, (tile, tall, shapes) in enumerate(MUTATED):
        if line not in executed_lines(index):
            continue
        seen = caught[index] = []
        for seed in range(1 if name in REDUNDANT else 3):
            for lanes in (False, True):
                launches = [product(shape, torch.bfloat16) for shape in shapes]
                options = {"seed": seed, "lanes": lanes, "skipped_line": line}
                ticket, _, result = run_gemm(*launches, tile=tile, tall=tall, **options)
                bounds = [reference(shape, torch.bfloat16, True, True) for shape in shapes]
                wrong = any(map(error_of, launches, bounds))
                seen.append(bool(result.rule) or wrong or ticket != 0)
        if all(seen):
            break
    # One of the problems must show it on every schedule.
    assert any(map(all, caught.values())) != (name in REDUNDANT), f"{name}: caught {caught}"


def test_kernel_source_has_no_emulator_conditionals_and_no_ptx():
    for path in (CUDA / "sm90" / "gemm.cuh", CUDA / "sm90" / "tile.cuh"):
        source = path.read_text()
        assert not re.search(r"\basm\b|__shared__|__CUDA|__GNUC__|EMULATOR|#\s*if", source), path.name
        includes = re.findall(r'#include [<"](.+)[>"]', source)
        assert set(includes) <= {"../common/layer.cuh", "../common/schedule.h", "tile.cuh"}, path.name


def zeros(rows, columns):
    return torch.zeros(rows, columns, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": zeros(0, 8)}, "m, n and k must be positive and below 2^31, got 0, 8 and 8"),
        ({"a": zeros(8, 0), "b": zeros(8, 0)}, "got 8, 8 and 0"),
        ({"a": zeros(8, 16)}, "b must be (8, 16) in the dtype of a, got (8, 8)"),
        ({"a": zeros(8, 12), "b": zeros(8, 12)}, "a must have columns in multiples of 8"),
        ({"a": zeros(8, 8).float(), "b": zeros(8, 8).float()}, "a must be bfloat16 or float16, got float32"),
        ({"b": zeros(8, 8).half()}, "b must be (8, 8) in the dtype of a, got (8, 8) in another"),
        ({"b": zeros(12, 8)}, "c must have columns in multiples of 8"),
        ({"bias": zeros(1, 16)[0]}, "bias must be (1, 8) in the dtype of a, got (1, 16)"),
        ({"wide": zeros(8, 8)}, "p must be (8, 0)"),
        ({"p": zeros(8, 8), "wide": zeros(8, 16)}, "a rank in multiples of 8 up to the columns of p"),
        ({"shrink": zeros(512, 8)}, "at most 256 where p is made, got 0 of 512"),
        ({"shrink": zeros(8, 8), "t": zeros(8, 8), "splits": 1}, "a gradient needs Major::MN"),
        ({"mn": True, "shrink": zeros(8, 8), "t": zeros(8, 136), "splits": 1}, "8 to 128 columns of p beyond the rank"),
        (
            {"mn": True, "shrink": zeros(8, 8), "t": zeros(8, 8), "splits": 2},
            "slices must be contiguous float32 of (1 to 1",
        ),
    ],
)
def test_operands_are_checked(changed, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run_gemm({"a": zeros(8, 8), "b": zeros(8, 8)} | changed)
