"""Drop-ins for the package causal_conv1d, against its definition written out in float64, one position at a time."""

import itertools
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import interpreted

from convkernels.interop import causal_conv1d
from convkernels.interop.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from convkernels.testing.accuracy import UNIT_ROUNDOFF
from convkernels.testing.inputs import LAYOUTS, arrange, values

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "silu", "swish")
TINY = {torch.float64: 2.0**-1000, torch.float32: 2.0**-110, torch.bfloat16: 2.0**-110, torch.float16: 2.0**-24}


def silu(a):
    return a / (1 + torch.exp(-a))


def definition(x, weight, bias, seq_idx=None, initial_states=None, activation=None):
    """The result in float64, and how far a result of x's dtype may be from it: sums in float32 (or float64), rounded
    once, then the activation, rounded once. silu is at most 1.1 times as steep as the identity."""
    (B, C, T), K = x.shape, weight.shape[1]
    u, own = UNIT_ROUNDOFF[torch.float64 if x.dtype == torch.float64 else torch.float32] * 2, UNIT_ROUNDOFF[x.dtype]
    x, dtype = x.double(), x.dtype
    weight, bias = weight.double(), torch.zeros(C, dtype=torch.float64) if bias is None else bias.double()
    y, size = torch.zeros(B, C, T, dtype=torch.float64), torch.zeros(B, C, T, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            if seq_idx is not None and seq_idx[b, t] < 0:
                continue
            total, magnitude = bias.clone(), bias.abs()
            for j in range(K):
                source = t + j - (K - 1)
                if source < 0 and initial_states is None:
                    continue
                if seq_idx is not None and seq_idx[b, max(source, 0)] != seq_idx[b, t]:
                    continue
                z = x[b, :, source] if source >= 0 else initial_states[b, :, source].double()
                total, magnitude = total + weight[:, j] * z, magnitude + (weight[:, j] * z).abs()
            y[b, :, t], size[b, :, t] = total, magnitude
    error = u * (K + 2) * size + own * y.abs() + TINY[dtype]
    if activation is not None:
        error = 1.1 * error + 8 * u * y.abs() + own * silu(y).abs() + TINY[dtype]
        y = silu(y)
    return y, 1.01 * error


def definition_of_states(x, initial_states, K):
    """The last K-1 columns of zeros, or of the initial states, and x."""
    if initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], K - 1)
    return torch.cat([initial_states, x], 2)[:, :, x.shape[2] :]


def definition_of_update(x, conv_state, weight, bias, activation=None, cache_seqlens=None, conv_state_indices=None):
    """The result with its bound, as above, and the state afterwards: input after input."""
    state, results = conv_state.clone(), []
    for b in range(x.shape[0]):
        row = b if conv_state_indices is None else conv_state_indices[b]
        if row < 0:
            results.append([torch.zeros(x.shape[1:], dtype=torch.float64)] * 2)
            continue
        W, K = state.shape[2], weight.shape[1]
        begin = W if cache_seqlens is None else int(cache_seqlens[b])
        past = [state[row, :, (begin - n) % W] for n in range(K - 1, 0, -1)]
        before = torch.stack(past, 1)[None] if past else x.new_zeros(1, x.shape[1], 0)
        results.append([v[0] for v in definition(x[b : b + 1], weight, bias, None, before, activation)])
        for t in range(x.shape[2] if W > 0 else 0):
            if cache_seqlens is None:
                state[row] = torch.cat([state[row, :, 1:], x[b, :, t, None]], 1)
            else:
                state[row, :, (begin + t) % W] = x[b, :, t]
    return *(torch.stack(parts) for parts in zip(*results, strict=True)), state


def check(actual, expected, bound):
    assert actual.shape == expected.shape
    wrong = ~((actual.detach().double() - expected).abs() <= bound)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements: {actual[wrong][0]}, {expected[wrong][0]}"


def layout(value):
    """The strides that mean something."""
    return [step for step, size in zip(value.stride(), value.shape, strict=True) if size > 1 and value.numel() > 0]


