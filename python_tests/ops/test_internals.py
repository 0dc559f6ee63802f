"""The doors into PyTorch that it does not document: each says what it is taken to say, and none is anywhere else."""

import ast
import inspect
import textwrap

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nlora_kernels as nk
from nlora_kernels import internals
from python_tests import ROOT

PRIVATE = {"_C", "_dynamo_marked_constant", "_current_level", "_backward_cls"}


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_plain_eager_mode_is_not_watched_whatever_ordinary_state_it_has():
    assert not internals.watched()
    for ordinary in (torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu")):
        with ordinary():
            assert not internals.watched() and not internals.composing()


@pytest.mark.parametrize(
    "mode", [Mode, Functions, torch.autograd.profiler.profile, lambda: FlopCounterMode(display=False)]
)
def test_every_mode_is_watched(mode):
    with mode():
        assert internals.watched()
    assert not internals.watched()


def test_transforms_compose_and_recorders_do_not():
    seen = {}

    def asks(name):
        def function(x):
            seen[name] = internals.watched(), internals.composing(), internals.tracing()
            return (x * x).sum()

        return function

    x = torch.ones(3)
    torch.func.grad(asks("grad"))(x)
    torch.func.vmap(asks("vmap"))(torch.ones(2, 3))
    make_fx(asks("fx"))(x)
    torch.jit.trace(asks("trace"), (x,), check_trace=False)
    with forward_ad.dual_level():
        assert internals.dual() and internals.composing()
    assert not internals.dual()
    assert seen == {
        "grad": (True, True, False),
        "vmap": (True, True, False),
        "fx": (True, False, False),
        "trace": (True, False, True),
    }


def test_a_batch_of_gradients_composes():
    seen = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            seen.append(internals.composing())
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Asks.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert seen == [True]


def test_a_backward_is_known_from_inside():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: seen.append(internals.in_backward()) or x.sin(), x, use_reentrant=False
    )
    y.sum().backward()
    assert seen == [False, True] and not internals.in_backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_is_shared_by_views_alone(device):
    t = torch.empty(4, 6, device=device)
    assert internals.shares_memory(t, t[1:, 2:].mT) and not internals.shares_memory(t, t.clone())


def test_any_autocast_is_that_of_any_device():
    assert not internals.any_autocast()
    with torch.autocast("cpu"):
        assert internals.any_autocast()
    torch.set_autocast_enabled("cuda", True)
    try:
        assert internals.any_autocast() and not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_the_precision_of_fp32_is_that_of_either_way_to_set_it():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        for name, precision in {"high": "tf32", "medium": "bf16", "highest": "ieee"}.items():
            torch.set_float32_matmul_precision(name)
            assert internals.fp32_precision() == precision == torch.backends.mkldnn.matmul.fp32_precision
        for precision in ("bf16", "tf32", "ieee"):
            torch.backends.mkldnn.matmul.fp32_precision = precision
            assert internals.fp32_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_the_plain_apply_leaves_out_what_torch_func_needs_and_no_more():
    """Function.apply is this: what the way past it leaves out, where no transform is active."""
    (function,) = ast.parse(inspect.cleandoc(inspect.getsource(torch.autograd.Function.apply))).body
    (plain,) = (s for s in function.body if ast.unparse(s).startswith("if not torch._C._are_functorch_transforms"))
    assert [ast.unparse(statement) for statement in plain.body] == [
        "args = _functorch.utils.unwrap_dead_wrappers(args)",
        "return super().apply(*args, **kwargs)",
    ]

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    internals.plain_apply(Double)(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_the_plain_backward_leaves_out_what_other_kinds_of_functions_need_and_no_more():
    """BackwardCFunction.apply is this: where there is no vjp and no list of gradients, a call of backward."""
    own = torch.autograd.function.BackwardCFunction
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(own.apply))).body
    assert [ast.unparse(statement) for statement in function.body[1:]] == [
        "user_fn = self._get_user_fn()",
        "fwd_cls = self._forward_cls",
        "if getattr(fwd_cls, 'boxed_grads_call', False):\n    args = (list(args),)",
        "return user_fn(self, *args)",
    ]
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(own._get_user_fn))).body
    assert ast.unparse(function.body[-1]) == "return vjp_fn if vjp_fn is not Function.vjp else backward_fn"
    stacks = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            stacks.append([frame.function for frame in inspect.stack()])
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    for plain in (False, True):
        if plain:
            internals.plain_backward(Double)
        Double.apply(x).sum().backward()
    assert x.grad.tolist() == [4, 4, 4]
    assert [stack.index("_engine_run_backward") for stack in stacks] == [2, 1]


def test_a_marked_function_is_a_constant_of_compiled_code():
    answers = []

    @internals.constant_in_compiled_code
    def answer(x):
        answers.append(open(__file__).readable())
        return 3

    compiled = torch.compile(lambda x: x + answer(x), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == 4 and answers
    documented = torch.compiler.assume_constant_result(lambda: 3)
    assert documented._dynamo_marked_constant is True


def test_private_names_of_torch_and_python_are_in_one_place():
    found = {}
    for file in (ROOT / "nlora_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Attribute) or node.attr not in PRIVATE:
                continue
            root = ast.unparse(node.value)
            if node.attr != "_C" or root == "torch":
                found.setdefault(file.relative_to(ROOT / "nlora_kernels").as_posix(), set()).add(ast.unparse(node))
    assert set(found) == {"internals.py"}, found


def test_the_constant_of_dropout_is_marked():
    assert nk.backends.drops_inside._dynamo_marked_constant is True
