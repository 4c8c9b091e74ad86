"""Convolution modules. Parameter names, shapes and initial values follow the checkpoints of the original
implementations.

All three raise ValueError or TypeError when they are made, naming the argument, what was expected and what was given;
the function behind a module checks its inputs in the same way.
"""

import math

import torch
from torch import Tensor, nn

from ..ops import _select, _validate
from ..ops._validate import each, expect
from ..ops.conv import api, checks, reference
from ..ops.conv import step as steps
from ..ops.conv.schema import TapStep


class _Conv(nn.Module):
    """What the three convolutions share: checked options, the call of the function behind, and the decoding state.

    A subclass names the public function behind and the dimensions of its filters, in a step too, and computes in
    ``_operands`` the convolution's input, its gate, the filters and the bias.
    """

    gate_activation, activation = "sigmoid", None  # of modules that were saved before there was a choice

    def __init__(
        self, channels, kernel_size, heads, *, padding, dilation, gate_activation, activation, backend, softmax=False,
        renormalize=False, weight_dropout=0.0, **flags,
    ):  # fmt: skip
        super().__init__()
        name = type(self).__name__
        each(_validate.positive, name, channels=channels, kernel_size=kernel_size, heads=heads)
        expect(name, "heads", channels % heads == 0, f"a divisor of {channels}", heads)
        checks.kernel_options(name, softmax, renormalize, dilation, kernel_size)
        checks.padding_left(name, padding, kernel_size, dilation)
        _validate.probability(name, "weight_dropout", weight_dropout)
        each(_validate.flag, name, **flags)
        checks.finish(name, gate_activation, activation)
        _select.known(name, backend)
        self.channels, self.kernel_size, self.heads = channels, kernel_size, heads
        self.softmax, self.renormalize = softmax, renormalize
        self.padding, self.dilation = padding, dilation
        self.gate_activation, self.activation = gate_activation, activation
        self.weight_dropout, self.backend = weight_dropout, backend

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        gate: Tensor | None = None,
        out_gate: Tensor | None = None,
        residual: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        step: dict | None = None,
    ):
        """x [B,T,C] -> [B,T,C]; with ``return_state`` also the state after the last position.

        The arguments are those of the function behind. ``step`` holds the arguments of the method of that name, which
        calls the module, so that its hooks run for steps too.
        """
        if step is not None:
            return self._step(x, mask, **step)
        operands, finish = self._operands(x, mask, gate), self._finish(out_gate, residual)
        return self._convolve(operands, mask, cu_seqlens, initial_state, finish, return_state)

    def step(
        self, x: Tensor, state: Tensor, *, gate: Tensor | None = None, out_gate: Tensor | None = None,
        residual: Tensor | None = None, mask: Tensor | None = None, state_index: Tensor | None = None,
        position: Tensor | None = None, **serving: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The next position, x [B,C] -> [B,C], or the next ones, x [B,T,C], without gradient; ``state`` is updated in
        place. Causal padding only.

        mask: bool [B] or [B,T], False for padding, which the state takes as zeros. The rest, and ``serving``: slots,
        accepted, cu_seqlens, save_at, save_slots, as in the function behind.
        """
        step = dict(state=state, gate=gate, state_index=state_index, position=position, **serving)
        return self(x, mask, step=step | dict(out_gate=out_gate, residual=residual))

    def _finish(self, out_gate, residual) -> tuple:
        """What the functions behind take together."""
        return self.gate_activation, self.activation, out_gate, residual

    def _convolve(self, operands, mask, cu_seqlens, initial_state, finish, return_state):
        x, gate, weight, bias = operands
        return api.convolve(
            self._function, self._filters, self._settings(), x, weight, bias, None, gate, mask, cu_seqlens,
            initial_state, finish, return_state, self.backend,
        )  # fmt: skip

    def _step(
        self, x, mask, state, state_index=None, position=None, out_gate=None, residual=None, slots=None, accepted=None,
        cu_seqlens=None, save_at=None, save_slots=None, **operands,
    ):  # fmt: skip
        if self.padding not in ("causal", (self.kernel_size - 1) * self.dilation):
            raise RuntimeError(f"{type(self).__name__}.step: expected padding='causal', got {self.padding!r}")
        name, finish = f"{self._function}_step", self._finish(out_gate, residual)
        if mask is not None:
            _validate.tensor(name, "x", x)
            checks.mask(name, mask, x)
        x, gate, weight, bias = self._operands(x, mask, **operands)
        if mask is not None:
            x, gate = (None if value is None else torch.where(mask[..., None], value, 0.0) for value in (x, gate))
        softmax, renormalize, *_ = self._settings()
        operands = (x, state, weight, self.dilation, softmax, renormalize, bias, gate, state_index, position)
        serving = (slots, accepted, cu_seqlens, save_at, save_slots)
        args = TapStep(*operands, *checks.finish(name, *finish), *serving)
        return steps.step(name, self._step_filters, args, self.backend)

    def _settings(self) -> tuple:
        """softmax, renormalize, padding, dilation, weight_dropout and training of the function behind."""
        return self.softmax, self.renormalize, self.padding, self.dilation, self.weight_dropout, self.training

    def init_state(self, batch: int, *, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """The state before the first position: zeros [batch, (K-1)*dilation, C], in the dtype of the inputs.

        dtype, device: by default those of the first parameter or buffer of a float type, else torch's defaults.
        """
        name, held = type(self).__name__, [*self.parameters(), *self.buffers()]
        _validate.integer(name, "batch", batch, "an integer >= 0")
        expect(name, "batch", batch >= 0, "an integer >= 0", batch)
        if dtype is None:
            found = (value.dtype for value in held if value.dtype in _validate.FLOATS)
            dtype = next(found, torch.get_default_dtype())
        if dtype not in _validate.FLOATS:
            _validate.fail(name, "dtype", "float64, float32, bfloat16 or float16", dtype, TypeError)
        if device is None and held:
            device = held[0].device
        rows = (self.kernel_size - 1) * self.dilation
        return torch.zeros(batch, rows, self.channels, dtype=dtype, device=device)

    def _activations(self) -> list[str]:
        """Those that are not the usual ones, as ``extra_repr`` shows them."""
        options = (("gate_activation", "sigmoid"), ("activation", None))
        return [f"{name}={getattr(self, name)!r}" for name, usual in options if getattr(self, name) != usual]

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, kernel_size={self.kernel_size}, heads={self.heads}, padding={self.padding!r}"]
        for name, default in (("softmax", True), ("renormalize", False), ("dilation", 1), ("weight_dropout", 0.0)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        parts += self._activations()
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


class LightweightConv1d(_Conv):
    """Lightweight convolution: one filter per head, shared by all positions.

        y[b,t,c] = bias[c] + sum_j w[h,j] * x[b, t + dilation*j - P, c],   h = c // (C/H),   w = softmax_j(weight)

    Parameters: ``weight`` [H,1,K], Xavier uniform; ``bias`` [C], zeros, if ``bias=True``. Options as in
    ``lightweight_conv1d``; ``weight_dropout`` is active in training mode.
    Source: Wu et al. 2019; Tay et al. 2021, equation 2.
    """

    _function, _filters, _step_filters = "lightweight_conv1d", "[H,K]", "[H,K]"

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        heads: int = 1,
        *,
        softmax: bool = True,
        renormalize: bool = False,
        padding: str | int = "same",
        dilation: int = 1,
        weight_dropout: float = 0.0,
        gate_activation: str = "sigmoid",
        activation: str | None = None,
        bias: bool = False,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            channels, kernel_size, heads, softmax=softmax, renormalize=renormalize, padding=padding, dilation=dilation,
            weight_dropout=weight_dropout, gate_activation=gate_activation, activation=activation, backend=backend,
            bias=bias,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(heads, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _operands(self, x, mask, gate=None):
        checks.last_dimension(type(self).__name__, "x", x, "C", self.channels)
        return x, gate, self.weight.squeeze(1), self.bias


class DynamicConv1d(_Conv):
    """Dynamic convolution: every position predicts its own filters.

        y[b,t,c] = conv_bias[c] + sum_j w[b,t,h,j] * x[b, t + dilation*j - P, c],   h = c // (C/H),
        w[b,t] = softmax_j(weight_linear(query[b,t]))

    The query is by default the convolution's input, behind the gate. Parameters: ``weight_linear.weight``
    [H*K, query_size], ``weight_linear.bias`` [H*K] if ``bias=True``, ``conv_bias`` [C], zeros, if ``conv_bias=True``.
    With ``in_proj=True`` weight_linear has C + H*K outputs and a bias, and the first C replace x. ``mask_query=True``
    takes the query as 0 where ``mask`` is False, as a block does that zeroes padding before it predicts filters
    (fairseq); this matters to outputs at padding alone. Options as in ``dynamic_conv1d``; ``weight_dropout`` is active
    in training mode.
    Source: Wu et al. 2019; Tay et al. 2021, equation 3.
    """

    _function, _filters, _step_filters = "dynamic_conv1d", "[B,T,H,K]", "[B,H,K]"

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        heads: int = 1,
        *,
        query_size: int | None = None,
        in_proj: bool = False,
        softmax: bool = True,
        renormalize: bool = False,
        padding: str | int = "same",
        dilation: int = 1,
        weight_dropout: float = 0.0,
        gate_activation: str = "sigmoid",
        activation: str | None = None,
        bias: bool = False,
        conv_bias: bool = False,
        mask_query: bool = False,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            channels, kernel_size, heads, softmax=softmax, renormalize=renormalize, padding=padding, dilation=dilation,
            weight_dropout=weight_dropout, gate_activation=gate_activation, activation=activation, backend=backend,
            bias=bias, conv_bias=conv_bias, in_proj=in_proj, mask_query=mask_query,
        )  # fmt: skip
        name = type(self).__name__
        if query_size is not None:
            _validate.positive(name, "query_size", query_size)
        fits = not in_proj or query_size in (None, channels)
        expect(name, "query_size", fits, f"{channels} with in_proj", query_size)
        self.query_size, self.in_proj, self.mask_query = query_size or channels, in_proj, mask_query
        outputs = heads * kernel_size + (channels if in_proj else 0)
        self.weight_linear = nn.Linear(self.query_size, outputs, bias=bias or in_proj, device=device, dtype=dtype)
        self.conv_bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if conv_bias else None

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        self.weight_linear.reset_parameters()
        if self.conv_bias is not None:
            nn.init.zeros_(self.conv_bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        gate: Tensor | None = None,
        out_gate: Tensor | None = None,
        residual: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        step: dict | None = None,
    ):
        """x [B,T,C] -> [B,T,C]; ``query`` [B,T,query_size] predicts the filters instead of x. The rest as in
        ``LightweightConv1d``."""
        if step is not None:
            return self._step(x, mask, **step)
        operands, finish = self._operands(x, mask, gate, query), self._finish(out_gate, residual)
        return self._convolve(operands, mask, cu_seqlens, initial_state, finish, return_state)

    def step(
        self, x: Tensor, state: Tensor, *, query: Tensor | None = None, gate: Tensor | None = None,
        out_gate: Tensor | None = None, residual: Tensor | None = None, mask: Tensor | None = None,
        state_index: Tensor | None = None, position: Tensor | None = None, **serving: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As in ``LightweightConv1d``; ``query``, of x's shape but for its last dimension query_size, predicts the
        filters instead of x."""
        step = dict(state=state, query=query, gate=gate, state_index=state_index, position=position, **serving)
        return self(x, mask, step=step | dict(out_gate=out_gate, residual=residual))

    def _operands(self, x, mask, gate=None, query=None):
        checks.last_dimension(type(self).__name__, "x", x, "C", self.channels)
        if query is not None or self.query_size != self.channels:
            given = x if query is None else query
            checks.last_dimension(type(self).__name__, "query", given, "query_size", self.query_size)
        if query is None:
            if gate is not None:  # the filters need the product, so the convolution gets it ready-made
                x, gate = reference.gated_input(x, gate, None, checks.GATE_ACTIVATIONS[self.gate_activation]), None
            query = x
        if self.mask_query and mask is not None:
            query = torch.where(mask[..., None], query, 0.0)
        filters = self.weight_linear(query)
        if self.in_proj:
            x, filters = filters.split([self.channels, self.heads * self.kernel_size], dim=-1)
        return x, gate, filters.unflatten(-1, (self.heads, self.kernel_size)), self.conv_bias

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.query_size != self.channels:
            text += f", query_size={self.query_size}"
        return text + (", in_proj=True" if self.in_proj else "")


class DepthwiseConv1d(_Conv):
    """Depthwise convolution: one filter per channel, no softmax.

        y[b,t,c] = bias[c] + sum_j weight[c,0,j] * x[b, t + dilation*j - P, c]

    Parameters: ``weight`` [C,1,K] and ``bias`` [C], both uniform in +-1/sqrt(K), as in ``torch.nn.Conv1d`` with
    ``groups=channels``, whose checkpoints load unchanged. Options as in ``depthwise_conv1d``.
    Source: Chang et al. 2021 (depthwise terms of convolutional attention); Tay et al. 2021.
    """

    _function, _filters, _step_filters = "depthwise_conv1d", "[C,K]", "[C,K]"

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        padding: str | int = "same",
        dilation: int = 1,
        gate_activation: str = "sigmoid",
        activation: str | None = None,
        bias: bool = True,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            channels, kernel_size, channels, padding=padding, dilation=dilation, gate_activation=gate_activation,
            activation=activation, backend=backend, bias=bias,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        bound = 1 / math.sqrt(self.kernel_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _settings(self):
        return False, False, self.padding, self.dilation, 0.0, False

    def _operands(self, x, mask, gate=None):
        return x, gate, self.weight.squeeze(1), self.bias

    def step(
        self, x: Tensor, state: Tensor, *, gate: Tensor | None = None, out_gate: Tensor | None = None,
        residual: Tensor | None = None, mask: Tensor | None = None, state_index: Tensor | None = None,
        **serving: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As in ``LightweightConv1d``."""
        step = dict(state=state, gate=gate, state_index=state_index, **serving)
        return self(x, mask, step=step | dict(out_gate=out_gate, residual=residual))

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, padding={self.padding!r}"
        text += f", dilation={self.dilation}" if self.dilation != 1 else ""
        text += ", bias=False" if self.bias is None else ""
        text = ", ".join([text, *self._activations()])
        return text + (f", backend={self.backend!r}" if self.backend != "auto" else "")
