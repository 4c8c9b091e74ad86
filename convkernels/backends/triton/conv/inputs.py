"""The input z of a convolution, made of x, gate, mask and state, and the gradients of x and of the gate."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import activated, slope
from .taps import Rows, columns_at, load_row, rows_from, store_row


class Mask(NamedTuple):
    """A padding mask [batch, time]."""

    data: Any
    batch: Any
    time: Any


class Inputs(NamedTuple):
    """What the input z of a convolution is made of."""

    x: Rows
    gate: Rows
    mask: Mask
    state: Any


class Gradients(NamedTuple):
    """The gradients of x and of the gate."""

    x: Rows
    gate: Rows


class InputFlags(NamedTuple):
    """ACTIVATION: of the gate."""

    HAS_GATE: bool
    HAS_MASK: bool
    HAS_STATE: bool
    PACKED: bool
    ACTIVATION: int


@triton.jit
def inputs_at(inputs, b, c, states):
    """``inputs`` from position 0 of batch row b and channels c on; states: those of ``states_at``."""
    mask = Mask(inputs.mask.data + b.to(tl.int64) * inputs.mask.batch, inputs.mask.batch, inputs.mask.time)
    return Inputs(columns_at(inputs.x, b, c), columns_at(inputs.gate, b, c), mask, states)


@triton.jit
def inputs_from(z, s):
    """Inputs from position s on."""
    mask = Mask(z.mask.data + tl.cast(s, tl.int64) * z.mask.time, z.mask.batch, z.mask.time)
    return Inputs(rows_from(z.x, s), rows_from(z.gate, s), mask, rows_from(z.state, s))


@triton.jit
def unmasked(mask, inside, HAS_MASK: tl.constexpr):
    """``inside``, less the rows that the padding mask excludes."""
    if HAS_MASK:
        inside = inside & (tl.load(mask.data, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_gated(x, gate, keep, INPUT: tl.constexpr, DTYPE: tl.constexpr):
    """The first row of x, gated; 0 where not ``keep``."""
    value = load_row(x, keep, DTYPE)
    if INPUT.HAS_GATE:
        value *= activated(load_row(gate, keep, DTYPE), INPUT.ACTIVATION)
    return value


@triton.jit
def load_input(z, s, columns, sequence, span, INPUT: tl.constexpr, DTYPE: tl.constexpr):
    """z[s]; ``z`` is the input from position 0 on."""
    return load_input_row(inputs_from(z, s), s, columns, sequence, span, INPUT, DTYPE)


@triton.jit
def load_input_row(z, s, columns, sequence, span, INPUT: tl.constexpr, DTYPE: tl.constexpr):
    """The first row of z, which is position s: x, gated, 0 by selection where masked or outside; positions before the
    sequence from the state."""
    inside = unmasked(z.mask, (s >= sequence.begin) & (s < sequence.end), INPUT.HAS_MASK) & columns
    value = load_gated(z.x, z.gate, inside, INPUT, DTYPE)
    if INPUT.HAS_STATE:
        before = (s < sequence.begin) & (s >= sequence.begin - span) & columns
        value += load_row(z.state, before, DTYPE)
    return value


@triton.jit
def gradients_at(gradients, b, c):
    return Gradients(columns_at(gradients.x, b, c), columns_at(gradients.gate, b, c))


@triton.jit
def gradients_from(gradients, s):
    """Gradients from position s on."""
    return Gradients(rows_from(gradients.x, s), rows_from(gradients.gate, s))


@triton.jit
def store_input_gradient(
    dz, z, gradients, inside, wanted, INPUT: tl.constexpr, NEED: tl.constexpr, DTYPE: tl.constexpr
):
    """The first rows of d(x) and d(gate) from d(z) where positions exist; 0 where not ``wanted``, that is, masked."""
    dx = dz
    if INPUT.HAS_GATE:
        gate = load_row(z.gate, wanted, DTYPE)
        dx = dz * activated(gate, INPUT.ACTIVATION)
        if NEED.GATE:
            dgate = dz * load_row(z.x, wanted, DTYPE) * slope(gate, INPUT.ACTIVATION)
            if INPUT.HAS_MASK:
                dgate = tl.where(wanted, dgate, 0.0)
            store_row(gradients.gate, dgate, inside)
    if NEED.X:
        if INPUT.HAS_MASK:
            dx = tl.where(wanted, dx, 0.0)
        store_row(gradients.x, dx, inside)
