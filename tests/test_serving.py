"""What servers do with the states of convolutions: pools of slots, several positions per step, positions that are taken
back, packed chunks, and states on the way."""

import pytest
import torch
from helpers import run_page
from test_decoding import CALLS, C, H

import convkernels as ck
from convkernels.interop.causal_conv1d import causal_conv1d_update, causal_conv1d_varlen_states
from convkernels.testing.inputs import values

MODES = {
    "plain": {},
    "silu": {"activation": "silu"},
    "raw": {"softmax": False, "dilation": 2},
    "renormalize": {"renormalize": True},
}
CASES = [(f, m) for f in CALLS for m in MODES if f != "depthwise" or m in ("plain", "silu")]
# Where the rows of a pool [S,W,C] lie.
POOLS = {
    "rows": lambda S, W: torch.zeros(S, W, C),
    "channels": lambda S, W: torch.zeros(S, C, W).mT,
    "slices": lambda S, W: torch.zeros(W, S, 2 * C)[..., C:].transpose(0, 1),
}


def operands(function, taps, batch, length, dtype):
    """x, and the weight's shape without what a position adds."""
    rows = (CALLS[function][2], taps)
    return {
        "x": values((batch, length, C), dtype, 1),
        "weight": values((batch, length, *rows) if function == "dynamic" else rows, dtype, 2),
    }


def part(t, batch, positions):
    """Operands of some positions of some batch rows."""
    dynamic = t["weight"].dim() == 4
    weight = t["weight"][batch][:, positions] if dynamic else t["weight"]
    return {"x": t["x"][batch][:, positions], "weight": weight}


def causal_run(function, mode, t, backend):
    """What steps of one position give. One run over all gives the same, bit for bit, but where filters of each position
    go through a softmax in other kernels, or where torch's sigmoid computes, whose bits depend on a value's place."""
    full, step, _ = CALLS[function]
    (batch, length, _), taps, options = t["x"].shape, t["weight"].shape[-1], MODES[mode]
    state = torch.zeros(batch, (taps - 1) * options.get("dilation", 1), C, dtype=t["x"].dtype)
    rows = []
    for n in range(length):
        one = part(t, slice(None), slice(n, n + 1))
        rows.append(step(one["x"], state, one["weight"], backend=backend, **options, **position_of(mode, [n])))
    found, expected = torch.cat(rows, 1), full(**t, padding="causal", backend=backend, **options)
    own_softmax = (
        backend == "cuda" and (function == "dynamic" or mode == "renormalize") and options.get("softmax", True)
    )
    if own_softmax or (backend == "reference" and "activation" in options):
        torch.testing.assert_close(found, expected, rtol=1e-5 if found.dtype == torch.float32 else 1e-2, atol=1e-6)
    else:
        assert torch.equal(found, expected)
    return found


def check_equal(found, expected, options, backend):
    """Bit for bit, but where torch's sigmoid computes."""
    if backend == "reference" and "activation" in options:
        torch.testing.assert_close(found, expected, rtol=1e-6 if found.dtype == torch.float32 else 1e-2, atol=1e-7)
    else:
        assert torch.equal(found, expected)


def position_of(mode, numbers):
    return {"position": torch.as_tensor(numbers)} if "renormalize" in MODES[mode] else {}


