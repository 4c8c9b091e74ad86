"""The tap convolution and its gradients in float64 numpy, written from the equation and from nothing else.

    y = residual + out_gate * act(a),   act one of those in ACTIVATIONS
    a[b,t,c] = bias[c] + sum_j w'[b,t,h(c),j] * z[b, t + dilation*j - left, c],   h(c) = c // (C/H)
    z = x * gate_act(gate), 0 where the mask is False, 0 outside the sequence or read from the state before its start
    w' = dropout(softmax_j(weight)), each optional

Every quantity the error bounds need (windows, weights, counts) stays readable on the `Windows` object.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from convkernels.testing.philox import keep_mask


def to_float64(tensor):
    """The exact values of a tensor as a float64 array (bfloat16 has no numpy type, hence the detour)."""
    return tensor.detach().cpu().double().numpy()


def sigmoid(a):
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-a))


class Activation(NamedTuple):
    """A function of an array, its derivative, and an upper limit of the second derivative."""

    value: Callable
    slope: Callable
    bend: float


def _silu_slope(a):
    s = sigmoid(a)
    return s * (1.0 + a * (1.0 - s))


ACTIVATIONS = (
    Activation(lambda a: a, np.ones_like, 0.0),
    Activation(sigmoid, lambda a: sigmoid(a) * sigmoid(-a), 0.1),
    Activation(lambda a: a * sigmoid(a), _silu_slope, 0.5),
)


class Windows:
    """One evaluation of the relation above; arguments as for the op `convkernels::tap_conv`.

    x [B,T,C]; weight [H,K], [B,T,H,K] or [B,1,H,K]; the other tensors as the op takes them. `first_row` (one per
    sequence) says how many of the oldest state rows lie before its start; only a decoding step with `renormalize` has
    any.
    """

    def __init__(
        self,
        x,
        weight,
        left,
        dilation=1,
        softmax=False,
        renormalize=False,
        dropout=0.0,
        seed=None,
        bias=None,
        gate=None,
        mask=None,
        cu_seqlens=None,
        initial_state=None,
        gate_activation=1,
        activation=0,
        out_gate=None,
        residual=None,
        first_row=None,
    ):
        self.batch, self.length, self.channels = x.shape
        self.heads, self.taps = weight.shape[-2:]
        self.softmax, self.renormalize, self.dropout = softmax, renormalize, dropout
        self.weight_shape = tuple(weight.shape)
        self.float64 = x.dtype == torch.float64
        self.gate_act, self.act = ACTIVATIONS[gate_activation], ACTIVATIONS[activation]
        self._read_values(x, gate, mask)
        self.out_gate = None if out_gate is None else to_float64(out_gate)
        self.residual = None if residual is None else to_float64(residual)
        self.bias = None if bias is None else to_float64(bias)
        self._locate_taps(left, dilation, cu_seqlens, initial_state)
        self._normalise_weight(weight, seed, first_row)
        self.window = self._gather(self.z, self.state)

    def _read_values(self, x, gate, mask):
        self.x = to_float64(x)
        self.mask = None if mask is None else mask.cpu().numpy()
        self.gate = None if gate is None else to_float64(gate)
        values = self.x if self.gate is None else self.x * self.gate_act.value(self.gate)
        self.z = values if self.mask is None else np.where(self.mask[:, :, None], values, 0.0)

    def _locate_taps(self, left, dilation, cu_seqlens, initial_state):
        """Row of [z rows, state rows, one zero row] that each (t, j) reads."""
        time = np.arange(self.length)
        bounds = np.array([0, self.length]) if cu_seqlens is None else cu_seqlens.cpu().numpy().astype(np.int64)
        sequence = np.searchsorted(bounds, time, side="right") - 1
        start, end = bounds[sequence][:, None], bounds[sequence + 1][:, None]
        source = time[:, None] + dilation * np.arange(self.taps)[None, :] - left
        inside = (source >= start) & (source < end)
        self.span = (self.taps - 1) * dilation
        self.state_shape = (self.batch * (len(bounds) - 1), self.span, self.channels)
        if initial_state is None:
            self.state = np.zeros((self.batch, 0, self.channels))
        else:
            rows = (len(bounds) - 1) * self.span
            self.state = to_float64(initial_state).reshape(self.batch, rows, self.channels)
        zero_row = self.length + self.state.shape[1]
        row = np.where(inside, source, zero_row)
        if initial_state is not None:
            before = source < start
            row = np.where(before, self.length + sequence[:, None] * self.span + self.span + source - start, row)
            inside = inside | before
        self.row, self.inside, self.sequence = row, inside, sequence

    def _gather(self, rows, state):
        """[B,T,H,C/H,K]: what each tap of each output reads."""
        zero = np.zeros((self.batch, 1, self.channels))
        extended = np.concatenate([rows, state, zero], axis=1)
        size = self.channels // self.heads
        window = extended[:, self.row].reshape(self.batch, self.length, self.taps, self.heads, size)
        return np.ascontiguousarray(window.transpose(0, 1, 3, 4, 2))

    def _normalise_weight(self, weight, seed, first_row):
        logits = to_float64(weight)
        if logits.ndim == 2:
            logits = logits[None, None]
        drawn_shape = logits.shape
        inside = self.inside[None, :, None, :]
        if first_row is not None:
            row = self.row - self.length - self.sequence[:, None] * self.span
            first = first_row.reshape(self.batch, self.state_shape[0] // self.batch if self.batch else 1)[
                :, self.sequence
            ]
            inside = inside & (row[None, :, None, :] >= first[:, :, None, None])
            # The new inputs are the rows below those of the state.
            inside = inside | (self.row < self.length)[None, :, None, :]
        self.probability = self.distance = None
        if self.softmax:
            if self.renormalize:
                logits = np.where(inside, logits, -np.inf)
            peak = logits.max(axis=-1, keepdims=True)
            peak = np.where(np.isfinite(peak), peak, 0.0)
            self.distance = np.where(np.isfinite(logits), peak - logits, 0.0)
            exponential = np.exp(logits - peak)
            total = exponential.sum(axis=-1, keepdims=True)
            self.probability = exponential / np.where(total == 0.0, 1.0, total)
            logits = self.probability
        self.keep_scale = None
        if self.dropout > 0.0:
            keep = keep_mask(int(seed.item()), self.dropout, *drawn_shape)
            self.keep_scale = keep / (1.0 - self.dropout) if self.dropout < 1.0 else keep.astype(np.float64)
            logits = logits * self.keep_scale
        self.weight = logits

    def sum(self):
        """a as float64 [B,T,C]."""
        a = (self.weight[:, :, :, None, :] * self.window).sum(-1).reshape(self.batch, self.length, self.channels)
        return a if self.bias is None else a + self.bias

    def output(self):
        """y as float64 [B,T,C]."""
        y = self.act.value(self.sum())
        y = y if self.out_gate is None else y * self.out_gate
        return y if self.residual is None else y + self.residual

    def spread(self, per_tap):
        """Adds a quantity [n,B,T,H,C/H,K] on (output, tap) to the rows it was read from: z part [n,B,T,C], state
        part.
        """
        total = self.length + self.state.shape[1] + 1
        count = per_tap.shape[0]
        flat = per_tap.reshape(count, self.batch, self.length, self.channels, self.taps)
        rows = np.zeros((count, self.batch, total, self.channels))
        for tap in range(self.taps):
            # For one tap all sources differ, but for the zero row, which is not returned: += adds to each row once.
            rows[:, :, self.row[:, tap]] += flat[..., tap]
        return rows[:, :, : self.length], rows[:, :, self.length : total - 1]