def numbers(draw, B, T, kind):
    """Numbers of sequences: those of a packed row, or any."""
    if kind == "any":
        return torch.tensor([[draw.randrange(-1, 2) for _ in range(T)] for _ in range(B)], dtype=torch.int32)
    rows = []
    for _ in range(B):
        row, number = [], draw.randrange(3)
        while len(row) < T:
            row += [-1 if draw.random() < 0.2 else number] * draw.randrange(1, 7)
            number += draw.randrange(1, 3)
        rows.append(row[:T])
    return torch.tensor(rows, dtype=torch.int32).view(B, T)


def case(number):
    """Arguments of causal_conv1d_fn, a pure function of a number."""
    draw = random.Random(number)
    B, C, K = draw.randrange(1, 4), draw.randrange(1, 20), draw.choice([1, 2, 3, 4, 4, 5, 9])
    T, dtype = draw.choice([0, 1, 2, 3, 5, 8, 13, 20]), draw.choice(DTYPES)
    parameters = dtype if dtype == torch.float64 or draw.random() < 0.5 else torch.float32
    strides = draw.choice([name for name in LAYOUTS if name != "expanded"])
    arguments = {
        "x": arrange(values((B, C, T), dtype, number), strides),
        "weight": values((C, K), parameters, number + 1),
        "bias": values((C,), parameters, number + 2) if draw.random() < 0.6 else None,
        "activation": draw.choice(ACTIVATIONS),
    }
    if draw.random() < 0.5:
        state = values((B, K - 1, C), dtype, number + 3).mT if draw.random() < 0.5 else values((B, C, K - 1), dtype, 4)
        arguments["initial_states"] = state
    kind = draw.choice([None, None, "packed", "packed", "any"])
    if kind is not None:
        arguments["seq_idx"] = numbers(draw, B, T, kind)
    elif draw.random() < 0.5:
        arguments["return_final_states"] = True
        if draw.random() < 0.5:
            arguments["final_states_out"] = arrange(torch.ones(B, C, K - 1, dtype=dtype), strides)
    return arguments


@pytest.mark.parametrize("first", range(0, 400, 40))
def test_random_calls(first, backend):
    for number in range(first, first + 40):
        arguments = case(number)
        given = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
        result = causal_conv1d_fn(**arguments, backend=backend)
        out = arguments.pop("final_states_out", None)
        y, states = result if arguments.pop("return_final_states", False) else (result, None)
        check(y, *definition(**arguments))
        x, weight = arguments["x"], arguments["weight"]
        assert y.dtype == x.dtype and layout(y) == layout(torch.empty_like(x)), number
        if states is not None:
            assert torch.equal(states, definition_of_states(x, arguments.get("initial_states"), weight.shape[1]))
            assert out is None or states is out
        assert all(torch.equal(v, given[name]) for name, v in arguments.items() if isinstance(v, torch.Tensor)), number


def update_case(number):
    """Arguments of causal_conv1d_update, a pure function of a number; x always with its time."""
    draw = random.Random(number)
    B, C, K = draw.randrange(1, 5), draw.randrange(1, 20), draw.choice([1, 2, 3, 4, 4, 5, 9])
    T, W, dtype = draw.choice([0, 1, 1, 1, 2, 5, 13]), K - 1 + draw.choice([0, 0, 1, 6]), draw.choice(DTYPES)
    parameters = dtype if dtype == torch.float64 or draw.random() < 0.5 else torch.float32
    S, strides = B, draw.choice([name for name in LAYOUTS if name != "expanded"])
    arguments = {
        "weight": values((C, K), parameters, number + 1),
        "bias": values((C,), parameters, number + 2) if draw.random() < 0.6 else None,
        "activation": draw.choice(ACTIVATIONS),
    }
    integers = draw.choice([torch.int32, torch.int64])
    if draw.random() < 0.4:
        arguments["cache_seqlens"] = torch.tensor([draw.randrange(40) for _ in range(B)], dtype=integers)
    if draw.random() < 0.5:
        S = B + draw.randrange(4)
        rows = [row if draw.random() < 0.7 else -1 for row in draw.sample(range(S), B)]
        arguments["conv_state_indices"] = torch.tensor(rows, dtype=integers)
    arguments["x"] = arrange(values((B, C, T), dtype, number), strides)
    arguments["conv_state"] = arrange(
        values((S, C, W), dtype, number + 3), draw.choice(["contiguous", "swap_last", strides])
    )
    return arguments


