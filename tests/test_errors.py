"""Bad inputs: each raises an error of the right kind that names the function, the argument, what was expected and what
was given, before any kernel starts.
"""

import re

import pytest
import torch
from bad_arguments import DS, LS, PS, TABLE, B, C, D, H, K, L, P, T, good, serving
from torch.utils._python_dispatch import TorchDispatchMode

import convkernels as ck
from convkernels.ops.conv import schema


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
        ("state", {"state": torch.zeros(B, K - 2, C)}),
        ("state", {"state": torch.zeros(B, 1, C).expand(B, K - 1, C)}),
        ("state", {"state": torch.zeros(B + 1, K - 1, C)}),
        ("dilation", {"dilation": 2**62}),
        ("weight", {"weight": torch.zeros(B, 1, H, K)}),
        ("slots", {"slots": torch.tensor([0, 2])}),
        ("slots", {"slots": torch.tensor([0])}),
        ("state_index", {"state_index": torch.tensor([0, 1]), "slots": torch.tensor([0, 1])}),
        ("accepted", {"accepted": torch.tensor([2, 1])}),
        ("accepted", {"accepted": torch.tensor([1, 0])}),
        ("x", {"cu_seqlens": torch.tensor([0, 1, 2])}),
        ("cu_seqlens", serving(cu_seqlens=torch.tensor([0, 3, 9]))),
        ("state", serving(slots=None)),
        ("accepted", serving(accepted=torch.tensor([4, 0]))),
        ("save_at", serving(save_at=torch.tensor([4]))),
        ("accepted", {"x": torch.zeros(B, T, C), "accepted": torch.tensor([-(2**63), T])}),
        ("save_at", serving(save_at=torch.tensor([0]), save_slots=torch.tensor([1]))),
        ("save_at", serving(save_at=torch.tensor([T + 1]), save_slots=torch.tensor([1]))),
        ("save_slots", serving(save_at=torch.tensor([4]), save_slots=torch.tensor([5]))),
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
        given = serving(
            bias=bias, gate=x.sin(), position=torch.tensor([2, 9]), out_gate=x.cos(), residual=x.exp(),
            accepted=torch.tensor([3, 4]), save_at=torch.tensor([2]), save_slots=torch.tensor([1]),
        )  # fmt: skip
        return good(LS) | given
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
        named = [argument for argument in named if (name, argument) != ("tap_step", "state_index")]  # not with slots
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
