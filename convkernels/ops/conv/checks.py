"""Checks of the arguments of the convolutions."""

from typing import Any

import torch
from torch import Tensor

from .._validate import (
    PLAIN,
    boundaries,
    dropout,
    expect,
    fail,
    flag,
    floating,
    integer,
    integers,
    like,
    own_memory,
    parameter_dtype,
    positive,
    readable,
    real,
    same_device,
    shape,
    size_text,
    tensor,
)  # fmt: skip
from .schema import NONE, SIGMOID, SILU, TapConv, TapStep

MAX_SPAN = 2**30
"""The greatest dilation, and distance between the first and the last tap, so that positions fit into 32 bits."""
GATE_ACTIVATIONS = {"sigmoid": SIGMOID, "silu": SILU, "none": NONE}
RESULT_ACTIVATIONS = {None: NONE, "silu": SILU}
CHANNELS_LAST = "x is read as [B,T,C]: give x.mT if channels come first"


def reach(function: str, dilation: Any, K: int) -> None:
    """A dilation, such that no position that K taps read overflows."""
    positive(function, "dilation", dilation)
    if dilation > MAX_SPAN or (isinstance(K, int) and (K - 1) * dilation > MAX_SPAN):
        fail(function, "dilation", f"a positive integer, at most 2^30, also times K - 1 = {size_text(K - 1)}", dilation)


def padding_left(function: str, padding: Any, K: int, dilation: int) -> int:
    """Number of input positions to the left of an output that its first tap reaches."""
    limit = (K - 1) * dilation
    expected = f"'same', 'causal' or an integer from 0 to (K-1)*dilation = {limit}"
    if isinstance(padding, str):
        if padding == "same":
            return dilation * (K // 2)
        if padding == "causal":
            return limit
        fail(function, "padding", expected, repr(padding))
    integer(function, "padding", padding, expected)
    if not 0 <= padding <= limit:
        fail(function, "padding", expected, padding)
    return padding


def kernel_options(function: str, softmax: Any, renormalize: Any, dilation: Any, K: int) -> None:
    flag(function, "softmax", softmax)
    flag(function, "renormalize", renormalize)
    if renormalize and not softmax:
        fail(function, "renormalize", "False, because without softmax there is nothing to renormalize", renormalize)
    reach(function, dilation, K)


def last_dimension(function: str, argument: str, value: Any, letters: str, size: int) -> None:
    """That an input of a module has the size that the module was made for; what is no tensor is left to others."""
    if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[-1] != size):
        first = letters == "C" and value.dim() == 3 and value.shape[1] == size
        hint = f" ({CHANNELS_LAST})" if first else ""
        fail(function, argument, f"a last dimension of {letters} = {size}{hint}", value)


def weight(function: str, value: Any, x: Tensor, leading: tuple, letters: str) -> tuple[int, int]:
    """The weight [*leading, H, K]; returns H and K. The error says where it would be right for x.mT."""
    try:
        return _weight(function, value, x, leading, letters)
    except ValueError as error:
        if x.dim() != 3:
            raise
        try:
            _weight(function, value, x.mT, leading and (x.shape[0], x.shape[2]), letters)
        except (TypeError, ValueError):
            raise error from None
        raise ValueError(f"{error} ({CHANNELS_LAST})") from None


def _weight(function: str, value: Any, x: Tensor, leading: tuple, letters: str) -> tuple[int, int]:
    rank = len(leading) + 2
    C = x.shape[-1]
    if value.dim() != rank:
        hint = ""
        if value.numel() and not leading and value.dim() == 3 and value.shape[1] == 1:
            hint = " (from a Conv1d: weight.squeeze(1))"
        elif value.numel() and leading and value.shape[:-1] == leading:
            hint = " (from a Linear: weight.unflatten(-1, (H, K)))"
        fail(function, "weight", f"a tensor of {rank} dimensions {letters}{hint}", value)
    H, K = value.shape[-2:]
    if leading:
        shape(function, "weight", value, (*leading, H, K), letters)
    if H == 0:
        fail(function, "weight", f"at least one row of weights in {letters}", value)
    if K == 0:
        fail(function, "weight", f"at least one tap, K >= 1, in {letters}", value)
    if letters == "[C,K]":
        shape(function, "weight", value, (C, K), letters)
    elif C % H != 0:
        fail(function, "weight", f"a number of heads H in {letters} that divides C = {size_text(C)}", value)
    parameter_dtype(function, "weight", value, x)
    same_device(function, "weight", value, x)
    return H, K