def pool_of(layout, slots, rows, dtype):
    """A pool of zeros, and of NaN where nobody may look: its last slot."""
    pool = POOLS[layout](slots + 1, rows).to(dtype)
    pool[slots] = torch.nan
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_speculative_decoding_equals_the_causal_run(function, mode, layout, dtype, backend):
    """Of n proposed positions 0 to n are accepted: those give, bit for bit, what decoding one by one gives."""
    step = CALLS[function][1]
    taps, n, batch, length = 4, 3, 4, 24
    t = operands(function, taps, batch, length, dtype)
    options = MODES[mode]
    expected = causal_run(function, mode, t, backend)
    span = (taps - 1) * options.get("dilation", 1)
    pool = pool_of(layout, batch + 2, span + n, dtype)
    slots, rows = torch.tensor([5, 0, 3, 1], dtype=torch.int32), torch.arange(batch)
    wrong = values((batch, n, C), dtype, 7)  # what is proposed and will be taken back
    done, accepted, number = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), n), 0
    while int(done.max()) + n <= length:
        positions = done[:, None] + torch.arange(n)
        take = (torch.arange(batch) + number) % (n + 1)
        right = torch.arange(n) < take[:, None]
        x = torch.where(right[..., None], t["x"][rows[:, None], positions], wrong)
        weight = t["weight"][rows[:, None], positions] if function == "dynamic" else t["weight"]
        y = step(x, pool, weight, slots=slots, accepted=accepted, backend=backend, **options, **position_of(mode, done))
        check_equal(y[right], expected[rows[:, None], positions][right], options, backend)
        done, accepted, number = done + take, take, number + 1
    # The positions after those that were accepted, in a step of another length.
    x, weight = t["x"][rows, done], t["weight"][rows, done] if function == "dynamic" else t["weight"]
    last = step(
        x, pool, weight, slots=slots, accepted=accepted - n + 1, backend=backend, **options, **position_of(mode, done)
    )
    check_equal(last, expected[rows, done], options, backend)
    assert pool[batch + 2].isnan().all() and (pool[[2, 4]] == 0).all()


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_packed_chunks_equal_the_causal_run(function, mode, layout, backend):
    """Sequences in chunks of any lengths, some of one position and some of none, packed and beside one that has no
    slot; the states on the way are those of runs that end there."""
    step = CALLS[function][1]
    taps, dtype, batch, length = 4, torch.float32, 4, 40
    t, options = operands(function, taps, batch, length, dtype), MODES[mode]
    span = (taps - 1) * options.get("dilation", 1)
    expected = causal_run(function, mode, t, backend)
    pool = pool_of(layout, 12, span + 1, dtype)
    slots = torch.tensor([4, -1, 0, 9, 7])
    done = [0] * batch
    for chunk in ([1, 17, 0, 5], [2, 3, 30, 1], [9, 0, 1, 1]):
        order, lengths = (2, None, 0, 1, 3), []
        xs, weights, saves = [], [], []
        for place, b in enumerate(order):
            count = 3 if b is None else chunk[b]
            start, row = (0, 0) if b is None else (done[b], b)
            one = part(t, slice(row, row + 1), slice(start, start + count))
            xs.append(torch.full_like(one["x"], torch.nan) if b is None else one["x"])
            weights.append(one["weight"])
            if b is not None and count > 1:
                saves.append((place, b, sum(lengths) + count // 2, start + count // 2))
            lengths.append(count)
        weight = torch.cat(weights, 1) if function == "dynamic" else t["weight"]
        before = [0 if b is None else done[b] for b in order]
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        save_slots = torch.tensor([1, 2, 3, 5])[: len(saves)]
        y = step(
            torch.cat(xs, 1), pool, weight, slots=slots, cu_seqlens=offsets,
            save_at=torch.tensor([at for _, _, at, _ in saves]), save_slots=save_slots, backend=backend, **options,
            **position_of(mode, before),
        )  # fmt: skip
        for place, b in enumerate(order):
            here = y[0, offsets[place] : offsets[place + 1]]
            if b is None:
                assert (here == 0).all()
            else:
                check_equal(here, expected[b, done[b] : done[b] + chunk[b]], options, backend)
                done[b] += chunk[b]
        for slot, (_, b, _, end) in zip(save_slots, saves, strict=True):
            history = torch.cat([torch.zeros(span + 1, C), t["x"][b, :end]])
            assert torch.equal(pool[slot], history[end:])
    for place, b in enumerate(order):
        if b is not None:
            history = torch.cat([torch.zeros(span + 1, C), t["x"][b, : done[b]]])
            assert torch.equal(pool[slots[place]], history[done[b] :])
    assert pool[12].isnan().all() and (pool[[6, 8, 10, 11]] == 0).all()


@pytest.mark.parametrize("layout", POOLS)
def test_a_sequence_goes_on_from_a_saved_state(layout, backend):
    """A second request with the same beginning starts from the state that the first has left on its way."""
    t = operands("depthwise", 4, 1, 20, torch.float32)
    other = torch.cat([t["x"][:, :8], values((1, 6, C), torch.float32, 9)], 1)
    expected = ck.depthwise_conv1d(other, t["weight"], padding="causal", backend=backend)
    pool = pool_of(layout, 3, 3, torch.float32)
    ck.depthwise_conv1d_step(
        t["x"], pool, t["weight"], slots=torch.tensor([2]), cu_seqlens=torch.tensor([0, 20]),
        save_at=torch.tensor([8]), save_slots=torch.tensor([0]), backend=backend,
    )  # fmt: skip
    y = ck.depthwise_conv1d_step(other[:, 8:], pool, t["weight"], slots=torch.tensor([0]), backend=backend)
    assert torch.equal(y, expected[:, 8:])


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 9])
def test_states_of_any_width_and_steps_of_any_length(length, extra, layout, backend):
    """Also no position at all, which changes nothing but what is taken back, and more positions than a state holds."""
    taps, batch, dtype = 4, 2, torch.float32
    t = operands("depthwise", taps, batch, 12 + length, dtype)
    past, new = part(t, slice(None), slice(0, 12)), part(t, slice(None), slice(12 - extra, 12 - extra + length))
    pool = pool_of(layout, batch, 3 + extra, dtype)
    pool[:batch] = past["x"][:, 12 - 3 - extra :]
    taken_back = torch.full((batch,), length - extra)
    y = ck.depthwise_conv1d_step(
        new["x"], pool, t["weight"], slots=torch.arange(batch), accepted=taken_back, backend=backend
    )
    history = torch.cat([past["x"][:, : 12 - extra], new["x"]], 1)
    expected = ck.depthwise_conv1d(history, t["weight"], padding="causal", backend=backend)
    assert torch.equal(y, expected[:, 12 - extra :])
    held = torch.cat([torch.zeros(batch, 3 + extra, C), history[:, 12 - 3 - extra :]], 1)
    assert torch.equal(pool[:batch], held[:, -3 - extra :])


