"""A pointer is read only of a plain tensor whose storage holds it; all else is computed by PyTorch or refused."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import nlora_kernels as nk
from nlora_kernels import testing

ROWS = [1, 6, 100]
NAMES = list(testing.TENSORS)
LORA2 = {"x": (6, 16), "weight": (12, 16), "lora_v": (3, 16), "lora_u": (4, 3), "lora_E": (4,), "lora_U": (3, 4)}
LORA2 |= {"lora_V": (12, 3), "mask": (4,), "bias": (12,)}


def negative(t):
    """The same values behind a sign that is kept as a flag."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg() and torch.equal(view, t)
    return view


def arguments(rows=6):
    p = testing.problem(rows, 16, 12, 4)
    return {name: getattr(p, name) for name in NAMES}, p.dy


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", [*NAMES, "dy"])
def test_negative_views_keep_their_sign(name, rows):
    tensors, dy = arguments(rows)
    expected = testing.outputs(nk.lora_linear, tensors, dy)
    if name == "dy":
        dy = negative(dy)
    else:
        tensors[name] = negative(tensors[name])
    actual = testing.outputs(nk.lora_linear, tensors, dy)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", LORA2)
def test_negative_views_of_lora2_keep_their_sign(name):
    tensors = {key: torch.randn(shape) for key, shape in LORA2.items()}
    expected = nk.lora2_linear(**tensors)
    tensors[name] = negative(tensors[name])
    torch.testing.assert_close(nk.lora2_linear(**tensors), expected)
    parts = ("lora_u", "lora_E", "lora_U", "mask")
    if name in parts:
        plain = [tensors[part].resolve_neg() for part in parts]
        torch.testing.assert_close(nk.lora2_core(*[tensors[p] for p in parts]), nk.lora2_core(*plain))


def test_negative_views_in_the_training_of_lora2():
    layer = nk.LoRA2Linear.from_linear(nn.Linear(8, 6), 3, 2)
    expected = nk.lora2.orthogonal_penalty(layer).detach()
    layer.lora_u = nn.Parameter(negative(layer.lora_u.detach()))
    assert layer.lora_u.is_neg()
    torch.testing.assert_close(nk.lora2.orthogonal_penalty(layer).detach(), expected)


def test_negative_views_of_what_an_adapter_is_added_to_keep_their_sign():
    # Of a rank, and with columns side by side, for which the kernel on the CPU goes before the library.
    view = torch._neg_view(torch.randn(64, 64))
    A, B = torch.randn(40, 64), torch.randn(64, 40)
    expected = nk.init.subtract_(view.resolve_neg(), A, None, B, 0.5)
    assert nk.init.subtract_(view, A, None, B, 0.5) is view
    torch.testing.assert_close(view.resolve_neg(), expected)


FREED = """
import torch, nlora_kernels as nk
from nlora_kernels import testing
for rows in {rows}:
    p = testing.problem(rows, 16, 12, 4)
    t = {{name: getattr(p, name).requires_grad_() for name in testing.TENSORS}}
    y = nk.lora_linear(**t) if {backward} else None
    t["{name}"].detach().untyped_storage().resize_(0)
    try:
        y.backward(p.dy) if {backward} else nk.lora_linear(**t)
    except (RuntimeError, ValueError) as error:
        print("refused:", error)
"""


@pytest.mark.parametrize("name, backward", [(n, False) for n in NAMES] + [(n, True) for n in NAMES if n != "bias"])
def test_freed_storage_is_refused(name, backward):
    """In a process of its own, for what reads it crashes."""
    code = FREED.format(rows=ROWS, name=name, backward=backward)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    refused = done.stdout.count("refused:")
    assert done.returncode == 0 and refused == len(ROWS), (done.returncode, done.stdout, done.stderr[-300:])


def freed(t):
    t.untyped_storage().resize_(0)
    return t


