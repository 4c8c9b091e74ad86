"""Attention modules. Parameter names, shapes and initial values follow the checkpoints of Chang et al. 2021."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _select, _validate
from ..ops._validate import each, expect
from ..ops.attention import checks
from ..ops.attention.api import composite_attention
from ..ops.attention.weights import attention_weights
from ..ops.conv import api
from ..ops.conv import checks as conv_checks
from .conv import DepthwiseConv1d

PROJECTIONS = ("linear", "conv", "mixed")


def _expect_odd(name: str, argument: str, taps) -> None:
    _validate.positive(name, argument, taps)
    expect(name, argument, taps % 2 == 1, "an odd number", taps)


class SpanDynamicConv(nn.Module):
    """Span-based dynamic convolution: the filters of a position are predicted from the query and a window around it.

        filters[b,t] = kernel(query[b,t] * pointwise(depthwise(x))[b,t]),    [heads, K]

    ``predicted_at`` says whose filter weighs input j of output i:

    * "output" (Jiang et al. 2020, ConvBERT): filters[b,i], softmax over the K taps; taps outside the sequence read
      zeros. The values are a linear map ``value`` of x.
    * "key" (the comparison in Chang et al. 2021): filters[b,j], softmax over the taps of output i that lie inside the
      sequence and are not masked. There is no ``value``; the values come from outside, and ``depthwise`` has a bias.

    Parameters: ``depthwise`` [C,1,K], ``pointwise`` C -> inner, ``kernel`` inner -> heads*K, ``value`` C -> inner. They
    are ``key_conv_attn_layer.depthwise``, ``key_conv_attn_layer.pointwise`` (whose bias stands beside it),
    ``conv_kernel_layer`` and ``conv_out_layer`` of ConvBERT's checkpoints, and ``convbert_key_depthwise``,
    ``convbert_key_pointwise`` and ``lightweight_kernel`` of the others. Linear weights start N(0, 0.02), biases 0.
    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        heads: int,
        kernel_size: int = 9,
        *,
        predicted_at: str = "output",
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = type(self).__name__
        each(_validate.positive, name, channels=channels, inner=inner, heads=heads)
        expect(name, "heads", inner % heads == 0, f"a divisor of {inner}", heads)
        _expect_odd(name, "kernel_size", kernel_size)
        _select.known(name, backend)
        expect(name, "predicted_at", predicted_at in ("output", "key"), "'output' or 'key'", predicted_at)
        self.channels, self.inner, self.heads, self.kernel_size = channels, inner, heads, kernel_size
        self.predicted_at, self.backend = predicted_at, backend
        at_key = predicted_at == "key"
        options = dict(device=device, dtype=dtype)
        self.depthwise = DepthwiseConv1d(channels, kernel_size, bias=at_key, backend=backend, **options)
        self.pointwise = nn.Linear(channels, inner, **options)
        self.kernel = nn.Linear(inner, heads * kernel_size, **options)
        self.value = None if at_key else nn.Linear(channels, inner, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        self.depthwise.reset_parameters()
        for linear in (self.pointwise, self.kernel, self.value):
            _reset_linear(linear)

    def forward(self, x: Tensor, query: Tensor, value: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B,T,C], query [B,T,inner] -> [B,T,inner].

        value: [B,T,inner], for "key", and to replace the linear map of x. mask: bool [B,T], False for padding, which
        then reads as zeros; ConvBERT itself does not mask its convolutions.
        """
        if value is None:
            expect(type(self).__name__, "value", self.value is not None, "[B,T,inner], because of 'key'", None)
            value = self.value(x)
        filters = self.kernel(query * self.pointwise(self.depthwise(x, mask))).unflatten(2, (self.heads, -1))
        if self.predicted_at == "key":
            filters = _seen_from_outputs(filters, mask)
        return api.dynamic_conv1d(
            value, filters, mask=mask, softmax=self.predicted_at == "output", padding="same", backend=self.backend
        )

    def extra_repr(self) -> str:
        sizes = f"{self.channels}, {self.inner}, heads={self.heads}, kernel_size={self.kernel_size}"
        return f"{sizes}, predicted_at={self.predicted_at!r}"


def _seen_from_outputs(filters: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of the taps of every output, from what the keys predicted, both [B,T,H,K]: w[b,i,h,c] is the softmax of
    filters[b,j,h,c], j = i + c - K//2, over the c whose j exists and is not masked."""
    (B, T, _, K), reach = filters.shape, filters.shape[3] // 2
    real = filters.new_ones(B, T, dtype=torch.bool) if mask is None else mask
    padded, real = F.pad(filters, (0, 0, 0, 0, reach, reach)), F.pad(real, (reach, reach))
    logits = torch.stack([padded[:, c : c + T, :, c] for c in range(K)], -1)  # [B,T,H,K]
    real = torch.stack([real[:, c : c + T] for c in range(K)], -1)[:, :, None]  # [B,T,1,K]
    some = real.any(-1, keepdim=True)
    logits = torch.where(real, logits, torch.where(some, float("-inf"), 0.0).to(logits.dtype))
    return torch.where(some, torch.softmax(logits, -1), 0.0)


class CompositeAttention(nn.Module):
    """Self-attention whose scores and values have convolutional terms, without output projection: x [B,T,C] -> [B,T,C].

        s[b,h,i,j] = scale * (q[b,i,h]·k[b,j,h] + q[b,i,h]·query_rel[:,c] + k[b,j,h]·key_rel[:,W-1-c]) + bias[h,c]
        c          = clip(j - i, -left, right) + left,     scale = (C/H)**-0.5
        y[b,i,h]   = sum_j softmax_j(s)[b,h,i,j] * v[b,j,h] + value_conv_scale[h] * (value_conv * v)[b,i,h]

    channels, heads: C and H, heads of C/H channels.
    window: (left, right), or k for (k, k); tables and ``value_conv`` have W = left + right + 1 columns.
    qk: the product of queries and keys. bias: a bias per head and offset (equation 4; with query_rel equation 6).
        query_rel, key_rel: a filter predicted by the query (equation 5), by the key. Without ``qk`` and ``query_rel``
        there is no query projection, without ``qk`` and ``key_rel`` no key projection.
    value_conv: the depthwise term of equation 7, with a scale per head that is trained only with
        ``value_conv_scale=True``.
    query_key, value: how q and k, and v, are computed. "linear": a linear map. "conv": a convolution and, if depthwise
        (``groups`` None), a linear map over channels. "mixed": the first half of the heads by "conv", the second by
        "linear". query_key="identity": q and k are the input itself.
    conv_kernel_size: taps of these convolutions, by default W. query_key_groups, value_groups: None for a depthwise
        separable convolution, a number for an ordinary grouped one. activation: GELU between the two parts.
    span: None, "output" or "key": the second half of the heads is a ``SpanDynamicConv`` of ``span_kernel_size`` taps
        (ConvBERT with a head ratio of 2). "output" sees the mask only with span_mask=True; in ConvBERT it does not.
    outside, causal, dropout (of the attention weights, in training mode): as in ``composite_attention``.

    With ``causal`` these convolutions see the past alone; otherwise as much on either side.
    If ``query_key`` or ``value`` has a convolution, and with ``span="key"``, padded positions of the input are set to 0
    before all projections, as the authors do.

    Parameters as in the authors' checkpoints: ``query``, ``key``, ``value`` (N(0, 0.02), bias 0); ``convfixed_param``
    [1,H,1,W] (zeros), ``convq_param`` and ``convk_param`` [C/H,W] (uniform within 1/sqrt(W)), ``convolution`` [C,1,W]
    with bias, ``convolution_scalar`` [1,H,1,1] (ones); ``*_conv``, ``*_pointwise`` and ``*_linear`` of convolutional
    projections; ``span`` is this package's own.
    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    Source: Chang et al. 2021, "Convolutions and self-attention: re-interpreting relative positions in pre-trained
    language models".
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int | tuple[int, int] = 8,
        *,
        qk: bool = True,
        bias: bool = False,
        query_rel: bool = False,
        key_rel: bool = False,
        value_conv: bool = False,
        value_conv_scale: bool = False,
        query_key: str = "linear",
        value: str = "linear",
        conv_kernel_size: int | None = None,
        query_key_groups: int | None = None,
        value_groups: int | None = None,
        activation: bool = False,
        span: str | None = None,
        span_kernel_size: int = 9,
        span_mask: bool = False,
        outside: str = "clip",
        causal: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = type(self).__name__
        each(_validate.positive, name, channels=channels, heads=heads, span_kernel_size=span_kernel_size)
        each(
            _validate.flag, name, qk=qk, bias=bias, query_rel=query_rel, key_rel=key_rel, value_conv=value_conv,
            value_conv_scale=value_conv_scale, activation=activation, span_mask=span_mask, causal=causal,
        )  # fmt: skip
        _validate.probability(name, "dropout", dropout)
        _select.known(name, backend)
        halves = span is not None or "mixed" in (query_key, value)
        divides = channels % heads == 0 and not (halves and heads % 2)
        expect(name, "heads", divides, f"{'an even ' if halves else 'a '}divisor of {channels}", heads)
        kinds = (*PROJECTIONS, "identity")
        expect(name, "query_key", query_key in kinds, f"one of {kinds}", query_key)
        expect(name, "value", value in PROJECTIONS, f"one of {PROJECTIONS}", value)
        expect(name, "span", span in (None, "output", "key"), "None, 'output' or 'key'", span)
        plain = query_key == value == "linear" and qk and not (bias or query_rel or key_rel or value_conv or causal)
        expect(name, "span", span is None or plain, "None, because only plain heads go beside it", span)
        expect(name, "qk", qk or bias or query_rel or key_rel, "True, because nothing else is in the scores", qk)
        expect(
            name, "value_conv_scale", value_conv or not value_conv_scale, "False without value_conv", value_conv_scale
        )
        expect(name, "window", window is not None, "k for (k, k), or (left, right)", window)
        self.channels, self.heads, self.head_size = channels, heads, channels // heads
        self.window = checks.reach(name, window, outside, {})
        self.qk, self.query_key, self.value_kind, self.activation = qk, query_key, value, activation
        self.outside, self.causal, self.dropout, self.backend = outside, causal, dropout, backend
        self.span_mask = span_mask
        self.zeroes_padding = query_key in ("conv", "mixed") or value != "linear" or span == "key"
        W, options = sum(self.window) + 1, dict(device=device, dtype=dtype)
        taps = W if conv_kernel_size is None else conv_kernel_size
        own = channels // 2 if span is not None else channels
        if query_key != "identity":
            for projection, used in (("query", qk or query_rel), ("key", qk or key_rel)):
                if used:
                    self._add_projection(projection, query_key, own, taps, query_key_groups, options)
        self._add_projection("value", value, own if span == "output" else channels, taps, value_groups, options)

        def table(given, *shape):
            return nn.Parameter(torch.empty(shape, **options)) if given else None

        self.convfixed_param = table(bias, 1, heads, 1, W)
        self.convq_param = table(query_rel, self.head_size, W)
        self.convk_param = table(key_rel, self.head_size, W)
        self.convolution_scalar = table(value_conv, 1, heads, 1, 1)
        if value_conv:
            self.convolution_scalar.requires_grad_(value_conv_scale)
        self.convolution = _Taps(channels, channels, W, groups=channels, **options) if value_conv else None
        self.span = None
        if span is not None:
            self.span = SpanDynamicConv(
                channels, own, heads // 2, span_kernel_size, predicted_at=span, backend=backend, **options
            )
        self.reset_parameters()

    def _add_projection(self, name: str, kind: str, outputs: int, taps: int, groups: int | None, options: dict) -> None:
        if kind == "linear":
            self.add_module(name, nn.Linear(self.channels, outputs, **options))
            return
        (_validate.positive if self.causal else _expect_odd)(type(self).__name__, "conv_kernel_size", taps)
        convolved = outputs // 2 if kind == "mixed" else outputs
        if groups is not None:
            argument = "value_groups" if name == "value" else "query_key_groups"
            _validate.positive(type(self).__name__, argument, groups)
            fits = self.channels % groups == convolved % groups == 0
            expect(type(self).__name__, argument, fits, f"a divisor of {self.channels} and {convolved}", groups)
        if groups is None:
            padding = "causal" if self.causal else "same"
            convolution = DepthwiseConv1d(
                self.channels, taps, padding=padding, bias=True, backend=self.backend, **options
            )
            self.add_module(f"{name}_pointwise", nn.Linear(self.channels, convolved, **options))
        else:
            padding = taps - 1 if self.causal else taps // 2
            convolution = nn.Conv1d(self.channels, convolved, taps, padding=padding, groups=groups, **options)
        self.add_module(f"{name}_conv", convolution)
        if kind == "mixed":
            self.add_module(f"{name}_linear", nn.Linear(self.channels, outputs - convolved, **options))

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                _reset_linear(module)
            elif name and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.convfixed_param is not None:
            nn.init.zeros_(self.convfixed_param)
        for parameter in (self.convq_param, self.convk_param):
            if parameter is not None:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if self.convolution_scalar is not None:
            nn.init.ones_(self.convolution_scalar)

    def _project(self, name: str, kind: str, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        """[B,T,C] -> [B,T,outputs]; None without such a projection."""
        if kind == "identity":
            return x
        if kind == "linear":
            linear = getattr(self, name, None)
            return None if linear is None else linear(x)
        convolution = getattr(self, f"{name}_conv", None)
        if convolution is None:
            return None
        if isinstance(convolution, DepthwiseConv1d):
            z = convolution(x, cu_seqlens=cu_seqlens)
            z = getattr(self, f"{name}_pointwise")(F.gelu(z) if self.activation else z)
        else:
            expected = "None, because of a grouped convolution"
            expect(type(self).__name__, "cu_seqlens", cu_seqlens is None, expected, cu_seqlens)
            z = convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return torch.cat([z, getattr(self, f"{name}_linear")(x)], 2) if kind == "mixed" else z

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None, only_weights: bool = False
    ) -> Tensor:
        """x [B,T,C] -> [B,T,C], the heads side by side. mask: bool [B,T], False for padding. cu_seqlens: x is [1,T,C]
        and holds several sequences. only_weights: instead what ``weights`` returns."""
        self._check(x, mask)
        if self.zeroes_padding and mask is not None:
            x = torch.where(mask[..., None], x, 0.0)
        q, k = (self._project(name, self.query_key, x, cu_seqlens) for name in ("query", "key"))
        if only_weights:
            q, k = (self._heads(x if value is None else value) for value in (q, k))
            return attention_weights(q, k, **self._score_terms(mask) | dict(dropout=0.0))
        v = self._project("value", self.value_kind, x, cu_seqlens)
        if self.span is not None:
            expect(type(self).__name__, "cu_seqlens", cu_seqlens is None, "None, because of span", cu_seqlens)
            return self._beside_span(x, mask, q, k, v)
        H = self.heads
        scalar = self.convolution_scalar
        taps, offsets = (None, None) if self.convolution is None else self.convolution()
        # Scores without queries or without keys ignore that input; the values have its shape.
        q, k, v = (self._heads(v if value is None else value) for value in (q, k, v))
        return composite_attention(
            q,
            k,
            v,
            value_conv=None if taps is None else taps.view(H, self.head_size, -1),
            value_conv_bias=None if offsets is None else offsets.view(H, -1),
            value_conv_scale=None if scalar is None else scalar.view(H),
            **self._score_terms(mask, cu_seqlens),
        ).flatten(2)

    def _check(self, x, mask) -> None:
        """What the projections would say in other words, and ``composite_attention`` of its argument key_mask."""
        name = type(self).__name__
        if not (isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] == self.channels):
            _validate.tensor(name, "x", x)
            _validate.fail(name, "x", f"shape [B,T,C], C = {self.channels}", x)
        fits = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape[:2])
        if not fits:
            conv_checks.mask(name, mask, x)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention weights of ``forward`` without dropout, [B,H,T,T]; with ``span`` those of the first half of the
        heads. They are computed apart from ``forward``, with the cost that ``attention_weights`` states."""
        # By a call of the module, so that hooks that fetch the parameters run.
        return self(x, mask, only_weights=True)

    def _score_terms(self, mask: Tensor | None, cu_seqlens: Tensor | None = None) -> dict:
        """The arguments of ``composite_attention`` that determine the weights, beside queries and keys."""
        terms = dict(key_mask=mask, cu_seqlens_q=cu_seqlens, **self._options())
        if self.span is None:
            terms |= dict(
                bias=None if self.convfixed_param is None else self.convfixed_param.view(self.heads, -1),
                query_rel=self.convq_param,
                key_rel=self.convk_param,
                window=self.window,
                qk=self.qk,
            )
        return terms

    def _beside_span(self, x: Tensor, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = self.channels // 2
        y = composite_attention(
            self._heads(q), self._heads(k), self._heads(v[..., :own]), **self._score_terms(mask)
        ).flatten(2)
        if self.span.predicted_at == "key":
            return torch.cat([y, self.span(x, q, v[..., own:], mask)], 2)
        return torch.cat([y, self.span(x, q, mask=mask if self.span_mask else None)], 2)

    def _options(self) -> dict:
        return dict(
            outside=self.outside,
            causal=self.causal,
            dropout=self.dropout,
            training=self.training,
            backend=self.backend,
        )

    def _heads(self, value: Tensor) -> Tensor:
        return value.unflatten(2, (-1, self.head_size))

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, heads={self.heads}, window={self.window}"]
        if not self.qk:
            parts.append("qk=False")
        return ", ".join(parts)


class _Taps(nn.Conv1d):
    """The filters of a depthwise convolution that the attention computes. A call returns the parameters, so that hooks
    that fetch them (offloading, sharding) run."""

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


def _reset_linear(linear: nn.Linear | None) -> None:
    if linear is not None:
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