def bias(function: str, value: Any, x: Tensor) -> None:
    if value is None:
        return
    tensor(function, "bias", value, optional=True)
    shape(function, "bias", value, (x.shape[-1],), "[C]")
    parameter_dtype(function, "bias", value, x)
    same_device(function, "bias", value, x)


def finish(function: str, gate_activation: Any, activation: Any, *tensors: Any) -> tuple:
    """These arguments, as operators take them; of the tensors nothing is known yet."""
    of_gate = _number(function, "gate_activation", gate_activation, GATE_ACTIVATIONS)
    return of_gate, _number(function, "activation", activation, RESULT_ACTIVATIONS), *tensors


def _number(function: str, argument: str, value: Any, numbers: dict) -> int:
    if not (value is None or isinstance(value, str)) or value not in numbers:
        fail(function, argument, f"one of {', '.join(map(repr, numbers))}", repr(value))
    return numbers[value]


def like_x(function: str, x: Tensor, **values: Any) -> None:
    """Of x's shape, dtype and device, or None."""
    for argument, value in values.items():
        if value is not None:
            tensor(function, argument, value, optional=True)
            like(function, argument, value, x, tuple(x.shape), "[B,T,C]" if x.dim() == 3 else "[B,C]")


def mask(function: str, value: Any, x: Tensor) -> None:
    if value is None:
        return
    tensor(function, "mask", value, optional=True)
    if value.dtype != torch.bool:
        fail(function, "mask", "a bool tensor (True: real position)", value, TypeError)
    shape(function, "mask", value, tuple(x.shape[:-1]), "[B,T]" if x.dim() == 3 else "[B]")
    same_device(function, "mask", value, x)


def cu_seqlens(function: str, value: Any, x: Tensor) -> None:
    if value is None:
        return
    tensor(function, "cu_seqlens", value, optional=True)
    boundaries(function, "cu_seqlens", value, x, x.shape[1])


def initial_state(function: str, value: Any, x: Tensor, rows: int, cu: Tensor | None) -> None:
    if value is None:
        return
    tensor(function, "initial_state", value, optional=True)
    sequences, letters = (x.shape[0], "[B,S,C]") if cu is None else (cu.shape[0] - 1, "[N,S,C]")
    like(function, "initial_state", value, x, (sequences, rows, x.shape[2]), f"{letters}, S = (K-1)*dilation,")


def convolution(function: str, letters: str, args: TapConv, padding, training, return_state) -> int:
    """All checks of a convolution over a sequence; returns ``left``. letters: [C,K], [H,K] or [B,T,H,K]. args: as
    given; ``left`` is not looked at."""
    x, state = args.x, args.initial_state
    tensor(function, "x", x)
    tensor(function, "weight", args.weight)
    K = _operands(function, letters, args, "a tensor of 3 dimensions [B,T,C]", 3, "[B,T,H,K]")
    left = padding_left(function, padding, K, args.dilation)
    dropout(function, "weight_dropout", args.dropout, training, args.seed, x)
    like_x(function, x, gate=args.gate, out_gate=args.out_gate, residual=args.residual)
    mask(function, args.mask, x)
    cu_seqlens(function, args.cu_seqlens, x)
    flag(function, "return_state", return_state)
    rows = (K - 1) * args.dilation
    initial_state(function, state, x, rows, args.cu_seqlens)
    for argument, given in (("initial_state", state is not None), ("return_state", return_state)):
        if given and left != rows:
            fail(function, "padding", f"'causal', because {argument} is given", repr(padding))
    return left


