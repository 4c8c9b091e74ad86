"""Values whose heads have another size than those of queries and keys."""

from torch import Tensor
from torch.nn.functional import pad

from .schema import Attention


def evened(args: Attention) -> Attention:
    """The arguments with the narrower of both widened by zeros, which add nothing to scores, or results that the caller
    cuts off."""
    D, E = args.q.shape[3], args.v.shape[3]
    if E < D:
        return args._replace(
            v=_wider(args.v, D - E),
            value_conv=_taller(args.value_conv, D - E),
            value_conv_bias=_wider(args.value_conv_bias, D - E),
        )
    if E > D:
        return args._replace(
            q=_wider(args.q, E - D),
            k=_wider(args.k, E - D),
            query_rel=_taller(args.query_rel, E - D) if args.rel_query is None else args.query_rel,
            key_rel=_taller(args.key_rel, E - D),
        )
    return args


def _wider(x: Tensor | None, count: int) -> Tensor | None:
    return None if x is None else pad(x, (0, count))


def _taller(table: Tensor | None, count: int) -> Tensor | None:
    return None if table is None else pad(table, (0, 0, 0, count))
