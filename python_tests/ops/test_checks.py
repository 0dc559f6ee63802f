"""What `fits` takes for plainly right at a look, against the checks that say what is wrong."""

import itertools

import pytest
import torch

from nlora_kernels.backends import Call, Factors, native
from nlora_kernels.ops.checks import check_call, check_linear, fits, fits_linear

pytestmark = pytest.mark.skipif(native._C is None, reason="the package was built without C++ kernels")

M, IN, OUT, R, K = 5, 12, 9, 4, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WRONG = [
    None,
    1.0,
    [1.0],
    (1.0,) * 4,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.complex64,
    lambda t: t.double(),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: torch.nested.nested_tensor([t, t]),
    lambda t: t.as_subclass(type("Own", (torch.Tensor,), {})),
    lambda t: torch.nn.Parameter(t),
    lambda t: t.unsqueeze(0),
    lambda t: t.mT if t.dim() > 1 else t.unsqueeze(1),
    lambda t: t[:-1],
    lambda t: t[..., :-1],
    lambda t: t[:0],
    lambda t: t[..., :0],
    lambda t: t.sum(),
]


def call(core: str, dtype=torch.float32, adapter=torch.float32, bias: bool = True) -> Call:
    def make(*shape, dtype=adapter):
        return torch.randn(shape).to(dtype)

    N = {
        "none": lambda: None,
        "matrix": lambda: make(K, K),
        "factors": lambda: Factors(make(R, K), make(R), make(K, R), torch.ones(R)),
        "unmasked": lambda: Factors(make(R, K), make(R), make(K, R), None),
    }[core]()
    of_bias = make(OUT, dtype=dtype) if bias else None
    return Call(make(M, IN, dtype=dtype), make(OUT, IN, dtype=dtype), make(K, IN), make(OUT, K), N, of_bias, 0.5)


def changed(t, wrong):
    if isinstance(wrong, torch.dtype):
        return t.to(wrong)
    return wrong(t) if callable(wrong) else wrong


def changes(right: Call):
    """The call with each of its arguments changed in each way."""
    for name, wrong in itertools.product(Call._fields[:6], WRONG):
        value = getattr(right, name)
        if isinstance(value, torch.Tensor):
            yield right._replace(**{name: changed(value, wrong)})
    if type(right.lora_N) is Factors:
        for part, wrong in itertools.product(Factors._fields, WRONG):
            if (value := getattr(right.lora_N, part)) is not None:
                yield right._replace(lora_N=right.lora_N._replace(**{part: changed(value, wrong)}))
    for scaling in (1, True, "1", None, torch.tensor(1.0)):
        yield right._replace(scaling=scaling)


@pytest.mark.parametrize("core", ["none", "matrix", "factors", "unmasked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", DTYPES)
def test_the_usual_calls_need_no_second_look(core, dtype, adapter):
    right = call(core, dtype, adapter)
    for x in (right.x, right.x[0], right.x[:0], right.x.expand(2, 3, M, IN), torch.nn.Parameter(right.x)):
        assert fits(right._replace(x=x)) and fits_linear(x, right.weight, right.bias)
        check_call(right._replace(x=x))
    assert fits(call(core, dtype, adapter, bias=False)) and fits_linear(right.x, right.weight, None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("core", ["none", "matrix", "factors", "unmasked"])
def test_what_fits_is_right_whatever_one_changes(core):
    seen = {True: 0, False: 0}
    for other in changes(call(core)):
        seen[fits(other)] += 1
        if fits(other):
            check_call(other)
    # As a Parameter, without a bias or a core, or x with one row less it is as right as before.
    assert seen[True] >= 8 and seen[False] >= 80, seen


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_fits_of_a_layer_without_an_adapter_is_right():
    right = call("none")
    for name, wrong in itertools.product(("x", "weight", "bias"), WRONG):
        x, weight, *_, bias, _, _ = right._replace(**{name: changed(getattr(right, name), wrong)})
        if fits_linear(x, weight, bias):
            check_linear(x, weight, bias, {"weight": "weight", "bias": "bias"})


def test_tensors_of_two_ranks_or_layers_do_not_fit():
    right, N = call("factors"), torch.randn(K + 1, K + 1)
    assert not fits(right._replace(lora_A=torch.randn(K + 1, IN), lora_N=None))
    assert fits(right._replace(lora_A=torch.randn(K + 1, IN), lora_B=torch.randn(OUT, K + 1), lora_N=N))
    assert not fits(right._replace(lora_N=N))
    assert not fits(right._replace(x=torch.randn(M, IN + 1), weight=torch.randn(OUT, IN + 1)))
