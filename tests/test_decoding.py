"""Decoding, streaming and packing: every way of cutting a sequence gives the same numbers as one causal run."""

import pytest
import torch
from conftest import interpreted

import convkernels as ck
from convkernels.testing.inputs import values

B, T, C, H = 3, 11, 12, 3
CALLS = {
    "depthwise": (ck.depthwise_conv1d, ck.depthwise_conv1d_step, C),
    "lightweight": (ck.lightweight_conv1d, ck.lightweight_conv1d_step, H),
    "dynamic": (ck.dynamic_conv1d, ck.dynamic_conv1d_step, H),
}
MODES = {
    "plain": {},
    "raw": {"softmax": False},
    "renormalize": {"renormalize": True},
    "dilation": {"dilation": 3},
    "renormalize_dilation": {"renormalize": True, "dilation": 2},
}
CASES = [(f, m) for f in CALLS for m in MODES if f != "depthwise" or m in ("plain", "dilation")]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}
# Which rows of the old state rows continue from.
ORDERS = {
    "permutation": lambda rows: torch.randperm(rows, generator=torch.Generator().manual_seed(0), device="cpu"),
    "duplicates": lambda rows: torch.randint(rows, (rows,), generator=torch.Generator().manual_seed(1), device="cpu"),
    "one cycle": lambda rows: torch.arange(rows, device="cpu").roll(1),
    "pairs": lambda rows: torch.arange(rows, device="cpu").flip(0),
    "one row": lambda rows: torch.full((rows,), rows // 2, device="cpu"),
}


def tensors(function, taps, dtype, batch=B, length=T):
    rows = (CALLS[function][2], taps)
    return {
        "x": values((batch, length, C), dtype, 1),
        "weight": values((batch, length, *rows) if function == "dynamic" else rows, dtype, 2),
        "bias": values((C,), dtype, 3),
        "gate": values((batch, length, C), dtype, 4),
    }


def at(weight, t):
    return weight[:, t] if weight.dim() == 4 else weight


def span(taps, mode):
    return (taps - 1) * MODES[mode].get("dilation", 1)


def position_of(mode, t, batch=1):
    return {"position": torch.full((batch,), t)} if MODES[mode].get("renormalize") else {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("taps", [1, 2, 5, 20])
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_steps_equal_the_causal_run(function, mode, taps, dtype, backend):
    full, step, _ = CALLS[function]
    t = tensors(function, taps, dtype)
    expected, final = full(**t, padding="causal", return_state=True, backend=backend, **MODES[mode])
    state = torch.zeros(B, span(taps, mode), C, dtype=dtype)
    for n in range(T):
        y = step(
            t["x"][:, n],
            state,
            at(t["weight"], n),
            t["bias"],
            gate=t["gate"][:, n],
            backend=backend,
            **MODES[mode],
            **position_of(mode, n, B if n % 2 else 1),
        )
        torch.testing.assert_close(y, expected[:, n], **TOLERANCE[dtype])
    torch.testing.assert_close(state, final, **TOLERANCE[dtype])


@pytest.mark.parametrize(("function", "mode"), CASES)
def test_beam_reorder(function, mode, backend):
    """Row b continues from old state state_index[b]: as if each beam had run its own history from the start."""
    full, step, _ = CALLS[function]
    taps, dtype, beams = 4, torch.float64, 5
    t = tensors(function, taps, dtype, beams)
    generator = torch.Generator().manual_seed(0)
    state = torch.zeros(beams, span(taps, mode), C, dtype=dtype)
    history = t["x"].new_zeros(beams, 0, C)
    for n in range(T):
        index = torch.randint(beams, (beams,), generator=generator, device="cpu") if n else torch.arange(beams)
        index = index.to(state.device)
        history = torch.cat([history[index], t["x"][:, n : n + 1]], 1)
        y = step(
            t["x"][:, n],
            state,
            at(t["weight"], n),
            t["bias"],
            state_index=index,
            backend=backend,
            **MODES[mode],
            **position_of(mode, n),
        )
        weight = t["weight"][:, n : n + 1].expand(-1, n + 1, -1, -1) if function == "dynamic" else t["weight"]
        expected = full(history, weight, t["bias"], padding="causal", backend=backend, **MODES[mode])
        torch.testing.assert_close(y, expected[:, n], **TOLERANCE[dtype])


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("function", ["lightweight", "dynamic"])
def test_only_renormalize_needs_a_position(function, softmax, backend):
    """Rows of a state count as they are, also those that a position says lie before the sequence."""
    _, step, _ = CALLS[function]
    t = tensors(function, 4, torch.float64)
    states = [torch.ones(B, 3, C, dtype=torch.float64) for _ in range(2)]
    results = [
        step(t["x"][:, 0], state, at(t["weight"], 0), softmax=softmax, backend=backend, **options)
        for state, options in zip(states, ({}, {"position": torch.zeros(B, dtype=torch.int64)}), strict=True)
    ]
    assert torch.equal(*results) and torch.equal(*states)


def check_reordered(function, order, dtype, batch, taps, backend, channels=C, call=None, **options):
    """One step whose rows continue from others: what the reference makes of a state in that order. call: the step
    itself, if it is not that of `function`."""
    step = CALLS[function][1]
    heads = channels if function == "depthwise" else channels // 4
    shape = (batch, heads, taps) if function == "dynamic" else (heads, taps)
    span = (taps - 1) * options.get("dilation", 1)
    x, gate = values((batch, channels), dtype, 1), values((batch, channels), dtype, 2)
    weight, bias = values(shape, dtype, 3), values((channels,), dtype, 4)
    old = values((batch, span, channels), dtype, 5)
    index = ORDERS[order](batch).to(x.device) if isinstance(order, str) else order
    state, expected_state = old.clone(), old[index.clamp(0, batch - 1)]
    expected = step(x, expected_state, weight, bias, gate=gate, backend="reference", **options)
    call = call or step
    y = call(x, state, weight, bias, gate=gate, state_index=index, backend=backend, **options)
    torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
    assert torch.equal(state[:, : span - 1], expected_state[:, : span - 1])
    torch.testing.assert_close(state, expected_state, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (2, 1), (4, 3), (31, 1)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("function", CALLS)
def test_rows_continue_from_others(function, order, taps, dilation, dtype, backend):
    check_reordered(function, order, dtype, 7, taps, backend, dilation=dilation)


# Shared memory holds whole states, some rows of each, or rows of some.
@pytest.mark.parametrize(("batch", "shared"), [(600, 232448), (600, 65536), (300, 4096)])
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float16, 40), (torch.float32, 12), (torch.float64, 4)])
@pytest.mark.parametrize(("function", "taps"), [("depthwise", 1), ("lightweight", 2), ("dynamic", 9)])
@pytest.mark.parametrize("order", ["duplicates", "one cycle"])
def test_many_rows_continue_from_others(order, function, taps, dtype, channels, batch, shared, backend, monkeypatch):
    """More rows than a block of a GPU has threads."""
    if interpreted(backend):
        pytest.skip("one program goes through all rows, slowly here")
    monkeypatch.setenv("CONVKERNELS_SIMT_SHARED", str(shared))
    check_reordered(function, order, dtype, batch, taps, backend, channels=channels)