@pytest.mark.parametrize("layout", POOLS)
def test_nobody_looks_at_what_has_no_slot(layout, backend):
    """Neither at its x nor at any state, nor at what is accepted; a pool may have no slot at all."""
    x = torch.full((3, C), torch.nan)
    weight, slots = values((C, 4), torch.float32, 2), torch.tensor([-1, -7, -1])
    for count in (0, 2):
        pool = pool_of(layout, count, 3, torch.float32)[:count]
        kept = pool.clone()
        for accepted in (None, torch.tensor([-99, 1, 99])):
            y = ck.depthwise_conv1d_step(x, pool, weight, slots=slots, accepted=accepted, backend=backend)
            assert (y == 0).all() and torch.equal(pool, kept)


def test_modules_serve(backend):
    """Steps of modules take what their functions take."""
    module = ck.nn.DynamicConv1d(C, 4, H, padding="causal", backend=backend)
    x, pool = values((2, 5, C), torch.float32, 1), torch.zeros(4, C, 6).mT
    slots = torch.tensor([3, 1])
    mask = torch.tensor([[True] * 5, [True, False, True, True, True]])
    with torch.no_grad():
        expected = module(torch.cat([x, x[:, :1]], 1), torch.cat([mask, mask[:, :1]], 1))
        y = module.step(x, pool, slots=slots, mask=mask)
        last = module.step(x[:, 0], pool, slots=slots)
    torch.testing.assert_close(torch.cat([y, last[:, None]], 1), expected)
    with pytest.raises(TypeError, match="slot_numbers"):
        module.step(x, pool, slot_numbers=slots)


@pytest.mark.parametrize("function", CALLS)
def test_masks_of_steps_have_the_shape_of_x(function):
    """What would broadcast is refused, too."""
    make = {"depthwise": ck.nn.DepthwiseConv1d, "lightweight": ck.nn.LightweightConv1d, "dynamic": ck.nn.DynamicConv1d}
    module = make[function](C, 4, padding="causal")
    for shape, mask, told in (
        ((5, 5, C), torch.ones(5, dtype=torch.bool), r"shape \[B,T\] = \[5, 5\], got bool tensor of shape \[5\]"),
        ((2, C), torch.ones(2, 1, dtype=torch.bool), r"shape \[B\] = \[2\], got bool tensor of shape \[2, 1\]"),
        ((2, C), torch.ones(2), "a bool tensor"),
    ):
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match=f"argument 'mask': expected {told}"):
            module.step(torch.ones(shape), module.init_state(shape[0]), mask=mask)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_states_of_packed_sequences(length, backend):
    """As a loop over the sequences cuts them out; decoding goes on from them."""
    x, offsets = values((9, C), torch.float32, 1).requires_grad_(), torch.tensor([0, 2, 2, 8, 9], dtype=torch.int32)
    assert causal_conv1d_varlen_states(x > 0, offsets, length).dtype == torch.bool
    states = causal_conv1d_varlen_states(x, offsets, length)
    ends = offsets.tolist()
    padded = [torch.cat([torch.zeros(length, C), x[a:b]])[-length:].T for a, b in zip(ends, ends[1:], strict=False)]
    assert torch.equal(states, torch.stack(padded))
    states.sum().backward()
    assert torch.equal(
        x.grad[:, 0], torch.tensor([float(any(b - length <= t < b for b in ends[1:])) for t in range(9)])
    )
    weight, new = values((C, min(length + 1, 4)), torch.float32, 2), values((4, C), torch.float32, 3)
    y = causal_conv1d_update(new, states.detach(), weight, backend=backend)
    whole = torch.cat([x.detach()[2:8], new[2:3]])[None]
    expected = ck.depthwise_conv1d(whole, weight, padding="causal", backend=backend)
    assert torch.equal(y[2], expected[0, -1])


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"'x': expected a tensor \[T,C\], got"),
        ({"x": [1.0]}, TypeError, "'x': expected a tensor, got"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "'cu_seqlens': expected a last boundary of T = 3, got 4"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "'cu_seqlens': expected an int32 or int64 tensor"),
        ({"state_len": 0}, ValueError, "'state_len': expected a positive integer, got 0"),
        ({"state_len": 2.0}, TypeError, "'state_len': expected a positive integer, got 2.0"),
    ],
)
def test_errors_of_states_of_packed_sequences(changes, kind, told):
    arguments = {"x": torch.ones(3, 4), "cu_seqlens": torch.tensor([0, 3]), "state_len": 2}
    with pytest.raises(kind, match=f"^causal_conv1d_varlen_states: argument {told}"):
        causal_conv1d_varlen_states(**arguments | changes)


def test_the_page_runs():
    assert run_page("docs/serving.md") == 4
