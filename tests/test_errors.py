"""Bad inputs: each raises an error of the right kind that names the function, the argument, what was expected and what
was given, before any kernel starts.
"""

import re

import numpy as np
import pytest
import torch
from helpers import nested, quantized
from torch.utils._python_dispatch import TorchDispatchMode

import convkernels as ck
from convkernels.ops.conv import schema

B, T, C, H, K = 2, 7, 12, 3, 5


def good(function):
    """Valid arguments of a function."""
    x = torch.randn(B, T, C)
    if function.endswith("_step"):
        weight = {"depthwise": (C, K), "lightweight": (H, K), "dynamic": (B, H, K)}[function.split("_")[0]]
        return {"x": x[:, 0].clone(), "state": torch.zeros(B, K - 1, C), "weight": torch.randn(weight)}
    weight = {"depthwise": (C, K), "lightweight": (H, K), "dynamic": (B, T, H, K)}[function.split("_")[0]]
    return {"x": x, "weight": torch.randn(weight)}


def packed(**changes):
    return {"x": torch.randn(1, T, C), **changes}


def overlapping():
    """x is the newest row of the state."""
    state = torch.zeros(B, K - 1, C)
    return {"state": state, "x": state[:, -1]}


class Array:
    """Something like an array of numpy."""

    shape, dtype = (B, T, C), "float32"

    def __repr__(self):
        return "all its numbers"


L, D, P = "lightweight_conv1d", "dynamic_conv1d", "depthwise_conv1d"
LS, DS, PS = f"{L}_step", f"{D}_step", f"{P}_step"

