"""Convolution modules. Parameter names, shapes and initial values follow the checkpoints of the original
implementations."""

import math

import torch
from torch import Tensor, nn

from ..ops import _select, _validate
from ..ops.conv import api, checks, step


class _Conv(nn.Module):
    """What the three convolutions share: the options of the function behind them, and the decoding state."""

    def __init__(
        self, channels, kernel_size, heads, softmax, renormalize, padding, dilation, weight_dropout, backend, **biases
    ):
        super().__init__()
        name = type(self).__name__
        for argument, value in (("channels", channels), ("kernel_size", kernel_size), ("heads", heads)):
            _validate.positive(name, argument, value)
        if channels % heads != 0:
            _validate.fail(name, "heads", f"a divisor of {channels}", heads)
        checks.kernel_options(name, softmax, renormalize, dilation, kernel_size)
        checks.padding_left(name, padding, kernel_size, dilation)
        _validate.probability(name, "weight_dropout", weight_dropout)
        for argument, value in biases.items():
            _validate.flag(name, argument, value)
        _select.known(name, backend)
        self.channels, self.kernel_size, self.heads = channels, kernel_size, heads
        self.softmax, self.renormalize = softmax, renormalize
        self.padding, self.dilation = padding, dilation
        self.weight_dropout, self.backend = weight_dropout, backend

    def init_state(self, batch: int, *, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """The state before the first position: zeros [batch, (K-1)*dilation, C], in the dtype of the inputs.

        dtype, device: by default those of the first parameter or buffer of a float type, else torch's defaults.
        """
        name, held = type(self).__name__, [*self.parameters(), *self.buffers()]
        _validate.integer(name, "batch", batch, "an integer >= 0")
        if batch < 0:
            _validate.fail(name, "batch", "an integer >= 0", batch)
        if dtype is None:
            found = (value.dtype for value in held if value.dtype in _validate.FLOATS)
            dtype = next(found, torch.get_default_dtype())
        if dtype not in _validate.FLOATS:
            _validate.fail(name, "dtype", "float64, float32, bfloat16 or float16", dtype, TypeError)
        if device is None and held:
            device = held[0].device
        rows = (self.kernel_size - 1) * self.dilation
        return torch.zeros(batch, rows, self.channels, dtype=dtype, device=device)

    def _expect(self, argument: str, value, letters: str, size: int) -> None:
        """That a tensor has the size it must have last, which the function behind cannot know."""
        if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[-1] != size):
            _validate.fail(type(self).__name__, argument, f"a last dimension of {letters} = {size}", value)

    @staticmethod
    def _hide(x: Tensor, gate: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x and gate [B,C], zero where mask [B] is False, whatever is there."""
        if mask is None:
            return x, gate
        real = mask[:, None]
        return torch.where(real, x, 0.0), None if gate is None else torch.where(real, gate, 0.0)

    def _options(self) -> dict:
        return dict(
            softmax=self.softmax,
            renormalize=self.renormalize,
            padding=self.padding,
            dilation=self.dilation,
            weight_dropout=self.weight_dropout,
            training=self.training,
            backend=self.backend,
        )

    def _step_options(self) -> dict:
        if self.padding not in ("causal", (self.kernel_size - 1) * self.dilation):
            raise RuntimeError(f"{type(self).__name__}.step: expected padding='causal', got {self.padding!r}")
        return dict(softmax=self.softmax, renormalize=self.renormalize, dilation=self.dilation, backend=self.backend)

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, kernel_size={self.kernel_size}, heads={self.heads}, padding={self.padding!r}"]
        for name, default in (("softmax", True), ("renormalize", False), ("dilation", 1), ("weight_dropout", 0.0)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


class LightweightConv1d(_Conv):
    """Lightweight convolution (Wu et al. 2019; Tay et al. 2021, equation 2): one kernel per head, shared by all
    positions.

    Parameters: ``weight`` [H,1,K], Xavier uniform; ``bias`` [C], zeros, if ``bias=True``. Options as in
    ``lightweight_conv1d``; ``weight_dropout`` is active in training mode.
    """

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
        bias: bool = False,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            channels, kernel_size, heads, softmax, renormalize, padding, dilation, weight_dropout, backend, bias=bias
        )
        self.weight = nn.Parameter(torch.empty(heads, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        gate: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        step: dict | None = None,
    ):
        """x [B,T,C] -> [B,T,C]; with ``return_state`` also the state after the last position. ``step`` holds the
        arguments of the method of that name, which calls the module, so that its hooks run for steps too."""
        self._expect("x", x, "C", self.channels)
        if step is not None:
            return self._step(x, mask, **step)
        return api.lightweight_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            gate=gate,
            mask=mask,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_state=return_state,
            **self._options(),
        )

    def step(
        self,
        x: Tensor,
        state: Tensor,
        *,
        gate: Tensor | None = None,
        mask: Tensor | None = None,
        state_index: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """One position, x [B,C] -> [B,C], without gradient; ``state`` is updated in place. Causal padding only. mask:
        bool [B], False for padding, which the state takes as zeros."""
        return self(x, mask, step=dict(state=state, gate=gate, state_index=state_index, position=position))

    def _step(self, x, mask, state, gate=None, state_index=None, position=None):
        x, gate = self._hide(x, gate, mask)
        return step.lightweight_conv1d_step(
            x,
            state,
            self.weight.squeeze(1),
            self.bias,
            gate=gate,
            state_index=state_index,
            position=position,
            **self._step_options(),
        )


class DynamicConv1d(_Conv):
    """Dynamic convolution (Wu et al. 2019; Tay et al. 2021, equation 3): every position predicts its own kernels.

    ``weight_linear`` maps the query (by default the convolution's input) at an output position to that position's H*K
    taps. Parameters: ``weight_linear.weight`` [H*K, query_size], ``weight_linear.bias`` if ``bias=True``, ``conv_bias``
    [C], zeros, if ``conv_bias=True``. With ``in_proj=True`` weight_linear has C + H*K outputs and a bias, and the
    first C replace x. ``mask_query=True`` takes the query as 0 where ``mask`` is False, as a block does that zeroes
    padding before it predicts kernels (fairseq); this matters to outputs at padding alone. Options as in
    ``dynamic_conv1d``; ``weight_dropout`` is active in training mode.
    """

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
        bias: bool = False,
        conv_bias: bool = False,
        mask_query: bool = False,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            channels, kernel_size, heads, softmax, renormalize, padding, dilation, weight_dropout, backend, bias=bias,
            conv_bias=conv_bias,
        )  # fmt: skip
        name = type(self).__name__
        for argument, value in (("in_proj", in_proj), ("mask_query", mask_query)):
            _validate.flag(name, argument, value)
        if query_size is not None:
            _validate.positive(name, "query_size", query_size)
        if in_proj and query_size not in (None, channels):
            _validate.fail(name, "query_size", f"{channels} with in_proj", query_size)
        self.query_size, self.in_proj, self.mask_query = query_size or channels, in_proj, mask_query
        outputs = heads * kernel_size + (channels if in_proj else 0)
        self.weight_linear = nn.Linear(self.query_size, outputs, bias=bias or in_proj, device=device, dtype=dtype)
        self.conv_bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if conv_bias else None

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        self.weight_linear.reset_parameters()
        if self.conv_bias is not None:
            nn.init.zeros_(self.conv_bias)

    def _predict(
        self, x: Tensor, gate: Tensor | None, query: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The convolution's input, its gate, and the kernels [..., H, K]."""
        self._expect("x", x, "C", self.channels)
        if query is not None or self.query_size != self.channels:
            self._expect("query", x if query is None else query, "query_size", self.query_size)
        if query is None:
            if gate is not None:
                # The product is needed for the kernels anyway, so the convolution gets it ready-made.
                x, gate = x * torch.sigmoid(gate), None
            query = x
        if self.mask_query and mask is not None:
            query = torch.where(mask[..., None], query, 0.0)
        taps = self.weight_linear(query)
        if self.in_proj:
            x, taps = taps.split([self.channels, self.heads * self.kernel_size], dim=-1)
        return x, gate, taps.unflatten(-1, (self.heads, self.kernel_size))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        gate: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        step: dict | None = None,
    ):
        """x [B,T,C] -> [B,T,C]; ``query`` [B,T,query_size] predicts the kernels instead of x. ``step``: as in
        ``LightweightConv1d``."""
        if step is not None:
            return self._step(x, mask, **step)
        x, gate, weight = self._predict(x, gate, query, mask)
        return api.dynamic_conv1d(
            x,
            weight,
            self.conv_bias,
            gate=gate,
            mask=mask,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_state=return_state,
            **self._options(),
        )

    def step(
        self,
        x: Tensor,
        state: Tensor,
        *,
        query: Tensor | None = None,
        gate: Tensor | None = None,
        mask: Tensor | None = None,
        state_index: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """One position, x [B,C] -> [B,C], without gradient; ``state`` is updated in place. Causal padding only. mask:
        bool [B], False for padding, which the state takes as zeros."""
        return self(x, mask, step=dict(state=state, query=query, gate=gate, state_index=state_index, position=position))

    def _step(self, x, mask, state, query=None, gate=None, state_index=None, position=None):
        x, gate, weight = self._predict(x, gate, query, mask)
        x, gate = self._hide(x, gate, mask)
        return step.dynamic_conv1d_step(
            x,
            state,
            weight,
            self.conv_bias,
            gate=gate,
            state_index=state_index,
            position=position,
            **self._step_options(),
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.query_size != self.channels:
            text += f", query_size={self.query_size}"
        return text + (", in_proj=True" if self.in_proj else "")


class DepthwiseConv1d(_Conv):
    """Depthwise convolution: one kernel per channel, no softmax.

    Parameters: ``weight`` [C,1,K] and ``bias`` [C], both uniform in +-1/sqrt(K), as in ``torch.nn.Conv1d`` with
    ``groups=channels``, whose checkpoints load unchanged.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        padding: str | int = "same",
        dilation: int = 1,
        bias: bool = True,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(channels, kernel_size, channels, False, False, padding, dilation, 0.0, backend, bias=bias)
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        bound = 1 / math.sqrt(self.kernel_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        gate: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        step: dict | None = None,
    ):
        """x [B,T,C] -> [B,T,C]; with ``return_state`` also the state after the last position. ``step`` holds the
        arguments of the method of that name, which calls the module, so that its hooks run for steps too."""
        if step is not None:
            return self._step(x, mask, **step)
        return api.depthwise_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            padding=self.padding,
            dilation=self.dilation,
            gate=gate,
            mask=mask,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_state=return_state,
            backend=self.backend,
        )

    def step(
        self,
        x: Tensor,
        state: Tensor,
        *,
        gate: Tensor | None = None,
        mask: Tensor | None = None,
        state_index: Tensor | None = None,
    ) -> Tensor:
        """One position, x [B,C] -> [B,C], without gradient; ``state`` is updated in place. Causal padding only. mask:
        bool [B], False for padding, which the state takes as zeros."""
        return self(x, mask, step=dict(state=state, gate=gate, state_index=state_index))

    def _step(self, x, mask, state, gate=None, state_index=None):
        options = self._step_options()
        x, gate = self._hide(x, gate, mask)
        return step.depthwise_conv1d_step(
            x,
            state,
            self.weight.squeeze(1),
            self.bias,
            dilation=options["dilation"],
            gate=gate,
            state_index=state_index,
            backend=options["backend"],
        )

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, padding={self.padding!r}"
        text += f", dilation={self.dilation}" if self.dilation != 1 else ""
        text += ", bias=False" if self.bias is None else ""
        return text + (f", backend={self.backend!r}" if self.backend != "auto" else "")


class SeparableConv1d(nn.Module):
    """Depthwise convolution without bias, then a linear map over channels (the convolution of ConvBERT).

    Parameters: ``depthwise.weight`` [C_in,1,K], ``pointwise.weight`` [C_out,C_in], ``pointwise.bias`` [C_out].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        padding: str | int = "same",
        dilation: int = 1,
        bias: bool = True,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        for argument, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            _validate.positive(type(self).__name__, argument, value)
        self.channels, self.out_channels = in_channels, out_channels
        self.depthwise = DepthwiseConv1d(
            in_channels,
            kernel_size,
            padding=padding,
            dilation=dilation,
            bias=False,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.pointwise = nn.Linear(in_channels, out_channels, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        self.depthwise.reset_parameters()
        self.pointwise.reset_parameters()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        gate: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ):
        """x [B,T,C_in] -> [B,T,C_out]; with ``return_state`` also the state after the last position."""
        y = self.depthwise(
            x, mask, gate=gate, cu_seqlens=cu_seqlens, initial_state=initial_state, return_state=return_state
        )
        return (self.pointwise(y[0]), y[1]) if return_state else self.pointwise(y)

    def init_state(self, batch: int, *, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """The state before the first position, [batch, (K-1)*dilation, C_in]."""
        return self.depthwise.init_state(batch, dtype=dtype, device=device)

    def step(
        self,
        x: Tensor,
        state: Tensor,
        *,
        gate: Tensor | None = None,
        mask: Tensor | None = None,
        state_index: Tensor | None = None,
    ) -> Tensor:
        """One position, x [B,C_in] -> [B,C_out], without gradient; ``state`` is updated in place."""
        return self.pointwise(self.depthwise.step(x, state, gate=gate, mask=mask, state_index=state_index))


class GatedConv(nn.Module):
    """The convolutional block of Tay et al. 2021: gated linear unit, convolution, linear map.

        X1 = (W_I X) * sigmoid(W_S X),   X2 = conv(X1),   X3 = W_O X2

    ``linear1`` holds W_I and W_S in one matrix with 2*inner outputs, value first, gate second; ``linear2`` is W_O. The
    product is taken inside the convolution kernel, except for a dynamic one, whose kernels are predicted from it.
    ``conv`` is one of this package's convolutions over ``inner`` channels, or a module with the same ``channels``,
    ``forward``, ``init_state`` and ``step``; where it has ``out_channels``, that is what it makes of them.
    ``glu=False`` leaves the gate out: linear1 has ``inner`` outputs (Wu et al. 2019 have both forms).
    ``pointwise=True`` puts another linear map over the convolution's channels, with bias, behind the convolution (the
    code released by Tay et al.). Linear maps start Xavier uniform with zero bias.
    """

    def __init__(
        self,
        channels: int,
        conv: nn.Module,
        *,
        bias: bool = True,
        glu: bool = True,
        pointwise: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = type(self).__name__
        _validate.positive(name, "channels", channels)
        for argument, value in (("glu", glu), ("pointwise", pointwise)):
            _validate.flag(name, argument, value)
        if isinstance(conv, GatedConv) or not all(hasattr(conv, n) for n in ("channels", "init_state", "step")):
            _validate.fail(name, "conv", "a convolution of this package", type(conv).__name__, TypeError)
        self.channels, self.inner, self.glu = channels, conv.channels, glu
        outer = getattr(conv, "out_channels", self.inner)
        options = dict(device=device, dtype=dtype)
        self.linear1 = nn.Linear(channels, (2 if glu else 1) * self.inner, bias=bias, **options)
        self.conv = conv
        self.pointwise = nn.Linear(outer, outer, **options) if pointwise else None
        self.linear2 = nn.Linear(outer, channels, bias=bias, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values for the linear maps."""
        for linear in (self.linear1, self.pointwise, self.linear2):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution's input and its gate."""
        x = self.linear1(x)
        return tuple(x.chunk(2, dim=-1)) if self.glu else (x, None)

    def _join(self, y: Tensor) -> Tensor:
        return self.linear2(y if self.pointwise is None else self.pointwise(y))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ):
        """x [B,T,C] -> [B,T,C]; with ``return_state`` also the convolution's state after the last position."""
        value, gate = self._split(x)
        y = self.conv(
            value, mask, gate=gate, cu_seqlens=cu_seqlens, initial_state=initial_state, return_state=return_state
        )
        return (self._join(y[0]), y[1]) if return_state else self._join(y)

    def init_state(self, batch: int, *, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """The state before the first position."""
        return self.conv.init_state(batch, dtype=dtype, device=device)

    def step(self, x: Tensor, state: Tensor, **options) -> Tensor:
        """One position, x [B,C] -> [B,C], without gradient; ``state`` is updated in place; options of ``conv.step``."""
        value, gate = self._split(x)
        return self._join(self.conv.step(value, state, gate=gate, **options))
