"""causal_conv1d (the package that Mamba's models call): its functions, with the same arguments, on any device.

Tensors are [B,C,T], as there, with any strides; filters may have any width. Needs torch alone.
Source: https://github.com/Dao-AILab/causal-conv1d, version 1.7.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._dtypes import accumulate_dtype
from ..ops._functorch import transforms_active
from ..ops._validate import (
    autocasting,
    boundaries,
    expect,
    fail,
    flag,
    floating,
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
)
from ..ops.conv.api import depthwise_conv1d
from ..ops.conv.step import depthwise_conv1d_step

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
):
    """Causal depthwise convolution of whole sequences.

        out[b,c,t] = act(bias[c] + sum_j weight[c,j] * z[b,c,t+j]),   z = [initial_states, x] along time

    with zeros in the place of initial states that are not given. act(a) = a * sigmoid(a) with an activation.

    x: [B,C,T], float64, float32, bfloat16 or float16; the result has its shape, dtype and layout.
    weight: [C,K].  bias: [C], optional.
    seq_idx: int32 or int64 [B,T]: a position reads those alone that have the same number as itself, and out is 0 where
        the number is negative, whatever x holds there. Initial states count as positions with the number of the first.
        Numbers of one sequence lie side by side, as a rule: where one comes back within K positions after another, a
        slower formulation in torch runs. Eager code reads the numbers to tell, which on a GPU waits for them; what is
        compiled, transformed by torch.func or captured into a CUDA graph takes that formulation always.
    initial_states: [B,C,K-1], dtype of x: the inputs before the first, oldest first.
    return_final_states: also return the last K-1 columns of z, [B,C,K-1]; not with seq_idx.
    final_states_out: like those: they are written there, too, and it is what is returned, unless they have a gradient,
        which it does not get. Ignored where they are not returned.
    activation: None, "silu" or "swish", which are the same.
    backend: as for ``depthwise_conv1d``.

    Everything has gradients, also second ones: x, weight, bias and initial states, through out and final states.
    Arithmetic and dtypes of parameters are those of ``depthwise_conv1d``. Autocast changes no dtype. ValueError or
    TypeError naming the argument, what was expected and what was given.
    Source: causal_conv1d_fn of the package causal_conv1d 1.7.
    """
    name = "causal_conv1d_fn"
    K, activation = _operands(name, x, weight, bias, activation, (3,), "[B,C,T]")
    flag(name, "return_final_states", return_final_states)
    B, C, _ = x.shape
    if seq_idx is not None:
        _integers(name, "seq_idx", seq_idx, x, (B, x.shape[2]), "[B,T]")
        expect(name, "return_final_states", not return_final_states, "False, because seq_idx is given", True)
    if initial_states is not None:
        _like_x(name, "initial_states", initial_states, x, (B, C, K - 1), "[B,C,K-1]")
    if return_final_states and final_states_out is not None:
        _like_x(name, "final_states_out", final_states_out, x, (B, C, K - 1), "[B,C,K-1]")
        _writable(name, "final_states_out", final_states_out)
    with _dtypes_as_given(x):
        if seq_idx is not None and seq_idx.numel() > 0:
            return _separate(x, weight, bias, seq_idx, initial_states, activation, backend)
        y = depthwise_conv1d(
            x.mT, weight, bias, padding="causal", initial_state=None if initial_states is None else initial_states.mT,
            activation=activation, return_state=return_final_states, backend=backend,
        )  # fmt: skip
        if not return_final_states:
            return y.mT
        y, state = y
        final_states = state.mT
        if final_states_out is not None:
            with torch.no_grad():
                final_states_out.copy_(final_states)
            final_states = final_states if final_states.requires_grad else final_states_out
        return y.mT, final_states


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The next positions of a causal depthwise convolution, one or several.

        out[b,c,t] = act(bias[c] + sum_j weight[c,j] * z[b,c,t+j]),   z = [the K-1 inputs before, x] along time

    x: [B,C], one position, or [B,C,T]; the result has its shape and dtype.
    conv_state: [B,C,W], W >= K-1, dtype of x, any strides: the inputs before, oldest first; start with zeros. Updated
        in place: the oldest leave, x enters.
    weight: [C,K].  bias: [C], optional.  activation, backend: as for ``causal_conv1d_fn``.
    cache_seqlens: int32 or int64 [B], not negative: conv_state is a ring, in which input n has column n % W, and x
        begins with input cache_seqlens[b]. Columns that are not written stay.
    conv_state_indices: int32 or int64 [B]: conv_state is [S,C,W], and row b continues from its row
        conv_state_indices[b]. Where that is negative out is 0, and no state is read or written. No row twice.

    Step by step this equals ``causal_conv1d_fn``. Inference only, as there: the result carries no gradient, whatever
    the inputs require. Values of both index tensors are checked where that costs no wait: on the CPU, in eager code.
    Arithmetic, dtypes and errors: as for ``causal_conv1d_fn``.
    Source: causal_conv1d_update of the package causal_conv1d 1.7.
    """
    name = "causal_conv1d_update"
    K, activation = _operands(name, x, weight, bias, activation, (2, 3), "[B,C] or [B,C,T]")
    rows = x[..., None] if x.dim() == 2 else x
    _states(name, x, conv_state, K, cache_seqlens, conv_state_indices)
    if x.numel() == 0 or conv_state.shape[0] == 0:
        return torch.zeros_like(x)
    with torch.no_grad(), _dtypes_as_given(x):
        if cache_seqlens is None and not transforms_active():
            y = depthwise_conv1d_step(
                rows.mT, conv_state.mT, weight, bias, activation=activation, slots=conv_state_indices, backend=backend
            ).mT
        else:
            y = _advance(rows, conv_state, weight, bias, cache_seqlens, conv_state_indices, activation, backend)
    return y[..., 0] if x.dim() == 2 else y


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The states of packed sequences, for ``causal_conv1d_update``: [N,C,state_len]. The last column holds the last
    position of each, those before it lie to the left, and what a sequence does not have is 0.

    x: [T,C], N sequences one after the other, any dtype.  cu_seqlens: int32 or int64 [N+1], where they begin and end.
    Has a gradient. Values of cu_seqlens are checked as those of indices are in ``causal_conv1d_update``.
    Source: causal_conv1d_varlen_states of the package causal_conv1d 1.7.
    """
    name = "causal_conv1d_varlen_states"
    tensor(name, "x", x)
    if x.dim() != 2:
        fail(name, "x", "a tensor [T,C]", x)
    tensor(name, "cu_seqlens", cu_seqlens)
    boundaries(name, "cu_seqlens", cu_seqlens, x[None], x.shape[0])
    positive(name, "state_len", state_len)
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    row = end + torch.arange(-state_len, 0, device=x.device)
    if x.shape[0] == 0:
        return x.new_zeros(row.shape[0], state_len, x.shape[1]).mT
    return torch.where((row >= begin)[..., None], x[row.clamp(min=0)], x.new_zeros(())).mT


def _dtypes_as_given(x: Tensor):
    """Autocast would have the operator cast x."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else contextlib.nullcontext()


