"""Attention with linear biases. They count the tokens before a key, which is the distance to the query but for what all
keys of a query have in common, unless there is padding between tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....ops.attention.alibi import alibi_bias
from ..attention import assert_data, attention_forward
from ..swapping import Adapter
from .common import OPTIMIZED, heads, refuse_options


def _one_piece(mask: Tensor) -> None:
    """An error for a mask [B,S] with padding between tokens."""
    tokens = mask.bool()
    starts = tokens[:, :1].sum(1) + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
    assert_data((starts <= 1).all(), OPTIMIZED, "attention_mask", "no padding between tokens (restore it)", mask)


def _build_alibi_tensor(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    _one_piece(attention_mask)
    return attention_mask.new_empty(0)


class BloomModel:
    def build_alibi_tensor(self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        return _build_alibi_tensor(attention_mask, num_heads, dtype)


class _ALiBi:
    """Attention with biases of distances."""

    bias_scale = 1.0

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
        """q [B,H,T,D], k, v [B,G,S,D] -> [B,T,C]."""
        dropout = dropout if self.training else 0.0
        y, _ = attention_forward(self, q, k, v, mask, dropout, scale, is_causal=True, position_bias=q)
        return y.flatten(2)

    def relative_terms(self, q: Tensor, T: int, S: int) -> dict:
        window, dtype = (S - 1, 0), torch.promote_types(q.dtype, torch.float32)
        bias = alibi_bias(q.shape[1], window, device=q.device, dtype=dtype)
        return dict(bias=bias * self.bias_scale, window=window)


class Bloom(_ALiBi):
    def forward(
        self, hidden_states, residual, alibi, attention_mask, layer_past=None, use_cache=False,
        output_attentions=False, **options,
    ):  # fmt: skip
        refuse_options(options | dict(output_attentions=output_attentions))
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        y = self.dense(self._attention(q, k, v, attention_mask, self.attention_dropout.p, self.inv_norm_factor))
        return residual + F.dropout(y, self.hidden_dropout, self.training), None


def _in_slices(module: nn.Module) -> str | None:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        return "it adds the parts of its output in order (slow_but_exact)"


class Falcon(_ALiBi):
    def forward(
        self, hidden_states, alibi, attention_mask, position_ids=None, layer_past=None, use_cache=False,
        output_attentions=False, position_embeddings=None, **options,
    ):  # fmt: skip
        refuse_options(options | dict(output_attentions=output_attentions))
        q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        y = self._attention(q, k, v, attention_mask, self.attention_dropout.p, self.inv_norm_factor)
        return self.dense(y), None

    @property
    def bias_scale(self) -> float:
        return self.inv_norm_factor


def _rotated(module: nn.Module) -> str | None:
    if not module.config.alibi:
        return "its positions are rotary, not ALiBi's"


class Mpt(_ALiBi):
    def forward(self, hidden_states, position_bias, cache=None, attention_mask=None, past_key_values=None, **options):
        refuse_options(options)
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = (heads(x, self.head_dim).transpose(1, 2) for x in mixed.chunk(3, 2))
        cache = past_key_values if cache is None else cache
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        y = self._attention(q, k, v, attention_mask, self.attn_dropout_p, self.softmax_scale)
        return self.out_proj(y), None


ALIBI = {
    "bloom.BloomModel": Adapter(BloomModel, masks=True),
    "bloom.BloomAttention": Adapter(Bloom, masks=True, why_not=_in_slices),
    "falcon.FalconModel": Adapter(functions={"build_alibi_tensor": _build_alibi_tensor}, masks=True, unneeded=_rotated),
    "falcon.FalconAttention": Adapter(Falcon, masks=True, unneeded=_rotated),
    "mpt.MptAttention": Adapter(Mpt, masks=True),
}