@pytest.mark.parametrize("first", range(0, 400, 40))
def test_random_updates(first, backend):
    for number in range(first, first + 40):
        arguments = update_case(number)
        x, state = arguments.pop("x"), arguments.pop("conv_state")
        expected, bound, after = definition_of_update(x, state, **arguments)
        given, before = x.clone(), state.clone()
        y = causal_conv1d_update(x, state, **arguments, backend=backend)
        check(y, expected, bound)
        assert y.dtype == x.dtype and torch.equal(state, after) and torch.equal(x, given), number
        if x.shape[2] == 1:
            single = causal_conv1d_update(x[..., 0], before, **arguments, backend=backend)
            assert torch.equal(single, y[..., 0]) and torch.equal(before, after), number


def leaves(*shapes):
    return [values(shape, torch.float64, i).clone().requires_grad_() for i, shape in enumerate(shapes)]


PACKED = ((4, 4, 4, 5, 5, 9), (-1, 2, -1, 3, 3, 3))
MIXED = ((4, 5, 4, 5, 5, 4), (-1, 2, -1, 2, 2, -1))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [None, PACKED, MIXED], ids=["whole", "packed", "mixed"])
@pytest.mark.parametrize("first", [False, True])
def test_gradients(first, rows, activation, backend):
    if interpreted(backend):
        pytest.skip("thousands of calls, slow here")
    seq_idx = None if rows is None else torch.tensor(rows)
    x, weight, bias, state = leaves((2, 2, 6), (2, 4), (2,), (2, 2, 3))

    def call(x, weight, bias, initial_states=None):
        options = {"return_final_states": seq_idx is None, "activation": activation, "backend": backend}
        return causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, **options)

    inputs = (x, weight, bias, state) if first else (x, weight, bias)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("rows", [PACKED, MIXED], ids=["packed", "mixed"])