def _as_x(y: Tensor, x: Tensor) -> Tensor:
    """y with the dtype and layout of x."""
    return y.to(x.dtype) if transforms_active() else torch.empty_like(x).copy_(y)


# Rows that hold several sequences.


def _separate(x, weight, bias, seq_idx, initial_states, activation, backend) -> Tensor:
    """The convolution of positions with numbers."""
    capturing = seq_idx.is_cuda and torch.cuda.is_current_stream_capturing()
    if real(seq_idx) and real(x) and not capturing:
        runs = _runs(seq_idx, weight.shape[1])
        if runs is not None:
            return _packed(x, weight, bias, seq_idx, initial_states, runs, activation, backend)
    return _tap_by_tap(x, weight, bias, seq_idx, initial_states, activation)


def _runs(seq_idx: Tensor, K: int) -> Tensor | None:
    """The number, [B,T], of the run of equal numbers that each position is in, over all batch rows; None if a number
    comes back where K taps reach its last run."""
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    runs = begins.flatten().cumsum(0).view(seq_idx.shape) - 1
    again = torch.zeros((), dtype=torch.bool, device=seq_idx.device)
    for distance in range(2, min(K, seq_idx.shape[1])):
        now, then = seq_idx[:, distance:], seq_idx[:, :-distance]
        again |= ((now == then) & (now >= 0) & (runs[:, distance:] != runs[:, :-distance])).any()
    return None if again else runs


