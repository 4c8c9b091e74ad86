"""vmap rules: the mapped dimension is folded into the heads, so that one kernel launch does the work of all, whatever
is mapped: every element brings its own heads, tables and gradients of tables. A mapped padding mask is folded into the
batch instead. Three cases run one call per element: dropout, whose mask depends on batch and head index, mapped
boundaries of packed sequences, and a mapped padding mask together with tables that are mapped or need gradients.
"""

from collections.abc import Callable

from torch import Tensor

from .._dtypes import accumulate_dtype
from .._functorch import fold, loop, mapped
from .schema import INPUTS, ROWS, TABLES, Attention, AttentionGrad

_SHARED = ("query_rel", "key_rel")
"""Tables that heads may share: these then have two dimensions."""


def _fold_heads(value: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """N times [B,T,H,D] -> [B,T,N*H,D]."""
    if value is None:
        return None
    value = mapped(value, dim, size).movedim(0, 2)
    return value.reshape(*value.shape[:2], size * value.shape[3], value.shape[4])


def _split(value: Tensor, dim: int, size: int) -> Tensor:
    """A dimension of N*n as [N, n]."""
    return value.unflatten(dim, (size, value.shape[dim] // size))


def _unfold_heads(value: Tensor, size: int) -> Tensor:
    """[B,T,N*H,D] -> [N,B,T,H,D]."""
    return _split(value, 2, size).movedim(2, 0)


def _fold_table(value: Tensor | None, dim: int | None, size: int, heads: int, shared: int) -> Tensor | None:
    """N times [H, ...] -> [N*H, ...]; a table with ``shared`` dimensions has no heads yet and gets them."""
    if value is None:
        return None
    value = mapped(value, dim, size)
    if value.dim() - 1 == shared:
        value = value[:, None].expand(size, heads, *value.shape[1:])
    return value.reshape(size * heads, *value.shape[2:])


def _looks_at_rows(dims, args, tables: bool) -> bool | None:
    """Whether to fold into the batch; None where only one call per element will do. tables: whether their gradients
    are needed."""
    if args.dropout > 0 or dims.cu_seqlens_q is not None or dims.cu_seqlens_k is not None:
        return None
    if dims.key_mask is None:
        return False
    if tables or args.cu_seqlens_q is not None or any(getattr(dims, name) is not None for name in TABLES):
        return None
    return True


def _folded(rows: bool, size: int, dims, args):
    """The arguments, folded."""
    heads = args.q.shape[2] if dims.q is None else args.q.movedim(dims.q, 0).shape[3]
    fold_row = fold if rows else _fold_heads
    values = {name: fold_row(getattr(args, name), getattr(dims, name), size) for name in ROWS}
    if rows:
        values["key_mask"] = fold(args.key_mask, dims.key_mask, size)
    else:
        for name in TABLES:
            shared = 2 if name in _SHARED else 0
            values[name] = _fold_table(getattr(args, name), getattr(dims, name), size, heads, shared)
    return args._replace(**values)


def forward(function: Callable, size: int, dims: Attention, args: Attention):
    """vmap of ``attention``."""
    rows = _looks_at_rows(dims, args, False)
    if rows is None:
        return loop(function, size, dims, args)
    out, lse = function(*_folded(rows, size, dims, args))
    if rows:
        return (_split(out, 0, size), _split(lse, 0, size)), (0, 0)
    return (_unfold_heads(out, size), _split(lse, 1, size).movedim(1, 0)), (0, 0)


def backward(function: Callable, size: int, dims: AttentionGrad, args: AttentionGrad):
    """vmap of ``attention_grad``."""
    given = {name: asked and getattr(args, name) is not None for name, asked in args.wanted._asdict().items()}
    rows = _looks_at_rows(dims, args, any(given[name] for name in TABLES))
    if rows is None:
        return loop(function, size, dims, args)
    # Gradients of tables that heads share are added up below; keep them in the accumulation type until then.
    shared = {name: getattr(args, name) for name in _SHARED if getattr(args, name) is not None}
    wide = args._replace(**{name: value.to(accumulate_dtype(value.dtype)) for name, value in shared.items()})
    folded = _folded(rows, size, dims, wide)
    fold_row = fold if rows else _fold_heads
    folded = folded._replace(**{n: fold_row(getattr(args, n), getattr(dims, n), size) for n in ("grad", "out")})
    folded = folded._replace(
        **{n: _fold_lse(rows, getattr(args, n), getattr(dims, n), size) for n in ("grad_lse", "lse")}
    )
    results = []
    for name, value in zip(INPUTS.names, function(*folded), strict=True):
        if given[name] and name in ROWS:
            value = _split(value, 0, size) if rows else _unfold_heads(value, size)
        elif given[name]:
            table, value = getattr(args, name), _split(value, 0, size)
            rank = table.dim() - (getattr(dims, name) is not None)
            value = (value.sum(1) if value.dim() - 1 > rank else value).to(table.dtype)
        results.append(value)
    return tuple(results), tuple(0 if there else None for there in given.values())


def _fold_lse(rows: bool, value: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """N times [B,H,T] -> [N*B,H,T] or [B,N*H,T]."""
    if rows or value is None:
        return fold(value, dim, size)
    value = mapped(value, dim, size).movedim(0, 1)
    return value.reshape(value.shape[0], size * value.shape[2], value.shape[3])
