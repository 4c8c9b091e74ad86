"""The parts of a ConvSeq2Seq layer; what is between them is in layers.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import DynamicConv1d, GatedConv, LightweightConv1d
from ..ops.attention.api import composite_attention
from ..ops.attention.t5 import t5_relative_bias
from ..ops.attention.weights import attention_weights
from .cache import ConvState, attention_update, may_step
from .configs import ConvSeq2SeqConfig


class ConvMixer(GatedConv):
    """``GatedConv`` with the convolution that the configuration asks for, and a cache."""

    def __init__(self, config: ConvSeq2SeqConfig, stack: str, layer: int):
        taps, dilation = config.taps(stack, layer)
        options = dict(
            softmax=config.kernel_softmax,
            padding="causal" if stack == "decoder" else "same",
            dilation=dilation,
            weight_dropout=config.weight_dropout,
            backend=config.backend,
        )
        if config.mixer == "lightweight":
            conv = LightweightConv1d(
                config.conv_dim, taps, config.num_filters, bias=config.depthwise_bias, **options
            )  # fmt: skip
        else:
            conv = DynamicConv1d(
                config.conv_dim, taps, config.num_filters, bias=config.kernel_bias, conv_bias=config.depthwise_bias,
                mask_query=config.mask_query, **options,
            )  # fmt: skip
        super().__init__(config.d_model, conv, bias=config.mixer_bias, glu=config.glu, pointwise=config.pointwise)
        self.input_dropout = config.input_dropout

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: None = None, cache: ConvState | None = None, weights=None
    ) -> Tensor:
        """x [B,T,d_model] -> the same; ``bias`` and ``weights`` are for mixers that attend."""
        x = F.dropout(x, self.input_dropout, self.training)
        if cache is None:
            return super().forward(x, mask)
        advance = cache.step if may_step(x) and not cache.record_past else cache.extend
        return advance(self, x, mask)

    def forward_with_state(self, x: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B,T,d_model] behind ``state`` -> the same, and the state after it."""
        return super().forward(x, mask, initial_state=state, return_state=True)


class Attention(nn.Module):
    """The linear maps q, k, v and o of an attention over heads."""

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__()
        inner, bias = config.num_heads * config.head_dim, config.use_bias
        self.head_dim, self.dropout, self.backend = config.head_dim, config.attention_dropout, config.backend
        self.scale = config.head_dim**-0.5 if config.scale_attention else 1.0
        self.q = nn.Linear(config.d_model, inner, bias=bias)
        self.k = nn.Linear(config.d_model, inner, bias=bias)
        self.v = nn.Linear(config.d_model, inner, bias=bias)
        self.o = nn.Linear(inner, config.d_model, bias=bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim))


class SelfAttention(Attention):
    """Self-attention with T5's relative bias, which ``RelativeBias`` makes for all layers of a stack."""

    def __init__(self, config: ConvSeq2SeqConfig, causal: bool):
        super().__init__(config)
        self.causal = causal
        self.window = relative_window(config, causal)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor, cache=None, weights: list | None = None) -> Tensor:
        """x [B,T,d_model] -> the same; mask bool [B,S], S counts what the cache holds too. weights: gets those of the
        attention, [B,H,T,S]."""
        q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        k, v = attention_update(cache, k, v)
        options = dict(
            bias=bias, window=self.window, causal=self.causal, key_mask=mask, scale=self.scale, backend=self.backend
        )
        if weights is not None:
            weights.append(attention_weights(q, k, **options))
        y = composite_attention(q, k, v, dropout=self.dropout, training=self.training, **options)
        return self.o(y.flatten(2))


class CrossAttention(Attention):
    """The decoder's attention to the encoder's states: the ordinary one."""

    def forward(
        self, x: Tensor, states: Tensor, mask: Tensor | None, cache=None, weights: list | None = None
    ) -> Tensor:
        """x [B,T,d_model], states [B,S,d_model], mask bool [B,S]. The cache is filled at the first call. weights: gets
        those of the attention, [B,H,T,S]."""
        q = self._heads(self.q(x)).transpose(1, 2)
        if cache is not None and cache.is_initialized:
            k, v = cache.keys, cache.values
        else:
            k, v = (self._heads(linear(states)).transpose(1, 2) for linear in (self.k, self.v))
            if cache is not None:
                k, v = cache.update(k, v)
        mask = None if mask is None else mask[:, None, None]
        if weights is not None:
            each = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
            weights.append(F.scaled_dot_product_attention(q, k, each, attn_mask=mask, scale=self.scale))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        return self.o(y.transpose(1, 2).flatten(2))


def relative_window(config: ConvSeq2SeqConfig, causal: bool) -> tuple[int, int]:
    """The window of T5's bias: all larger distances share a bucket, which clipping continues."""
    reach = config.relative_max_distance
    return reach, 0 if causal else reach


class RelativeBias(nn.Module):
    """T5's table of buckets, expanded once for all layers of a stack."""

    def __init__(self, config: ConvSeq2SeqConfig, causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))
        self.window, self.causal = relative_window(config, causal), causal
        self.max_distance = config.relative_max_distance

    def forward(self) -> Tensor:
        """[H, W]"""
        return t5_relative_bias(self.weight, self.window, bidirectional=not self.causal, max_distance=self.max_distance)


class FeedForward(nn.Module):
    """wo(f(wi x)), f being ReLU or GELU; "gated-gelu": wo(gelu(wi x) * gate x), with T5's GELU."""

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__()
        self.kind, self.dropout = config.feed_forward, config.activation_dropout
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=config.use_bias)
        gated = self.kind == "gated-gelu"
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.use_bias) if gated else None
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.wi(x)
        if self.kind == "relu":
            inner = F.relu(inner)
        elif self.kind == "gelu":
            inner = F.gelu(inner)
        else:
            inner = F.gelu(inner, approximate="tanh") * self.gate(x)
        return self.wo(F.dropout(inner, self.dropout, self.training))


class Positions(nn.Module):
    """Absolute positions, learned or sinusoidal, the latter as sines beside cosines (fairseq, tensor2tensor).

    Padding is not counted: with a mask the first real token has position 0. Table row: position + offset.
    """

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__()
        self.channels, self.offset, self.limit = config.d_model, config.position_offset, config.max_positions
        self.weight = None
        if config.positions == "learned":
            self.weight = nn.Parameter(torch.empty(config.max_positions + config.position_offset, config.d_model))

    def check(self, call: str, length: int, position_ids) -> None:
        """Check that there are as many positions as the input needs; ``length`` counts those in the cache too."""
        if self.weight is not None and position_ids is None and length > self.limit:
            raise ValueError(f"{call}: expected at most max_positions = {self.limit} positions, got {length}")

    def forward(self, length: int, mask: Tensor | None, past: int, like: Tensor, index: Tensor | None = None) -> Tensor:
        """[length, d_model], or [B, length, d_model] if mask [B, past + length] or index, the positions [B, length] or
        [1, length], is given; in the dtype of ``like``."""
        if index is None and mask is None:
            index = torch.arange(past, past + length, device=like.device)
        elif index is None:
            index = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past : past + length]
        if self.weight is not None:
            return F.embedding(index + self.offset, self.weight)
        half = self.channels // 2
        steps = torch.arange(half, device=like.device, dtype=torch.float32) / max(half - 1, 1)
        angle = (index + self.offset)[..., None] * torch.exp(steps * -9.210340371976184)  # log(10000)
        table = torch.cat([angle.sin(), angle.cos()], -1)
        return F.pad(table, (0, self.channels % 2)).to(like.dtype)


def make_norm(config: ConvSeq2SeqConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_eps)