def _packed(x, weight, bias, seq_idx, initial_states, runs: Tensor, activation, backend) -> Tensor:
    """All batch rows one after the other, runs as packed sequences."""
    B, C, T = x.shape
    lengths = runs.flatten().bincount()
    hidden = seq_idx < 0
    padded = bool(hidden.any())
    state = None
    if initial_states is not None:
        used = initial_states.mT.masked_fill(hidden[:, :1, None], 0)
        state = x.new_zeros(lengths.shape[0], weight.shape[1] - 1, C).index_copy(0, runs[:, 0], used)
    y = depthwise_conv1d(
        x.mT.reshape(1, B * T, C), weight, bias, padding="causal", cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)),
        initial_state=state, mask=~hidden.view(1, B * T) if padded else None, activation=activation, backend=backend,
    )  # fmt: skip
    y = y.view(B, T, C).mT
    if padded:
        y.masked_fill_(hidden[:, None], 0)  # in place, which keeps the layout
    in_place = B == 1 or x.stride(0) == T * x.stride(2)  # rows of x follow each other: nothing was copied
    return y if in_place else _as_x(y, x)


def _tap_by_tap(x, weight, bias, seq_idx, initial_states, activation) -> Tensor:
    """For any numbers, in torch: no value decides what runs."""
    (B, _, T), K = x.shape, weight.shape[1]
    wide = accumulate_dtype(x.dtype)
    if initial_states is None:
        z, numbers = F.pad(x, (K - 1, 0)), F.pad(seq_idx, (K - 1, 0), value=-1)
    else:
        z = torch.cat([initial_states, x], 2)
        numbers = torch.cat([seq_idx[:, :1].expand(B, K - 1), seq_idx], 1)
    shown = seq_idx >= 0
    y = torch.zeros((), dtype=wide, device=x.device) if bias is None else bias[:, None].to(wide)
    for j in range(K):
        same = shown & (numbers[:, j : j + T] == seq_idx)
        y = y + weight[:, j, None].to(wide) * torch.where(same[:, None], z[:, :, j : j + T].to(wide), 0)
    y = y if activation is None else F.silu(y)
    return _as_x(torch.where(shown[:, None], y, 0), x)


# States of decoding.


def _advance(rows, conv_state, weight, bias, cache_seqlens, indices, activation, backend) -> Tensor:
    """The convolution, [B,C,T], of rows that continue from a state of any form."""
    x, state, reach = rows, conv_state, weight.shape[1] - 1
    if indices is not None:
        # A row without a state does again what the first row with one does, so that no size depends on how many there
        # are. Without any, row 0 of the state is written as it was.
        given = indices >= 0
        source = torch.where(given, torch.arange(x.shape[0], device=x.device), given.to(torch.int32).argmax())
        slots = indices.index_select(0, source).clamp(min=0).long()
        x, state = x.index_select(0, source), state.index_select(0, slots)
        cache_seqlens = None if cache_seqlens is None else cache_seqlens.index_select(0, source)
    past, after = _shifted(x, state, cache_seqlens, reach)
    y = depthwise_conv1d(
        x.mT, weight, bias, padding="causal", initial_state=past.mT, activation=activation, backend=backend
    ).mT
    if indices is None:
        conv_state.copy_(after)
        return y
    conv_state.index_copy_(0, slots, torch.where(given.any(), after, state))
    return _as_x(y, rows).masked_fill_(~given[:, None, None], 0)


