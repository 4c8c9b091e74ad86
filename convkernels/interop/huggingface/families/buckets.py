"""T5's buckets of distances. The position bias that goes from layer to layer is a table [H,W]: the distances up to the
first that shares the last bucket."""

import torch
from torch import Tensor

from ....ops._validate import fail
from ....ops.attention.api import composite_attention
from ....ops.attention.t5 import t5_relative_bias
from ..swapping import Adapter
from .common import OPTIMIZED, expect_interface, heads, refuse_options, rows


class T5:
    """Attention of T5 and its relatives."""

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, *more, **options):
        expect_interface(self)
        if position_bias is None and not self.has_relative_attention_bias:  # the original makes zeros [1,H,T,S]
            position_bias = hidden_states.new_zeros(self.n_heads, 1)
        if mask is not None and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:  # 0 or the lowest number
            mask = mask[:, 0, 0] == 0
        return super().forward(hidden_states, mask, key_value_states, position_bias, *more, **options)

    def compute_bias(self, query_length, key_length, device, past_seen_tokens=0) -> Tensor:
        table, furthest = rows(self.relative_attention_bias, device), self.relative_attention_max_distance
        return t5_relative_bias(table, bidirectional=not self.is_decoder, max_distance=furthest)

    def relative_terms(self, bias: Tensor, T: int, S: int) -> dict:
        W = bias.shape[1]
        return {} if W == 1 else dict(bias=bias, window=(left := self.relative_attention_max_distance, W - 1 - left))


class UMT5:
    """UMT5's attention, of which each layer has a bias; that of the encoder to the decoder's is zeros [1,H,T,S]."""

    def compute_bias(self, *lengths, **placed) -> Tensor:
        expect_interface(self)
        return T5.compute_bias(self, *lengths, **placed)

    def relative_terms(self, bias: Tensor, T: int, S: int) -> dict:
        return T5.relative_terms(self, bias, T, S) if bias.dim() == 2 else {}


class MPNetEncoder:
    def compute_position_bias(self, x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Tensor:
        if position_ids is not None:
            fail(OPTIMIZED, "position_ids", "None (restore it)", position_ids, NotImplementedError)
        return t5_relative_bias(rows(self.relative_attention_bias, x.device, num_buckets))


class MPNetAttention:
    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **options):
        refuse_options(options | dict(output_attentions=output_attentions))
        q, k, v = (heads(linear(hidden_states), self.attention_head_size) for linear in (self.q, self.k, self.v))
        y = composite_attention(
            q, k, v, bias=position_bias, key_mask=attention_mask, dropout=self.dropout.p, training=self.training
        )
        return (self.o(y.flatten(2)),)


class WavLM:
    def forward(self, hidden_states, attention_mask=None, position_bias=None, index=0, **options):
        if position_bias is None:
            reach = min(hidden_states.shape[1], self.max_distance)
            offset = torch.arange(-reach, reach + 1, device=hidden_states.device)
            position_bias = self.rel_attn_embed(self._relative_positions_bucket(offset)).T
        gates = self.gru_rel_pos_linear(heads(hidden_states, self.head_dim)).unflatten(-1, (2, 4)).sum(-1)
        first, second = gates.sigmoid().chunk(2, -1)
        gate = first * (second * self.gru_rel_pos_const.view(-1, 1) - 1.0) + 2.0
        q, k, v = (heads(linear(hidden_states), self.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj))
        y = composite_attention(
            q,
            k,
            v,
            rel_query=gate,
            query_rel=position_bias[:, None],
            key_mask=None if attention_mask is None else attention_mask == 1,
            dropout=self.dropout,
            training=self.training,
        )
        return self.out_proj(y.flatten(2)), None, position_bias


BUCKETS = {
    **{
        f"{family}.{name}Attention": Adapter(T5, masks=True)
        for family, name in (
            ("mt5", "MT5"),
            ("pop2piano", "Pop2Piano"),
            ("switch_transformers", "SwitchTransformers"),
            ("t5", "T5"),
        )
    },
    "umt5.UMT5Attention": Adapter(UMT5, masks=True),
    "mpnet.MPNetEncoder": Adapter(MPNetEncoder, masks=True),
    "mpnet.MPNetSelfAttention": Adapter(MPNetAttention, masks=True),
    "wavlm.WavLMAttention": Adapter(WavLM),
}