def _operands(function: str, letters: str, args: TapConv | TapStep, expected: str, rank: int, dynamic: str) -> int:
    """Checks of x, weight, bias and what shapes the filters; returns K. dynamic: the letters of dynamic weights."""
    x = args.x
    floating(function, "x", x)
    if x.dim() != rank:
        fail(function, "x", expected, x)
    _, K = weight(function, args.weight, x, tuple(x.shape[: rank - 1]) if letters == dynamic else (), letters)
    bias(function, args.bias, x)
    kernel_options(function, args.softmax, args.renormalize, args.dilation, K)
    return K


def step(function: str, letters: str, args: TapStep) -> None:
    """All checks of a decoding step. letters: [C,K], [H,K] or [B,H,K], which is [B,T,H,K] where x is [B,T,C]."""
    x, state = args.x, args.state
    tensor(function, "x", x)
    tensor(function, "state", state)
    tensor(function, "weight", args.weight)
    expected, rank, dynamic = "a tensor [B,C] or [B,T,C]", 2 if x.dim() == 2 else 3, "[B,H,K]"
    if args.cu_seqlens is not None:
        expected, rank = "a tensor [1,T,C], because cu_seqlens is given", 3
    if letters == dynamic and rank == 3:
        letters = dynamic = "[B,T,H,K]"
    K = _operands(function, letters, args, expected, rank, dynamic)
    N = x.shape[0]
    if args.cu_seqlens is not None:
        cu_seqlens(function, args.cu_seqlens, x)
        N = args.cu_seqlens.shape[0] - 1
    _state(function, args, (K - 1) * args.dilation, N)
    like_x(function, x, gate=args.gate, out_gate=args.out_gate, residual=args.residual)
    _of_sequences(function, args, (K - 1) * args.dilation, N)
    inputs = {"x": x, "weight": args.weight}
    inputs |= {
        name: value for name in ("bias", "gate", "out_gate", "residual") if (value := getattr(args, name)) is not None
    }
    if torch.is_grad_enabled():
        for argument, value in {**inputs, "state": state}.items():
            if value.requires_grad:
                expected = "no gradient (a step is inference only: use torch.no_grad())"
                fail(function, argument, expected, "requires_grad=True")
    if real(state):
        if state.is_neg():
            expected = "memory that holds its values (see Tensor.resolve_neg)"
            fail(function, "state", expected, "a negated view of other memory")
        _apart(function, inputs, state)


def _state(function: str, args: TapStep, span: int, N: int) -> None:
    """That a state, or a pool of states, holds what a step reads, and can be written in place."""
    state, letters = args.state, "[B,W,C]" if args.slots is None else "[S,W,C]"
    if state.dim() != 3 or state.shape[1] < span:
        fail(function, "state", f"a tensor {letters}, W at least (K-1)*dilation = {size_text(span)}", state)
    rows, C = N if args.slots is None else state.shape[0], args.x.shape[-1]
    if state.shape[1] == C != state.shape[2]:
        sizes = [size_text(size) for size in (rows, state.shape[2], C)]
        fail(function, "state", f"shape {letters} = {sizes} (channels come last: give state.mT)", state)
    like(function, "state", state, args.x, (rows, state.shape[1], C), letters)
    own_memory(function, "state", state)


def _slots(function: str, argument: str, value: Tensor, taken: list[int], below: int) -> list[int]:
    """Slots of a pool, none of them twice or taken; returns those that are not negative."""
    if not readable(value):
        return []
    numbers = value.tolist()
    used = [number for number in numbers if number >= 0]
    good = all(number < below for number in used) and len({*used, *taken}) == len(used) + len(taken)
    apart = " or in slots" if taken else ""
    expect(function, argument, good, f"slots below {below}, none of them twice{apart}, or negative numbers", numbers)
    return used


