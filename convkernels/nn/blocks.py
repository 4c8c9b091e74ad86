"""Modules of a convolution and the linear maps around it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import _validate
from ..ops._validate import each
from ..ops.conv import checks
from ..ops.conv.api import depthwise_conv1d
from ..ops.conv.step import depthwise_conv1d_step
from .conv import DepthwiseConv1d


class SeparableConv1d(nn.Module):
    """Depthwise convolution without bias, then a linear map over channels.

        y[b,t] = pointwise(depthwise(x)[b,t])

    Parameters: ``depthwise.weight`` [C_in,1,K], ``pointwise.weight`` [C_out,C_in], ``pointwise.bias`` [C_out]. Errors
    and options as in ``DepthwiseConv1d``.
    Source: Jiang et al. 2020 (ConvBERT).
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
        each(_validate.positive, type(self).__name__, in_channels=in_channels, out_channels=out_channels)
        self.channels, self.out_channels = in_channels, out_channels
        options = dict(device=device, dtype=dtype)
        self.depthwise = DepthwiseConv1d(
            in_channels, kernel_size, padding=padding, dilation=dilation, bias=False, backend=backend, **options
        )
        self.pointwise = nn.Linear(in_channels, out_channels, bias=bias, **options)

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
        self, x: Tensor, state: Tensor, *, gate: Tensor | None = None, mask: Tensor | None = None,
        state_index: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One position, x [B,C_in] -> [B,C_out], without gradient; ``state`` is updated in place."""
        return self.pointwise(self.depthwise.step(x, state, gate=gate, mask=mask, state_index=state_index))


class GatedConv(nn.Module):
    """The convolutional block of Tay et al. 2021: gated linear unit, convolution, linear map.

        X1 = (W_I X) * sigmoid(W_S X),   X2 = conv(X1),   X3 = W_O X2

    ``linear1`` holds W_I and W_S in one matrix with 2*inner outputs, value first, gate second; ``linear2`` is W_O. The
    product is part of the convolution's operator, except for a dynamic one, whose filters are predicted from it.
    ``conv`` is one of this package's convolutions over ``inner`` channels, or a module with the same ``channels``,
    ``forward``, ``init_state`` and ``step``; ``out_channels``, if it has that, is the size of its output.
    ``glu=False`` leaves the gate out: linear1 has ``inner`` outputs (Wu et al. 2019 have both forms).
    ``pointwise=True`` puts another linear map over the convolution's channels, with bias, behind the convolution (the
    code released by Tay et al.). Linear maps start Xavier uniform with zero bias.
    Raises ValueError or TypeError naming the argument, what was expected and what was given.
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
        each(_validate.flag, name, glu=glu, pointwise=pointwise)
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
        checks.last_dimension(type(self).__name__, "x", x, "C", self.channels)
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


