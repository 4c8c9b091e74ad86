"""The layers of ConvSeq2Seq: mixer, attention to the encoder, feed-forward block, with residual sums and norms."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .base import one_cache
from .blocks import ConvMixer, CrossAttention, FeedForward, SelfAttention, make_norm
from .cache import cross_layer
from .configs import ConvSeq2SeqConfig


class _Layer(GradientCheckpointingLayer):
    """A mixer and a feed-forward block, each with its residual sum and norm."""

    def __init__(self, config: ConvSeq2SeqConfig, stack: str, layer: int):
        super().__init__()
        self.placement, self.dropout = config.norm_placement, config.dropout
        if config.mixer == "transformer":
            self.mixer = SelfAttention(config, causal=stack == "decoder")
        else:
            self.mixer = ConvMixer(config, stack, layer)
        self.mixer_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = make_norm(config)

    def _add(self, norm: nn.Module, x: Tensor, branch, *args) -> Tensor:
        """x plus the branch; ``norm_placement`` says where the norm stands."""
        y = branch(norm(x) if self.placement == "pre" else x, *args)
        if self.placement == "res_post":
            y = norm(y.to(x.dtype))  # the residual stream keeps its precision under autocast
        x = x + F.dropout(y, self.dropout, self.training)
        return norm(x) if self.placement == "post" else x


class EncoderLayer(_Layer):
    """One layer of the encoder; the one numbered ``pair_attention`` has full self-attention behind its convolution."""

    def __init__(self, config: ConvSeq2SeqConfig, layer: int):
        super().__init__(config, "encoder", layer)
        paired = config.pair_attention == layer + 1
        self.pair_attention = SelfAttention(config, causal=False) if paired else None
        self.pair_attention_norm = make_norm(config) if paired else None

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, weights: list | None = None
    ) -> Tensor:
        """x [B,T,C], mask bool [B,T], bias [H,W] of attention. weights: gets those of each attention."""
        x = self._add(self.mixer_norm, x, self.mixer, mask, bias, None, weights)
        if self.pair_attention is not None:
            x = self._add(self.pair_attention_norm, x, self.pair_attention, mask, bias, None, weights)
        return self._add(self.feed_forward_norm, x, self.feed_forward)


class DecoderLayer(_Layer):
    """One layer of the decoder: causal mixer, attention to the encoder, feed-forward block."""

    def __init__(self, config: ConvSeq2SeqConfig, layer: int, cross_attention: bool = True):
        super().__init__(config, "decoder", layer)
        self.layer = layer
        self.cross_attention = CrossAttention(config) if cross_attention else None
        self.cross_attention_norm = make_norm(config) if cross_attention else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
        past_key_values=None,
        weights: list | None = None,
        cross_weights: list | None = None,
        cache=None,
    ) -> Tensor:
        """x [B,T,C], states [B,S,C] of the encoder; masks bool, ``mask`` as long as the mixer looks back. weights,
        cross_weights: get those of the two attentions. cache: another name of past_key_values."""
        cache = one_cache(type(self).__name__, past_key_values, cache)
        own = None if cache is None else cache.self_attention_cache.layers[self.layer]
        x = self._add(self.mixer_norm, x, self.mixer, mask, bias, own, weights)
        if self.cross_attention is not None:
            cross = None if cache is None else cross_layer(cache, self.layer)
            x = self._add(self.cross_attention_norm, x, self.cross_attention, states, states_mask, cross, cross_weights)
        return self._add(self.feed_forward_norm, x, self.feed_forward)