def _of_sequences(function: str, args: TapStep, span: int, N: int) -> None:
    """What a step takes per sequence: the state that it continues from, and where in it."""
    x, (S, W, _), cu = args.x, args.state.shape, args.cu_seqlens
    taken, letters = [], "[B]" if cu is None else "[N]"
    if args.slots is not None:
        _numbers(function, "slots", args.slots, x, N, letters)
        if args.state_index is not None:
            fail(function, "state_index", "None, because slots is given", args.state_index)
        taken = _slots(function, "slots", args.slots, [], S)
    if args.accepted is not None:
        _numbers(function, "accepted", args.accepted, x, N, letters)
        if readable(args.accepted) and (cu is None or readable(cu)):
            lengths = [x.shape[1] if x.dim() == 3 else 1] * N if cu is None else cu.diff().tolist()
            numbers, held = args.accepted.tolist(), W - span
            live = [0] * N if args.slots is None or not readable(args.slots) else args.slots.tolist()
            good = all(
                slot < 0 or T - held <= number <= T for number, T, slot in zip(numbers, lengths, live, strict=True)
            )
            T = lengths if cu is not None else lengths[:1]
            expected = f"numbers from T - (W - (K-1)*dilation) = T - {held} to T, T = {T}"
            expect(function, "accepted", good, expected, numbers)
    if (index := args.state_index) is not None:
        if cu is not None:
            fail(function, "state_index", "None, because cu_seqlens is given", index)
        _numbers(function, "state_index", index, x, N, letters)
        if readable(index):
            rows = index.tolist()
            if any(not 0 <= row < N for row in rows):
                fail(function, "state_index", f"rows of the state, 0 to {N - 1}", rows)
    if (position := args.position) is not None:
        tensor(function, "position", position, optional=True)
        if position.dtype != torch.int64:
            fail(function, "position", "an int64 tensor", position, TypeError)
        if position.dim() != 1 or position.shape[0] not in (1, N):
            fail(function, "position", f"shape [B] = [{size_text(N)}] or [1]", position)
        same_device(function, "position", position, x)
        if readable(position):
            numbers = position.tolist()
            if any(number < 0 for number in numbers):
                fail(function, "position", "numbers of positions >= 0", numbers)
    _saves(function, args, taken)


def _saves(function: str, args: TapStep, taken: list[int]) -> None:
    """Where states on the way are left. taken: slots of the sequences."""
    if args.save_at is None and args.save_slots is None:
        return
    given = [name for name in ("save_at", "save_slots") if getattr(args, name) is not None]
    expect(function, given[0], len(given) == 2, "None, because save_at and save_slots go together", "one of them")
    for needed in ("cu_seqlens", "slots"):
        expect(
            function, "save_at", getattr(args, needed) is not None, f"None, because {needed} is not given", args.save_at
        )
    tensor(function, "save_at", args.save_at)
    if args.save_at.dim() != 1:
        fail(function, "save_at", "a tensor [M]", args.save_at)
    count = args.save_at.shape[0]
    for argument in given:
        _numbers(function, argument, getattr(args, argument), args.x, count, "[M]")
    if readable(args.save_at):
        numbers, T = args.save_at.tolist(), args.x.shape[1]
        good = all(0 < number <= T for number in numbers)
        expect(function, "save_at", good, f"numbers from 1 to T = {T}", numbers)
    _slots(function, "save_slots", args.save_slots, taken, args.state.shape[0])


def _numbers(function: str, argument: str, value: Any, x: Tensor, count: int, letters: str) -> None:
    """Integers, one per sequence."""
    tensor(function, argument, value, optional=True)
    integers(function, argument, value)
    shape(function, argument, value, (count,), letters)
    same_device(function, argument, value, x)


def _apart(function: str, inputs: dict[str, Tensor], state: Tensor) -> None:
    """No input may share memory with the state, which is updated in place. Spans of memory are compared, so interleaved
    views count: nothing cheaper is exact."""
    if state.numel() == 0:
        return
    first, last = _span(state)
    for argument, value in inputs.items():
        if type(value) not in PLAIN or value.numel() == 0 or value.device != state.device:
            continue
        begin, end = _span(value)
        if begin <= last and first <= end:
            expected = "memory apart from the state's, which is updated in place"
            fail(function, argument, expected, "an overlapping view")


def _span(value: Tensor) -> tuple[int, int]:
    """First and last byte of the memory of a tensor that is not empty."""
    first = value.data_ptr()
    if value.is_contiguous():
        return first, first + value.nbytes - 1
    steps = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return first, first + value.element_size() * (steps + 1) - 1
