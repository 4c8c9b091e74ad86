"""DeBERTa: the query scores the distance, and so does the key."""

import torch
from torch import Tensor, nn

from ....ops._validate import fail
from ....ops.attention.api import composite_attention
from ..swapping import Adapter
from .common import OPTIMIZED, heads, refuse_options


class DebertaEncoder:
    """Encoders of DeBERTa, whose layers get the padding as a mask [B,1,1,S], and no distances."""

    def get_attention_mask(self, attention_mask: Tensor) -> Tensor:
        if attention_mask.dim() != 2:
            fail(OPTIMIZED, "attention_mask", "shape [B,S] (restore it)", attention_mask, NotImplementedError)
        return attention_mask[:, None, None]

    def get_rel_pos(self, hidden_states, query_states=None, relative_pos=None) -> None:
        refuse_options(dict(relative_pos=relative_pos))


class _Disentangled:
    """Attention of DeBERTa:

    s[b,h,i,j] = (q[i]·k[j] + q[i]·key_pos[n(i-j)] + k[j]·query_pos[n(i-j)]) / sqrt(D * number of terms)
    """

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rel_embeddings: Tensor, span: int) -> Tensor:
        """q, k, v [B,T,H,D] -> [B,T,C]. span: rel_embeddings has 2 * span rows."""
        T, D = q.shape[1], q.shape[3]
        key_pos, query_pos = self._projections()
        left, right = min(T - 1, self._furthest(span) - 1), min(T - 1, self._furthest(span))
        row = self._rows(torch.arange(left, -right - 1, -1, device=q.device), span)
        first, last = self._reach(left, right, span)
        embedded = self.pos_dropout(rel_embeddings[first : last + 1])

        def table(term: str, projection: nn.Module, row: Tensor) -> Tensor | None:
            if term not in self.pos_att_type:
                return None
            return heads(projection(embedded)[row - first], D).permute(1, 2, 0)

        y = composite_attention(
            q,
            k,
            v,
            query_rel=table("c2p", key_pos, row),
            key_rel=table("p2c", query_pos, row.flip(0)),
            window=(left, right),
            key_mask=mask[:, 0, 0].bool(),
            scale=(D * self._parts()) ** -0.5,
            dropout=self.dropout.p if hasattr(self.dropout, "p") else self.dropout.drop_prob,
            training=self.training,
        )
        return y.flatten(2)

    def _buckets(self) -> int:
        return getattr(self, "position_buckets", -1)

    def _furthest(self, span: int) -> int:
        """The distance from which on the row is the same."""
        if self._buckets() <= 0:
            return span
        return self.max_relative_positions if self.max_relative_positions > self._buckets() // 2 else 2**31

    def _rows(self, distance: Tensor, span: int) -> Tensor:
        """The row of rel_embeddings of each distance i - j."""
        if self._buckets() > 0:
            distance = _log_buckets(distance, self._buckets() // 2, self.max_relative_positions)
        return (distance + span).clamp(0, 2 * span - 1)

    def _reach(self, left: int, right: int, span: int) -> tuple[int, int]:
        """The first and the last row that distances from -right to left can have."""
        if 0 < self._buckets() // 2 < max(left, right):
            return 0, 2 * span - 1
        return max(span - right, 0), min(span + left, 2 * span - 1)


def _log_buckets(distance: Tensor, exact: int, furthest: int) -> Tensor:
    """DeBERTa-v2's buckets: as many exact distances to each side as there are logarithmic ones beyond them. The
    logarithms are taken in float32, as in the original, because the boundaries depend on their rounding."""
    ratio = torch.log(distance.abs().clamp(min=exact) / exact) / torch.log(torch.tensor((furthest - 1) / exact))
    far = (torch.ceil(ratio * (exact - 1)) + exact).to(torch.int64)
    return torch.where(distance.abs() <= exact, distance, far * distance.sign())


class Deberta(_Disentangled):
    def forward(
        self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
        rel_embeddings=None,
    ):  # fmt: skip
        given = dict(output_attentions=output_attentions, query_states=query_states, relative_pos=relative_pos)
        refuse_options(given)
        D = self.attention_head_size
        q, k, v = heads(self.in_proj(hidden_states), 3 * D).chunk(3, -1)
        q, v = q + heads(self.q_bias, D), v + heads(self.v_bias, D)
        furthest = self.max_relative_positions
        span = min(hidden_states.shape[1], furthest)
        rows = rel_embeddings[furthest - span : furthest + span]
        return self._attention(q, k, v, attention_mask, rows, span), None

    def _parts(self) -> int:
        return 1 + len(self.pos_att_type)

    def _projections(self):
        return getattr(self, "pos_proj", None), getattr(self, "pos_q_proj", None)


class DebertaV2(_Disentangled):
    def forward(
        self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
        rel_embeddings=None,
    ):  # fmt: skip
        refuse_options(dict(output_attentions=output_attentions, relative_pos=relative_pos))
        asking = hidden_states if query_states is None else query_states
        linear = ((self.query_proj, asking), (self.key_proj, hidden_states), (self.value_proj, hidden_states))
        q, k, v = (x.unflatten(-1, (self.num_attention_heads, -1)) for x in (map_(y) for map_, y in linear))
        return self._attention(q, k, v, attention_mask, rel_embeddings, self.pos_ebd_size), None

    def _parts(self) -> int:
        return 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)

    def _projections(self):
        if self.share_att_key:
            return self.key_proj, self.query_proj
        return getattr(self, "pos_key_proj", None), getattr(self, "pos_query_proj", None)


class SEWD(DebertaV2):
    def forward(
        self, hidden_states, attention_mask, query_states=None, relative_pos=None, rel_embeddings=None, **options
    ):
        refuse_options(options)
        return super().forward(hidden_states, attention_mask, False, query_states, relative_pos, rel_embeddings)


def _absolute(module: nn.Module) -> str | None:
    if not module.relative_attention:
        return "it has no relative positions"


def _talking(module: nn.Module) -> str | None:
    if module.talking_head:
        return "its heads talk to each other (talking_head)"


DEBERTA = {
    "deberta.DebertaEncoder": Adapter(DebertaEncoder, unneeded=_absolute),
    "deberta.DisentangledSelfAttention": Adapter(Deberta, unneeded=_absolute, why_not=_talking),
    "deberta_v2.DebertaV2Encoder": Adapter(DebertaEncoder, unneeded=_absolute),
    "deberta_v2.DisentangledSelfAttention": Adapter(DebertaV2, unneeded=_absolute),
    "sew_d.SEWDTransformerEncoder": Adapter(DebertaEncoder, unneeded=_absolute),
    "sew_d.DisentangledSelfAttention": Adapter(SEWD, unneeded=_absolute),
}
