"""What attention costs. Convention: a multiply and an add per product of two numbers, all T*S pairs counted, also those
hidden by causality, a window, padding or packing, as in PyTorch's own formula; softmax, gathers, bias and dropout are
not counted. The backward pass computes the scores again. Shapes stand for the tensors."""

from .schema import Attention, AttentionGrad


def _products(args: Attention | AttentionGrad) -> tuple[int, int, int, int]:
    """FLOPs of q·k (as many as p·v), of the query's and the key's relative terms, and of the depthwise term."""
    (B, T, H, D), S = args.q, args.k[1]
    R, W = args.query_rel[-2:] if args.query_rel is not None else (0, 0)
    return (
        2 * B * H * T * S * D,
        2 * B * H * T * R * W,
        2 * B * H * S * D * args.key_rel[-1] if args.key_rel is not None else 0,
        2 * B * H * T * D * args.value_conv[-1] if args.value_conv is not None else 0,
    )


def forward(args: Attention) -> int:
    """q·k, p·v, and the relative and depthwise terms that are given."""
    pairs, by_query, by_key, taps = _products(args)
    return (1 + bool(args.qk)) * pairs + by_query + by_key + taps


def backward(args: AttentionGrad) -> int:
    """The scores again, d(p) if anything behind the softmax is needed, and one product per gradient needed."""
    pairs, by_query, by_key, taps = _products(args)
    need = args.wanted._replace(
        **{name: False for name, asked in args.wanted._asdict().items() if asked and getattr(args, name) is None}
    )
    to_query = need.q if args.rel_query is None else need.rel_query
    behind = need.q or need.k or need.bias or need.query_rel or need.rel_query or need.key_rel
    total = bool(args.qk) * pairs + by_query + by_key if behind or need.v else 0
    total += (behind + need.v + bool(args.qk) * (need.q + need.k)) * pairs
    total += (need.query_rel + to_query) * by_query + (need.key_rel + need.k) * by_key
    return total + (need.v + need.value_conv + need.value_conv_scale) * taps