def test_what_was_freed_is_named():
    factors = [torch.ones(LORA2[name]) for name in ("lora_u", "lora_E", "lora_U", "mask")]
    for i, name in enumerate(("lora_u", "lora_E", "lora_U", "mask")):
        given = [freed(t.clone()) if i == at else t for at, t in enumerate(factors)]
        with pytest.raises(ValueError, match=f"{name} has no memory"):
            nk.lora2_core(*given)
    experts = [torch.ones(shape) for shape in ((6, 16), (3, 12, 16), (3, 4, 16), (3, 12, 4))]
    with pytest.raises(ValueError, match="offsets has no memory"):
        nk.lora_grouped_linear(experts[0], freed(torch.tensor([1, 2, 6])), *experts[1:])
    tensors, _ = arguments()
    with pytest.raises(ValueError, match="seed has no memory"):
        nk.lora_linear(**tensors, dropout=0.5, seed=freed(torch.tensor([3])))
    whole = torch.ones(13, 16)
    tensors["weight"] = whole[1:]
    freed(whole)
    with pytest.raises(ValueError, match="weight has no memory"):
        nk.lora_linear(**tensors)


FREED_IN_A_GROUP = """
import torch, nlora_kernels as nk
def group():
    x, W, A, B, N, bias = (torch.randn(s) for s in ((6, 16), (12, 16), (4, 16), (12, 4), (4, 4), (12,)))
    return x, [torch.randn(8, 16), W], [None, (A, B, N)], [None, bias]
def tensors(x, weights, adapters, biases):
    members = {"weights[1]": weights[1], "biases[1]": biases[1]}
    return {"x": x, **members, **{f"lora_{n} of adapters[1]": t for n, t in zip("ABN", adapters[1])}}
for name in tensors(*group()):
    arguments = group()
    tensors(*arguments)[name].untyped_storage().resize_(0)
    try:
        nk.lora_group_linear(*arguments)
    except ValueError as error:
        assert f"{name} has no memory" in str(error), error
        print("refused")
"""


def test_freed_storage_in_a_group_is_refused_by_name():
    done = subprocess.run([sys.executable, "-c", FREED_IN_A_GROUP], capture_output=True, text=True)
    assert done.stdout.count("refused") == 6, (done.returncode, done.stdout, done.stderr[-300:])


def test_freed_storage_is_refused_in_the_training_of_lora2():
    layer = nk.LoRA2Linear.from_linear(nn.Linear(8, 6), 3, 2)
    layer.lora_V.detach().untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError)):
        nk.lora2.orthogonal_penalty(layer)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_among_plain_tensors_is_computed_by_pytorch_or_refused_by_name(name):
    tensors, _ = arguments()
    expected = nk.lora_linear(**tensors)
    mixed = dict(tensors, **{name: TwoTensor(tensors[name], tensors[name].clone())})
    try:
        y = nk.lora_linear(**mixed)
    except TypeError as error:
        assert name in str(error) and "TwoTensor" in str(error)
    else:
        torch.testing.assert_close(y.a if isinstance(y, TwoTensor) else y, expected)


def test_wrappers_alone_are_computed_by_pytorch():
    tensors, _ = arguments()
    y = nk.lora_linear(**{name: TwoTensor(t, 2 * t) for name, t in tensors.items()})
    torch.testing.assert_close(y.a, nk.lora_linear(**tensors))
    torch.testing.assert_close(y.b, nk.lora_linear(**{name: 2 * t for name, t in tensors.items()}))


def test_a_subclass_keeps_its_type_and_sees_the_function():
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    seen = []
    tensors, _ = arguments()
    y = nk.lora_linear(tensors["x"].as_subclass(Named), *[tensors[name] for name in NAMES[1:]])
    assert type(y) is Named and nk.lora_linear in seen
    torch.testing.assert_close(y.as_subclass(torch.Tensor), nk.lora_linear(**tensors))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "made, said",
    [
        (lambda t: t.to_sparse(), "dense tensor, got torch.sparse_coo"),
        (lambda t: t.to_mkldnn(), "dense tensor, got torch._mkldnn"),
        (lambda t: torch.nested.nested_tensor(list(t)), "dense tensor, got a nested one"),
    ],
    ids=["sparse", "mkldnn", "nested"],
)
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "lora_N"])
def test_tensors_of_other_layouts_are_refused_by_name(name, made, said):
    tensors, _ = arguments()
    with pytest.raises(TypeError, match=f"{name} must be a {said}"):
        nk.lora_linear(**dict(tensors, **{name: made(tensors[name])}))
