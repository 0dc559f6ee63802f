"""The ceilings of the roofline: what the library's large product and a copy reach on this machine."""

import pytest
import torch

from bench import rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], ids="smoke-{}".format)
def test_product(benchmark, request, dtype):
    n = 1536
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    exact = a[:32].double() @ b.double()
    error = ((a @ b)[:32] - exact).norm() / exact.norm()
    # The result is rounded once, and fp32 sums of n terms are off by about √n roundings.
    assert error <= torch.finfo(a.dtype).eps + n**0.5 * torch.finfo(torch.float32).eps
    info = {"impl": "product", "op": "roof", "shape": f"{n}x{n}x{n}", "dtype": dtype, "error": error.item()}
    rows.record(benchmark, lambda: a @ b, {}, info, request, flops=2 * n**3)


def test_smoke_copy(benchmark, request):
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    target.copy_(source)
    assert torch.equal(target, source)
    info = {"impl": "copy", "op": "roof", "shape": "256 MiB", "dtype": "float32", "error": 0.0}
    rows.record(benchmark, lambda: target.copy_(source), {}, info, request, bytes_moved=2 * source.nbytes)
