"""The public function of the attention family."""

from torch import Tensor
from torch.autograd import forward_ad

from .. import _dtypes, _functorch, _select, _validate
from . import checks, op
from .schema import INPUTS, Attention, settled
from .sink import sunk
from .sizes import evened


def composite_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    query_rel: Tensor | None = None,
    rel_query: Tensor | None = None,
    key_rel: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    outside: str = "clip",
    value_conv: Tensor | None = None,
    value_conv_bias: Tensor | None = None,
    value_conv_scale: Tensor | None = None,
    sink: Tensor | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    scale: float | None = None,
    qk: bool = True,
    return_lse: bool = False,
    backend: str = "auto",
):
    """Attention with learnable relative terms, and a depthwise convolution of the values.

        s[b,h,i,j] = scale * (q[b,i,h]·k[b,j,g] + q[b,i,h]·query_rel[h,:,c] + k[b,j,g]·key_rel[h,:,W-1-c]) + bias[h,c]
        c          = clip(j - m, -left, right) + left,     m = i + S - T,     g = h // (H/G)
        out[b,i,h] = sum_j exp(s[b,h,i,j]) * v[b,j,g] / (exp(sink) + sum_j exp(s[b,h,i,j]))
                     + value_conv_scale[h] * (value_conv_bias[h] + sum_c value_conv[h,:,c] * v[b, m + c - left, g])

    Each of the terms is optional; without ``sink`` the weights are softmax_j(s). With ``rel_query`` its term is
    rel_query[b,i,h]·query_rel[h,:,c], not scaled.

    q: [B,T,H,D], float64, float32, bfloat16 or float16, any strides; the result has its dtype and layout, and its shape
        but for E in the place of D.
    k, v: [B,S,G,D] and [B,S,G,E] of q's dtype; G divides H, and consecutive query heads share a key head. If S differs
        from T, the last query stands where the last key is. If E differs from D, the narrower are widened by zeros.
    bias: [H,W].
    query_rel: [R,W], shared by the heads, or [H,R,W]; R = D without rel_query.
    rel_query: [B,T,H,R] of q's dtype, takes q's place in the product with query_rel.
    key_rel: [D,W] or [H,D,W]. Column W-1-c: the key looks back at the query.
    window: (left, right), the offsets j - m from -left to right that have a column, W = left + right + 1; k stands for
        (k, k). By default the middle column of the tables is offset 0.
    outside: beyond the window "clip" repeats the outermost column, "zero" drops the relative terms, "mask" forbids
        attention.
    value_conv: [H,E,W], taps of the depthwise term, which is added after the softmax, untouched by dropout; padded
        values, and with ``causal`` later ones, count as 0. value_conv_bias: [H,E]. value_conv_scale: [H].
    sink: [H], or [B,T,H], a score that belongs to no key, not scaled: it takes weight and has the value 0. Not together
        with value_conv. A result of 16 bits is rounded before and after it.
    causal: hide all j > m.
    key_mask: bool [B,S], False for padding: these keys and values are left out whatever they hold, NaN included, and
        get no gradient. A query that sees no key gets 0 from the attention, and passes no gradient on.
    cu_seqlens_q, cu_seqlens_k: int32 or int64 [N+1], from 0 to T and to S, never decreasing: B is 1, and the row holds
        N sequences one after the other, each with positions and lengths of its own. cu_seqlens_k is by default
        cu_seqlens_q.
    dropout: probability of dropping an element of softmax(s), scaling the kept ones by 1/(1-p); only if ``training``.
    seed: int64 [1], fixes the dropout mask; by default drawn from PyTorch's generator of q's device.
    scale: by default 1/sqrt(D). The bias is not scaled.
    qk: False leaves the product q·k out.
    return_lse: also return log(exp(sink) + sum_j exp(s)), [B,H,T], float32 (float64 for float64), differentiable;
        without ``sink`` it is -inf for a query that sees no key.
    backend: "auto" or a name from ``convkernels.backends.names()``; a named one never falls back.

    The arithmetic is float32 (float64 for float64); the tables may be of another float dtype than q, except that
    float64 goes only with float64. Under autocast q, k, v and rel_query are cast, the tables are not.
    Raises ValueError or TypeError naming the argument, what was expected and what was given, and RuntimeError if the
    backend named cannot run the call.
    Source: Chang et al. 2021, "Convolutions and self-attention: re-interpreting relative positions in pre-trained
    language models", equations 4 to 7; Shaw et al. 2018 (query_rel); T5 (bias, see ``t5_relative_bias``).
    """
    name = "composite_attention"
    transforming = _functorch.transforming()
    # The 0 and 1.0 here are placeholders: their values follow from other parameters once those are checked.
    args = Attention(
        q, k, v, 0, 0, 0, causal, qk, 1.0, 1.0, dropout, seed, bias, query_rel, rel_query, key_rel, value_conv,
        value_conv_bias, value_conv_scale, key_mask, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    if forward_ad._current_level >= 0:
        _functorch.refuse_tangents(name, sink=sink, **dict(zip(INPUTS.names, INPUTS.of(args), strict=True)))
    if transforming or _validate.autocast_somewhere():
        q, k, v, rel_query = _validate.autocast(q, k, v, rel_query)
        args = args._replace(q=q, k=k, v=v, rel_query=rel_query)
    left, right = checks.attention(name, args, window, outside, training, scale, sink, return_lse)
    recorded = _functorch.recording(INPUTS.of(args))
    operator = "attention_grad" if recorded or transforming else "attention"
    chosen = _select.pick(backend, name, q.device.type, q.dtype, operator)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    E = v.shape[3]
    args = settled(
        evened(args),
        left,
        right,
        checks.OUTSIDE[outside],
        scale,
        scale if rel_query is None else 1.0,
        *_dtypes.drawn(dropout, training, seed, q.device),
        cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
    )
    if transforming:
        out, lse = op.differentiable(chosen, *args)
    else:
        kernels = op.KERNELS[chosen]
        out, lse = (kernels.record if recorded else kernels.raw)(*args)
    if sink is not None:
        out, lse = sunk(out, lse, sink)
    out = out if out.shape[3] == E else out[..., :E]
    return (out, lse) if return_lse else out