@pytest.mark.parametrize("taps", [1, 5])
def test_rows_that_do_not_exist_are_clamped(taps, backend):
    """On a GPU the values of an index are not checked: the first or the last row of the state takes their place."""
    if backend != "cuda":
        pytest.skip("another backend checks them, or its kernels do not")

    def call(x, state, weight, bias, gate, state_index, backend):
        step = torch.ops.convkernels._tap_step.cuda
        return step(x, state, weight, 1, False, False, bias, gate, state_index, None)

    index = torch.tensor([-1, 7, 2, -(2**62), 2**62, 0, 6])
    check_reordered("depthwise", index, torch.float32, 7, taps, backend, call=call)


@pytest.mark.parametrize("sizes", [(11,), (4, 7), (5, 1, 1, 4), (1,) * 11, (3, 0, 8)])
@pytest.mark.parametrize("taps", [1, 4, 9])
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_streaming_equals_one_run(function, mode, taps, sizes, backend):
    """Chunks chained by return_state and initial_state. With renormalize the rows of a state count as inside the
    sequence, so the first chunk starts without one and must fill it.
    """
    full, _, _ = CALLS[function]
    t = tensors(function, taps, torch.float64)
    if "renormalize" in mode and sizes[0] < span(taps, mode):
        sizes = (min(span(taps, mode), T), T - min(span(taps, mode), T))
    mask = values((B, T), torch.float64, 7) > -0.5
    options = {"padding": "causal", "return_state": True, "backend": backend, **MODES[mode]}
    expected, final = full(**t, mask=mask, **options)
    outputs, state, first = [], None, 0
    for size in sizes:
        part = slice(first, first + size)
        weight = t["weight"][:, part] if function == "dynamic" else t["weight"]
        y, state = full(
            t["x"][:, part],
            weight,
            t["bias"],
            gate=t["gate"][:, part],
            mask=mask[:, part],
            initial_state=state,
            **options,
        )
        assert state.shape == (B, span(taps, mode), C)
        outputs.append(y)
        first += size
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **TOLERANCE[torch.float64])
    torch.testing.assert_close(state, final, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_of_gated_rows_is_rounded_once(dtype, backend):
    t = tensors("lightweight", 5, dtype)
    _, state = ck.lightweight_conv1d(**t, padding="causal", return_state=True, backend=backend)
    z = t["x"].float() * torch.sigmoid(t["gate"].float())
    assert torch.equal(state, z[:, -4:].to(dtype))


@pytest.mark.parametrize("dtype_of_bounds", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding", ["same", "causal", 1])
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_packed_equals_separate_runs(function, mode, padding, dtype_of_bounds, backend):
    """Outputs, final states and all gradients; sequences may be empty or shorter than the kernel."""
    full, _, _ = CALLS[function]
    taps, lengths = 4, (5, 0, 1, 3, 9)
    total, rows = sum(lengths), span(taps, mode)
    with_state = padding == "causal"
    t = {n: v.clone().requires_grad_() for n, v in tensors(function, taps, torch.float64, 1, total).items()}
    mask = values((1, total), torch.float64, 7) > -0.5
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(dtype_of_bounds)
    state = values((len(lengths), rows, C), torch.float64, 8).clone().requires_grad_()
    options = {"padding": padding, "backend": backend, **MODES[mode]}
    extra = {"initial_state": state, "return_state": True} if with_state else {}
    packed = full(**t, mask=mask, cu_seqlens=bounds, **extra, **options)
    y, final = packed if with_state else (packed, None)
    parts, finals = [], []
    for n, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        own = {
            k: v[:, first:last] if k in ("x", "gate") or (k == "weight" and v.dim() == 4) else v for k, v in t.items()
        }
        extra = {"initial_state": state[n : n + 1], "return_state": True} if with_state else {}
        result = full(**own, mask=mask[:, first:last], **extra, **options)
        parts.append(result[0] if with_state else result)
        if with_state:
            finals.append(result[1])
    separate = torch.cat(parts, 1)
    leaves = [*t.values(), state] if with_state else list(t.values())
    torch.testing.assert_close(y, separate, **TOLERANCE[torch.float64])
    ours, theirs = y.square().sum(), separate.square().sum()
    if with_state:
        torch.testing.assert_close(final, torch.cat(finals), **TOLERANCE[torch.float64])
        ours, theirs = ours + final.square().sum(), theirs + torch.cat(finals).square().sum()
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float64])


def test_a_step_is_seen_by_autograd(backend):
    """The state is mutated: a tensor saved for backward before the step must not be used silently afterwards."""
    state = torch.zeros(2, 2, C)
    leaf = torch.randn(2, 2, C, requires_grad=True)
    product = (leaf * state).sum()
    with torch.no_grad():
        ck.lightweight_conv1d_step(torch.randn(2, C), state, torch.randn(H, 3), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode(backend):
    with torch.inference_mode():
        state = torch.zeros(2, 2, C)
        y = ck.lightweight_conv1d_step(torch.randn(2, C), state, torch.randn(H, 3), backend=backend)
        full = ck.lightweight_conv1d(torch.randn(2, 5, C), torch.randn(H, 3), backend=backend)
    assert y.shape == (2, C) and full.shape == (2, 5, C)
