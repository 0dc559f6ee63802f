"""Weights in few bits by Triton: on a GPU, or in Triton's interpreter on the CPU where TRITON_INTERPRET=1 is set."""

import functools

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE, quantised
from python_tests.ops.test_quantised import FORMATS, exactly, four_bit

if reason := TABLE["triton"].unavailable():
    pytest.skip(f"{reason}; TRITON_INTERPRET=1 pytest {__file__} runs these tests", allow_module_level=True)

from nlora_kernels.backends.triton import device  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_plans")

DEVICE = "cpu" if device.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if device.interpreted() else [torch.bfloat16])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_decoded_as_by_the_formula(name, dtype):
    make, rows, cols = FORMATS[name]
    N, K = 2 * max(rows, 17), 3 * max(cols, 21)
    weight = make(torch.randn(N, K)).to(DEVICE)
    view = quantised.view(weight).to(dtype)
    decoded = TABLE["triton"].decode(view)
    assert decoded.dtype == dtype and torch.equal(decoded, view.composed())
    if "packed" not in name and hasattr(weight, "quant_state"):
        assert torch.equal(decoded.cpu(), exactly(weight, (N, K)).to(dtype).cpu())


@pytest.mark.parametrize("block", [64, 512, 4096])
def test_four_bits_are_those_of_bitsandbytes(block):
    for kind in ("nf4", "fp4"):
        weight = four_bit(torch.randn(40, block), kind, block, nested=True).to(DEVICE)
        bnb = pytest.importorskip("bitsandbytes")
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(TABLE["triton"].decode(quantised.view(weight).to(expected.dtype)), expected)


def test_a_layer_is_that_of_the_decoded_weight():
    weight = four_bit(torch.randn(48, 64)).to(DEVICE)
    x, A, B = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((5, 64), (4, 64), (48, 4)))
    layer = functools.partial(nk.lora_linear, x, lora_A=A, lora_B=B, backend="triton")
    y, exact = layer(weight), layer(quantised.view(weight).composed())
    assert torch.equal(y, exact)
    for ours, of_dense in zip(*(torch.autograd.grad(out.sum(), (x, A, B)) for out in (y, exact)), strict=True):
        assert torch.equal(ours, of_dense)


@pytest.fixture
def decodings(monkeypatch):
    """Grows by one whenever a weight is decoded as a whole."""
    calls, decode = [], type(TABLE["triton"]).decode
    monkeypatch.setattr(type(TABLE["triton"]), "decode", lambda *args: calls.append(args) or decode(*args))
    return calls


def layer(M, K, N, R, dtype, *quantised_as, seed=0, **options):
    """A problem whose weight was decoded, and the weight."""
    p = testing.problem(M, K, N, R, dtype=dtype, device=DEVICE, seed=seed, **options)
    weight = four_bit(p.weight.float().cpu(), *quantised_as).to(DEVICE)
    p.weight = quantised.view(weight).to(dtype).composed()
    return p, weight


def results(p, weight, **options):
    """y and every gradient but that of the weight."""
    tensors = {n: t for n in testing.TENSORS if (t := getattr(p, n)) is not None and n != "weight"}
    function = functools.partial(nk.lora_linear, weight=weight, scaling=p.scaling, backend="triton", **options)
    return testing.outputs(function, tensors, p.dy)


# One row, ragged everywhere, rows of x that are not aligned, whole blocks in every row of W, as many rows as may be.
FEW = [(1, 64, 32, 4), (5, 77, 33, 3), (33, 100, 50, 20), (16, 256, 96, 8), (64, 130, 48, 17)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", FEW, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("kind, block", [("nf4", 64), ("fp4", 128), ("nf4", 4096)])
def test_few_rows_keep_the_budget_of_the_decoded_weight(decodings, kind, block, nested, shape, dtype):
    p, weight = layer(*shape, dtype, kind, block, nested, bias=shape[1] % 2 == 0, strided=shape[0] == 33)
    tensors = {n: t for n in testing.TENSORS if (t := getattr(p, n)) is not None}
    plain, base = (functools.partial(testing.plain_linear, scaling=s) for s in (p.scaling, 0.0))
    budget = testing.Budget(plain, base, tensors, p.dy, [n for n in tensors if n != "weight"])
    budget.check(results(p, weight))
    assert not decodings


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("capability", [80, 90], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(20, 128, 64, 16), (33, 77, 35, 5), (7, 96, 40, 24)], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_a_product_that_decodes_has_the_bits_of_one_with_the_decoded_weight(
    small_tiles, decodings, nested, shape, dropout, capability
):
    small_tiles("two", capability)
    for dtype in DTYPES:
        p, weight = layer(*shape, dtype, "nf4", 64, nested)
        options = {"dropout": dropout, "seed": 3} if dropout else {}
        ours, exact = results(p, weight, **options), results(p, p.weight, **options)
        assert not decodings and [name for name in ours if not torch.equal(ours[name], exact[name])] == []


def test_a_product_decodes_its_weight_where_rows_are_few_and_it_is_cut_into_blocks_in_sequence(decodings):
    for M, wholly in ((64, 0), (65, 2)):
        p, weight = layer(M, 64, 32, 4, torch.float32)
        results(p, weight)
        assert len(decodings) == wholly
        decodings.clear()
    for name, wholly in (("torchao_nf4", 0), ("torchao_int8", 2), ("fp4_nested_packed_for_cpu", 2)):
        make, rows, cols = FORMATS[name]
        p = testing.problem(5, max(cols, 64), max(rows, 32), 4, device=DEVICE)
        results(p, make(p.weight.cpu()).to(DEVICE))
        assert len(decodings) == wholly, name
        decodings.clear()


@pytest.mark.parametrize("shape", [(0, 64, 32, 4), (3, 64, 0, 4)], ids=str)
def test_nothing_to_multiply(shape):
    M, K, N, R = shape
    codes, scales = torch.zeros(N * K // 2, dtype=torch.uint8, device=DEVICE), torch.zeros(N, device=DEVICE)
    values = torch.zeros(16, device=DEVICE)
    weight = quantised.Coded("nibbles", (N, K), torch.float32, codes, values, scales, 64)
    p = testing.problem(M, K, N, R, device=DEVICE)
    for name, value in results(p, weight).items():
        assert not value.any() or name == "dx", name
