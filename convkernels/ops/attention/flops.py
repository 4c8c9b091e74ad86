"""What attention costs. Convention: a multiply and an add per product of two numbers, all T*S pairs counted, also those
hidden by causality, a window, padding or packing, as in PyTorch's own formula; softmax, gathers, bias and dropout are
not counted. The backward pass computes the scores again."""

from .double_backward import INPUTS


def _products(q, k, qk, query_rel, key_rel, value_conv) -> tuple[int, int, int, int]:
    """FLOPs of q·k (as many as p·v), of the query's and the key's relative terms, and of the depthwise term."""
    B, T, H, D = q
    S = k[1]
    R, W = query_rel[-2:] if query_rel is not None else (0, 0)
    return (
        2 * B * H * T * S * D,
        2 * B * H * T * R * W,
        2 * B * H * S * D * key_rel[-1] if key_rel is not None else 0,
        2 * B * H * T * D * value_conv[-1] if value_conv is not None else 0,
    )


def _arguments(args: tuple):
    qk = args[7] if len(args) > 7 else True
    return [*args[:3], qk, *(args[index] if len(args) > index else None for index in INPUTS[3:])]


def flops(*args, out_shape=None, **kwargs) -> int:
    """q·k, p·v, and the relative and depthwise terms that are given."""
    q, k, _, qk, _, query_rel, _, key_rel, value_conv, *_ = _arguments(args)
    pairs, by_query, by_key, taps = _products(q, k, qk, query_rel, key_rel, value_conv)
    return (1 + bool(qk)) * pairs + by_query + by_key + taps


def grad_flops(grad, grad_lse, out, lse, *args, out_shape=None, needs=1023, **kwargs) -> int:
    """The scores again, d(p) if anything behind the softmax is needed, and one product per gradient needed."""
    needs = args[22] if len(args) > 22 else needs
    q, k, _, qk, bias, query_rel, rel_query, key_rel, value_conv, _, value_conv_scale = _arguments(args[:22])
    pairs, by_query, by_key, taps = _products(q, k, qk, query_rel, key_rel, value_conv)
    given = (q, k, q, bias, query_rel, rel_query, key_rel, value_conv, None, value_conv_scale)
    need = [shape is not None and bool(needs & 1 << bit) for bit, shape in enumerate(given)]
    to_query = need[0] if rel_query is None else need[5]
    behind = any(need[:2]) or any(need[3:7])
    total = bool(qk) * pairs + by_query + by_key if behind or need[2] else 0
    total += (behind + need[2] + bool(qk) * (need[0] + need[1])) * pairs
    total += (need[4] + to_query) * by_query + (need[6] + need[1]) * by_key
    return total + (need[2] + need[7] + need[9]) * taps
