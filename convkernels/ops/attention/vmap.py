"""vmap rules: the mapped dimension is folded into the heads, so that one kernel launch does the work of all, whatever
is mapped: every element brings its own heads, tables and gradients of tables. A mapped padding mask is folded into the
batch instead. Three cases run one call per element: dropout, whose mask depends on batch and head index, mapped
boundaries of packed sequences, and a mapped padding mask together with tables that are mapped or need gradients.
"""

from collections.abc import Callable

from torch import Tensor

from .._dtypes import accumulate_dtype
from .._functorch import fold, loop, mapped
from .double_backward import INPUTS

DROPOUT, KEY_MASK, BOUNDARIES = 10, 19, (20, 21)
_TABLES = INPUTS[3:5] + INPUTS[6:]
_TABLE_BITS = 8 | 16 | 64 | 128 | 256 | 512


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


def _looks_at_rows(dims: tuple, args: tuple, tables: bool) -> bool | None:
    """Whether to fold into the batch; None where only one call per element will do. tables: whether their gradients
    are needed."""
    if args[DROPOUT] > 0 or any(dims[index] is not None for index in BOUNDARIES):
        return None
    if dims[KEY_MASK] is None:
        return False
    if tables or args[BOUNDARIES[0]] is not None or any(dims[index] is not None for index in _TABLES):
        return None
    return True


def _fold(rows: bool, size: int, dims: tuple, args: tuple) -> list:
    """The arguments of ``attention``, folded."""
    values = list(args)
    heads = args[0].shape[2] if dims[0] is None else args[0].movedim(dims[0], 0).shape[3]
    for index in (0, 1, 2, 14):
        values[index] = (fold if rows else _fold_heads)(args[index], dims[index], size)
    if rows:
        values[KEY_MASK] = fold(args[KEY_MASK], dims[KEY_MASK], size)
    else:
        for index in _TABLES:
            values[index] = _fold_table(args[index], dims[index], size, heads, 2 if index in (13, 15) else 0)
    return values


def forward(function: Callable, size: int, dims: tuple, args: tuple):
    """vmap of ``attention``: function(*args) with args as in the op's schema."""
    rows = _looks_at_rows(dims, args, False)
    if rows is None:
        return loop(function, size, dims, args)
    out, lse = function(*_fold(rows, size, dims, args))
    if rows:
        return (_split(out, 0, size), _split(lse, 0, size)), (0, 0)
    return (_unfold_heads(out, size), _split(lse, 1, size).movedim(1, 0)), (0, 0)


def grad(function: Callable, size: int, dims: tuple, args: tuple):
    """vmap of ``attention_grad``: function(*args) with args as in the op's schema."""
    (to_out, to_lse, out, lse), inner, needs = args[:4], args[4:-1], args[-1]
    given = [inner[index] is not None and bool(needs & 1 << bit) for bit, index in enumerate(INPUTS)]
    tables = any(there and _TABLE_BITS & 1 << bit for bit, there in enumerate(given))
    rows = _looks_at_rows(dims[4:-1], inner, tables)
    if rows is None:
        return loop(function, size, dims, args)
    # Gradients of tables that heads share are added up below; keep them in the accumulation type until then.
    inner = tuple(
        value.to(accumulate_dtype(value.dtype)) if index in (13, 15) and value is not None else value
        for index, value in enumerate(inner)
    )
    fold_all = fold if rows else _fold_heads
    folded_lse = []
    for value, dim in zip((to_lse, lse), (dims[1], dims[3]), strict=True):
        if rows or value is None:
            folded_lse.append(fold(value, dim, size))
        else:
            value = mapped(value, dim, size).movedim(0, 1)
            folded_lse.append(value.reshape(value.shape[0], size * value.shape[2], value.shape[3]))
    found = function(
        fold_all(to_out, dims[0], size),
        folded_lse[0],
        fold_all(out, dims[2], size),
        folded_lse[1],
        *_fold(rows, size, dims[4:-1], inner),
        needs,
    )
    results = []
    for bit, (index, value) in enumerate(zip(INPUTS, found, strict=True)):
        if given[bit]:
            if index in (0, 1, 2, 14):
                value = _split(value, 0, size) if rows else _unfold_heads(value, size)
            else:
                value = _split(value, 0, size)
                rank = inner[index].dim() - (dims[4 + index] is not None)
                value = (value.sum(1) if value.dim() - 1 > rank else value).to(args[4 + index].dtype)
        results.append(value)
    return tuple(results), tuple(0 if there else None for there in given)
