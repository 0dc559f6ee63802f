"""Initial adapter matrices: the published ones bitwise, the others against their definitions in fp64."""

import math

import pytest
import torch
from torch import nn

import nlora_kernels as nk
from nlora_kernels import init, testing


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank(out, in_, rank, seed=0):
    return normal(out, rank, dtype=torch.float64, seed=seed) @ normal(rank, in_, dtype=torch.float64, seed=seed + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_default_is_the_published_slices_bitwise(dtype, shape):
    W = normal(*shape, dtype=dtype)
    A, N, B = init.nystrom(W, 7)
    assert torch.equal(A, W[:7]) and torch.equal(N, W[:7, :7]) and torch.equal(B, W[:, :7])
    assert A.dtype == N.dtype == B.dtype == dtype
    assert all(t.is_contiguous() for t in (A, N, B, *init.nystrom(W.T, 7)))
    A.zero_(), N.zero_(), B.zero_()
    assert torch.equal(W, normal(*shape, dtype=dtype)), "the matrices must be copies"


@pytest.mark.parametrize("select", init.SELECTIONS)
@pytest.mark.parametrize("core", init.CORES)
def test_every_core_for_every_selection(core, select):
    W = normal(24, 31)
    rows, cols = init.select(W, 5, select, torch.Generator().manual_seed(4))
    A, N, B = init.nystrom(W, 5, core=core, select=select, generator=torch.Generator().manual_seed(4))
    assert torch.equal(A, W[rows]) and torch.equal(B, W[:, cols])
    W, A64, B64 = W.double(), A.double(), B.double()
    sample = W[rows][:, cols]
    exact = {
        "sample": sample,
        "optimal": torch.linalg.pinv(B64) @ W @ torch.linalg.pinv(A64),
        "pinv": torch.linalg.pinv(sample),
    }[core]
    # The error of a computed inverse is eps times the condition number, here of A, B and the sample.
    condition = max(torch.linalg.cond(t).item() for t in (A64, B64, sample))
    assert (N.double() - exact).norm() <= 10 * condition * torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("core", ["optimal", "pinv"])
@pytest.mark.parametrize("select", init.SELECTIONS)
def test_the_product_restores_a_matrix_of_rank_r(core, select):
    W = low_rank(40, 30, 6)
    A, N, B = init.nystrom(W, 6, core=core, select=select)
    torch.testing.assert_close(B @ N @ A, W, rtol=1e-7, atol=1e-7)


def test_the_optimal_core_is_best_and_survives_dependent_rows():
    W = normal(40, 30, dtype=torch.float64)
    A, N, B = init.nystrom(W, 8, core="optimal")
    best = (W - B @ N @ A).norm()
    for seed in range(5):
        assert (W - B @ (N + 1e-3 * normal(8, 8, dtype=torch.float64, seed=seed)) @ A).norm() > best
    W[3] = W[1]
    A, N, B = init.nystrom(W, 8, core="optimal")
    fitted = B @ torch.linalg.pinv(B) @ W @ torch.linalg.pinv(A) @ A
    torch.testing.assert_close(B @ N @ A, fitted)


def test_selections():
    W = normal(50, 40)
    W[[7, 3, 21]] *= torch.tensor([30.0, 20.0, 10.0])[:, None]
    leading = init.select(W, 4, "leading")
    assert all(torch.equal(i, torch.arange(4)) for i in leading)
    assert init.select(W, 3, "norm")[0].tolist() == [7, 3, 21]
    rows, cols = init.select(W, 10, "uniform", torch.Generator().manual_seed(0))
    again = init.select(W, 10, "uniform", torch.Generator().manual_seed(0))
    other = init.select(W, 10, "uniform", torch.Generator().manual_seed(1))
    assert torch.equal(rows, again[0]) and torch.equal(cols, again[1]) and not torch.equal(rows, other[0])
    for how in init.SELECTIONS:
        for indices, size in zip(init.select(W, 40, how), W.shape, strict=True):
            assert indices.dtype == torch.int64 and len(set(indices.tolist())) == 40 and max(indices) < size


def test_norms_of_16_bits_are_those_in_fp32():
    W = torch.ones(8, 64, dtype=torch.bfloat16)
    # A norm that bf16 rounds to that of the others.
    W[5, :2] = 1.0625
    assert torch.equal(init.select(W, 2, "norm")[0], init.select(W.float(), 2, "norm")[0])


def pivots(W, r):
    """The first r pivots by definition: take the largest remaining row, remove its direction from the others."""
    rest, chosen = W.clone(), []
    for _ in range(r):
        chosen.append(int(rest.norm(dim=1).argmax()))
        q = rest[chosen[-1]] / rest[chosen[-1]].norm()
        rest = rest - torch.outer(rest @ q, q)
        rest[chosen] = 0
    return chosen


@pytest.mark.parametrize("shape, r", [((60, 20), 12), ((20, 60), 20), ((600, 33), 9)], ids=str)
def test_pivots_are_those_of_the_definition(shape, r):
    W = normal(*shape, dtype=torch.float64)
    rows, cols = init.select(W, r, "pivoted")
    assert rows.tolist() == pivots(W, r) and cols.tolist() == pivots(W.T, r)


def test_pivots_of_a_matrix_of_lower_rank_are_distinct():
    rows, cols = init.select(low_rank(20, 16, 3).float(), 10, "pivoted")
    assert len(set(rows.tolist())) == len(set(cols.tolist())) == 10
    assert len(set(init.select(torch.zeros(6, 5), 4, "pivoted")[0].tolist())) == 4
    # What rounding leaves of explained rows is far below -1, the mark of those that are chosen.
    for indices in init.select(3e4 * low_rank(20, 16, 2).float(), 10, "pivoted"):
        assert len(set(indices.tolist())) == 10


def test_given_indices_replace_the_selection():
    W = normal(12, 10)
    A, N, B = init.nystrom(W, 3, rows=[5, 1, 11], cols=torch.tensor([9, 0, 2]))
    assert torch.equal(A, W[[5, 1, 11]]) and torch.equal(B, W[:, [9, 0, 2]])
    assert torch.equal(N, W[[5, 1, 11]][:, [9, 0, 2]])
    A, N, B = init.nystrom(W, 3, rows=[5, 1, 11])
    assert torch.equal(N, W[[5, 1, 11]][:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("core", [True, False], ids=["N", "noN"])
def test_subtract_rounds_once(dtype, transposed, core):
    W = normal(700, 90, dtype=dtype)
    W = W.T.contiguous().T if transposed else W
    A, B = normal(6, 90, dtype=dtype, seed=1), normal(700, 6, dtype=dtype, seed=2)
    N = normal(6, 6, dtype=dtype, seed=3) if core else None
    exact = W.double() - 0.3 * (B.double() if N is None else B.double() @ N.double()) @ A.double()
    pointer = W.data_ptr()
    assert init.subtract_(W, A, N, B, 0.3) is W and W.data_ptr() == pointer
    # The product is accumulated in fp32: r + 2 roundings of its terms, then one rounding of W.
    fp32 = 0.3 * (B.double().abs() if N is None else B.double().abs() @ N.double().abs()) @ A.double().abs()
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + unit * (fp32 * 14 + exact.abs())
    assert ((W.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("r", [16, 64])
def test_what_is_subtracted_may_lie_in_the_weight(r):
    W = normal(1024, 1024)
    expected = init.subtract_(W.clone(), W[:r].clone(), W[:r, :r].clone(), W[:, :r].clone(), 0.01)
    assert torch.equal(init.subtract_(W, W[:r], W[:r, :r], W[:, :r], 0.01), expected)


@pytest.mark.parametrize("r", [32, 33, 64, 160, 161])
def test_subtract_at_every_rank(r):
    whole = normal(301, 235)
    W, before = whole[:, 5:230], whole.clone()
    A, B = normal(r, 225, seed=1), normal(301, r, seed=2)
    expected = W.double() - 0.3 * B.double() @ A.double()
    plain = testing.error_norm(W - 0.3 * (B @ A), expected)
    version = W._version
    init.subtract_(W, A, None, B, 0.3)
    assert testing.error_norm(W, expected) <= 2 * plain + torch.finfo(W.dtype).eps * expected.norm()
    assert torch.equal(whole[:, :5], before[:, :5]) and torch.equal(whole[:, 230:], before[:, 230:])
    # Autograd has to notice, and so it does whoever writes.
    assert W._version > version


@pytest.mark.parametrize("select", init.SELECTIONS)
@pytest.mark.parametrize("core", init.CORES)
def test_what_is_chosen_of_16_bit_experts_is_made_of_a_fraction_of_them(select, core):
    W = torch.randn(64, 96, 160).bfloat16()
    with torch.profiler.profile(profile_memory=True) as profile:
        init.nystrom(W, 4, core=core, select=select)
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) <= W.nbytes / 4


def test_subtract_of_a_16_bit_weight_allocates_a_fraction_of_it():
    W = normal(8192, 512, dtype=torch.bfloat16)
    A, N, B = init.nystrom(W, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        init.subtract_(W, A, N, B, 1.0)
    # The largest single allocation is the fp32 tile of 512 rows.
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 512 * 512 * 4 + 8192 * 4 * 4 < W.nbytes / 4


@pytest.mark.parametrize("method", init.METHODS)
def test_adapters_by_method(method):
    W = normal(300, 400)
    A, N, B = init.adapter(W, 64, method, generator=torch.Generator().manual_seed(1))
    again = init.adapter(W, 64, method, generator=torch.Generator().manual_seed(1))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip((A, N, B), again, strict=True))
    assert A.shape == (64, 400) and B.shape == (300, 64)
    if method == "nystrom":
        assert torch.equal(A, W[:64])
        return
    assert not B.any()
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound and A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    if method == "lora":
        assert N is None
    elif method == "slora":
        assert N.abs().max() <= 1 / 8 and N.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
    else:
        assert N.std().item() == pytest.approx(1 / 64, rel=0.05) and N.mean().abs() < 1e-3


def test_lora2_matrices():
    W = normal(300, 400, dtype=torch.bfloat16)
    v, u, E, U, V = init.lora2(W, 40, 30, generator=torch.Generator().manual_seed(1))
    assert [t.shape for t in (v, u, E, U, V)] == [(30, 400), (40, 30), (40,), (30, 40), (300, 30)]
    assert not E.any() and all(t.dtype == torch.bfloat16 for t in (v, u, E, U, V))
    for t in (v, u, U, V):
        assert t.float().std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("r, k", [(8, 8), (8, 1), (8, 3)])
def test_orthogonal_vectors_of_lora2(r, k):
    W = normal(30, 40, dtype=torch.float64)
    v, u, E, U, V = init.lora2(W, r, k, "orthogonal", generator=torch.Generator().manual_seed(1))
    again = init.lora2(W, r, k, "orthogonal", generator=torch.Generator().manual_seed(1))
    assert [t.shape for t in (v, u, E, U, V)] == [(k, 40), (r, k), (r,), (k, r), (30, k)]
    assert not E.any() and all(map(torch.equal, (v, u, E, U, V), again))
    for gram in (v @ v.T, u.T @ u, U @ U.T, V.T @ V):
        torch.testing.assert_close(gram, torch.eye(k, dtype=torch.float64), atol=1e-6, rtol=0)
    # Where k < r the products P and Q have more vectors than dimensions.
    layer = nk.LoRA2Linear.from_linear(nn.Linear(40, 30), r, k, vectors="orthogonal")
    assert nk.lora2.orthogonal_penalty(layer, "paper").item() == pytest.approx(2 * (r - k), abs=1e-5)


@pytest.mark.parametrize("select", init.SELECTIONS)
@pytest.mark.parametrize("core", init.CORES)
def test_shapes_on_the_meta_device(core, select):
    A, N, B = init.nystrom(torch.empty(30, 20, device="meta", dtype=torch.bfloat16), 4, core=core, select=select)
    assert (A.shape, N.shape, B.shape) == ((4, 20), (4, 4), (30, 4))
    assert all(t.is_meta and t.dtype == torch.bfloat16 for t in (A, N, B))
    v, u, E, U, V = init.lora2(torch.empty(30, 20, device="meta"), 4, 2)
    assert all(t.is_meta for t in (v, u, E, U, V))


nan, infinite = normal(8, 6), normal(8, 6)
nan[2, 3], infinite[5, 1] = math.nan, -math.inf
BAD = {
    "rank_zero": ((normal(8, 6), 0), {}, ValueError, r"r must be at least 1 and at most min\(out, in\) = 6, got 0"),
    "rank_large": ((normal(8, 6), 7), {}, ValueError, r"at most min\(out, in\) = 6, got 7"),
    "rank_float": ((normal(8, 6), 2.0), {}, TypeError, "r must be an integer, got float"),
    "rank_bool": ((normal(8, 6), True), {}, TypeError, "r must be an integer, got bool"),
    "weight_list": (([[1.0]], 1), {}, TypeError, "weight must be a Tensor, got list"),
    "weight_vector": ((normal(8), 1), {}, ValueError, r"weight must have shape \(out, in\) or .*, got \(8,\)"),
    "experts_rows": ((normal(2, 8, 6), 1), {"rows": [0]}, ValueError, "rows and cols must be None"),
    "experts_cols": ((normal(2, 8, 6), 1), {"cols": [0]}, ValueError, "rows and cols must be None"),
    "weight_integer": ((torch.ones(8, 6, dtype=torch.int8), 1), {}, TypeError, "weight must be a floating tensor"),
    "nan": ((nan, 2), {}, ValueError, "weight must be finite"),
    "infinite": ((infinite, 2), {}, ValueError, "weight must be finite"),
    "core": ((normal(8, 6), 2), {"core": "best"}, ValueError, "core must be one of sample, optimal, pinv, got 'best'"),
    "select": ((normal(8, 6), 2), {"select": "best"}, ValueError, "select must be one of leading, .*, got 'best'"),
    "select_unused": (
        (normal(8, 6), 2),
        {"select": "best", "rows": [0, 1], "cols": [0, 1]},
        ValueError,
        "select must be one of leading, .*, got 'best'",
    ),
    "rows_length": ((normal(8, 6), 2), {"rows": [1]}, ValueError, r"rows must have shape \(2,\), got \(1,\)"),
    "rows_range": ((normal(8, 6), 2), {"rows": [1, 8]}, ValueError, "rows must lie in 0 … 7, got 1 … 8"),
    "cols_negative": ((normal(8, 6), 2), {"cols": [-1, 2]}, ValueError, "cols must lie in 0 … 5, got -1 … 2"),
    "cols_float": ((normal(8, 6), 2), {"cols": [0.5, 2]}, TypeError, "cols must hold integers"),
}


@pytest.mark.parametrize("args, options, error, message", BAD.values(), ids=BAD)
def test_bad_calls(args, options, error, message):
    with pytest.raises(error, match=message):
        init.nystrom(*args, **options)


def test_a_finite_weight_whose_sum_overflows_is_finite():
    W = torch.full((8, 6), 6e4, dtype=torch.float16)
    assert torch.equal(init.nystrom(W, 2)[0], W[:2])


def test_bad_calls_of_the_others():
    W = normal(8, 6)
    with pytest.raises(ValueError, match="method must be one of lora, .*, got 'pissa'"):
        init.adapter(W, 2, "pissa")
    with pytest.raises(ValueError, match="vectors must be one of gaussian, orthogonal, got 'unit'"):
        init.lora2(W, 4, 1, "unit")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        init.lora2(W, 4, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda W: init.nystrom(W, 2, generator=3),
        lambda W: init.select(W, 2, "leading", 3),
        lambda W: init.adapter(W, 2, "slora", generator=3),
        lambda W: init.lora2(W, 2, 2, generator=3),
    ],
    ids=["nystrom", "select", "adapter", "lora2"],
)
def test_what_is_no_generator_is_refused(call):
    with pytest.raises(TypeError, match="generator must be a torch.Generator or None, got int"):
        call(normal(8, 6))


def matrices(**changed):
    return {"A": normal(2, 6), "N": normal(2, 2), "B": normal(8, 2), "scaling": 1.0} | changed


BAD_PRODUCTS = {
    "shape_A": ({"A": normal(2, 5)}, ValueError, r"A must have shape \(r, 6\) with r >= 1, got \(2, 5\)"),
    "scalar_A": ({"A": torch.tensor(1.0)}, ValueError, r"A must have shape \(r, 6\) with r >= 1, got \(\)"),
    "stacked_A": ({"A": normal(1, 2, 6)}, ValueError, "A must have shape"),
    "shape_N": ({"N": normal(2, 3)}, ValueError, r"N must have shape \(2, 2\), got \(2, 3\)"),
    "vector_B": ({"B": normal(8)}, ValueError, r"B must have shape \(8, 2\), got \(8,\)"),
    "list": ({"A": [[1.0] * 6] * 2}, TypeError, "A must be a Tensor, got list"),
    "none": ({"B": None}, TypeError, "B must be a Tensor, got NoneType"),
    "sparse": ({"N": torch.eye(2).to_sparse()}, TypeError, "N must be a dense tensor, got torch.sparse_coo"),
    "complex": ({"A": normal(2, 6) + 1j}, TypeError, "A must be one of .*float64, got torch.complex64"),
    "integer": ({"A": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "A must be one of .*, got torch.int64"),
    "float8": ({"N": torch.eye(2).to(torch.float8_e4m3fn)}, TypeError, "N must be one of .*, got torch.float8_e4m3fn"),
    **{
        f"meta_{name}": ({name: matrices()[name].to("meta")}, ValueError, f"{name} must be on cpu .*, got meta")
        for name in "ANB"
    },
    "scaling": ({"scaling": "1"}, TypeError, "scaling must be a real number, got str"),
    "scaling_complex": ({"scaling": 1j}, TypeError, "scaling must be a real number, got complex"),
}


def freed(t):
    """The same without its memory, as FSDP leaves it."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("select", init.SELECTIONS)
def test_a_weight_without_memory_is_refused(select):
    whole = normal(9, 6)
    part = whole[1:]
    whole.untyped_storage().resize_(0)
    for W in (freed(normal(8, 6)), freed(normal(2, 8, 6)), freed(normal(8, 6).bfloat16()), part):
        for call in (init.nystrom, init.select) if W.dim() == 2 else (init.nystrom,):
            with pytest.raises(ValueError, match="weight has no memory"):
                call(W, 2, select=select) if call is init.nystrom else call(W, 2, select)


def test_indices_without_memory_are_refused():
    with pytest.raises(ValueError, match="cols has no memory"):
        init.nystrom(normal(8, 6), 2, cols=freed(torch.arange(2)))


@pytest.mark.parametrize("name", ["weight", "A", "N", "B"])
def test_a_product_without_memory_is_refused(name):
    given = {"weight": normal(8, 6)} | matrices()
    before, given[name] = given["weight"].clone(), freed(given[name])
    with pytest.raises(ValueError, match=f"{name} has no memory"):
        init.subtract_(**given)
    assert name == "weight" or torch.equal(given["weight"], before)


def test_a_sparse_weight_is_refused():
    W = normal(8, 6).to_sparse()
    for call in (init.nystrom, init.adapter, lambda W, r: init.lora2(W, r, 2), lambda W, r: init.select(W, r, "norm")):
        with pytest.raises(TypeError, match="weight must be a dense tensor, got torch.sparse_coo"):
            call(W, 2)
    with pytest.raises(TypeError, match="weight must be a dense tensor, got torch.sparse_coo"):
        init.subtract_(W, **matrices())


@pytest.mark.parametrize("changed, error, message", BAD_PRODUCTS.values(), ids=BAD_PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_cannot_be_subtracted_leaves_the_weight(changed, error, message, dtype):
    W = normal(8, 6, dtype=dtype)
    before = W.clone()
    with pytest.raises(error, match=message):
        init.subtract_(W, **matrices(**changed))
    assert torch.equal(W, before)


def test_on_the_meta_device_there_is_nothing_to_subtract():
    given = {name: t.to("meta") if name in "ANB" else t for name, t in matrices().items()}
    W = torch.empty(8, 6, device="meta")
    assert init.subtract_(W, **given) is W
