"""Checks of the arguments of ``composite_attention``."""

import math

import torch
from torch import Tensor

from .. import _validate
from .._validate import (
    boundaries,
    describe,
    fail,
    flag,
    floating,
    parameter_dtype,
    same_device,
    same_dtype,
    shape,
    tensor,
)  # fmt: skip
from . import reference
from .schema import Attention

MAX_REACH = 2**60
"""A window reaches less far to either side, so that positions do not overflow."""
OUTSIDE = {"clip": reference.CLIP, "zero": reference.ZERO, "mask": reference.MASK}


def attention(function: str, args: Attention, window, outside, training, scale, sink, return_lse) -> tuple[int, int]:
    """All checks; returns how far the window reaches to the left and to the right. args: as given; what is found from
    the other parameters is not looked at."""
    q, query_rel, rel_query, value_conv = args.q, args.query_rel, args.rel_query, args.value_conv
    _queries_and_keys(function, q, args.k, args.v)
    (B, T, H, D), S, E = q.shape, args.k.shape[1], args.v.shape[3]
    for argument, value in (("causal", args.causal), ("qk", args.qk), ("return_lse", return_lse)):
        flag(function, argument, value)
    tables = {"bias": args.bias, "query_rel": query_rel, "key_rel": args.key_rel, "value_conv": value_conv}
    left, right = reach(function, window, outside, tables)
    W = left + right + 1
    if rel_query is not None:
        if query_rel is None:
            fail(function, "rel_query", "None, because query_rel is not given", rel_query)
        tensor(function, "rel_query", rel_query)
        if rel_query.dim() != 4:
            fail(function, "rel_query", "a tensor of 4 dimensions [B,T,H,R]", rel_query)
        shape(function, "rel_query", rel_query, (B, T, H, rel_query.shape[3]), "[B,T,H,R]")
        same_dtype(function, "rel_query", rel_query, q, "q")
        same_device(function, "rel_query", rel_query, q, "q")
    R = D if rel_query is None else rel_query.shape[3]
    for argument, value, size, letters in (
        ("bias", args.bias, (H, W), "[H,W]"),
        ("query_rel", query_rel, (H, R, W), "[R,W] or [H,R,W]"),
        ("key_rel", args.key_rel, (H, D, W), "[D,W] or [H,D,W]"),
        ("value_conv", value_conv, (H, E, W), "[H,E,W]"),
        ("value_conv_bias", args.value_conv_bias, (H, E), "[H,E]"),
        ("value_conv_scale", args.value_conv_scale, (H,), "[H]"),
    ):
        if value is not None:
            if value_conv is None and argument in ("value_conv_bias", "value_conv_scale"):
                fail(function, argument, "None, because value_conv is not given", value)
            _table(function, argument, value, q, size, letters)
    if sink is not None:
        _sink(function, sink, q, value_conv)
    if not args.qk and args.bias is None and query_rel is None and args.key_rel is None:
        fail(function, "qk", "True, because there is no bias, query_rel or key_rel", args.qk)
    key_mask = args.key_mask
    if key_mask is not None:
        tensor(function, "key_mask", key_mask, optional=True)
        if key_mask.dtype != torch.bool:
            fail(function, "key_mask", "a bool tensor (True: real key)", key_mask, TypeError)
        shape(function, "key_mask", key_mask, (B, S), "[B,S]")
        same_device(function, "key_mask", key_mask, q, "q")
    _packing(function, q, args.k, args.cu_seqlens_q, args.cu_seqlens_k)
    _validate.dropout(function, "dropout", args.dropout, training, args.seed, q, "q")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            fail(function, "scale", "a number or None", describe(scale), TypeError)
        if not math.isfinite(scale):
            fail(function, "scale", "a finite number", scale)
    return left, right


