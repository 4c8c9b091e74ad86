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
from .schema import INPUTS, ROWS, Attention, AttentionGrad

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


def key_spans(args: Attention | AttentionGrad) -> tuple[Tensor, Tensor, Tensor]:
    """For each query: its place among the keys, m(i), and the first and the end of its sequence's keys, int64 [T].

    The last query and the last key of a sequence are at the same place: m(i) = i + (keys) - (queries).
    """
    T, S = args.q.shape[1], args.k.shape[1]
    i = torch.arange(T, device=args.q.device)
    if args.cu_seqlens_q is None:
        return i + (S - T), torch.zeros_like(i), torch.full_like(i, S)
    cu_q, cu_k = args.cu_seqlens_q.to(torch.int64), args.cu_seqlens_k.to(torch.int64)
    sequence = torch.searchsorted(cu_q, i, right=True) - 1
    first, end = cu_k[sequence], cu_k[sequence + 1]
    return i + end - cu_q[sequence + 1], first, end


def relation(args: Attention | AttentionGrad) -> Relation:
    left, right = args.left, args.right
    place, first, end = (value[:, None] for value in key_spans(args))
    j = torch.arange(args.k.shape[1], device=args.q.device)
    offset = j - place
    inside = (offset >= -left) & (offset <= right)
    visible = (j >= first) & (j < end)
    if args.causal:
        visible = visible & (offset <= 0)
    if args.outside == MASK:
        visible = visible & inside
    present = inside if args.outside == ZERO else torch.ones_like(inside)
    return Relation(offset.clamp(-left, right) + left, present, visible)


def value_rows(args: Attention | AttentionGrad) -> Tensor:
    """Which value each tap of ``value_conv`` reads for each query, int64 [T,W]; S stands for a row of zeros."""
    place, first, end = (value[:, None] for value in key_spans(args))
    offset = torch.arange(-args.left, args.right + 1, device=args.q.device)
    j = place + offset
    inside = (j >= first) & (j < end)
    if args.causal:
        inside = inside & (offset <= 0)
    return torch.where(inside, j, args.k.shape[1])


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


def _scores(args: Attention | AttentionGrad, relation: Relation) -> Tensor:
    """s, [B,H,T,S], from q [B,T,H,D] and k [B,S,H,D]."""
    q, k, query_rel, key_rel, bias, W = args.q, args.k, args.query_rel, args.key_rel, args.bias, _width(args)
    (B, T, H, _), S = q.shape, k.shape[1]
    s = torch.einsum("bthd,bshd->bhts", q, k) * args.scale if args.qk else q.new_zeros(B, H, T, S)
    rows = None
    if query_rel is not None:
        r = q if args.rel_query is None else args.rel_query
        rows = torch.einsum("bthr,hrw->bhtw", r, _tables(query_rel, H)) * args.rel_scale
    if bias is not None:
        rows = bias[None, :, None].expand(B, H, T, W) if rows is None else rows + bias[:, None]
    if rows is not None:
        s = s + torch.where(relation.present, rows.gather(3, _by_pair(relation, s.shape)), 0.0)
    if key_rel is not None:
        rows = torch.einsum("bshd,hdw->bhsw", k, _tables(key_rel, H)) * args.scale
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


def _width(args: Attention | AttentionGrad) -> int:
    """W, the columns of the tables."""
    return args.left + args.right + 1


def _widened(args: Attention | AttentionGrad):
    """The arguments in the accumulation type; k and v without padding, [B,S,H,D]."""
    dtype, H = accumulate_dtype(args.q.dtype), args.q.shape[2]
    given = {name: getattr(args, name) for name in INPUTS.names}
    wide = args._replace(**{name: value.to(dtype) for name, value in given.items() if value is not None})
    k, v = (_per_head(_real(value, args.key_mask), H) for value in (wide.k, wide.v))
    return wide._replace(k=k, v=v)


def attend(args: Attention | AttentionGrad, *, sum_seen=None) -> tuple[Tensor, Tensor]:
    """out and lse in the accumulation type, by differentiable operations only. Hidden values that are not finite are
    kept out by ``sum_seen``, which looks at values, as derivatives of derivatives cannot."""
    args = _widened(args)
    pair = relation(args)
    p, lse, seen = _softmax(_scores(args, pair), _visible(pair, args.key_mask))
    if args.dropout > 0:
        p = p * _dropout(args, p)
    out = torch.einsum("bhts,bshd->bthd", p, args.v) if sum_seen is None else sum_seen(p, seen, args.v)
    if args.value_conv is not None:
        u = _convolve(args.v, value_rows(args), args.value_conv, args.value_conv_bias)
        out = out + (u if args.value_conv_scale is None else u * args.value_conv_scale[:, None])
    return out, lse


def _dropout(args: Attention | AttentionGrad, p: Tensor) -> Tensor:
    """Multipliers 0 or 1/(1-dropout) for p [B,H,T,S]; counter (i, b, h, j >> 2)."""
    B, H, T, S = p.shape
    return dropout_mask(args.seed, args.dropout, (B, T, H, S), p.dtype).transpose(1, 2)


def attention(args: Attention) -> tuple[Tensor, Tensor]:
    """The forward pass: out [B,T,H,D] like q, and lse [B,H,T] in the accumulation type."""
    out, lse = attend(args, sum_seen=_sum_seen)
    return _like(out, args.q), lse.contiguous()


