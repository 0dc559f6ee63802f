"""The ceilings of the roofline: what large products, reading and copying reach on this machine."""

import pytest
import torch

import nlora_kernels as nk
from bench import rows
from bench.timing import LEAST, seconds


@pytest.mark.parametrize("impl", ["product", "kernels"], ids="smoke-{}".format)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product(benchmark, request, impl, dtype):
    """A product of 1536³ by the library, and by our kernels, which need an adapter: one of rank 1."""
    n = 1536
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    lora_A, lora_B = torch.zeros(1, n, dtype=a.dtype), torch.zeros(n, 1, dtype=a.dtype)
    if impl == "kernels" and nk.backends.available()["cpu"]:
        pytest.skip("the package was built without C++ kernels")

    def product():
        return a @ b.T if impl == "product" else nk.lora_linear(a, b, lora_A, lora_B, backend="cpu")

    exact = a[:32].double() @ b.double().T
    error = (product()[:32] - exact).norm() / exact.norm()
    # The result is rounded once, and fp32 sums of n terms are off by about √n roundings.
    assert error <= torch.finfo(a.dtype).eps + n**0.5 * torch.finfo(torch.float32).eps
    info = {"impl": impl, "op": "roof", "shape": f"{n}x{n}x{n}", "dtype": dtype, "error": error.item()}
    rows.record(benchmark, product, {}, info, request, flops=2 * n**3)


@pytest.mark.parametrize("mib", [1, 8, 64, 256], ids="smoke-{}".format)
def test_read(benchmark, request, mib):
    """How fast a matrix of a size is read, again and again: from the cache that holds it, or from memory.

    By the faster of its product with a vector and its sum: not every library's product comes to what memory gives.
    """
    matrix = torch.randn(mib * 256, 1024)
    vector = torch.randn(1024)
    exact = matrix[:8].double() @ vector.double()
    error = (torch.mv(matrix, vector)[:8] - exact).norm() / exact.norm()
    assert error <= 32 * torch.finfo(torch.float32).eps
    ways = (lambda: torch.mv(matrix, vector), matrix.sum)
    fastest = min(ways, key=lambda read: min(seconds(read) for _ in range(LEAST)))
    info = {"impl": "read", "op": "roof", "shape": f"{mib} MiB", "dtype": "float32", "bytes": matrix.nbytes}
    rows.record(benchmark, fastest, {}, info | {"error": error.item()}, request, bytes_moved=matrix.nbytes)


def test_smoke_copy(benchmark, request):
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    target.copy_(source)
    assert torch.equal(target, source)
    info = {"impl": "copy", "op": "roof", "shape": "256 MiB", "dtype": "float32", "error": 0.0}
    rows.record(benchmark, lambda: target.copy_(source), {}, info, request, bytes_moved=2 * source.nbytes)