# function, changed arguments, exception, argument named, expected, got
TABLE = [
    (L, {"x": None}, TypeError, "x", "a tensor", "None of type NoneType"),
    (L, {"x": [1.0]}, TypeError, "x", "a tensor", r"\[1.0\] of type list"),
    (L, {"x": torch.randn(T, C)}, ValueError, "x", "3 dimensions", r"shape \[7, 12\]"),
    (L, {"x": torch.randn(B, T, C, 1)}, ValueError, "x", "3 dimensions", r"shape \[2, 7, 12, 1\]"),
    (L, {"x": torch.ones(B, T, C, dtype=torch.int64)}, TypeError, "x", "float", "int64"),
    (L, {"x": torch.ones(B, T, C, dtype=torch.bool)}, TypeError, "x", "float", "bool"),
    (L, {"x": torch.ones(B, T, C, dtype=torch.complex64)}, TypeError, "x", "float", "complex64"),
    (L, {"x": torch.randn(B, T, C).to_sparse()}, TypeError, "x", "dense", "sparse"),
    *(
        case
        for f in (L, D, P, LS, DS, PS)
        for case in (
            (f, {"activation": "relu"}, ValueError, "activation", "one of None, 'silu'", "'relu'"),
            (f, {"activation": True}, ValueError, "activation", "one of None, 'silu'", "True"),
            (f, {"gate_activation": None}, ValueError, "gate_activation", "one of 'sigmoid', 'silu', 'none'", "None"),
            (f, {"gate_activation": "tanh"}, ValueError, "gate_activation", "one of 'sigmoid', ", "'tanh'"),
        )
    ),
    (L, {"out_gate": torch.randn(B, T, 1)}, ValueError, "out_gate", r"\[B,T,C\] = \[2, 7, 12\]", r"\[2, 7, 1\]"),
    (P, {"residual": torch.randn(B, T, C).double()}, TypeError, "residual", "the dtype of x, torch.float32", "float64"),
    (D, {"residual": 1.0}, TypeError, "residual", "a tensor or None", "1.0"),
    (P, {"out_gate": Array()}, TypeError, "out_gate", "a tensor or None", "Array of shape"),
    (P, {"residual": np.ones((B, T, C))}, TypeError, "residual", "a tensor or None", "ndarray of shape"),
    (P, {"gate_activation": np.ones(2)}, ValueError, "gate_activation", "one of 'sigmoid', ", "array"),
    (P, {"activation": np.ones(2)}, ValueError, "activation", "one of None, 'silu'", "array"),
    (LS, {"out_gate": torch.randn(B, C + 1)}, ValueError, "out_gate", r"\[B,C\] = \[2, 12\]", r"\[2, 13\]"),
    (L, {"weight": None}, TypeError, "weight", "a tensor", "None"),
    (L, {"weight": torch.randn(K)}, ValueError, "weight", r"2 dimensions \[H,K\]", r"shape \[5\]"),
    (L, {"weight": torch.randn(H, 1, K)}, ValueError, "weight", r"\[H,K\] \(from a Conv1d: weight.squeeze\(1\)\)",
     r"shape \[3, 1, 5\]"),
    (P, {"weight": torch.randn(C, 1, K)}, ValueError, "weight", r"weight.squeeze\(1\)", r"shape \[12, 1, 5\]"),
    (D, {"weight": torch.randn(B, T, H * K)}, ValueError, "weight", r"weight.unflatten\(-1, \(H, K\)\)",
     r"shape \[2, 7, 15\]"),
    (P, {"x": torch.randn(B, C, T)}, ValueError, "weight", r"\[7, 5\]", r"shape \[12, 5\].* \(x is .*: give x.mT"),
    (D, {"x": torch.randn(B, C, T)}, ValueError, "weight", r"\[2, 12, 3, 5\]", r"7, 3, 5\].* \(x is .*: give x.mT"),
    (L, {"x": torch.randn(B, C, T)}, ValueError, "weight", "divides C = 7", r"\[3, 5\].* \(x is .*: give x.mT"),
    (L, {"x": torch.randn(B, T, T)}, ValueError, "weight", "divides C = 7", r"shape \[3, 5\] on cpu$"),
    (L, {"weight": torch.randn(5, K)}, ValueError, "weight", "divides C = 12", r"shape \[5, 5\]"),
    (L, {"weight": torch.randn(0, K)}, ValueError, "weight", "at least one row", r"shape \[0, 5\]"),
    (L, {"weight": torch.randn(H, 0)}, ValueError, "weight", "at least one tap", r"shape \[3, 0\]"),
    (L, {"weight": torch.ones(H, K, dtype=torch.int32)}, TypeError, "weight", "float", "int32"),
    (L, {"weight": torch.randn(H, K).double()}, TypeError, "weight", "not float64", "float64"),
    (L, {"x": torch.randn(B, T, C).double()}, TypeError, "weight", "float64, because x is float64", "float32"),
    (L, {"weight": torch.randn(H, K, device="meta")}, ValueError, "weight", "on cpu", "on meta"),
    (P, {"weight": torch.randn(H, K)}, ValueError, "weight", r"\[C,K\] = \[12, 3\]|\[C,K\] = \[12, 5\]",
     r"shape \[3, 5\]"),
    (D, {"weight": torch.randn(H, K)}, ValueError, "weight", r"4 dimensions \[B,T,H,K\]", r"shape \[3, 5\]"),
    (D, {"weight": torch.randn(B, T + 1, H, K)}, ValueError, "weight", r"\[2, 7, 3, 5\]", r"shape \[2, 8, 3, 5\]"),
    (D, {"weight": torch.randn(1, T, H, K)}, ValueError, "weight", r"\[2, 7, 3, 5\]", r"shape \[1, 7, 3, 5\]"),
    (L, {"bias": torch.randn(C + 1)}, ValueError, "bias", r"\[C\] = \[12\]", r"shape \[13\]"),
    (L, {"bias": torch.randn(C, 1)}, ValueError, "bias", r"\[C\] = \[12\]", r"shape \[12, 1\]"),
    (L, {"bias": torch.randn(C).double()}, TypeError, "bias", "not float64", "float64"),
    (L, {"bias": 1.0}, TypeError, "bias", "a tensor or None", "1.0 of type float"),
    (L, {"softmax": 1}, TypeError, "softmax", "True or False", "1 of type int"),
    (L, {"softmax": None}, TypeError, "softmax", "True or False", "None"),
    (L, {"renormalize": "yes"}, TypeError, "renormalize", "True or False", "'yes'"),
    (L, {"renormalize": True, "softmax": False}, ValueError, "renormalize", "False, because without softmax", "True"),
    (L, {"dilation": 0}, ValueError, "dilation", "positive integer", "got 0"),
    (L, {"dilation": 2**63 - 1}, ValueError, "dilation", r"at most 2\^30, also times K - 1 = 4", "9223372036854775807"),
    (L, {"dilation": 2**28 + 1}, ValueError, "dilation", r"at most 2\^30, also times K - 1 = 4", "268435457"),
    (P, {"weight": torch.randn(C, 1), "dilation": 2**30 + 1}, ValueError, "dilation", r"at most 2\^30", "1073741825"),
    (DS, {"dilation": 2**62}, ValueError, "dilation", r"at most 2\^30", "4611686018427387904"),
    (LS, {"state": torch._neg_view(torch.zeros(B, K - 1, C))}, ValueError, "state", "resolve_neg", "negated view"),
    (L, {"x": Array()}, TypeError, "x", "a tensor", r"Array of shape \[2, 7, 12\]$"),
    (L, {"x": [0.0] * 10000}, TypeError, "x", "a tensor", r"\[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, \.\.\.\] of type list"),
    (L, {"x": nested(torch.strided)}, TypeError, "x", "one after the other in one row, with cu_seqlens", "nested"),
    (L, {"x": nested(torch.jagged)}, TypeError, "x", "one after the other in one row, with cu_seqlens", "nested"),
    (P, {"bias": nested(torch.strided)}, TypeError, "bias", "one after the other", "nested"),
    (D, {"weight": nested(torch.strided)}, TypeError, "weight", "one after the other", "nested"),
    (L, {"x": quantized()}, TypeError, "x", "not quantized", "qint8 tensor"),
    (L, {"dilation": -2}, ValueError, "dilation", "positive integer", "-2"),
    (L, {"dilation": 1.0}, TypeError, "dilation", "positive integer", "1.0 of type float"),
    (L, {"dilation": True}, TypeError, "dilation", "positive integer", "True"),
    (L, {"padding": "valid"}, ValueError, "padding", "'same', 'causal' or an integer from 0 to .* = 4", "'valid'"),
    (L, {"padding": -1}, ValueError, "padding", "an integer from 0 to", "-1"),
    (L, {"padding": K}, ValueError, "padding", "an integer from 0 to .* = 4", "5"),
    (L, {"padding": 9, "dilation": 2}, ValueError, "padding", "= 8", "9"),
    (L, {"padding": 1.5}, TypeError, "padding", "'same', 'causal' or an integer", "1.5 of type float"),
    (L, {"padding": (1, 2)}, TypeError, "padding", "'same', 'causal' or an integer", r"\(1, 2\)"),
    (L, {"weight_dropout": 1.5}, ValueError, "weight_dropout", "probability from 0 to 1", "1.5"),
    (L, {"weight_dropout": -0.1}, ValueError, "weight_dropout", "probability", "-0.1"),
    (L, {"weight_dropout": float("nan")}, ValueError, "weight_dropout", "probability", "nan"),
    (L, {"weight_dropout": "0.1"}, TypeError, "weight_dropout", "probability", "'0.1'"),
    (L, {"training": 1}, TypeError, "training", "True or False", "1 of type int"),
    (L, {"seed": 3}, TypeError, "seed", "a tensor or None", "3 of type int"),
    (L, {"seed": torch.tensor([1], dtype=torch.int32)}, TypeError, "seed", "int64", "int32"),
    (L, {"seed": torch.tensor([1, 2])}, ValueError, "seed", r"\[1\]", r"shape \[2\]"),
    (L, {"gate": torch.randn(B, T, C + 1)}, ValueError, "gate", r"\[B,T,C\] = \[2, 7, 12\]", r"shape \[2, 7, 13\]"),
    (L, {"gate": torch.randn(B, T, C).half()}, TypeError, "gate", "dtype of x, torch.float32", "float16"),
    (L, {"mask": torch.ones(B, T)}, TypeError, "mask", "bool", "float32"),
    (L, {"mask": torch.ones(B, T + 1, dtype=torch.bool)}, ValueError, "mask", r"\[B,T\] = \[2, 7\]", r"shape \[2, 8\]"),
    (L, {"mask": [True] * T}, TypeError, "mask", "a tensor or None", "of type list"),
    (L, packed(cu_seqlens=torch.tensor([0.0, 7.0])), TypeError, "cu_seqlens", "int32 or int64", "float32"),
    (L, packed(cu_seqlens=torch.tensor([0])), ValueError, "cu_seqlens", r"\[N\+1\]", r"shape \[1\]"),
    (L, packed(cu_seqlens=torch.tensor([[0, 7]])), ValueError, "cu_seqlens", r"\[N\+1\]", r"shape \[1, 2\]"),
    (L, packed(cu_seqlens=torch.tensor([1, 7])), ValueError, "cu_seqlens", "first boundary of 0", "got 1"),
    (L, packed(cu_seqlens=torch.tensor([0, 6])), ValueError, "cu_seqlens", "last boundary of T = 7", "got 6"),
    (L, packed(cu_seqlens=torch.tensor([0, 5, 3, 7])), ValueError, "cu_seqlens", "never decrease", r"\[0, 5, 3, 7\]"),
    (L, {"cu_seqlens": torch.tensor([0, 7])}, ValueError, "x", r"\[1,T,C\].*cu_seqlens", r"shape \[2, 7, 12\]"),
    (L, {"initial_state": torch.zeros(B, K - 1, C)}, ValueError, "padding", "'causal', because initial_state",
     "'same'"),
    (L, {"return_state": True}, ValueError, "padding", "'causal', because return_state is given", "'same'"),
    (L, {"return_state": 1}, TypeError, "return_state", "True or False", "1 of type int"),
    (L, {"initial_state": torch.zeros(B, K, C), "padding": "causal"}, ValueError, "initial_state", r"\[2, 4, 12\]",
     r"shape \[2, 5, 12\]"),
    (L, {"initial_state": torch.zeros(B, K - 1, C).half(), "padding": "causal"}, TypeError, "initial_state",
     "dtype of x", "float16"),
    (L, packed(cu_seqlens=torch.tensor([0, 3, 7]), padding="causal", initial_state=torch.zeros(1, K - 1, C)),
     ValueError, "initial_state", r"\[N,S,C\].*\[2, 4, 12\]", r"shape \[1, 4, 12\]"),
    (L, {"backend": "cudnn"}, ValueError, "backend", "one of 'auto'", "'cudnn'"),
    (L, {"backend": []}, ValueError, "backend", "one of 'auto'", r"\[\]"),
    (LS, {"backend": {}}, ValueError, "backend", "one of 'auto'", r"\{\}"),
    (P, {"padding": torch.ones(2).numpy()}, TypeError, "padding", "'same', 'causal' or an integer", "ndarray of shape"),
    (D, {"weight": torch.randn(B, T, 5, K)}, ValueError, "weight", "divides C = 12", r"shape \[2, 7, 5, 5\]"),
    (P, {"bias": torch.randn(1)}, ValueError, "bias", r"\[12\]", r"shape \[1\]"),
    (LS, {"x": torch.randn(B, 1, C)}, ValueError, "x", r"2 dimensions \[B,C\]", r"shape \[2, 1, 12\]"),
    (LS, {"state": None}, TypeError, "state", "a tensor", "None"),
    (LS, {"state": torch.zeros(B, K, C)}, ValueError, "state", r"\[2, 4, 12\]", r"shape \[2, 5, 12\]"),
    (LS, {"state": torch.zeros(B, K - 1, C).half()}, TypeError, "state", "dtype of x", "float16"),
    (LS, {"state": torch.zeros(1, K - 1, C).expand(B, -1, -1)}, ValueError, "state", "contiguous",
     r"strides \[0, 12, 1\]"),
    (LS, {"state": torch.zeros(K - 1, B, C).transpose(0, 1)}, ValueError, "state", "contiguous",
     r"strides \[12, 24, 1\]"),
    (LS, {"state_index": torch.tensor([0, 2])}, ValueError, "state_index", "0 to 1", r"\[0, 2\]"),
    (LS, {"state_index": torch.tensor([-1, 0])}, ValueError, "state_index", "0 to 1", r"\[-1, 0\]"),
    (LS, overlapping(), ValueError, "x", "apart from the state", "overlapping"),
    (LS, {"dilation": 2}, ValueError, "state", r"\[2, 8, 12\]", r"shape \[2, 4, 12\]"),
    (LS, {"state_index": torch.tensor([0])}, ValueError, "state_index", r"\[B\] = \[2\]", r"shape \[1\]"),
    (LS, {"state_index": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "state_index", "int64", "int32"),
    (LS, {"position": torch.tensor([0, 1, 2])}, ValueError, "position", r"\[B\] = \[2\] or \[1\]", r"shape \[3\]"),
    (LS, {"position": torch.tensor([-1, 0])}, ValueError, "position", "positions >= 0", r"\[-1, 0\]"),
    (LS, {"position": 3}, TypeError, "position", "a tensor or None", "3 of type int"),
    (LS, {"x": torch.randn(B, C, requires_grad=True)}, ValueError, "x", "no gradient", "requires_grad=True"),
    (LS, {"gate": torch.randn(B, T, C)}, ValueError, "gate", r"\[B,C\] = \[2, 12\]", r"shape \[2, 7, 12\]"),
    (DS, {"weight": torch.randn(H, K)}, ValueError, "weight", r"3 dimensions \[B,H,K\]", r"shape \[3, 5\]"),
    (PS, {"weight": torch.randn(H, K)}, ValueError, "weight", r"\[C,K\]", r"shape \[3, 5\]"),
]  # fmt: skip


class NoKernel(TorchDispatchMode):
    """Fails when an operator of this package is reached."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith("convkernels"), f"{func} was launched"
        return func(*args, **(kwargs or {}))


def test_the_table_is_long_enough():
    assert len(TABLE) >= 40


@pytest.mark.parametrize("row", range(len(TABLE)), ids=lambda i: f"{TABLE[i][0]}-{i}-{next(iter(TABLE[i][1]))}")
def test_bad_input(row):
    function, changes, kind, argument, expected, got = TABLE[row]
    kwargs = {**good(function), **changes}
    with NoKernel(), pytest.raises(kind, match=rf"^{function}: argument '{argument}': expected .*, got") as caught:
        getattr(ck, function)(**kwargs)
    message = str(caught.value)
    wanted, given = message.split(", got ", 1) if ", got " in message else (message, "")
    assert re.search(expected, wanted), message
    assert re.search(got.removeprefix("got "), given), message
    assert type(caught.value) is kind


@pytest.mark.parametrize("function", [L, D, P, LS, DS, PS])
def test_the_good_arguments_are_good(function, backend):
    kwargs = good(function)
    assert getattr(ck, function)(**kwargs, backend=backend).shape == kwargs["x"].shape


@pytest.mark.parametrize("row", range(len(TABLE)), ids=lambda i: f"{TABLE[i][0]}-{i}-{next(iter(TABLE[i][1]))}")
def test_bad_input_after_a_good_call(row):
    """The short path for calls already proven valid lets no mistake through."""
    function, changes, kind, argument, _, _ = TABLE[row]
    getattr(ck, function)(**good(function), backend="reference")
    kwargs = {"backend": "reference", **good(function), **changes}
    with NoKernel(), pytest.raises(kind, match=f"argument '{argument}'"):
        getattr(ck, function)(**kwargs)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="unexpected keyword argument 'stride'"):
        ck.lightweight_conv1d(**good(L), stride=2)


# The raw operators check what could leave their memory, and say which argument is wrong.
RAW = [
    ("x", {"x": torch.randn(B, C)}),
    ("weight", {"weight": torch.randn(5, K)}),
    ("weight", {"weight": torch.randn(B, T + 1, H, K)}),
    ("weight", {"weight": torch.randn(H, K).double()}),
    ("left", {"left": -1}),
    ("left", {"left": K}),
    ("dilation", {"dilation": 0}),
    ("dilation", {"dilation": 2**62}),
    ("dilation", {"dilation": 2**28 + 1}),
    ("dropout", {"dropout": 1.5}),
    ("seed", {"dropout": 0.5}),
    ("bias", {"bias": torch.randn(C + 1)}),
    ("gate", {"gate": torch.randn(B, T, C + 1)}),
    ("gate", {"gate": torch.randn(B, T, C).half()}),
    ("mask", {"mask": torch.ones(B, T)}),
    ("mask", {"mask": torch.ones(B, T + 1, dtype=torch.bool)}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, T + 5])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 2, T])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 7.0])}),
    ("initial_state", {"initial_state": torch.zeros(B, K, C)}),
]


def test_no_backend_takes_a_dilation_that_leaves_the_memory(ops):
    """Compiled code and direct calls of the operators skip the checks of the functions."""
    for dilation in (2**63 - 1, 2**62, 2**62 + 1, 2**28 + 1, 0, -1):
        for call in (
            lambda d: ops.tap_conv(torch.randn(B, T, C), torch.randn(H, K), 0, d),
            lambda d: ops.tap_grad(torch.randn(B, T, C), torch.randn(B, T, C), torch.randn(H, K), 0, d),
            lambda d: ops.tap_step(**good(LS), dilation=d),
        ):
            with pytest.raises((RuntimeError, ValueError), match="argument 'dilation': expected .*positive"):
                call(dilation)


def test_no_backend_takes_a_state_of_another_length(ops):
    for state in (
        torch.zeros(B, K, C),
        torch.zeros(B, K - 2, C),
        torch.zeros(B + 1, K - 1, C),
        torch.zeros(B, K - 1, 1),
    ):
        with pytest.raises(
            (RuntimeError, ValueError), match="argument 'state': expected .*dilation \\* \\(taps - 1\\)"
        ):
            ops.tap_step(**{**good(LS), "state": state})


@pytest.mark.parametrize("row", range(len(RAW)), ids=lambda i: f"{i}-{RAW[i][0]}")
def test_the_native_ops_refuse_to_leave_their_memory(row):
    reasons = ck.why_not("cpu")
    if reasons:
        pytest.skip("; ".join(reasons))
    argument, changes = RAW[row]
    kwargs = {**good(L), "left": 2, **changes}
    with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
        torch.ops.convkernels._tap_conv.cpu(**kwargs)
    if not kwargs.keys() - {"x", "weight", "left", "dilation"} and kwargs.get("dilation", 1) < 2**31:
        settings = schema.packed(kwargs["left"], kwargs.get("dilation", 1), False)
        with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
            torch.ops.convkernels._plain_tap_conv.cpu(kwargs["x"], kwargs["weight"], settings)
    kwargs.pop("bias", None)
    if argument != "bias":
        with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
            torch.ops.convkernels._tap_grad.cpu(torch.randn(B, T, C), **kwargs)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("state", {"state": torch.zeros(B, K, C)}),
        ("dilation", {"dilation": 2**62}),
        ("state_index", {"state_index": torch.tensor([0, 2])}),
        ("state_index", {"state_index": torch.tensor([-1, 0])}),
        ("state_index", {"state_index": torch.tensor([0])}),
        ("position", {"position": torch.tensor([0, 1, 2])}),
    ],
)
def test_the_native_step_refuses_to_leave_its_memory(argument, changes):
    reasons = ck.why_not("cpu")
    if reasons:
        pytest.skip("; ".join(reasons))
    with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
        torch.ops.convkernels._tap_step.cpu(**{**good(LS), **changes})


def everything(name):
    """Arguments of a raw operator, all tensors that it can take among them."""
    x, bias, seed = torch.randn(1, T, C), torch.randn(C), torch.tensor([3])
    offsets, state = torch.tensor([0, 3, T]), torch.randn(2, K - 1, C)
    if name == "tap_step":
        return {**good(LS), "bias": bias, "gate": torch.randn(B, C), "state_index": torch.tensor([1, 0]),
                "position": torch.tensor([2, 9]), "out_gate": torch.randn(B, C), "residual": torch.randn(B, C)
                }  # fmt: skip
    if name.startswith("tap"):
        rest = {
            "weight": torch.randn(H, K), "left": K - 1, "softmax": True, "dropout": 0.2, "seed": seed, "gate": x.sin(),
            "mask": torch.ones(1, T, dtype=torch.bool), "cu_seqlens": offsets, "initial_state": state,
        }  # fmt: skip
        if name == "tap_grad":
            return {"grad": x.cos(), "x": x, **rest}
        rest |= {"bias": bias, "out_gate": x.exp(), "activation": schema.SILU}
        return {"x": x, "residual": x.cos(), **rest} if name == "tap_conv" else {"grad": x.cos(), "x": x, **rest}
    q, window, rank = torch.randn(1, T, H, 4), 5, 3
    arguments = {
        "q": q, "k": q.sin(), "v": q.cos(), "left": 2, "right": 2, "outside": 0, "causal": False, "qk": True,
        "scale": 0.5, "rel_scale": 1.0, "dropout": 0.2, "seed": seed, "bias": torch.randn(H, window),
        "query_rel": torch.randn(rank, window), "rel_query": torch.randn(1, T, H, rank),
        "key_rel": torch.randn(4, window), "value_conv": torch.randn(H, 4, window),
        "value_conv_bias": torch.randn(H, 4), "value_conv_scale": torch.randn(H),
        "key_mask": torch.ones(1, T, dtype=torch.bool), "cu_seqlens_q": offsets, "cu_seqlens_k": offsets.clone(),
    }  # fmt: skip
    if name == "attention":
        return arguments
    lse = torch.zeros(1, H, T)
    return {"grad": q.exp(), "grad_lse": lse.sin(), "out": q, "lse": lse, **arguments, "needs": 1023}


@pytest.mark.parametrize(
    "name", ["tap_conv", "tap_activation_grad", "tap_grad", "tap_step", "attention", "attention_grad"]
)
def test_every_tensor_is_where_the_call_computes(ops, name):
    """Dispatch looks at one device among those of all arguments, and kernels read pointers."""
    if ops.backend not in ("cpu", "cuda"):
        pytest.skip("its kernels take no pointers of tensors elsewhere")
    kind = torch.device(ops.device).type
    own = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, kind.upper()))
    for op in (getattr(ops, name), getattr(getattr(torch.ops.convkernels, name), ops.backend)):
        given = everything(name)
        named = [argument.name for argument in op._schema.arguments if "Tensor" in str(argument.type)]
        assert all(isinstance(given[argument], torch.Tensor) for argument in named)
        op(**everything(name))
        for argument in named:
            elsewhere = given | {argument: given[argument].to("meta")}
            first = argument == {"t": "x", "a": "q"}[name[0]] and kind != "cpu"
            expected = "a CUDA device" if first else f"{kind}.*, where this call computes, got one on another kind"
            with pytest.raises(RuntimeError, match=f"argument '{argument}': expected a tensor on {expected}"):
                op.redispatch(own, **elsewhere)
            with pytest.raises(
                RuntimeError, match=f"argument '{argument}': expected a tensor on {kind}.*, got one on meta"
            ):
                op(**elsewhere)
