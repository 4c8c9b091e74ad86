"""The readable definition of composite attention, in plain PyTorch; the oracle of all tests.

    s[b,h,i,j] = scale * q[b,i,h]·k[b,j,g(h)] + rel_scale * r[b,i,h]·query_rel[h,:,c] + scale * k[b,j,g(h)]·key_rel[h,:,W-1-c]
                 + bias[h,c]
    p          = dropout(softmax over the visible j of s)
    out[b,i,h] = sum_j p[b,h,i,j] v[b,j,g(h)]
                 + value_conv_scale[h] * (value_conv_bias[h] + sum_c value_conv[h,:,c] * v[b, m(i) + c - left, g(h)])

with r = rel_query or q, g(h) = h // (H/G), and the column c = clip(j - m(i), -left, right) + left of the W = left + right + 1
in a table; m(i) is the position of query i among the keys (``relation``). Everything is computed in float32 (float64 for
float64) and rounded once, at the end. ``attend`` is differentiable, so the double backward is built from it;
``attention_grad`` is written out, as the kernels have to do it.
Sources: Chang et al. 2021, equations 4 to 7; Shaw et al. 2018; Raffel et al. 2020 (T5).
"""  # noqa: E501

from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype, dropout_mask

CLIP, ZERO, MASK = 0, 1, 2
"""What the relative terms do outside the window: repeat the outermost column, vanish, or forbid attention."""


class Relation(NamedTuple):
    """What position j is to query i; all [T,S]."""

    column: Tensor
    """Column of the tables, int64, 0 to W-1; ``key_rel`` is read from its other end."""
    present: Tensor
    """Whether the relative terms count."""
    visible: Tensor
    """Whether i may attend to j, padding aside."""


def key_spans(T: int, S: int, cu_q: Tensor | None, cu_k: Tensor | None, device) -> tuple[Tensor, Tensor, Tensor]:
    """For each query: its place among the keys, m(i), and the first and the end of its sequence's keys, int64 [T].

    The last query and the last key of a sequence are at the same place: m(i) = i + (keys) - (queries).
    """
    i = torch.arange(T, device=device)
    if cu_q is None:
        return i + (S - T), torch.zeros_like(i), torch.full_like(i, S)
    cu_q, cu_k = cu_q.to(torch.int64), cu_k.to(torch.int64)
    sequence = torch.searchsorted(cu_q, i, right=True) - 1
    first, end = cu_k[sequence], cu_k[sequence + 1]
    return i + end - cu_q[sequence + 1], first, end


def relation(
    T: int, S: int, left: int, right: int, outside: int, causal: bool, cu_q: Tensor | None, cu_k: Tensor | None, device
) -> Relation:
    place, first, end = (value[:, None] for value in key_spans(T, S, cu_q, cu_k, device))
    j = torch.arange(S, device=device)
    offset = j - place
    inside = (offset >= -left) & (offset <= right)
    visible = (j >= first) & (j < end)
    if causal:
        visible = visible & (offset <= 0)
    if outside == MASK:
        visible = visible & inside
    present = inside if outside == ZERO else torch.ones_like(inside)
    return Relation(offset.clamp(-left, right) + left, present, visible)


def value_rows(
    T: int, S: int, left: int, right: int, causal: bool, cu_q: Tensor | None, cu_k: Tensor | None, device
) -> Tensor:
    """Which value each tap of ``value_conv`` reads for each query, int64 [T,W]; S stands for a row of zeros."""
    place, first, end = (value[:, None] for value in key_spans(T, S, cu_q, cu_k, device))
    offset = torch.arange(-left, right + 1, device=device)
    j = place + offset
    inside = (j >= first) & (j < end)
    if causal:
        inside = inside & (offset <= 0)
    return torch.where(inside, j, S)


# -- pieces, differentiable -------------------------------------------------------------------------------------------


