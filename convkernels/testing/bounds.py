"""A-priori error bounds: how far a correct kernel may be from the exact result, element by element.

Model. Inputs are exact (a low-precision number converts exactly to the accumulator type). The accumulator has unit
roundoff u = 2^-24 (float32), or 2^-53 for float64 problems; a result is rounded once, with u_out of its own type. A
sum of n products in any order, fused or not, is off by at most n*u*sum|products| (Higham, Accuracy and Stability,
section 3.1): n-1 additions and one product rounding per path. All terms are first order; SECOND_ORDER = 1.01 covers
the rest (n*u stays below 0.01 here).

Prologue terms, relative:
* exp: EXP = 4, that is 2 units in the last place, and ARGUMENT = 3 roundings of the argument (subtract the maximum,
  multiply by log2(e), representation of log2(e)), each worth |argument|*u. Vectorised exponentials are 1-2 ulp; a
  library exp is better.
* softmax, tap j at distance D_j below the maximum, n taps: own exponential (ARGUMENT*D_j + EXP), the sum of
  exponentials (the p-weighted mean of the same, and n for the additions), and 3 for reciprocal, multiply and the store
  of the row.
* dropout: 2 (the scale 1/(1-p) is rounded once, and the product once).
* sigmoid(a) = 1/(1+exp(-a)): the exponential's error enters with the factor 1-sigmoid; 3 for add, divide and a
  multiply with x. Its argument is rounded ARGUMENT-1 times (nothing is subtracted).
* SiLU, a*sigmoid(a), has another rounding. Its derivative is s*(1 + a*(1-s)): 1-s has the absolute error of s, and
  there are four roundings. An error of the argument enters with the slope, that of a slope with the second derivative.

The `tiny` term is the absolute error of underflow: a flushed exponential times a moderate value, or half a subnormal
step of float16.

float64 problems: the oracle computes in float64 as well and commits errors of the same size and kind, hence u is
doubled. A float16 or bfloat16 accumulator has u of 2^-11 or 2^-8 and is rejected wherever more than a few terms
cancel; tests/test_bounds.py shows it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from convkernels.testing.accuracy import UNIT_ROUNDOFF
from convkernels.testing.oracle import ACTIVATIONS, Windows, sigmoid, to_float64

TINY = {torch.float64: 2.0**-1000, torch.float32: 2.0**-110, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-110}
SECOND_ORDER = 1.01
EXP = 4.0
ARGUMENT = 3.0
SOFTMAX_ROUNDINGS = 3.0
DROPOUT_ROUNDINGS = 2.0
SIGMOID_ROUNDINGS = 3.0


@dataclass(frozen=True)
class Expected:
    """An exact value (float64 array), the largest error a correct kernel can make there, and the dtype of the
    result.
    """

    value: np.ndarray
    bound: np.ndarray
    dtype: torch.dtype

    def worst(self, actual):
        """Largest error as a multiple of the bound (0 for an empty result, inf where a NaN or an error without
        allowance is).
        """
        error = np.abs(to_float64(actual) - self.value)
        if error.size == 0:
            return 0.0
        ratio = np.divide(error, self.bound, out=np.where(error == 0.0, 0.0, np.inf), where=self.bound > 0.0)
        return float(np.nan_to_num(ratio, nan=np.inf).max())

    def check(self, actual, name):
        """Raises AssertionError naming the result, the element and both numbers when a bound is exceeded."""
        assert actual.dtype == self.dtype, f"{name}: expected {self.dtype}, got {actual.dtype}"
        assert tuple(actual.shape) == self.value.shape, (
            f"{name}: expected {self.value.shape}, got {tuple(actual.shape)}"
        )
        got = to_float64(actual)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(got - self.value) <= self.bound)
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.size} elements exceed the bound; at {where} got {got[where]!r}, "
                f"expected {self.value[where]!r} +- {self.bound[where]:.3g} (worst {self.worst(actual):.3g} bounds)"
            )


class Bounds:
    """Bounds of all results of one problem. Takes the arguments of `Windows`."""

    def __init__(self, x, weight, *args, **kwargs):
        self.exact = Windows(x, weight, *args, **kwargs)
        self.x_dtype, self.weight_dtype = x.dtype, weight.dtype
        self.sum_dtype = torch.float64 if self.exact.float64 else torch.float32
        self.u = 2.0 * UNIT_ROUNDOFF[torch.float64] if self.exact.float64 else UNIT_ROUNDOFF[torch.float32]
        self.weight_error = self._weight_error()
        self.gate_error = (
            None if self.exact.gate is None else self._activation_errors(self.exact.gate_act, self.exact.gate)
        )

    def _weight_error(self):
        """Relative error of w' (an array broadcasting against exact.weight, or a number)."""
        exact, error = self.exact, 0.0
        if exact.softmax:
            own = ARGUMENT * exact.distance + EXP
            mean = (exact.probability * own).sum(-1, keepdims=True)
            error = self.u * (own + mean + exact.taps + SOFTMAX_ROUNDINGS)
        return error + (self.u * DROPOUT_ROUNDINGS if exact.keep_scale is not None else 0.0)

    def _activation_errors(self, act, a):
        """Absolute errors of act(a) and of its derivative, and the roundings of a product with it."""
        if act is ACTIVATIONS[0]:
            return self.u * np.abs(a), np.zeros_like(a)
        s = sigmoid(a)
        relative = self.u * (sigmoid(-a) * (EXP + (ARGUMENT - 1.0) * np.abs(a)) + SIGMOID_ROUNDINGS)
        if act is ACTIVATIONS[1]:
            # 1 - s has the absolute error of s, which near s = 1 is as large as 1 - s itself.
            return s * relative, s * sigmoid(-a) * (relative + 4.0 * self.u) + s * s * relative
        size, rest = 1.0 + np.abs(a) * sigmoid(-a), np.abs(a) * s * relative
        return np.abs(a) * s * (relative + self.u), s * (size * (relative + 4.0 * self.u) + rest)

    def _rounded(self, value, error, dtype):
        """Adds the rounding of the stored result to an accumulator error; exact zeros that carry no error stay
        exact.
        """
        bound = SECOND_ORDER * (error + UNIT_ROUNDOFF[dtype] * (np.abs(value) + error)) + TINY[dtype]
        return Expected(value, bound, dtype)

    def _selected(self, expected):
        """Masked positions are selected away, not multiplied: exactly zero, no allowance."""
        mask = self.exact.mask
        if mask is None:
            return expected
        keep = mask[:, :, None]
        return Expected(np.where(keep, expected.value, 0.0), np.where(keep, expected.bound, 0.0), expected.dtype)

    def _window_error(self):
        """Absolute error of what the taps read, or 0."""
        exact = self.exact
        if exact.gate is None:
            return 0.0
        return exact._gather(self.input_error(), np.zeros_like(exact.state))

    def input_error(self):
        """Absolute error of z = x*gate_act(gate), [B,T,C]."""
        error = np.abs(self.exact.x) * self.gate_error[0]
        return error if self.exact.mask is None else np.where(self.exact.mask[:, :, None], error, 0.0)

    def output(self, extra_window_error=0.0):
        """y [B,T,C]."""
        exact, error = self.exact, self._sum_error(extra_window_error)
        value, error = self._activated(exact.sum(), error)
        if exact.out_gate is not None:
            value, error = value * exact.out_gate, np.abs(exact.out_gate) * (error + self.u * np.abs(value))
        if exact.residual is not None:
            value = value + exact.residual
            error = error + self.u * np.abs(value)
        return self._rounded(value, error, self.x_dtype)

    def _activated(self, total, error):
        """act(a) and its error, from a and its own."""
        act = self.exact.act
        if act is ACTIVATIONS[0]:
            return total, error
        passed = np.abs(act.slope(total)) * error + act.bend * error * error
        return act.value(total), self._activation_errors(act, total)[0] + passed

    def activation_gradients(self, grad):
        """Gradients for the cotangent `grad` [B,T,C]: dict of Expected sum and out_gate."""
        exact, g = self.exact, to_float64(grad)
        total, error = exact.sum(), self._sum_error()
        value, value_error = self._activated(total, error)
        slope = exact.act.slope(total)
        slope_error = self._activation_errors(exact.act, total)[1] + exact.act.bend * error
        inside = g if exact.out_gate is None else g * exact.out_gate
        of_sum = np.abs(inside) * (slope_error + 2.0 * self.u * np.abs(slope))
        return {
            "sum": self._rounded(inside * slope, of_sum, self.x_dtype),
            "out_gate": self._rounded(g * value, np.abs(g) * (value_error + self.u * np.abs(value)), self.x_dtype),
        }

    def _sum_error(self, extra_window_error=0.0):
        """Of the sum a [B,T,C]: n = taps inside the sequence, the bias and one product rounding."""
        exact = self.exact
        weight = np.abs(exact.weight)[:, :, :, None, :]
        magnitude = (weight * np.abs(exact.window)).sum(-1)
        terms = (exact.inside.sum(-1) + 2.0)[None, :, None, None]
        error = terms * self.u * magnitude
        error = error + (
            weight * np.broadcast_to(self.weight_error, exact.weight.shape)[:, :, :, None, :] * np.abs(exact.window)
        ).sum(-1)
        window_error = self._window_error() + extra_window_error
        if not np.isscalar(window_error):
            error = error + (weight * window_error).sum(-1)
        error = error.reshape(exact.z.shape)
        if exact.bias is not None:
            error = error + (exact.taps + 2.0) * self.u * np.abs(exact.bias)
        return error

    def gradients(self, grad):
        """Gradients for the cotangent `grad` [B,T,C]: dict of Expected x, weight, bias, and gate and initial_state
        where present.

        grad_bias is expected in the accumulation type, as the op returns it.
        """
        exact = self.exact
        g = to_float64(grad)
        split = g.reshape(exact.batch, exact.length, exact.heads, exact.channels // exact.heads)
        results = {"bias": self._bias_gradient(g), "weight": self._weight_gradient(split)}
        results.update(self._input_gradients(split))
        return results

    def _bias_gradient(self, g):
        terms = max(g.shape[0] * g.shape[1], 1)
        return self._rounded(g.sum((0, 1)), terms * self.u * np.abs(g).sum((0, 1)), self.sum_dtype)

    def _weight_gradient(self, split):
        exact, u = self.exact, self.u
        grad_abs = np.abs(split)[..., None]
        value = (split[..., None] * exact.window).sum(3)
        magnitude = (grad_abs * np.abs(exact.window)).sum(3)
        window_error = self._window_error()
        error = 0.0 if np.isscalar(window_error) else (grad_abs * window_error).sum(3)
        shared = exact.weight.shape[1] == 1 or len(exact.weight_shape) == 2 or exact.weight_shape[1] == 1
        # Terms per weight: the channels of the head, times every output that the weight serves.
        terms = float(split.shape[3])
        if shared:
            rows = exact.batch if len(exact.weight_shape) == 2 else 1
            terms = terms * rows * exact.inside.sum(0)[None, None, None, :]
        error = error + (terms + 1.0) * u * magnitude
        by_row = exact.softmax and exact.renormalize
        if shared and not by_row:
            value, error = self._sum(value), self._sum(error)
        if exact.keep_scale is not None:
            value, error = value * exact.keep_scale, error * exact.keep_scale
            error = error + DROPOUT_ROUNDINGS * u * np.abs(value)
        if exact.softmax:
            value, error = self._softmax_gradient(value, error)
        if shared and by_row:
            rows = exact.length * (exact.batch if len(exact.weight_shape) == 2 else 1)
            error = self._sum(error) + rows * u * self._sum(np.abs(value))
            value = self._sum(value)
        value = value.reshape(exact.weight_shape)
        return self._rounded(value, error.reshape(exact.weight_shape), self.weight_dtype)

    def _sum(self, values):
        axes = (0, 1) if len(self.exact.weight_shape) == 2 else (1,)
        full = np.broadcast_to(values, (self.exact.batch, self.exact.length, *values.shape[2:]))
        return full.sum(axes, keepdims=True)

    def _softmax_gradient(self, value, error):
        """p_j*(d_j - sum_k p_k d_k), by either p*(d - s) or p*d - p*s: two roundings of |d| + |s|."""
        exact, u = self.exact, self.u
        p, relative = exact.probability, self.weight_error
        weighted = p * np.abs(value)
        mean = (p * value).sum(-1, keepdims=True)
        mean_error = (p * error + weighted * (relative + (exact.taps + 1.0) * u)).sum(-1, keepdims=True)
        difference = value - mean
        total = relative * np.abs(difference) + error + mean_error + 2.0 * u * (np.abs(value) + np.abs(mean))
        return p * difference, p * total

    def _input_gradients(self, split):
        exact, u = self.exact, self.u
        product = exact.weight[:, :, :, None, :] * split[..., None]
        size = np.abs(product)
        relative = np.broadcast_to(self.weight_error, exact.weight.shape)[:, :, :, None, :]
        (dz, magnitude, error), (ds, state_magnitude, state_error) = exact.spread(
            np.stack([product, size, size * relative])
        )
        counts = np.bincount(exact.row.ravel(), minlength=exact.length + exact.state.shape[1] + 1) + 1.0
        error = error + counts[: exact.length][None, :, None] * u * magnitude
        results = {}
        if exact.state.shape[1] or exact.span == 0:
            state_error = state_error + counts[exact.length : -1][None, :, None] * u * state_magnitude
            results["initial_state"] = self._rounded(
                ds.reshape(exact.state_shape), state_error.reshape(exact.state_shape), self.x_dtype
            )
        if exact.gate is None:
            results["x"] = self._selected(self._rounded(dz, error, self.x_dtype))
            return results
        value, (value_error, slope_error) = exact.gate_act.value(exact.gate), self.gate_error
        results["x"] = self._selected(
            self._rounded(
                dz * value, np.abs(value) * error + np.abs(dz) * (value_error + u * np.abs(value)), self.x_dtype
            )
        )
        slope = exact.x * exact.gate_act.slope(exact.gate)
        slope_error = np.abs(exact.x) * slope_error + 2.0 * u * np.abs(slope)
        results["gate"] = self._selected(
            self._rounded(dz * slope, np.abs(slope) * error + np.abs(dz) * slope_error, self.x_dtype)
        )
        return results


class StepBounds:
    """Bounds of one call of the op `convkernels::tap_step`, with its arguments and the state before it."""

    def __init__(
        self,
        x,
        state,
        weight,
        dilation=1,
        softmax=False,
        renormalize=False,
        bias=None,
        gate=None,
        state_index=None,
        position=None,
        gate_activation=1,
        activation=0,
        out_gate=None,
        residual=None,
        slots=None,
        accepted=None,
        cu_seqlens=None,
        save_at=None,
        save_slots=None,
    ):
        self.shape = tuple(x.shape)
        x, gate, out_gate, residual = (_with_time(value, x) for value in (x, gate, out_gate, residual))
        weight = weight[:, None] if len(self.shape) == 2 and weight.ndim == 3 else weight
        span, (rows, length, _) = (weight.shape[-1] - 1) * dilation, x.shape
        # Batch row, begin and end of every sequence.
        bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
        self.sequences = [(b, *ends) for b in range(rows) for ends in zip(bounds, bounds[1:], strict=False)]
        batch = len(self.sequences)
        # A copy: the step overwrites the state in place, and a float64 tensor shares its memory with the array.
        self.pool = to_float64(state).copy()
        self.slots = np.arange(batch) if slots is None else slots.cpu().numpy()
        source = self.slots if state_index is None else state_index.cpu().numpy()
        lengths = np.array([end - begin for _, begin, end in self.sequences], dtype=np.int64)
        taken = lengths if accepted is None else accepted.cpu().numpy()
        # Row of the old state that position 0, the first of x, would have.
        self.first = self.pool.shape[1] - lengths + taken
        self.before = self.pool[np.maximum(source, 0)]
        self.saves = [] if save_at is None else list(zip(save_at.tolist(), save_slots.tolist(), strict=True))
        history = self.before[np.arange(batch)[:, None], self.first[:, None] + np.arange(-span, 0)]
        first_row = None
        if position is not None:
            first_row = np.maximum(span - np.broadcast_to(position.cpu().numpy(), (batch,)), 0)
        self.bounds = Bounds(
            x,
            weight,
            span,
            dilation,
            softmax,
            renormalize,
            bias=bias,
            gate=gate,
            cu_seqlens=cu_seqlens,
            initial_state=torch.from_numpy(history).to(state.dtype),
            gate_activation=gate_activation,
            activation=activation,
            out_gate=out_gate,
            residual=residual,
            first_row=first_row,
        )

    def output(self):
        """y. With a gate a kernel may read a new value as stored (rounded to x's dtype) or as computed."""
        exact = self.bounds.exact
        extra = 0.0
        if exact.gate is not None:
            new = (exact.row < exact.length)[None, :, None, None, :]
            extra = np.abs(exact.window) * new * UNIT_ROUNDOFF[self.bounds.x_dtype]
        y = self.bounds.output(extra)
        value, bound = y.value, y.bound
        for slot, (b, begin, end) in zip(self.slots, self.sequences, strict=True):
            if slot < 0:
                value[b, begin:end] = bound[b, begin:end] = 0.0
        return Expected(value.reshape(self.shape), bound.reshape(self.shape), y.dtype)

    def state(self):
        """The states after the step [S,W,C]: old rows that count move up unchanged, and z is rounded into the last."""
        bounds, exact = self.bounds, self.bounds.exact
        self.rounding = np.zeros_like(exact.z)
        if exact.gate is not None:
            self.rounding = bounds._rounded(exact.z, bounds.input_error(), bounds.x_dtype).bound
        value, bound = self.pool.copy(), np.zeros_like(self.pool)
        for number, (slot, (_, begin, end)) in enumerate(zip(self.slots, self.sequences, strict=True)):
            if slot >= 0:
                saves = [(at, kept) for at, kept in self.saves if begin < at <= end and kept >= 0]
                for at, into in (*saves, (end, slot)):
                    value[into], bound[into] = self._after(number, at - begin)
        return Expected(value, bound, bounds.x_dtype)

    def _after(self, number, count):
        """The state [W,C] of a sequence after `count` of its positions, and bounds of its error."""
        b, begin, _ = self.sequences[number]
        value, bound = (np.zeros(self.pool.shape[1:]) for _ in range(2))
        for row in range(len(value)):
            position = row - len(value) + count
            old = self.first[number] + position
            if position >= 0:
                value[row], bound[row] = self.bounds.exact.z[b, begin + position], self.rounding[b, begin + position]
            elif old >= 0:
                value[row] = self.before[number, old]
        return value, bound


def _with_time(value, x):
    return value[:, None] if value is not None and x.ndim == 2 else value