def _queries_and_keys(function: str, q, k, v) -> None:
    for argument, value in (("q", q), ("k", k), ("v", v)):
        tensor(function, argument, value)
    floating(function, "q", q)
    if q.dim() != 4:
        fail(function, "q", "a tensor of 4 dimensions [B,T,H,D]", q)
    B, _, H, D = q.shape
    if H == 0 or D == 0:
        fail(function, "q", "at least one head and one channel in [B,T,H,D]", q)
    if k.dim() != 4:
        fail(function, "k", "a tensor of 4 dimensions [B,S,G,D]", k)
    _, S, G, _ = k.shape
    shape(function, "k", k, (B, S, G, D), "[B,S,G,D]")
    if G == 0 or H % G != 0:
        fail(function, "k", f"a number of heads G in [B,S,G,D] that divides H = {H}", k)
    if v.dim() != 4 or v.shape[3] == 0:
        fail(function, "v", "a tensor of 4 dimensions [B,S,G,E], at least one channel", v)
    shape(function, "v", v, (B, S, G, v.shape[3]), "[B,S,G,E]")
    for argument, value in (("k", k), ("v", v)):
        same_dtype(function, argument, value, q, "q")
        same_device(function, argument, value, q, "q")


def reach(function: str, window, outside, tables: dict) -> tuple[int, int]:
    """How far the window reaches to the left and to the right; tables: those that have its columns, by argument."""
    given = []
    for argument, value in tables.items():
        if value is not None:
            tensor(function, argument, value, optional=True)
            if value.dim() < 2:
                fail(function, argument, "two dimensions or more, the last one of W columns", value)
            if value.shape[-1] == 0:
                fail(function, argument, "at least one column, W >= 1, in its last dimension", value)
            given.append((argument, value.shape[-1]))
    if not isinstance(outside, str):
        fail(function, "outside", "'clip', 'zero' or 'mask'", describe(outside), TypeError)
    if outside not in OUTSIDE:
        fail(function, "outside", "'clip', 'zero' or 'mask'", repr(outside))
    if window is None:
        if not given:
            if outside == "mask":
                fail(function, "window", "(left, right), because outside='mask'", "None")
            return 0, 0
        argument, W = given[0]
        if W % 2 == 0:
            fail(function, "window", f"(left, right), because {argument} has an even number of columns, {W}", "None")
        return W // 2, W // 2
    expected = "None, k for (k, k), or (left, right), two integers >= 0 and below 2^60"
    pair = (window, window) if isinstance(window, int) and not isinstance(window, bool) else window
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        fail(function, "window", expected, describe(window), TypeError)
    for side in pair:
        if isinstance(side, bool) or not isinstance(side, int):
            fail(function, "window", expected, describe(window), TypeError)
        if not 0 <= side < MAX_REACH:
            fail(function, "window", expected, window)
    return pair[0], pair[1]


def _table(function: str, argument: str, value, q: Tensor, size: tuple, letters: str) -> None:
    tensor(function, argument, value)
    one, _, per_head = letters.partition(" or ")
    if per_head and value.dim() == 2:
        shape(function, argument, value, size[1:], one)
    else:
        shape(function, argument, value, size, letters)
    parameter_dtype(function, argument, value, q, "q")
    same_device(function, argument, value, q, "q")


def _sink(function: str, sink, q: Tensor, value_conv) -> None:
    tensor(function, "sink", sink)
    B, T, H, _ = q.shape
    if tuple(sink.shape) not in ((H,), (B, T, H)):
        fail(function, "sink", f"shape [H] = [{H}] or [B,T,H] = {[B, T, H]}", sink)
    parameter_dtype(function, "sink", sink, q, "q")
    same_device(function, "sink", sink, q, "q")
    if value_conv is not None:
        fail(function, "sink", "None, because value_conv is given", sink)


def _packing(function: str, q: Tensor, k: Tensor, cu_q, cu_k) -> None:
    if cu_q is None and cu_k is None:
        return
    tensor(function, "cu_seqlens_q", cu_q, optional=True)
    tensor(function, "cu_seqlens_k", cu_k, optional=True)
    if cu_q is None:
        if cu_k is not None:
            fail(function, "cu_seqlens_q", "boundaries, because cu_seqlens_k is given", "None")
        return
    if cu_k is None and k.shape[1] != q.shape[1]:
        fail(function, "cu_seqlens_k", "boundaries, because q and k differ in length", "None")
    pairs = [("cu_seqlens_q", cu_q, "T", q)] + ([] if cu_k is None else [("cu_seqlens_k", cu_k, "S", k)])
    for argument, value, letter, rows in pairs:
        boundaries(function, argument, value, q, rows.shape[1], "q", "[1,T,H,D]", letter)
    if cu_k is not None:
        shape(function, "cu_seqlens_k", cu_k, tuple(cu_q.shape), "[N+1]")