class ConformerConv(nn.Module):
    """The convolution module of the Conformer, without the normalisation before it and the residual around it.

        a, b = W1 x,   y = W2 silu(norm(depthwise(a * sigmoid(b)))),   then dropout

    The gated linear unit is part of the convolution's operator; so are SiLU and, while evaluating, batch normalisation,
    whose scale and shift go into the filters.

    norm: "batch" (Gulati et al.), "layer", which streams and does not look at other rows, or None.
    mask: bool [B,T], False for padding, which the convolution reads as 0. Batch statistics in training mode count all
        positions, padding too, as in the original; packed sequences have none.
    Parameters: ``pointwise_conv1.weight`` [2C,C], ``depthwise_conv.weight`` [C,1,K], ``norm``,
    ``pointwise_conv2.weight`` [C,C], and their biases if ``bias=True``: the names of Parakeet. Checkpoints in which the
    pointwise maps are ``nn.Conv1d`` ([2C,C,1]) load unchanged.
    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    Source: Gulati et al. 2020, "Conformer: convolution-augmented transformer for speech recognition", figure 2.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 31,
        *,
        norm: str | None = "batch",
        padding: str | int = "same",
        dilation: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = type(self).__name__
        _validate.positive(name, "channels", channels)
        if norm not in ("batch", "layer", None):
            _validate.fail(name, "norm", "'batch', 'layer' or None", repr(norm))
        _validate.flag(name, "bias", bias)
        _validate.probability(name, "dropout", dropout)
        options = dict(device=device, dtype=dtype)
        self.channels = channels
        self.pointwise_conv1 = nn.Linear(channels, 2 * channels, bias=bias, **options)
        self.depthwise_conv = DepthwiseConv1d(
            channels, kernel_size, padding=padding, dilation=dilation, bias=bias, backend=backend, **options
        )
        kinds = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.norm = kinds[norm](channels, **options) if norm is not None else None
        self.pointwise_conv2 = nn.Linear(channels, channels, bias=bias, **options)
        self.dropout = nn.Dropout(dropout)
        self.register_load_state_dict_pre_hook(_as_linear)

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        for module in (self.pointwise_conv1, self.depthwise_conv, self.norm, self.pointwise_conv2):
            if module is not None:
                module.reset_parameters()

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
        conv, filters = self.depthwise_conv, self._filters()
        options = dict(gate=gate, cu_seqlens=cu_seqlens, initial_state=initial_state, return_state=return_state)
        if filters is None:
            y = conv(value, mask, **options)
        else:
            options |= dict(padding=conv.padding, dilation=conv.dilation, mask=mask, backend=conv.backend)
            y = depthwise_conv1d(value, *filters, activation="silu", **options)
        joined = self._join(y[0] if return_state else y, filters is not None)
        return (joined, y[1]) if return_state else joined

    def init_state(self, batch: int, *, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """The state before the first position, [batch, (K-1)*dilation, C]."""
        return self.depthwise_conv.init_state(batch, dtype=dtype, device=device)

    def step(
        self, x: Tensor, state: Tensor, *, mask: Tensor | None = None, state_index: Tensor | None = None,
        slots: Tensor | None = None, accepted: Tensor | None = None, cu_seqlens: Tensor | None = None,
        save_at: Tensor | None = None, save_slots: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The next position, x [B,C] -> [B,C], or the next ones, x [B,T,C], without gradient; ``state`` is updated in
        place. Options as in ``DepthwiseConv1d.step``. Causal padding only, and no batch statistics."""
        if isinstance(self.norm, _BatchNorm) and (self.training or self.norm.running_mean is None):
            name, state_of = type(self).__name__, "train mode" if self.training else "no running statistics"
            raise RuntimeError(f"{name}.step: expected a module in eval mode, because of norm='batch', got {state_of}")
        value, gate = self._split(x)
        filters, conv = self._filters(), self.depthwise_conv
        options = dict(
            gate=gate, state_index=state_index, slots=slots, accepted=accepted, cu_seqlens=cu_seqlens, save_at=save_at,
            save_slots=save_slots,
        )  # fmt: skip
        causal = conv.padding in ("causal", (conv.kernel_size - 1) * conv.dilation)
        if filters is None or not causal or mask is not None:
            return self._join(conv.step(value, state, mask=mask, **options), False)
        options |= dict(dilation=conv.dilation, activation="silu", backend=conv.backend)
        return self._join(depthwise_conv1d_step(value, state, *filters, **options), True)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's input and its gate."""
        checks.last_dimension(type(self).__name__, "x", x, "C", self.channels)
        return tuple(self.pointwise_conv1(x).chunk(2, dim=-1))

    def _filters(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a convolution with the normalisation in it, which SiLU follows; None where that is no
        constant map, or where somebody waits for the calls of these modules, to fetch their parameters for example."""
        conv, norm = self.depthwise_conv, self.norm
        if any(_awaited(module) for module in (conv, norm) if module is not None):
            return None
        weight, bias = conv.weight.squeeze(1), conv.bias
        if norm is None:
            return weight, bias
        if not isinstance(norm, _BatchNorm) or self.training or norm.running_mean is None or not norm.affine:
            return None
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = norm.weight.to(wide) * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        shift = -norm.running_mean.to(wide) if bias is None else bias.to(wide) - norm.running_mean.to(wide)
        return weight.to(wide) * scale[:, None], norm.bias.to(wide) + shift * scale

    def _join(self, y: Tensor, activated: bool) -> Tensor:
        if not activated:
            if isinstance(self.norm, _BatchNorm):
                y = self.norm(y.flatten(0, -2)).view_as(y)
            elif self.norm is not None:
                y = self.norm(y)
            y = silu(y)
        return self.dropout(self.pointwise_conv2(y))


def _awaited(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


def _as_linear(module: nn.Module, state_dict: dict, prefix: str, *unused) -> None:
    """Before a checkpoint is loaded: pointwise maps of it may be convolutions of one tap."""
    for name in ("pointwise_conv1", "pointwise_conv2"):
        weight = state_dict.get(f"{prefix}{name}.weight")
        if weight is not None and weight.dim() == 3 and weight.shape[2] == 1:
            state_dict[f"{prefix}{name}.weight"] = weight.squeeze(2)