def _shifted(x: Tensor, state: Tensor, cache_seqlens: Tensor | None, reach: int) -> tuple[Tensor, Tensor]:
    """The ``reach`` inputs before x, and the state after it. state: [B,C,W]; left as it is."""
    T, W = x.shape[2], state.shape[2]
    new = min(T, W)
    if cache_seqlens is None:
        return state[:, :, W - reach :], torch.cat([state[:, :, new:], x[:, :, T - new :]], 2)

    def columns(first: int, last: int) -> Tensor:
        numbers = cache_seqlens[:, None] + torch.arange(first, last, device=x.device)
        return numbers.remainder(W)[:, None].expand(-1, x.shape[1], -1)

    return state.gather(2, columns(-reach, 0)), state.scatter(2, columns(T - new, T), x[:, :, T - new :])


# Checks of arguments.


def _operands(function: str, x, weight, bias, activation, ranks: tuple[int, ...], letters: str):
    """Checks of what both functions take; returns K, and the activation by its one name."""
    tensor(function, "x", x)
    floating(function, "x", x)
    if x.dim() not in ranks:
        fail(function, "x", f"a tensor {letters}", x)
    C = x.shape[1]
    tensor(function, "weight", weight)
    if weight.dim() == 3 and weight.shape[1] == 1:
        fail(function, "weight", "a tensor of 2 dimensions [C,K] (from a Conv1d: weight.squeeze(1))", weight)
    if weight.dim() != 2 or weight.shape[0] != C or weight.shape[1] == 0:
        fail(function, "weight", f"shape [C,K], C = {size_text(C)}, with at least one tap", weight)
    tensor(function, "bias", bias, optional=True)
    if bias is not None:
        shape(function, "bias", bias, (C,), "[C]")
    for argument, value in {"weight": weight, "bias": bias}.items():
        if value is not None:
            parameter_dtype(function, argument, value, x)
            same_device(function, argument, value, x)
    known = activation is None or activation in ("silu", "swish")
    expect(function, "activation", known, "None, 'silu' or 'swish'", activation)
    return weight.shape[1], None if activation is None else "silu"


def _like_x(function: str, argument: str, value, x: Tensor, sizes: tuple, letters: str) -> None:
    tensor(function, argument, value)
    like(function, argument, value, x, sizes, letters)


def _integers(function: str, argument: str, value, x: Tensor, sizes: tuple, letters: str) -> None:
    tensor(function, argument, value)
    integers(function, argument, value)
    shape(function, argument, value, sizes, letters)
    same_device(function, argument, value, x)


def _writable(function: str, argument: str, value: Tensor) -> None:
    """That a tensor can be written in place: every element in memory of its own, and no gradient of what it held."""
    if torch.is_grad_enabled() and value.requires_grad:
        fail(function, argument, "no gradient, because it is updated in place", "requires_grad=True")
    own_memory(function, argument, value)


def _states(function: str, x: Tensor, conv_state, K: int, cache_seqlens, indices) -> None:
    """Checks of a state and of what says where in it inputs lie."""
    B, C = x.shape[:2]
    tensor(function, "conv_state", conv_state)
    if conv_state.dim() != 3 or conv_state.shape[2] < K - 1:
        rows = "B" if indices is None else "S"
        fail(function, "conv_state", f"a tensor [{rows},C,W], W >= K-1 = {size_text(K - 1)}", conv_state)
    S, _, W = conv_state.shape
    letters, rows = ("[B,C,W]", B) if indices is None else ("[S,C,W]", S)
    _like_x(function, "conv_state", conv_state, x, (rows, C, W), letters)
    _writable(function, "conv_state", conv_state)
    if cache_seqlens is not None:
        _integers(function, "cache_seqlens", cache_seqlens, x, (B,), "[B]")
        if readable(cache_seqlens) and B > 0:
            numbers = cache_seqlens.tolist()
            expect(function, "cache_seqlens", min(numbers) >= 0, "numbers of inputs >= 0", numbers)
    if indices is not None:
        _integers(function, "conv_state_indices", indices, x, (B,), "[B]")
        if readable(indices):
            numbers = indices.tolist()
            used = [number for number in numbers if number >= 0]
            good = all(number < S for number in used) and len(set(used)) == len(used)
            expected = f"rows of conv_state below {S}, none of them twice, or negative numbers"
            expect(function, "conv_state_indices", good, expected, numbers)
