"""Nyström initialisation by Triton: on a GPU, or in Triton's interpreter on the CPU where TRITON_INTERPRET=1 is set."""

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE

if reason := TABLE["triton"].unavailable():
    pytest.skip(f"{reason}; TRITON_INTERPRET=1 pytest {__file__} runs these tests", allow_module_level=True)

from nlora_kernels.backends.triton import device, launch, nystrom  # noqa: E402

DEVICE = "cpu" if device.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if device.interpreted() else [torch.bfloat16])


def short(value):
    return str(value).removeprefix("torch.")


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("how", nk.init.SELECTIONS)
def test_gather_is_slicing_bitwise(dtype, strided, how):
    weight = normal(300, 150, dtype=dtype)[::2, ::2] if strided else normal(150, 75, dtype=dtype)
    rows, cols = nk.init.select(weight, 13, how)
    A, N, B = nystrom.gather(weight, rows, cols)
    assert torch.equal(A, weight[rows]) and torch.equal(N, weight[rows][:, cols]) and torch.equal(B, weight[:, cols])
    if how == "leading":
        assert torch.equal(A, weight[:13]) and torch.equal(N, weight[:13, :13]) and torch.equal(B, weight[:, :13])


def test_gather_reads_indices_in_any_strides():
    weight = normal(40, 30)
    rows, cols = (torch.arange(20, device=DEVICE)[start::3] for start in (0, 2))
    cols = torch.stack([cols, cols], 1)[:, 0]
    rows = rows[: len(cols)]
    A, N, B = nystrom.gather(weight, rows, cols)
    assert torch.equal(A, weight[rows]) and torch.equal(N, weight[rows][:, cols]) and torch.equal(B, weight[:, cols])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_squared_norms(dtype):
    weight = normal(150, 290, dtype=dtype)
    for dim, actual in zip((1, 0), nystrom.squared_norms(weight), strict=True):
        exact = weight.double().square().sum(dim)
        assert (actual - exact).abs().max() <= 1e-6 * exact.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize("core", [True, False], ids=["N", "noN"])
@pytest.mark.parametrize("r", [3, 70])
def test_subtract_is_within_the_budget(dtype, adapter_dtype, core, r):
    weights = [normal(75, 130, dtype=dtype) for _ in range(2)]
    adapter = adapter_dtype or dtype
    As, Bs = ([normal(*s, dtype=adapter) for _ in range(2)] for s in ((r, 130), (75, r)))
    Ns = [normal(r, r, dtype=adapter) / r if core else None for _ in range(2)]
    before = [w.clone() for w in weights]
    nystrom.subtract_products(weights, As, Ns, Bs, 0.3)
    for w, W, A, N, B in zip(weights, before, As, Ns, Bs, strict=True):
        exact = W.double() - 0.3 * (B.double() if N is None else B.double() @ N.double()) @ A.double()
        plain = nk.init.subtract_(W.clone(), A, N, B, 0.3)
        bound = 2 * testing.error_norm(plain, exact) + torch.finfo(dtype).eps * exact.norm().item()
        assert testing.error_norm(w, exact) <= bound


def test_subtract_of_a_strided_weight_leaves_the_rest():
    storage = normal(40, 60)
    weight, before = storage[::2, ::2], storage.clone()
    A, N, B = normal(4, 30), normal(4, 4), normal(20, 4)
    expected = weight - B @ N @ A
    nystrom.subtract_products([weight], [A], [N], [B], 1.0)
    torch.testing.assert_close(weight, expected)
    assert torch.equal(storage[1::2], before[1::2]) and torch.equal(storage[::2, 1::2], before[::2, 1::2])


@pytest.mark.parametrize("r, n", [(1, 1), (13, 40), (64, 5), (200, 33)])
def test_solve_triangular(r, n):
    R = torch.linalg.qr(normal(2 * r, r)).R
    C = normal(n, r).T
    X = nystrom.solve_triangular(R, C)
    exact = torch.linalg.solve_triangular(R.double(), C.double(), upper=True)
    plain = torch.linalg.solve_triangular(R, C, upper=True)
    assert testing.error_norm(X, exact) <= 2 * testing.error_norm(plain, exact) + 1e-6 * exact.norm().item()


def test_solve_triangular_gives_nothing_to_a_direction_that_is_not_there():
    R = torch.diag(torch.tensor([2.0, 0.0, 4.0])).to(DEVICE)
    X = nystrom.solve_triangular(R, torch.ones(3, 2, device=DEVICE))
    assert X.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.25, 0.25]]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("how", nk.init.SELECTIONS)
@pytest.mark.parametrize("core", ["sample", "optimal"])
def test_the_named_backend_initialises(monkeypatch, dtype, how, core, prefer):
    weight = normal(60, 90, dtype=dtype)
    A, N, B = nk.init.nystrom(weight, 9, core=core, select=how, generator=torch.Generator().manual_seed(3))
    # Rows that are all zero are dependent on any others.
    if core == "optimal":
        weight[A.shape[0] - 1] = 0
        A, N, B = nk.init.nystrom(weight, 9, core=core, select=how, generator=torch.Generator().manual_seed(3))
    expected = weight.clone()
    nk.init.subtract_(expected, A, N, B, 0.5)
    prefer("triton")
    ours = nk.init.nystrom(weight, 9, core=core, select=how, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours[0], A) and torch.equal(ours[2], B)
    if core == "sample":
        assert torch.equal(ours[1], N)
    pointer = weight.data_ptr()
    assert nk.init.subtract_(weight, *ours, 0.5) is weight and weight.data_ptr() == pointer
    eps = torch.finfo(dtype).eps
    assert testing.error_norm(weight, expected.double()) <= 4 * eps * expected.norm().item() * (
        1 if core == "sample" else 4
    )


def test_a_graph_that_is_being_captured_gets_an_error_and_the_weight_stays(monkeypatch):
    monkeypatch.setattr(launch, "capturing", lambda on: True)
    weight, A, B = normal(20, 30), normal(4, 30), normal(20, 4)
    before = weight.clone()
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture this call"):
        nystrom.subtract_products([weight], [A], [None], [B], 0.3)
    assert torch.equal(weight, before)
