"""torch.library.opcheck over 200 samples per op of the convolutions, and some of attention: schema, autograd
registration, fakes, and AOT dispatch with dynamic shapes.

It proves nothing about gradients (tests/test_gradients.py does), but it does find fakes and aliasing declarations that
lie.
"""

import random

import pytest
import torch

from convkernels.ops.conv.schema import PLAIN, TapConv, packed
from convkernels.testing.attention import INPUTS
from convkernels.testing.compare import CONV_INPUTS
from convkernels.testing.random_problems import random_attention, random_conv, random_step

SAMPLES = 200
# Backends share schemas, fakes and autograd formulas; for the reference a part of the samples is enough.
SAMPLES_OF_REFERENCE = 64
CHUNKS = 9
OPS = pytest.mark.parametrize("op", ["tap_conv", "tap_activation_grad", "tap_grad", "tap_step"])


def copied(tensors, differentiable=()):
    """What opcheck can copy: its own copies fail on a tensor without elements that is a strided view."""
    dense = {
        name: torch.empty(t.shape, dtype=t.dtype) if t is not None and t.numel() == 0 else t
        for name, t in tensors.items()
    }
    for name in differentiable:
        if dense[name] is not None:
            dense[name] = dense[name].detach().requires_grad_()
    return dense


def sample(op, index):
    """Arguments of the op; every other sample of tap_conv and every fourth of its gradients asks for gradients."""
    if op == "tap_step":
        problem = random_step(index)
        return problem, problem.op_arguments(copied(problem.tensors()))
    problem = random_conv(index)
    if any(t is not None and list(t.shape).count(0) > 1 for t in problem.tensors().values()):
        problem = problem.with_(batch=1)  # its copies fail where two dimensions are empty, too
    asked = index % (2 if op == "tap_conv" else 4) == 1
    tensors = copied(problem.tensors(), (*CONV_INPUTS, "out_gate", "residual", "grad") if asked else ())
    if op == "tap_conv":
        return problem, problem.op_arguments(tensors)
    if op == "tap_activation_grad":
        return problem, problem.activation_grad_arguments(tensors, 1 + index % 3)
    return problem, problem.grad_arguments(tensors, random.Random(index).choice((31, 31, 3, 1, 2, 24)))


def check(name, op, backend, indices):
    operator = getattr(getattr(torch.ops.convkernels, name), backend)
    utilities = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    # Before 2.13 torch asserts something else of its own of second derivatives with dynamic shapes.
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    for index in indices:
        problem, arguments = sample(op, index)
        try:
            torch.library.opcheck(operator, arguments, test_utils=utilities[:3] if old and "grad" in op else utilities)
        except Exception as error:
            raise AssertionError(f"opcheck of {operator} failed on sample {index}: {problem!r}") from error


@pytest.mark.slow
@pytest.mark.thin(7)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@OPS
def test_opcheck(op, chunk, backend):
    check(op, op, backend, range(chunk, SAMPLES_OF_REFERENCE if backend == "reference" else SAMPLES, CHUNKS))


@OPS
def test_opcheck_quick(op, backend):
    check(op, op, backend, range(SAMPLES, SAMPLES + 6))


@OPS
def test_opcheck_raw(op, backend):
    # Only samples without requires_grad: the raw ops have no autograd kernel, on purpose.
    check(f"_{op}", op, backend, range(SAMPLES + 8, SAMPLES + 20, 2))


@pytest.mark.parametrize("left, dilation, softmax", [(0, 1, False), (2, 1, True), (6, 3, True), (2**30, 2**29, False)])
def test_opcheck_plain(left, dilation, softmax, backend):
    """The form with few arguments is the same operator."""
    x, weight = torch.randn(2, 9, 8), torch.randn(4, 3)
    plain = getattr(torch.ops.convkernels._plain_tap_conv, backend)
    whole = getattr(torch.ops.convkernels._tap_conv, backend)
    arguments = x, weight, packed(left, dilation, softmax)
    torch.library.opcheck(plain, arguments)
    assert torch.equal(plain(*arguments), whole(x, weight, left, dilation, softmax))
    assert PLAIN.record(*arguments) == TapConv(x, weight, left, dilation, softmax)


DOUBLE_BACKWARD_OF_ATTENTION = 7007


def sample_of_attention(number, requires_grad):
    """Nothing expanded, which opcheck cannot copy either, and no NaN in padding, which is not equal to itself."""
    problem = random_attention(number)
    layouts = ("layout", "table_layout", "grad_layout")
    changes = {name: "contiguous" for name in layouts if getattr(problem, name) == "expanded"}
    problem = problem.with_(**changes, padding=problem.padding % 2)
    t = problem.tensors()
    t |= {name: t[name].nan_to_num() for name in "kv"}
    return problem, copied(t, (*INPUTS, "grad") if requires_grad else ())


@pytest.mark.parametrize("number", [
    *range(7001, 7007),
    pytest.param(DOUBLE_BACKWARD_OF_ATTENTION, marks=pytest.mark.slow),
])  # fmt: skip
def test_opcheck_of_attention(number, ops):
    """Tracing the double backward takes long."""
    requires_grad = number % 4 == 3
    problem, t = sample_of_attention(number, requires_grad)
    arguments = problem.op_arguments(t)
    torch.library.opcheck(getattr(torch.ops.convkernels.attention, ops.backend), arguments)
    if not requires_grad:
        torch.library.opcheck(ops.attention, arguments)
    out, lse = ops.attention(*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments))
    needs = random.Random(number).choice((1023, 1023, 7, 8 | 1, 896))
    for full in ("attention_grad", "_attention_grad"):
        t = sample_of_attention(number, requires_grad and number == DOUBLE_BACKWARD_OF_ATTENTION)[1]
        grad_op = getattr(getattr(torch.ops.convkernels, full), ops.backend)
        if full[0] != "_" or not t["q"].requires_grad:
            torch.library.opcheck(grad_op, problem.grad_arguments(t, out, lse, needs))
