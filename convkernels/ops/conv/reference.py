"""The readable definition of the convolution family, in plain PyTorch; the oracle of all tests.

    y[b,t,c] = residual[b,t,c] + out_gate[b,t,c] * act(a[b,t,c])
    a[b,t,c] = bias[c] + sum_j w'[b,t,h(c),j] * z[b, t + dilation*j - left, c],      h(c) = c // (C/H)
    z[b,s,c] = x[b,s,c] * gate_act(gate[b,s,c]), and 0 where mask[b,s] is False
    w'       = dropout(softmax_j(weight)), each part optional

act and gate_act are the identity, the sigmoid or SiLU (``ACTIVATIONS``).

Everything is computed in float32 (float64 for float64) and rounded once, at the end. ``source_rows`` is the one
place that says which input a tap reads; the forward pass gathers by that table and the gradient scatters by it.
Sources: Wu et al. 2019 (lightweight and dynamic convolution), Tay et al. 2021, Chang et al. 2021.
"""

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype, dropout_mask
from .._validate import fail
from .checks import reach
from .schema import ACTIVATIONS, NONE, SIGMOID, TapActivationGrad, TapConv, TapGrad, TapStep

# The pieces of the definition are differentiable; the double backward is built from them too.


def sequence_count(cu_seqlens: Tensor | None) -> int:
    """Sequences in a row of the batch."""
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def sequence_bounds(T: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Number, start and end of the sequence each position 0..T-1 belongs to (int64 [T]); empty sequences are
    skipped."""
    position = torch.arange(T, device=device)
    if cu_seqlens is None:
        return torch.zeros_like(position), torch.zeros_like(position), torch.full_like(position, T)
    cu = cu_seqlens.to(torch.int64)
    sequence = torch.searchsorted(cu, position, right=True) - 1
    return sequence, cu[sequence], cu[sequence + 1]


def source_rows(
    T: int,
    K: int,
    left: int,
    dilation: int,
    device: torch.device,
    cu_seqlens: Tensor | None = None,
    state_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Which row each tap of each output position reads, int64 [T,K], and whether that row exists, bool [T,K].

    Rows are numbered as ``extend`` lays them out: the T inputs, then the ``state_rows`` rows of each sequence's initial
    state (None: there is no state), then one row of zeros, which stands for everything outside.
    """
    reach("tap_conv", dilation, K)
    sequence, start, end = (bound[:, None] for bound in sequence_bounds(T, cu_seqlens, device))
    position = torch.arange(T, device=device)[:, None] + dilation * torch.arange(K, device=device) - left
    inside = (position >= start) & (position < end)
    rows = 0 if state_rows is None else state_rows * sequence_count(cu_seqlens)
    source = torch.where(inside, position, T + rows)
    if state_rows is not None:
        before = position < start
        source = torch.where(before, T + sequence * state_rows + state_rows + position - start, source)
        inside = inside | before
    return source, inside


def extend(z: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[B,T,C] inputs, the rows of the initial state of each of a row's sequences, and a row of zeros, along axis 1."""
    B, _, C = z.shape
    zero = z.new_zeros(B, 1, C)
    if initial_state is None:
        return torch.cat([z, zero], 1)
    rows = sequence_count(cu_seqlens) * initial_state.shape[1]
    return torch.cat([z, initial_state.to(z.dtype).reshape(B, rows, C), zero], 1)


def check_activations(args) -> None:
    """That the numbers of an operator's call stand for something."""
    for argument in ("gate_activation", "activation"):
        number = getattr(args, argument, NONE)
        if not 0 <= number < len(ACTIVATIONS):
            fail(type(args).__name__, argument, "0, 1 or 2", number)


def activated(value: Tensor, activation: int) -> Tensor:
    """act(value)."""
    if activation == NONE:
        return value
    return torch.sigmoid(value) if activation == SIGMOID else value * torch.sigmoid(value)


def slope(value: Tensor, activation: int) -> Tensor:
    """The derivative of act."""
    if activation == NONE:
        return torch.ones_like(value)
    s = torch.sigmoid(value)
    return s * (1 - s) if activation == SIGMOID else s * (1 + value * (1 - s))


def gated_input(x: Tensor, gate: Tensor | None, mask: Tensor | None, activation: int) -> Tensor:
    """z. Masked x and gate are replaced *before* the product: 0 * NaN would leak into the result or the gradients."""
    if mask is not None:
        x = torch.where(mask[..., None], x, 0.0)
        gate = None if gate is None else torch.where(mask[..., None], gate, 0.0)
    return x if gate is None else x * activated(gate, activation)


def finished(total: Tensor, args: TapConv | TapStep) -> Tensor:
    """y from the sum a, both in the accumulation type."""
    y = activated(total, args.activation)
    y = y if args.out_gate is None else y * args.out_gate.to(y.dtype)
    return y if args.residual is None else y + args.residual.to(y.dtype)


def tap_weights(weight: Tensor, inside: Tensor | None, args) -> Tensor:
    """w' as [B|1, T|1, H, K] from weight [H,K] or [B,T|1,H,K]; args: an operator's, for the settings."""
    w = soft_weights(weight, inside, args)
    return w * dropout_mask(args.seed, args.dropout, _four(weight.shape), w.dtype) if args.dropout > 0 else w


def soft_weights(weight: Tensor, inside: Tensor | None, args) -> Tensor:
    """The same before dropout."""
    w = weight if weight.dim() == 4 else weight[None, None]
    if args.softmax and args.renormalize:
        real = inside[None, :, None, :]
        some = real.any(-1, keepdim=True)
        # A position whose taps are all outside gets finite logits and weights of 0; softmax of -inf alone is NaN.
        logits = torch.where(real, w, float("-inf"))
        w = torch.where(some, torch.softmax(torch.where(some, logits, 0.0), -1), 0.0)
    elif args.softmax:
        w = torch.softmax(w, -1)
    return w


def per_channel(w: Tensor, C: int) -> Tensor:
    """[..., H] -> [..., C]: each value for the C/H channels of its head."""
    return w.repeat_interleave(C // w.shape[-1], -1)


def finish_gradients(total: Tensor, grad: Tensor, out_gate: Tensor | None, activation: int) -> tuple[Tensor, Tensor]:
    """Of the sum a and of out_gate; all in the accumulation type."""
    inside = grad if out_gate is None else grad * out_gate.to(grad.dtype)
    return inside * slope(total, activation), grad * activated(total, activation)


def _setting(args: TapConv | TapActivationGrad | TapGrad):
    """What forward and gradient share: the accumulation type, the source table, z's rows (of x and gate masked), w'."""
    check_activations(args)
    x, gate, state, dtype = args.x, args.gate, args.initial_state, accumulate_dtype(args.x.dtype)
    state_rows = None if state is None else state.shape[1]
    T, K = x.shape[1], args.weight.shape[-1]
    source, inside = source_rows(T, K, args.left, args.dilation, x.device, args.cu_seqlens, state_rows)
    z = gated_input(x.to(dtype), None if gate is None else gate.to(dtype), args.mask, args.gate_activation)
    w = tap_weights(args.weight.to(dtype), inside, args)
    return dtype, source, inside, extend(z, state, args.cu_seqlens), w


def tap_conv(args: TapConv) -> Tensor:
    """The forward pass."""
    return _like(convolved(args), args.x)


def convolved(args: TapConv) -> Tensor:
    """y before it is rounded, in any layout."""
    return finished(_sum(args), args)


def _sum(args: TapConv | TapActivationGrad) -> Tensor:
    """The sum a."""
    x, weight, bias = args.x, args.weight, args.bias
    dtype, source, _, rows, w = _setting(args)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for j in range(weight.shape[-1]):
        # Not in place: programs that are decomposed into this definition have to be functional.
        y = y + per_channel(w[..., j], x.shape[2]) * rows.index_select(1, source[:, j])
    return y if bias is None else y + bias.to(dtype)


def tap_activation_grad(args: TapActivationGrad) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the sum a, which is computed again, and to out_gate, those that ``needs`` asks for, in
    x's dtype and layout."""
    total, x = _sum(args), args.x
    gradients = finish_gradients(total, args.grad.to(total.dtype), args.out_gate, args.activation)
    return tuple(_like(g, x) if asked else x.new_empty(0) for g, asked in zip(gradients, args.wanted, strict=True))


def tap_grad(args: TapGrad) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, weight, bias, gate, initial_state, those that ``needs`` asks for. Each has the dtype
    of its input, but that of the bias, which is not given, the accumulation type."""
    x, weight, gate, mask, initial_state, wanted = (
        args.x, args.weight, args.gate, args.mask, args.initial_state, args.wanted
    )  # fmt: skip
    (_, T, C), (H, K) = x.shape, weight.shape[-2:]
    dtype, source, inside, rows, w = _setting(args)
    g = args.grad.to(dtype)
    grad_x, grad_gate, grad_state = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    grad_weight, grad_bias = weight.new_empty(0), x.new_empty(0, dtype=dtype)

    if wanted.x or wanted.gate or wanted.initial_state:
        grad_rows = torch.zeros_like(rows)
        for j in range(K):
            grad_rows.index_add_(1, source[:, j], per_channel(w[..., j], C) * g)
        grad_z = grad_rows[:, :T]
        if mask is not None:
            grad_z = torch.where(mask[..., None], grad_z, 0.0)
        if initial_state is not None and wanted.initial_state:
            grad_state = grad_rows[:, T:-1].reshape(initial_state.shape).to(initial_state.dtype, copy=True)
        if gate is not None:
            gate_in, act = gate.to(dtype), args.gate_activation
            if wanted.gate:
                grad_gate = grad_z * x.to(dtype) * slope(gate_in, act)
                grad_gate = _like(grad_gate if mask is None else torch.where(mask[..., None], grad_gate, 0.0), gate)
            grad_z = grad_z * activated(gate_in, act)
        if wanted.x:
            grad_x = _like(grad_z if mask is None else torch.where(mask[..., None], grad_z, 0.0), x)

    if wanted.weight:
        grad_w = torch.empty(w.shape, dtype=dtype, device=x.device)
        for j in range(K):
            products = (g * rows.index_select(1, source[:, j])).unflatten(2, (H, C // H)).sum(-1)
            grad_w[..., j] = products.sum_to_size(w.shape[:-1])
        if args.dropout > 0:
            grad_w = grad_w * dropout_mask(args.seed, args.dropout, _four(weight.shape), dtype)
        if args.softmax:
            p = soft_weights(weight.to(dtype), inside, args)
            grad_w = p * (grad_w - (grad_w * p).sum(-1, keepdim=True))
        grad_weight = grad_w.sum_to_size(_four(weight.shape)).reshape(weight.shape).to(weight.dtype).contiguous()
    if wanted.bias:
        grad_bias = g.sum((0, 1))
    return grad_x, grad_weight, grad_bias, grad_gate, grad_state


def tap_step(args: TapStep) -> Tensor:
    """The next positions of the causal convolution; ``state`` [S,W,C] is updated.

    x is [B,C], one position for each of B sequences, [B,T,C], or, with cu_seqlens, [1,T,C]. Positions of a sequence are
    numbered from the first of x on. After n of them row W - n + s of its state holds position s. Before x, row
    W - n + accepted + s holds position s < 0, n those of x, and accepted = n by default. Rows for which the old state
    held nothing become 0. Of the window, the rows from position -dilation*(K-1) on, tap j of output t reads row
    t + dilation*j.
    """
    check_activations(args)
    reach("tap_step", args.dilation, args.weight.shape[-1])
    step, cu = _with_time(args), args.cu_seqlens
    N = args.x.shape[0] if cu is None else cu.shape[0] - 1
    rows, W, C = args.state.shape
    span = args.dilation * (args.weight.shape[-1] - 1)
    if W < span or args.x.shape[-1] != C or (args.slots is None and rows != N):
        expected = f"[{'slots' if args.slots is not None else N}, at least dilation * (taps - 1) = {span}, channels]"
        fail("tap_step", "state", expected, tuple(args.state.shape))
    y = torch.zeros(step.x.shape, dtype=accumulate_dtype(args.x.dtype), device=args.x.device)
    if cu is None:
        y[:] = _stepped(step, [])
    else:
        bounds = cu.tolist()
        saves = [] if args.save_at is None else list(zip(args.save_at.tolist(), args.save_slots.tolist(), strict=True))
        for n, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            inside = [(at - begin, slot) for at, slot in saves if begin < at <= end and slot >= 0]
            y[:, begin:end] = _stepped(_sequence(step, n, begin, end), inside)
    return _like(y.view(args.x.shape), args.x)


def _with_time(args: TapStep) -> TapStep:
    """With a dimension T, also of the weight."""
    if args.x.dim() == 3:
        return args._replace(weight=args.weight[None, None]) if args.weight.dim() == 2 else args
    weight = args.weight[None, None] if args.weight.dim() == 2 else args.weight[:, None]
    given = {name: getattr(args, name) for name in _LIKE_X if getattr(args, name) is not None}
    return args._replace(weight=weight, **{name: value[:, None] for name, value in given.items()})


def _sequence(args: TapStep, n: int, begin: int, end: int) -> TapStep:
    """The step of one packed sequence."""
    part = {name: getattr(args, name)[:, begin:end] for name in _LIKE_X if getattr(args, name) is not None}
    if args.weight.shape[1] > 1:
        part["weight"] = args.weight[:, begin:end]
    if args.slots is None:
        part["state"] = args.state[n : n + 1]
    for name in ("slots", "accepted", "position"):
        value = getattr(args, name)
        if value is not None and value.shape[0] > 1:
            part[name] = value[n : n + 1]
    return args._replace(**part)


_LIKE_X = ("x", "gate", "out_gate", "residual")


def _stepped(args: TapStep, saves: list[tuple[int, int]]) -> Tensor:
    """y of x [B,T,C] in the accumulation type. saves: numbers of positions, and slots for the states after them."""
    x, state, position, device = args.x, args.state, args.position, args.x.device
    (B, T, C), (S, W, _), (H, K) = x.shape, state.shape, args.weight.shape[-2:]
    dtype, span = accumulate_dtype(x.dtype), args.dilation * (K - 1)
    z = gated_input(x.to(dtype), None if args.gate is None else args.gate.to(dtype), None, args.gate_activation)
    slots, skipped = torch.arange(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    if args.slots is not None:
        skipped = (args.slots < 0) | (args.slots >= S)
        slots = torch.where(skipped, 0, args.slots.long())
    source = slots if args.state_index is None else args.state_index
    accepted = torch.full_like(slots, T) if args.accepted is None else args.accepted.long()
    # A row of zeros, and those of the old state.
    held = torch.cat([state.new_zeros(B, 1, C), state.index_select(0, source) if S else state.new_zeros(B, W, C)], 1)

    def before(count: int) -> Tensor:
        """The last positions before x, [B,count,C]."""
        row = 1 + W - T + accepted[:, None] + torch.arange(-count, 0, device=device)
        return held.gather(1, row.clamp(min=0, max=W)[..., None].expand(-1, -1, C))

    def after(n: int) -> Tensor:
        """The state after n positions."""
        return torch.cat([before(max(W - n, 0)), z[:, max(n - W, 0) : n].to(state.dtype)], 1)

    window = torch.cat([before(span).to(dtype), z], 1)
    offset = torch.arange(T, device=device)[:, None] + args.dilation * torch.arange(K, device=device)
    inside = torch.ones(B, T, K, dtype=torch.bool, device=device)
    if position is not None:
        inside = inside & (offset >= span - position[:, None, None])
    w = args.weight.to(dtype).expand(B, T, H, K).reshape(1, B * T, H, K)
    w = soft_weights(w, inside.view(B * T, K), args).view(B, T, H, K)
    y = torch.zeros_like(z)
    for j in range(K):
        y += per_channel(w[..., j], C) * window[:, offset[:, j]]
    y = finished(y if args.bias is None else y + args.bias.to(dtype), args)
    new = after(T)
    for n, slot in saves:
        if not skipped.any():
            state[slot] = after(n)[0]
    state[slots[~skipped]] = new[~skipped]
    return torch.where(skipped[:, None, None], 0, y)


def _four(shape: torch.Size) -> tuple[int, ...]:
    """A weight's shape as [B|1, T|1, H, K]."""
    return tuple(shape) if len(shape) == 4 else (1, 1, *shape)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """value rounded to x's type in a new tensor of x's layout."""
    return torch.empty_like(x).copy_(value)
