"""Weights in few bits by Triton: on a GPU, or in Triton's interpreter on the CPU where TRITON_INTERPRET=1 is set."""

import functools

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels.backends import TABLE, quantised
from python_tests.ops.test_quantised import FORMATS, exactly, four_bit

if reason := TABLE["triton"].unavailable():
    pytest.skip(f"{reason}; TRITON_INTERPRET=1 pytest {__file__} runs these tests", allow_module_level=True)

from nlora_kernels.backends.triton import device  # noqa: E402

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