def test_both_formulations_agree(rows, backend, monkeypatch):
    """Packed sequences, and what runs where numbers cannot be read: values and gradients. Numbers that come back ask
    for the second, but for negative ones."""
    seq_idx, inputs = torch.tensor(rows), leaves((2, 2, 6), (2, 4), (2,), (2, 2, 3))
    taken, by_tap = [], causal_conv1d._tap_by_tap
    monkeypatch.setattr(causal_conv1d, "_tap_by_tap", lambda *a: taken.append(a) or by_tap(*a))
    y = causal_conv1d_fn(*inputs[:3], seq_idx, inputs[3], activation="silu", backend=backend)
    assert len(taken) == (rows is MIXED)
    monkeypatch.setattr(causal_conv1d, "real", lambda value: False)
    again = causal_conv1d_fn(*inputs[:3], seq_idx, inputs[3], activation="silu", backend=backend)
    torch.testing.assert_close(y, again)
    for one, other in zip(*(torch.autograd.grad(v.square().sum(), inputs) for v in (y, again)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [PACKED, MIXED], ids=["packed", "mixed"])
def test_nan_where_numbers_are_negative_stays_there(rows, backend):
    x, weight, bias, state = leaves((2, 2, 6), (2, 4), (2,), (2, 2, 3))
    seq_idx = torch.tensor(rows)
    hidden = (seq_idx < 0)[:, None].expand(x.shape)
    spoiled = x.detach().masked_fill(hidden, torch.nan).requires_grad_()
    spoiled_state = state.detach().index_fill(0, torch.tensor(1), torch.nan).requires_grad_()
    options = {"activation": "silu", "backend": backend}
    expected = causal_conv1d_fn(x, weight, bias, seq_idx, state, **options)
    y = causal_conv1d_fn(spoiled, weight, bias, seq_idx, spoiled_state, **options)
    assert torch.equal(y, expected) and not y[hidden].any()
    theirs = torch.autograd.grad(expected.square().sum(), (x, weight, bias, state))
    ours = torch.autograd.grad(y.square().sum(), (spoiled, weight, bias, spoiled_state))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_nothing_is_copied(backend, monkeypatch):
    """The operator reads x, the initial states and the state of decoding where they lie."""
    seen = []

    def watched(call, x, *rest, initial_state=None, **options):
        state = initial_state if "padding" in options else rest[0]
        seen.append((x.data_ptr(), None if state is None else state.data_ptr()))
        return call(x, *rest, **options, **({} if initial_state is None else {"initial_state": initial_state}))

    for name in ("depthwise_conv1d", "depthwise_conv1d_step"):
        monkeypatch.setattr(causal_conv1d, name, partial(watched, getattr(causal_conv1d, name)))
    weight = values((8, 4), torch.float32, 2)
    for x in (values((2, 8, 6), torch.float32, 1), values((2, 6, 24), torch.float32, 1)[..., 8:16].mT):
        state, wider = values((2, 8, 3), torch.float32, 3), values((2, 8, 5), torch.float32, 4)
        causal_conv1d_fn(x, weight, initial_states=state, backend=backend)
        causal_conv1d_update(x, wider, weight, backend=backend)
        causal_conv1d_update(x, wider, weight, conv_state_indices=torch.tensor([1, -1]), backend=backend)
        assert seen == [(x.data_ptr(), state.data_ptr()), *((x.data_ptr(), wider.data_ptr()),) * 2]
        seen.clear()
    causal_conv1d_fn(x, weight, seq_idx=torch.tensor(PACKED), backend=backend)
    assert seen == [(x.data_ptr(), None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 4, 9])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_updates_equal_the_whole(last, width, dtype, backend):
    """Chunks of any length, with states of any width and layout, rings among them; the state is what the whole leaves.
    Only torch's silu has other bits for other lengths, and kernels for GPUs."""
    B, C, T, K = 2, 12, 11, 4
    x, weight, bias = values((B, C, T), dtype, 1), values((C, K), dtype, 2), values((C,), dtype, 3)
    for ring, activation in itertools.product((False, True), (None, "silu")):
        options = {"activation": activation, "backend": backend}
        expected, final = causal_conv1d_fn(x, weight, bias, return_final_states=True, **options)
        state = torch.zeros(B, width, C, dtype=dtype).mT if last else torch.zeros(B, C, width, dtype=dtype)
        parts, begin = [], 0
        for size in (1, 3, 1, 1, 4, 1):
            at = torch.full((B,), begin, dtype=torch.int32) if ring else None
            part = x[:, :, begin : begin + size]
            parts.append(causal_conv1d_update(part, state, weight, bias, cache_seqlens=at, **options))
            begin += size
        exact = activation is None and backend in ("cpu", "reference")
        torch.testing.assert_close(torch.cat(parts, 2), expected, **({"rtol": 0, "atol": 0} if exact else {}))
        latest = state[:, :, [n % width for n in range(T - K + 1, T)]] if ring else state[:, :, 1 - K :]
        assert torch.equal(latest, final)


def test_rows_without_a_state(backend):
    """All of them, beside a state that has no row too: zeros, and nothing is written."""
    x, weight = values((3, 8, 2), torch.float32, 1), values((8, 4), torch.float32, 2)
    for rows in (4, 0):
        state = values((rows, 8, 3), torch.float32, 3).clone()
        before, none = state.clone(), torch.full((3,), -1, dtype=torch.int32)
        y = causal_conv1d_update(x, state, weight, weight[:, 0], "silu", None, none, backend=backend)
        assert not y.any() and torch.equal(state, before)


def test_final_states_out():
    """It gets the values, in every step of training again; what is returned carries the gradient."""
    x, weight, state = leaves((2, 3, 2), (3, 4), (2, 3, 3))
    out = torch.empty(2, 3, 3, dtype=torch.float64)
    for _ in range(2):
        y, final = causal_conv1d_fn(x, weight, None, None, state, True, out)
        assert torch.equal(final, out) and not out.requires_grad
        grad_x, grad_state = torch.autograd.grad(final.sum(), (x, state))
        assert grad_x.eq(1).all() and grad_state.eq(torch.tensor([0, 0, 1])).all()
    with torch.no_grad():
        assert causal_conv1d_fn(x, weight, None, None, state, True, out)[1] is out
        assert causal_conv1d_fn(x, weight, None, None, out, True, out)[1] is out  # they may be the initial ones
    assert torch.equal(out, torch.cat([x[:, :, 1:], x], 2))
    unused = torch.ones(1)
    assert torch.equal(causal_conv1d_fn(x, weight, None, None, state, False, unused), y) and unused == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_accurate_than_stock(dtype, backend):
    """Than F.conv1d and F.silu in that dtype, by the mean error."""
    x, weight, bias = values((4, 96, 40), dtype, 1), values((96, 4), dtype, 2), values((96,), dtype, 3)
    exact = silu(F.conv1d(F.pad(x.double(), (3, 0)), weight.double()[:, None], bias.double(), groups=96))
    stock = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=96))
    ours = causal_conv1d_fn(x, weight, bias, activation="silu", backend=backend)
    errors = [(y.double() - exact).abs().mean().item() for y in (ours, stock)]
    assert errors[0] <= errors[1], errors