def _per_head(value: Tensor, H: int) -> Tensor:
    """[B,S,G,D] -> [B,S,H,D]: each key head for the H/G query heads that share it."""
    return value if value.shape[2] == H else value.repeat_interleave(H // value.shape[2], 2)


def _sum_groups(value: Tensor, G: int) -> Tensor:
    """[B,S,H,D] -> [B,S,G,D]."""
    return value.unflatten(2, (G, value.shape[2] // G)).sum(3)


def _tables(table: Tensor, H: int) -> Tensor:
    """[R,W] or [H,R,W] -> [H,R,W]."""
    return table if table.dim() == 3 else table.expand(H, *table.shape)


def _real(value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Keys or values with zeros in place of padding: 0 * NaN would leak."""
    return value if key_mask is None else torch.where(key_mask[:, :, None, None], value, 0.0)


def _by_pair(relation: Relation, shape: tuple) -> Tensor:
    """The column of each pair, for a gather from or a scatter to [B,H,T,W]."""
    return relation.column.expand(*shape[:2], *relation.column.shape)


def _by_key(relation: Relation, shape: tuple, W: int) -> Tensor:
    """The same for the tables of keys, [B,H,S,W]: the key looks at the query, so the columns run backwards."""
    return (W - 1 - relation.column).T.expand(*shape[:2], *relation.column.T.shape)


def _scores(q, k, relation, W, qk, scale, rel_scale, bias, query_rel, rel_query, key_rel) -> Tensor:
    """s, [B,H,T,S], from q [B,T,H,D] and k [B,S,H,D]."""
    (B, T, H, _), S = q.shape, k.shape[1]
    s = torch.einsum("bthd,bshd->bhts", q, k) * scale if qk else q.new_zeros(B, H, T, S)
    rows = None
    if query_rel is not None:
        r = q if rel_query is None else rel_query
        rows = torch.einsum("bthr,hrw->bhtw", r, _tables(query_rel, H)) * rel_scale
    if bias is not None:
        rows = bias[None, :, None].expand(B, H, T, W) if rows is None else rows + bias[:, None]
    if rows is not None:
        s = s + torch.where(relation.present, rows.gather(3, _by_pair(relation, s.shape)), 0.0)
    if key_rel is not None:
        rows = torch.einsum("bshd,hdw->bhsw", k, _tables(key_rel, H)) * scale
        rows = rows.gather(3, _by_key(relation, s.shape, W)).transpose(2, 3)
        s = s + torch.where(relation.present, rows, 0.0)
    return s


def _softmax(s: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, log of the sum of exponentials over the visible j, and which pairs these are, [B,H,T,S]. A row whose visible
    scores are all -inf sees nothing: p is 0 and the logarithm -inf."""
    if s.shape[3] == 0:
        return s, s.new_full(s.shape[:3], float("-inf")), torch.ones_like(s, dtype=torch.bool)
    top = torch.where(visible, s, float("-inf")).amax(3, keepdim=True).detach()
    some = top != float("-inf")
    seen = visible & some
    e = torch.where(seen, torch.exp(torch.where(seen, s - top, 0.0)), 0.0)
    total = torch.where(some, e.sum(3, keepdim=True), 1.0)
    lse = torch.where(some, torch.log(total) + top, float("-inf"))
    return torch.where(seen, e / total, 0.0), lse.squeeze(3), seen


def _sum_seen(weights: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
    """[B,T,H,D] from weights [B,H,T,S] and rows [B,S,H,D]: the sums over j of the seen pairs; other weights are 0.
    Rows that are not finite are added one by one: 0 * NaN would leak."""
    finite = rows.isfinite().all(3)
    if finite.all():
        return torch.einsum("bhts,bshd->bthd", weights, rows)
    total = torch.einsum("bhts,bshd->bthd", weights, torch.where(finite[..., None], rows, 0.0))
    for j in (~finite).any(2).any(0).nonzero().flatten().tolist():
        pairs = (seen[..., j] & ~finite[:, j, :, None]).transpose(1, 2)
        terms = weights[..., j].transpose(1, 2)[..., None] * rows[:, None, j]
        total = total + torch.where(pairs[..., None], terms, 0.0)
    return total


def _convolve(v: Tensor, rows: Tensor, value_conv: Tensor, value_conv_bias: Tensor | None) -> Tensor:
    """The depthwise term before its scale, [B,T,H,D], from v [B,S,H,D]."""
    extended = torch.cat([v, v.new_zeros(v.shape[0], 1, *v.shape[2:])], 1)
    u = v.new_zeros(v.shape[0], rows.shape[0], *v.shape[2:])
    for c in range(rows.shape[1]):
        u = u + extended.index_select(1, rows[:, c]) * value_conv[..., c]
    return u if value_conv_bias is None else u + value_conv_bias


def _visible(relation: Relation, key_mask: Tensor | None) -> Tensor:
    """[1|B,1,T,S]."""
    visible = relation.visible[None, None]
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def attend(
    q, k, v, left=0, right=0, outside=CLIP, causal=False, qk=True, scale=1.0, rel_scale=1.0, dropout=0.0, seed=None,
    bias=None, query_rel=None, rel_query=None, key_rel=None, value_conv=None, value_conv_bias=None,
    value_conv_scale=None, key_mask=None, cu_seqlens_q=None, cu_seqlens_k=None, *, sum_seen=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse in the accumulation type, by differentiable operations only. Hidden values that are not finite are
    kept out by ``sum_seen``, which looks at values, as derivatives of derivatives cannot."""
    dtype = accumulate_dtype(q.dtype)
    (_, T, H, _), S = q.shape, k.shape[1]
    pair = relation(T, S, left, right, outside, causal, cu_seqlens_q, cu_seqlens_k, q.device)
    q, k, v, bias, query_rel, rel_query, key_rel, value_conv, value_conv_bias, value_conv_scale = (
        None if value is None else value.to(dtype)
        for value in (
            q, k, v, bias, query_rel, rel_query, key_rel, value_conv, value_conv_bias, value_conv_scale
        )
    )  # fmt: skip
    k, v = _per_head(_real(k, key_mask), H), _per_head(_real(v, key_mask), H)
    s = _scores(q, k, pair, left + right + 1, qk, scale, rel_scale, bias, query_rel, rel_query, key_rel)
    p, lse, seen = _softmax(s, _visible(pair, key_mask))
    if dropout > 0:
        p = p * _dropout(seed, dropout, p)
    out = torch.einsum("bhts,bshd->bthd", p, v) if sum_seen is None else sum_seen(p, seen, v)
    if value_conv is not None:
        rows = value_rows(T, S, left, right, causal, cu_seqlens_q, cu_seqlens_k, q.device)
        u = _convolve(v, rows, value_conv, value_conv_bias)
        out = out + (u if value_conv_scale is None else u * value_conv_scale[:, None])
    return out, lse


def _dropout(seed: Tensor, dropout: float, p: Tensor) -> Tensor:
    """Multipliers 0 or 1/(1-dropout) for p [B,H,T,S]; counter (i, b, h, j >> 2)."""
    B, H, T, S = p.shape
    return dropout_mask(seed, dropout, (B, T, H, S), p.dtype).transpose(1, 2)


# -- the kernels ------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int = 0,
    right: int = 0,
    outside: int = CLIP,
    causal: bool = False,
    qk: bool = True,
    scale: float = 1.0,
    rel_scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    query_rel: Tensor | None = None,
    rel_query: Tensor | None = None,
    key_rel: Tensor | None = None,
    value_conv: Tensor | None = None,
    value_conv_bias: Tensor | None = None,
    value_conv_scale: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward pass: out [B,T,H,D] like q, and lse [B,H,T] in the accumulation type."""
    out, lse = attend(
        q, k, v, left, right, outside, causal, qk, scale, rel_scale, dropout, seed, bias, query_rel, rel_query,
        key_rel, value_conv, value_conv_bias, value_conv_scale, key_mask, cu_seqlens_q, cu_seqlens_k,
        sum_seen=_sum_seen,
    )  # fmt: skip
    return _like(out, q), lse.contiguous()


def attention_grad(
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int = 0,
    right: int = 0,
    outside: int = CLIP,
    causal: bool = False,
    qk: bool = True,
    scale: float = 1.0,
    rel_scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    query_rel: Tensor | None = None,
    rel_query: Tensor | None = None,
    key_rel: Tensor | None = None,
    value_conv: Tensor | None = None,
    value_conv_bias: Tensor | None = None,
    value_conv_scale: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    needs: int = 1023,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k, v, bias, query_rel, rel_query, key_rel, value_conv, value_conv_bias and
    value_conv_scale, in this order; bits 1, 2, 4, ... 512 of ``needs`` select them. out and lse are the results of
    the forward pass, for kernels that do not want to find them again; this one does."""
    dtype = accumulate_dtype(q.dtype)
    (B, T, H, _), (S, G), W = q.shape, k.shape[1:3], left + right + 1
    inputs = (q, k, v, bias, query_rel, rel_query, key_rel, value_conv, value_conv_bias, value_conv_scale)
    asked = [value is not None and bool(needs & 1 << bit) for bit, value in enumerate(inputs)]
    found: list[Tensor | None] = [None] * len(inputs)
    q, k, v, bias, query_rel, rel_query, key_rel, value_conv, value_conv_bias, value_conv_scale = (
        None if value is None else value.to(dtype) for value in inputs
    )
    k, v = _per_head(_real(k, key_mask), H), _per_head(_real(v, key_mask), H)
    g = grad.to(dtype)
    pair = relation(T, S, left, right, outside, causal, cu_seqlens_q, cu_seqlens_k, q.device)
    s = _scores(q, k, pair, W, qk, scale, rel_scale, bias, query_rel, rel_query, key_rel)
    p, found_lse, seen = _softmax(s, _visible(pair, key_mask))
    multiplier = _dropout(seed, dropout, p) if dropout > 0 else None
    seen_back = seen.transpose(2, 3)
    grad_v = _sum_seen((p if multiplier is None else p * multiplier).transpose(2, 3), seen_back, g)

    if any(asked[:2]) or any(asked[3:7]):
        grad_p = torch.einsum("bthd,bshd->bhts", g, v)
        if multiplier is not None:
            grad_p = grad_p * multiplier
        delta = torch.where(seen, grad_p * p, 0.0).sum(3, keepdim=True)
        if grad_lse is not None:
            # Whoever merges results of several calls gets NaN for a row of -inf: it passes nothing on.
            delta = delta - torch.where(found_lse == float("-inf"), 0.0, grad_lse.to(dtype))[..., None]
        grad_s = torch.where(seen, p * (grad_p - delta), 0.0)
        grad_q = _sum_seen(grad_s, seen, k) * scale if qk else torch.zeros_like(q)
        grad_k = _sum_seen(grad_s.transpose(2, 3), seen_back, q) * scale if qk else torch.zeros_like(k)
        by_pair = torch.where(pair.present, grad_s, 0.0)
        if bias is not None or query_rel is not None:
            rows = q.new_zeros(B, H, T, W).scatter_add_(3, _by_pair(pair, s.shape), by_pair)
            if asked[3]:
                found[3] = rows.sum((0, 2))
            if query_rel is not None:
                r = q if rel_query is None else rel_query
                r = torch.where(seen.any(3).transpose(1, 2)[..., None], r, 0.0)  # 0 * NaN of a query that sees nothing
                found[4] = torch.einsum("bthr,bhtw->hrw", r, rows) * rel_scale
                grad_r = torch.einsum("bhtw,hrw->bthr", rows, _tables(query_rel, H)) * rel_scale
                if rel_query is None:
                    grad_q = grad_q + grad_r
                else:
                    found[5] = grad_r
        if key_rel is not None:
            columns = q.new_zeros(B, H, S, W)
            columns = columns.scatter_add_(3, _by_key(pair, s.shape, W), by_pair.transpose(2, 3))
            met = torch.where(seen.any(2).transpose(1, 2)[..., None], k, 0.0)  # 0 * NaN of a key that nothing sees
            found[6] = torch.einsum("bshd,bhsw->hdw", met, columns) * scale
            grad_k = grad_k + torch.einsum("bhsw,hdw->bshd", columns, _tables(key_rel, H)) * scale
        found[0], found[1] = grad_q, _sum_groups(_real(grad_k, key_mask), G)

    if value_conv is not None:
        rows = value_rows(T, S, left, right, causal, cu_seqlens_q, cu_seqlens_k, q.device)
        if value_conv_scale is not None:
            found[9] = (g * _convolve(v, rows, value_conv, value_conv_bias)).sum((0, 1, 3))
            g = g * value_conv_scale[:, None]
        found[8] = g.sum((0, 1))
        extended = torch.cat([v, v.new_zeros(B, 1, *v.shape[2:])], 1)
        found[7] = torch.stack([(g * extended.index_select(1, rows[:, c])).sum((0, 1)) for c in range(W)], -1)
        grad_extended = torch.zeros_like(extended)
        for c in range(W):
            grad_extended.index_add_(1, rows[:, c], g * value_conv[..., c])
        grad_v = grad_v + grad_extended[:, :S]
    found[2] = _sum_groups(_real(grad_v, key_mask), G)

    results = []
    for bit, (value, gradient) in enumerate(zip(inputs, found, strict=True)):
        if not asked[bit]:
            results.append((q_like(inputs, bit)).new_empty(0))
        elif bit in (0, 1, 2, 5):
            results.append(_like(gradient, value))
        else:
            gradient = gradient.sum(0) if gradient.dim() > value.dim() else gradient
            results.append(gradient.to(value.dtype).contiguous())
    return tuple(results)


def q_like(inputs: tuple, bit: int) -> Tensor:
    """The tensor whose dtype an unwanted gradient has: its input, or q for an input that is not given."""
    return inputs[0] if inputs[bit] is None else inputs[bit]


def _like(value: Tensor, x: Tensor) -> Tensor:
    """value rounded to x's type in a new tensor of x's layout."""
    return torch.empty_like(x).copy_(value)
