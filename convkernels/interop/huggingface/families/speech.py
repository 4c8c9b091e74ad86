"""Speech encoders with the relative positions of Transformer-XL or of Shaw et al."""

from torch import Tensor, nn

from ....ops._validate import fail
from ....ops.attention.api import composite_attention
from ..attention import attention_forward
from ..swapping import Adapter
from .common import OPTIMIZED, expect_interface, heads, refuse_options, rows

# Transformer-XL: the query with another bias scores the projected sinusoid of the distance.


def _apply_relative_position_encoding(module, query, key, relative_position_embeddings):
    """Conformers of transformers, query [B,H,T,D], embeddings [1,2T-1,C] of the distances from T-1 down."""
    expect_interface(module)
    if relative_position_embeddings is None:
        expected = "embeddings, because position_embeddings_type is 'relative'"
        fail(OPTIMIZED, "relative_position_embeddings", expected, "None")
    terms = _sinusoids(module.linear_pos, relative_position_embeddings, module.head_size, module.scaling)
    asking = (query + module.pos_bias_v[:, None]).transpose(1, 2)
    return query + module.pos_bias_u[:, None], dict(rel_query=asking, **terms)


def _sinusoids(linear: nn.Module, embedded: Tensor, size: int, scale: float) -> dict:
    reach = embedded.shape[1] // 2
    return dict(query_rel=heads(linear(embedded[0]) * scale, size).permute(1, 2, 0), window=reach)


class Parakeet:
    def forward(self, hidden_states, position_embeddings, attention_mask=None, **options):
        refuse_options(options)
        q, k, v = (heads(linear(hidden_states), self.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj))
        mask = None
        if attention_mask is not None:  # padding times padding, [B,1,T,T]
            mask = attention_mask[:, 0].diagonal(dim1=1, dim2=2)
        y = composite_attention(
            q + self.bias_u,
            k,
            v,
            rel_query=q + self.bias_v,
            **_sinusoids(self.relative_k_proj, position_embeddings, self.head_dim, self.scaling),
            key_mask=mask,
            scale=self.scaling,
            dropout=self.attention_dropout,
            training=self.training,
        )
        return self.o_proj(y.flatten(2)), None


def _dropped(module: nn.Module) -> str | None:
    if module.config.dropout_positions > 0:
        return "its positions are dropped for each sequence apart (dropout_positions)"


def _unrelated(*kinds: str):
    def unneeded(module: nn.Module) -> str | None:
        if module.position_embeddings_type not in kinds:
            return f"its position_embeddings_type is {module.position_embeddings_type!r}"

    return unneeded


# Shaw: the query scores the clipped distance.


def _apply_relative_key_position_encoding(module, query, key):
    expect_interface(module)
    window = (module.left_max_position_embeddings, module.right_max_position_embeddings)
    return query, dict(query_rel=rows(module.distance_embedding, query.device).T, window=window)


class SeamlessM4Tv2:
    def forward(self, hidden_states, attention_mask=None, **options):
        q, k, v = (
            heads(linear(hidden_states), self.head_size).transpose(1, 2)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        _, terms = _apply_relative_key_position_encoding(self, q, k)
        dropout = self.dropout.p if self.training else 0.0
        y, _ = attention_forward(self, q, k, v, attention_mask, dropout, self.scaling, position_bias=terms, **options)
        return self.linear_out(y.flatten(2)), None


class SeamlessM4Tv2Encoder:
    def _apply_chunk_attention(self, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        T, chunk = hidden_states.shape[1], self.config.speech_encoder_chunk_size
        if T > chunk:
            expected = f"at most speech_encoder_chunk_size = {chunk} of them (restore it)"
            fail(OPTIMIZED, "frames", expected, T, NotImplementedError)
        return attention_mask


_XL = {"_apply_relative_position_encoding": _apply_relative_position_encoding}
_SHAW = {"_apply_relative_key_position_encoding": _apply_relative_key_position_encoding}
_CONFORMER = Adapter(functions=_XL, masks=True, unneeded=_unrelated("relative"))

SPEECH = {
    "parakeet.ParakeetEncoderAttention": Adapter(Parakeet, why_not=_dropped),
    "seamless_m4t.SeamlessM4TConformerSelfAttention": _CONFORMER,
    "seamless_m4t_v2.SeamlessM4Tv2ConformerEncoder": Adapter(SeamlessM4Tv2Encoder, masks=True),
    "seamless_m4t_v2.SeamlessM4Tv2ConformerSelfAttention": Adapter(
        SeamlessM4Tv2, masks=True, unneeded=_unrelated("relative_key")
    ),
    "wav2vec2_bert.Wav2Vec2BertSelfAttention": Adapter(
        functions=_XL | _SHAW, masks=True, unneeded=_unrelated("relative", "relative_key")
    ),
    "wav2vec2_conformer.Wav2Vec2ConformerSelfAttention": _CONFORMER,
}