X, WEIGHT, STATE = torch.zeros(2, 3, 6), torch.zeros(3, 4), torch.zeros(2, 3, 3)
ROWS = torch.tensor([0, 1])
# Arguments that are wrong, the kind of error, and what it says: of causal_conv1d_fn, then of causal_conv1d_update.
WRONG = [
    ({"x": [1.0]}, TypeError, "argument 'x': expected a tensor, got"),
    ({"x": X.int()}, TypeError, "argument 'x': expected a tensor of float64, float32, bfloat16 or float16, got int32"),
    ({"x": X[0]}, ValueError, r"argument 'x': expected a tensor \[B,C,T\], got float32 tensor of shape \[3, 6\]"),
    ({"weight": WEIGHT[:, None]}, ValueError, r"argument 'weight': .*\[C,K\] \(from a Conv1d: weight.squeeze\(1\)\)"),
    ({"weight": WEIGHT.mT}, ValueError, r"'weight': expected shape \[C,K\], C = 3, .*, got .* \[4, 3\]"),
    ({"weight": WEIGHT[:, :0]}, ValueError, r"'weight': .* with at least one tap, got .* \[3, 0\]"),
    ({"weight": WEIGHT.double()}, TypeError, "'weight': expected not float64, because x is torch.float32, got"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "'weight': expected a tensor on cpu, where x is, got .* on meta"),
    ({"bias": 1.0}, TypeError, "'bias': expected a tensor or None, got 1.0"),
    ({"bias": torch.zeros(2)}, ValueError, r"'bias': expected shape \[C\] = \[3\], got"),
    ({"activation": "gelu"}, ValueError, "'activation': expected None, 'silu' or 'swish', got 'gelu'"),
    ({"seq_idx": torch.zeros(2, 6)}, TypeError, "'seq_idx': expected an int32 or int64 tensor, got float32"),
    ({"seq_idx": torch.zeros(6, 2).int()}, ValueError, r"'seq_idx': expected shape \[B,T\] = \[2, 6\], got"),
    ({"seq_idx": torch.zeros(2, 6).int(), "return_final_states": True}, ValueError,
     "'return_final_states': expected False, because seq_idx is given, got True"),
    ({"initial_states": STATE.mT[:, 1:]}, ValueError, r"'initial_states': expected shape \[B,C,K-1\] = \[2, 3, 3\]"),
    ({"initial_states": STATE.half()}, TypeError, "'initial_states': expected the dtype of x, torch.float32, got"),
    ({"return_final_states": 1}, TypeError, "'return_final_states': expected True or False, got 1"),
    ({"return_final_states": True, "final_states_out": STATE.half()}, TypeError, "'final_states_out': expected the d"),
    ({"return_final_states": True, "final_states_out": STATE[:1].expand(2, 3, 3)}, ValueError,
     r"'final_states_out': expected every element in memory of its own, .*, got strides \[0, 3, 1\]"),
    ({"return_final_states": True, "final_states_out": STATE.clone().requires_grad_()}, ValueError,
     "'final_states_out': expected no gradient, because it is updated in place, got requires_grad=True"),
]  # fmt: skip
WRONG_UPDATES = [
    *(case for case in WRONG if set(case[0]) <= {"x", "weight", "bias", "activation"} and "[B,C,T" not in case[2]),
    ({"x": X[0, 0]}, ValueError, r"argument 'x': expected a tensor \[B,C\] or \[B,C,T\], got .* \[6\]"),
    ({"conv_state": None}, TypeError, "'conv_state': expected a tensor, got None"),
    ({"conv_state": STATE[:, :, 1:]}, ValueError, r"'conv_state': expected a tensor \[B,C,W\], W >= K-1 = 3, got"),
    ({"conv_state": STATE[:1]}, ValueError, r"'conv_state': expected shape \[B,C,W\] = \[2, 3, 3\], got"),
    ({"conv_state": STATE[0], "conv_state_indices": ROWS}, ValueError, r"'conv_state': expected a tensor \[S,C,W\]"),
    ({"conv_state": STATE.mT[:, :1], "conv_state_indices": ROWS}, ValueError, r"\[S,C,W\] = \[2, 3, 3\], got"),
    ({"conv_state": STATE.half()}, TypeError, "'conv_state': expected the dtype of x, torch.float32, got"),
    ({"conv_state": STATE[:1].expand(2, 3, 3)}, ValueError, "'conv_state': expected every element in memory of its"),
    ({"conv_state": STATE.clone().requires_grad_()}, ValueError, "'conv_state': expected no gradient"),
    ({"cache_seqlens": 3}, TypeError, "'cache_seqlens': expected a tensor, got 3"),
    ({"cache_seqlens": ROWS.short()}, TypeError, "'cache_seqlens': expected an int32 or int64 tensor, got int16"),
    ({"cache_seqlens": ROWS[:1]}, ValueError, r"'cache_seqlens': expected shape \[B\] = \[2\], got"),
    ({"cache_seqlens": -ROWS}, ValueError, r"'cache_seqlens': expected numbers of inputs >= 0, got \[0, -1\]"),
    ({"conv_state_indices": ROWS.bool()}, TypeError, "'conv_state_indices': expected an int32 or int64 tensor, got"),
    ({"conv_state_indices": ROWS[None]}, ValueError, r"'conv_state_indices': expected shape \[B\] = \[2\], got"),
    ({"conv_state_indices": ROWS + 1}, ValueError, r"indices': expected rows of conv_state below 2, .*, got \[1, 2\]"),
    ({"conv_state_indices": ROWS * 0}, ValueError, r"indices': expected .*, none of them twice, .*, got \[0, 0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "told"), WRONG)
def test_errors(arguments, kind, told):
    with pytest.raises(kind, match=f"^causal_conv1d_fn: .*{told}"):
        causal_conv1d_fn(**{"x": X, "weight": WEIGHT, **arguments})


@pytest.mark.parametrize(("arguments", "kind", "told"), WRONG_UPDATES)
def test_errors_of_updates(arguments, kind, told):
    state = STATE.clone()
    arguments = {"x": X[..., 0], "weight": WEIGHT, "conv_state": state, **arguments}
    with pytest.raises(kind, match=f"^causal_conv1d_update: .*{told}"):
        causal_conv1d_update(**arguments)
    assert torch.equal(state, STATE)