def attention_grad(args: AttentionGrad) -> tuple[Tensor, ...]:
    """Gradients with respect to q, k, v, bias, query_rel, rel_query, key_rel, value_conv, value_conv_bias and
    value_conv_scale, in this order, those that ``needs`` asks for. out and lse are the results of the forward pass, for
    kernels that do not compute them again; this one does."""
    given = {name: getattr(args, name) for name in INPUTS.names}
    asked = [value is not None and want for value, want in zip(given.values(), args.wanted, strict=True)]
    found = _gradients(_widened(args), any(asked[:2]) or any(asked[3:7]), args.k.shape[2])
    results = []
    for (name, value), there in zip(given.items(), asked, strict=True):
        if not there:
            results.append((args.q if value is None else value).new_empty(0))
        elif name in ROWS:
            results.append(_like(found[name], value))
        else:
            gradient = found[name].sum(0) if found[name].dim() > value.dim() else found[name]
            results.append(gradient.to(value.dtype).contiguous())
    return tuple(results)


def _gradients(args: AttentionGrad, behind: bool, G: int) -> dict[str, Tensor]:
    """Gradients by name, of ``_widened`` arguments; behind: whether anything behind the softmax is needed."""
    q, k, v, g = args.q, args.k, args.v, args.grad.to(args.q.dtype)
    (B, T, H, _), S, W = q.shape, k.shape[1], _width(args)
    found: dict[str, Tensor] = {}
    pair = relation(args)
    s = _scores(args, pair)
    p, lse, seen = _softmax(s, _visible(pair, args.key_mask))
    multiplier = _dropout(args, p) if args.dropout > 0 else None
    seen_back = seen.transpose(2, 3)
    grad_v = _sum_seen((p if multiplier is None else p * multiplier).transpose(2, 3), seen_back, g)

    if behind:
        grad_p = torch.einsum("bthd,bshd->bhts", g, v)
        if multiplier is not None:
            grad_p = grad_p * multiplier
        delta = torch.where(seen, grad_p * p, 0.0).sum(3, keepdim=True)
        if args.grad_lse is not None:
            # A caller that merges results of several calls gets NaN as gradient of an lse of -inf: it counts as 0.
            delta = delta - torch.where(lse == float("-inf"), 0.0, args.grad_lse.to(q.dtype))[..., None]
        grad_s = torch.where(seen, p * (grad_p - delta), 0.0)
        grad_q = _sum_seen(grad_s, seen, k) * args.scale if args.qk else torch.zeros_like(q)
        grad_k = _sum_seen(grad_s.transpose(2, 3), seen_back, q) * args.scale if args.qk else torch.zeros_like(k)
        by_pair = torch.where(pair.present, grad_s, 0.0)
        if args.bias is not None or args.query_rel is not None:
            rows = q.new_zeros(B, H, T, W).scatter_add_(3, _by_pair(pair, s.shape), by_pair)
            found["bias"] = rows.sum((0, 2))
            if args.query_rel is not None:
                r = q if args.rel_query is None else args.rel_query
                r = torch.where(seen.any(3).transpose(1, 2)[..., None], r, 0.0)  # 0 * NaN of a query that sees nothing
                found["query_rel"] = torch.einsum("bthr,bhtw->hrw", r, rows) * args.rel_scale
                grad_r = torch.einsum("bhtw,hrw->bthr", rows, _tables(args.query_rel, H)) * args.rel_scale
                if args.rel_query is None:
                    grad_q = grad_q + grad_r
                else:
                    found["rel_query"] = grad_r
        if args.key_rel is not None:
            columns = q.new_zeros(B, H, S, W)
            columns = columns.scatter_add_(3, _by_key(pair, s.shape, W), by_pair.transpose(2, 3))
            met = torch.where(seen.any(2).transpose(1, 2)[..., None], k, 0.0)  # 0 * NaN of a key that nothing sees
            found["key_rel"] = torch.einsum("bshd,bhsw->hdw", met, columns) * args.scale
            grad_k = grad_k + torch.einsum("bhsw,hdw->bshd", columns, _tables(args.key_rel, H)) * args.scale
        found["q"], found["k"] = grad_q, _sum_groups(_real(grad_k, args.key_mask), G)

    if args.value_conv is not None:
        rows = value_rows(args)
        if args.value_conv_scale is not None:
            u = _convolve(v, rows, args.value_conv, args.value_conv_bias)
            found["value_conv_scale"] = (g * u).sum((0, 1, 3))
            g = g * args.value_conv_scale[:, None]
        found["value_conv_bias"] = g.sum((0, 1))
        extended = torch.cat([v, v.new_zeros(B, 1, *v.shape[2:])], 1)
        taps = [(g * extended.index_select(1, rows[:, c])).sum((0, 1)) for c in range(W)]
        found["value_conv"] = torch.stack(taps, -1)
        grad_extended = torch.zeros_like(extended)
        for c in range(W):
            grad_extended.index_add_(1, rows[:, c], g * args.value_conv[..., c])
        grad_v = grad_v + grad_extended[:, :S]
    found["v"] = _sum_groups(_real(grad_v, args.key_mask), G)
    return found


def _like(value: Tensor, x: Tensor) -> Tensor:
    """value rounded to x's type in a new tensor of x's layout."""
    return torch.empty_like(x).copy_(value)
