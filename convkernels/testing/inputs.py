"""Problems and their tensors: one record describes a call completely, so a failure is replayed by printing it."""

from dataclasses import dataclass, replace

import torch

LAYOUTS = ("contiguous", "swap01", "swap_last", "step2", "step2_time", "offset1", "expanded", "guarded", "sliced")
WEIGHT_KINDS = ("light", "dynamic", "row")

# Values come from a fixed pool: drawing per tensor would cost more than a small kernel call.
_POOL = torch.randn(1 << 16, dtype=torch.float64, generator=torch.Generator().manual_seed(20260101))
_PRIME = 65521  # the largest below the pool's size: of what is repeated, no two rows are equal
_POOL_OF = {dtype: _POOL.to(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def values(shape, dtype, seed):
    """Normally distributed values of a shape on the default device, a pure function of (shape, dtype, seed)."""
    count = 1
    for size in shape:
        count *= size
    pool = _POOL_OF[dtype]
    if count > pool.numel():
        pool = pool[:_PRIME].repeat(count // _PRIME + 2)
        start = (seed * 7919) % _PRIME
    else:
        start = (seed * 7919) % max(pool.numel() - count, 1)
    chosen = pool[start : start + count]
    return chosen.reshape(shape).to(torch.get_default_device())


def _garbage(shape, dtype):
    """Storage around and between the elements: NaN, or values that would be noticed."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, True if dtype == torch.bool else 99, dtype=dtype)


def arrange(tensor, layout):
    """The same values (for "expanded": those of row 0, repeated) with the strides of a layout, in storage filled with
    NaN.

    contiguous; swap01 (storage TBC for a BTC tensor); swap_last (storage BCT); step2 (every second element of the last
    axis); step2_time (of axis 1, or 0); offset1 (storage offset of one element, so not aligned); expanded (stride 0
    along axis 0); guarded (the middle of a buffer with a margin in every direction); sliced (of the last axis, three
    elements of a buffer before it and two behind; a stride of no meaning for an axis 0 of one element).
    """
    if tensor.dim() == 0 or layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    shape, last = list(tensor.shape), tensor.dim() - 1
    if layout == "swap01" and last > 0:
        return tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    if layout == "swap_last" and last > 0:
        return tensor.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    if layout == "expanded":
        return tensor[:1].clone().expand(shape) if shape[0] else tensor.clone()
    if layout == "offset1":
        flat = _garbage((tensor.numel() + 1,), tensor.dtype)
        view = flat[1:].view(shape)
    elif layout == "guarded":
        margin = 3
        view = _garbage([size + 2 * margin for size in shape], tensor.dtype)
        for axis in range(tensor.dim()):
            view = view.narrow(axis, margin, shape[axis])
    elif layout == "sliced":
        view = _garbage([*shape[:-1], shape[-1] + 5], tensor.dtype)[..., 3:-2]
        if shape[0] == 1:
            view = view.as_strided(shape, (view.stride(0) + 1, *view.stride()[1:]))
    else:
        axis = min(1, last) if layout == "step2_time" else last
        doubled = list(shape)
        doubled[axis] *= 2
        view = _garbage(doubled, tensor.dtype)[(slice(None),) * axis + (slice(0, None, 2),)]
    view.copy_(tensor)
    return view


def row_bytes(tensor, axis):
    """Bytes, 16 at most, at which rows of a [batch, time, channels] tensor along an axis can be read; 0 where they do
    not lie side by side. The storage is aligned.
    """
    steps = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if (tensor.stride(2) if axis == 2 else steps[1]) != 1:
        return 0
    numbers = tensor.storage_offset() | steps[0] | steps[3 - axis] | tensor.shape[axis]
    bits = numbers * tensor.dtype.itemsize | 16
    return bits & -bits


class _Derived:
    """What problems of a sequence and of a step derive from their fields."""

    @property
    def channels(self):
        return self.heads * self.head_size

    @property
    def span(self):
        return (self.taps - 1) * self.dilation

    def with_(self, **changes):
        return replace(self, **changes)

    def _make(self, shape, salt, layout):
        return arrange(values(shape, self.dtype, self.seed + salt), layout)

    def _weight(self, shape, salt):
        return arrange(values(shape, self.weight_dtype, self.seed + salt), self.weight_layout)

    def _bias(self, salt):
        if not self.bias:
            return None
        dtype = self.bias_dtype or self.weight_dtype
        return arrange(values((self.channels,), dtype, self.seed + salt), self.weight_layout)


@dataclass(frozen=True)
class Problem(_Derived):
    """One call of the op family; see docs/semantics.md for the relation.

    kind: "light" weight [H,K], "dynamic" [B,T,H,K], "row" [B,1,H,K]. lengths: lengths of packed sequences (their sum
    replaces `length`). padding_mask: 0 none, 1 ragged tail, 2 random holes, 3 everything masked.
    """

    batch: int = 2
    length: int = 9
    heads: int = 2
    head_size: int = 3
    taps: int = 4
    left: int = 2
    dilation: int = 1
    kind: str = "light"
    softmax: bool = False
    renormalize: bool = False
    dropout: float = 0.0
    bias: bool = False
    gate: bool = False
    gate_activation: int = 1
    activation: int = 0
    out_gate: bool = False
    residual: bool = False
    padding_mask: int = 0
    lengths: tuple = ()
    state: bool = False
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    seed: int = 0

    def __post_init__(self):
        if self.lengths:
            object.__setattr__(self, "length", sum(self.lengths))

    def _mask(self):
        if self.padding_mask == 0:
            return None
        time = torch.arange(self.length)
        if self.padding_mask == 1:
            ends = torch.arange(self.batch)[:, None] % 3 * (self.length // 3)
            return time[None, :] < self.length - ends
        if self.padding_mask == 2:
            return values((self.batch, self.length), torch.float64, self.seed + 5) > -0.5
        return torch.zeros(self.batch, self.length, dtype=torch.bool)

    def weight_shape(self):
        rows = {"light": (), "dynamic": (self.batch, self.length), "row": (self.batch, 1)}[self.kind]
        return (*rows, self.heads, self.taps)

    def tensors(self):
        """The op's tensor arguments by name (None where absent) and the cotangent `grad`."""
        shape = (self.batch, self.length, self.channels)
        packed = len(self.lengths) if self.lengths else 1
        states = (self.batch * packed, self.span, self.channels)
        mask_layout = "step2" if self.layout == "step2" else "contiguous"
        return {
            "x": self._make(shape, 1, self.layout),
            "weight": self._weight(self.weight_shape(), 2),
            "bias": self._bias(3),
            "gate": self._make(shape, 4, self.layout) if self.gate else None,
            "mask": arrange(self._mask(), mask_layout) if self.padding_mask else None,
            "cu_seqlens": torch.tensor([0, *self.lengths]).cumsum(0) if self.lengths else None,
            "initial_state": self._make(states, 6, self.layout) if self.state else None,
            "seed": torch.tensor([self.seed * 0x9E3779B9 + 7]) if self.dropout > 0 else None,
            "out_gate": self._make(shape, 10, self.grad_layout) if self.out_gate else None,
            "residual": self._make(shape, 11, self.layout) if self.residual else None,
            "grad": self._make(shape, 8, self.grad_layout),
        }

    def op_arguments(self, t):
        """Arguments of the ops tap_conv and of the oracle, in schema order."""
        return (
            t["x"], t["weight"], self.left, self.dilation, self.softmax, self.renormalize, self.dropout, t["seed"],
            t["bias"], t["gate"], t["mask"], t["cu_seqlens"], t["initial_state"], self.gate_activation,
            self.activation, t["out_gate"], t["residual"],
        )  # fmt: skip

    def activation_grad_arguments(self, t, needs=3):
        """Arguments of the op tap_activation_grad, in schema order."""
        return (t["grad"], *self.op_arguments(t)[:-1], needs)

    def plan_facts(self, backward):
        """What a call with these tensors looks like to the plans of the cuda backend."""
        shape = (self.batch, self.length, self.channels)
        with torch.device("meta"):
            x, grad = (arrange(torch.empty(shape, dtype=self.dtype), at) for at in (self.layout, self.grad_layout))
        # Results lie as x does, or one number after the other; so does a copy of a state that does not.
        tensors = [x, torch.empty_like(x), *([grad] if backward or self.out_gate else [])]
        aligned = not (self.state and self.span and self.layout == "offset1")
        return {
            "batch": self.batch, "time": self.length, "channels": self.channels, "heads": self.heads,
            "taps": self.taps, "dilation": self.dilation, "dtype": str(self.dtype).removeprefix("torch."),
            "per_position": self.kind == "dynamic", "renormalize": self.renormalize,
            "per_batch": self.kind != "light", "gate": self.gate, "packed": bool(self.lengths), "state": self.state,
            "channel_bytes": min(16 if aligned else self.dtype.itemsize, *(row_bytes(t, 2) for t in tensors)),
            "time_bytes": min(row_bytes(t, 1) for t in tensors), "weight_bytes": self.weight_dtype.itemsize,
        }  # fmt: skip

    def grad_arguments(self, t, needs=31):
        """Arguments of the op tap_grad, in schema order."""
        return (
            t["grad"], t["x"], t["weight"], self.left, self.dilation, self.softmax, self.renormalize, self.dropout,
            t["seed"], t["gate"], t["mask"], t["cu_seqlens"], t["initial_state"], self.gate_activation, needs,
        )  # fmt: skip


@dataclass(frozen=True)
class StepProblem(_Derived):
    """One call of tap_step. length: T of x [B,T,C], 0 for x [B,C]. lengths: those of packed sequences, which replace
    `batch` and `length`. extra: rows of a state beyond the span. indexed: rows continue from permuted and duplicated
    states. slots: 0 none, 1 of a pool, 2 with sequences that have none. position: 0 none, 1 one for all, 2 per
    sequence. saves: how many states are left on the way. wide: indices are int64, not int32.
    """

    batch: int = 3
    length: int = 0
    lengths: tuple[int, ...] = ()
    heads: int = 2
    head_size: int = 3
    taps: int = 4
    dilation: int = 1
    extra: int = 0
    kind: str = "light"
    softmax: bool = False
    renormalize: bool = False
    bias: bool = False
    gate: bool = False
    gate_activation: int = 1
    activation: int = 0
    out_gate: bool = False
    residual: bool = False
    indexed: bool = False
    slots: int = 0
    accepted: bool = False
    saves: int = 0
    position: int = 0
    wide: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    state_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    seed: int = 0

    def tensors(self):
        """The op's tensor arguments by name, None where absent."""
        sequences = len(self.lengths) or self.batch
        time = (sum(self.lengths),) if self.lengths else (self.length,) if self.length else ()
        leading = (1 if self.lengths else self.batch, *time)
        shape, filters, rows = (*leading, self.channels), (self.heads, self.taps), sequences
        weight_shape = filters if self.kind == "light" else (*leading, *filters)
        index = position = slots = accepted = bounds = save_at = save_slots = None
        if self.indexed:
            index = self._integers(5, sequences, max(sequences, 1))
        if self.slots:
            rows = sequences + self.saves + 3
            free = torch.argsort(values((rows,), torch.float64, self.seed + 12))
            slots, save_slots = free[:sequences], free[sequences : sequences + self.saves]
            if self.slots == 2:
                slots = torch.where(self._integers(13, sequences, 3) > 0, slots, -1 - slots)
        if self.lengths:
            bounds = torch.tensor((0, *self.lengths)).cumsum(0)
        if self.saves:
            save_at = self._integers(15, self.saves, sum(self.lengths)) + 1
        if self.accepted:
            newest = torch.tensor(self.lengths) if self.lengths else max(self.length, 1)
            accepted = newest - self._integers(14, sequences, self.extra + 1)
        if self.position:
            position = self._integers(9, sequences if self.position == 2 else 1, self.span + 1)
        return {
            "x": self._make(shape, 1, self.layout),
            "state": self._make((rows, self.span + self.extra, self.channels), 2, self.state_layout),
            "weight": self._weight(weight_shape, 3),
            "bias": self._bias(4),
            "gate": self._make(shape, 6, self.layout) if self.gate else None,
            "state_index": self._indices(index),
            "position": position,
            "out_gate": self._make(shape, 10, self.layout) if self.out_gate else None,
            "residual": self._make(shape, 11, self.layout) if self.residual else None,
            "slots": self._indices(slots),
            "accepted": self._indices(accepted),
            "cu_seqlens": self._indices(bounds),
            "save_at": self._indices(save_at),
            "save_slots": self._indices(save_slots if self.saves else None),
        }

    def _integers(self, salt, count, below):
        """Drawn from 0 to below - 1."""
        drawn = values((count,), torch.float64, self.seed + salt)
        return (drawn.abs() * 1000).long() % below

    def _indices(self, value):
        return value if self.wide or value is None else value.int()

    def op_arguments(self, t):
        """Arguments of the op tap_step and of the oracle, in schema order."""
        return (
            t["x"], t["state"], t["weight"], self.dilation, self.softmax, self.renormalize, t["bias"], t["gate"],
            t["state_index"], t["position"], self.gate_activation, self.activation, t["out_gate"], t["residual"],
            t["slots"], t["accepted"], t["cu_seqlens"], t["save_at"], t["save_slots"],
        )  # fmt: skip
