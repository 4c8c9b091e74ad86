"""Bad inputs of composite_attention: each raises an error of the right kind that names the argument, what was expected
and what was given. What the raw operators would read or write elsewhere they refuse themselves.
"""

import pytest
import torch
from attention_inputs import SHAPES, B, D, H, T, W
from helpers import nested, quantized

import convkernels as ck

OP = "attention_grad"


def packed(**changes):
    return {**{n: torch.randn(1, *SHAPES[n][1:]) for n in "qkv"}, **changes}


def bounds(*numbers):
    return torch.tensor(numbers)


r = torch.randn
BAD = [
    ({"q": None}, TypeError, "q", "a tensor", "None"),
    ({"q": r(T, H, D)}, ValueError, "q", r"4 dimensions \[B,T,H,D\]", r"\[5, 4, 3\]"),
    ({"q": torch.ones(B, T, H, D, dtype=torch.int64)}, TypeError, "q", "float", "int64"),
    ({"q": r(B, T, 0, D)}, ValueError, "q", "at least one head", r"\[2, 5, 0, 3\]"),
    ({"q": r(B, T, H, D).to_sparse()}, TypeError, "q", "dense", "sparse"),
    ({"k": r(B, T, D)}, ValueError, "k", r"4 dimensions \[B,S,G,D\]", r"\[2, 5, 3\]"),
    ({"k": r(B + 1, T, 2, D)}, ValueError, "k", r"\[B,S,G,D\] = \[2, 5, 2, 3\]", r"\[3, 5, 2, 3\]"),
    ({"k": r(B, T, 3, D)}, ValueError, "k", "divides H = 4", r"\[2, 5, 3, 3\]"),
    ({"k": r(B, T, 2, D + 1)}, ValueError, "k", r"\[2, 5, 2, 3\]", r"\[2, 5, 2, 4\]"),
    ({"k": r(B, T, 2, D).double()}, TypeError, "k", "dtype of q, torch.float32", "float64"),
    ({"v": r(B, T + 1, 2, D)}, ValueError, "v", r"\[2, 5, 2, 3\]", r"\[2, 6, 2, 3\]"),
    ({"v": r(B, T, 2, D).half()}, TypeError, "v", "dtype of q", "float16"),
    ({"v": r(B, T, 2, D, device="meta")}, ValueError, "v", "on cpu, where q is", "on meta"),
    ({"bias": r(H, 3).tolist()}, TypeError, "bias", "a tensor or None", "list"),
    ({"bias": r(3)}, ValueError, "bias", "two dimensions or more", r"shape \[3\]"),
    ({"bias": r(H + 1, 3)}, ValueError, "bias", r"\[H,W\] = \[4, 3\]", r"\[5, 3\]"),
    ({"bias": r(H, 4)}, ValueError, "window", r"\(left, right\), because bias has an even number of columns", "None"),
    ({"bias": r(H, 3).double()}, TypeError, "bias", "not float64, because q is torch.float32", "float64"),
    ({"bias": r(H, 3), "window": (1, 2)}, ValueError, "bias", r"\[4, 4\]", r"\[4, 3\]"),
    ({"query_rel": r(D + 1, 3)}, ValueError, "query_rel", r"\[R,W\] = \[3, 3\]", r"\[4, 3\]"),
    ({"query_rel": r(2, D, 3)}, ValueError, "query_rel", r"\[R,W\] or \[H,R,W\] = \[4, 3, 3\]", r"\[2, 3, 3\]"),
    ({"query_rel": r(D, 3), "bias": r(H, 5)}, ValueError, "query_rel", r"\[3, 5\]", r"\[3, 3\]"),
    ({"rel_query": r(B, T, H, 2)}, ValueError, "rel_query", "None, because query_rel is not given", r"\[2, 5, 4, 2\]"),
    ({"rel_query": r(B, T, 2), "query_rel": r(2, 3)}, ValueError, "rel_query", "4 dimensions", r"\[2, 5, 2\]"),
    ({"rel_query": r(B, T, 2, 2), "query_rel": r(2, 3)}, ValueError, "rel_query", r"\[2, 5, 4, 2\]", r"\[2, 5, 2, 2\]"),
    ({"rel_query": r(B, T, H, 2), "query_rel": r(D, 3)}, ValueError, "query_rel", r"\[2, 3\]", r"\[3, 3\]"),
    ({"key_rel": r(H, D, 0)}, ValueError, "key_rel", "at least one column", r"\[4, 3, 0\]"),
    ({"key_rel": r(D + 1, 3)}, ValueError, "key_rel", r"\[D,W\] = \[3, 3\]", r"\[4, 3\]"),
    ({"value_conv": r(D, 3)}, ValueError, "value_conv", r"\[H,E,W\] = \[4, 3, 3\]", r"\[3, 3\]"),
    ({"value_conv_bias": r(H, D)}, ValueError, "value_conv_bias", "None, because value_conv is not given", r"\[4, 3\]"),
    ({"value_conv": r(H, D, 3), "value_conv_bias": r(H)}, ValueError, "value_conv_bias", r"\[4, 3\]", r"shape \[4\]"),
    ({"value_conv": r(H, D, 3), "value_conv_scale": r(1, H)}, ValueError, "value_conv_scale", r"\[4\]", r"\[1, 4\]"),
    ({"window": (1, 2, 3)}, TypeError, "window", r"\(left, right\)", r"\(1, 2, 3\)"),
    ({"window": (2**60, 0), "outside": "mask"}, ValueError, "window", r"below 2\^60", r"\(1152921504606846976, 0\)"),
    ({"window": 2**64, "outside": "mask"}, ValueError, "window", r"below 2\^60", "18446744073709551616"),
    ({"q": [0.0] * 10000}, TypeError, "q", "a tensor", r"0.0, \.\.\.\] of type list"),
    ({"q": [[[[0.0] * 9] * 9] * 9] * 9}, TypeError, "q", "a tensor", r"\[\[0.0, [^a-z]{160,200}\.\.\. of type list"),
    ({"k": nested(torch.strided)}, TypeError, "k", "in one row, with cu_seqlens", "a nested tensor"),
    ({"k": nested(torch.jagged)}, TypeError, "k", "in one row, with cu_seqlens", "a nested tensor"),
    ({"v": quantized()}, TypeError, "v", "not quantized", "qint8"),
    ({"window": (1, -1)}, ValueError, "window", "two integers >= 0", r"\(1, -1\)"),
    ({"window": 1.5}, TypeError, "window", r"k for \(k, k\)", "1.5 of type float"),
    ({"window": (True, 1)}, TypeError, "window", "two integers", "True"),
    ({"outside": "mask"}, ValueError, "window", r"\(left, right\), because outside='mask'", "None"),
    ({"outside": "wrap"}, ValueError, "outside", "'clip', 'zero' or 'mask'", "'wrap'"),
    ({"outside": None}, TypeError, "outside", "'clip', 'zero' or 'mask'", "None"),
    ({"causal": 1}, TypeError, "causal", "True or False", "1 of type int"),
    ({"qk": False}, ValueError, "qk", "True, because there is no bias, query_rel or key_rel", "False"),
    ({"return_lse": None}, TypeError, "return_lse", "True or False", "None"),
    ({"key_mask": torch.ones(B, T)}, TypeError, "key_mask", "bool", "float32"),
    ({"key_mask": torch.ones(B, 1, dtype=torch.bool)}, ValueError, "key_mask", r"\[B,S\] = \[2, 5\]", r"\[2, 1\]"),
    ({"cu_seqlens_q": bounds(0, 5)}, ValueError, "q", r"\[1,T,H,D\]", r"\[2, 5, 4, 3\]"),
    ({"cu_seqlens_k": bounds(0, 5)}, ValueError, "cu_seqlens_q", "because cu_seqlens_k is given", "None"),
    (packed(cu_seqlens_q=bounds(1, 5)), ValueError, "cu_seqlens_q", "first boundary of 0", "1"),
    (packed(cu_seqlens_q=bounds(0, 4)), ValueError, "cu_seqlens_q", "last boundary of T = 5", "4"),
    (packed(cu_seqlens_q=bounds(0, 3, 2, 5)), ValueError, "cu_seqlens_q", "never decrease", r"\[0, 3, 2, 5\]"),
    (packed(cu_seqlens_q=torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens_q", "int32 or int64", "float32"),
    (packed(cu_seqlens_q=bounds(0, 5), cu_seqlens_k=bounds(0, 2, 5)), ValueError, "cu_seqlens_k", r"\[2\]", r"\[3\]"),
    (packed(k=r(1, 7, 2, D), v=r(1, 7, 2, D), cu_seqlens_q=bounds(0, 5)), ValueError, "cu_seqlens_k", "differ", "None"),
    ({"dropout": 1.5}, ValueError, "dropout", "probability", "1.5"),
    ({"dropout": True}, TypeError, "dropout", "probability", "True"),
    ({"training": 1}, TypeError, "training", "True or False", "1"),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed", "int64", "float32"),
    ({"seed": torch.tensor([1, 2])}, ValueError, "seed", r"\[1\]", r"\[2\]"),
    ({"scale": "1"}, TypeError, "scale", "a number or None", "'1'"),
    ({"scale": float("nan")}, ValueError, "scale", "finite", "nan"),
    ({"backend": "cudnn"}, ValueError, "backend", "one of 'auto'", "'cudnn'"),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(BAD)), ids=lambda i: f"{i}-{BAD[i][2]}")
def test_bad_input(row):
    changes, kind, argument, expected, got = BAD[row]
    arguments = {**{n: torch.randn(SHAPES[n]) for n in "qkv"}, "backend": "reference", **changes}
    pattern = rf"^composite_attention: argument '{argument}': expected .*{expected}.*, got .*{got}"
    with pytest.raises(kind, match=pattern) as caught:
        ck.composite_attention(**arguments)
    assert type(caught.value) is kind


@pytest.mark.parametrize(("changes", "argument"), [
    ({"table": torch.randn(32)}, "table"),
    ({"table": torch.randn(31, 2)}, "table"),
    ({"table": None}, "table"),
    ({"window": (1,)}, "window"),
    ({"window": (-1, 2)}, "window"),
    ({"window": 0}, "window"),
    ({"max_distance": 8}, "max_distance"),
    ({"max_distance": 2.0}, "max_distance"),
    ({"bidirectional": 1}, "bidirectional"),
])  # fmt: skip
def test_bad_input_of_t5(changes, argument):
    with pytest.raises((TypeError, ValueError), match=f"^t5_relative_bias: argument '{argument}': expected .*, got"):
        ck.t5_relative_bias(**{"table": torch.randn(32, 2), **changes})


@pytest.mark.parametrize(("changes", "argument"), [
    ({"heads": 0}, "heads"),
    ({"heads": 2.0}, "heads"),
    ({"window": None}, "window"),
    ({"window": (1,)}, "window"),
    ({"window": (-1, 2)}, "window"),
    ({"window": 1.5}, "window"),
    ({"dtype": torch.int64}, "dtype"),
    ({"dtype": "float32"}, "dtype"),
])  # fmt: skip
def test_bad_input_of_alibi(changes, argument):
    with pytest.raises((TypeError, ValueError), match=f"^alibi_bias: argument '{argument}': expected .*, got"):
        ck.alibi_bias(**{"heads": 4, "window": 3, **changes})


# The raw operators check what could leave their memory, and say which argument is wrong.
S, G = 6, 2
GOOD = {"q": (B, T, H, D), "k": (B, S, G, D), "v": (B, S, G, D), "bias": (H, W), "query_rel": (D, W),
        "key_rel": (H, D, W), "value_conv": (H, D, W), "value_conv_bias": (H, D), "value_conv_scale": (H,)}  # fmt: skip
REFUSED = [
    ("q", {"q": torch.randn(T, H, D)}),
    ("q", {"q": torch.ones(B, T, H, D, dtype=torch.int64)}),
    ("q", {"q": torch.randn(B, T, 0, D)}),
    ("k", {"k": torch.randn(B, S, 3, D)}),
    ("k", {"k": torch.randn(B + 1, S, G, D)}),
    ("k", {"k": torch.randn(B, S, G, D).half()}),
    ("v", {"v": torch.randn(B, S - 1, G, D)}),
    ("v", {"v": torch.randn(B, S, G, D - 1)}),
    ("left", {"left": -1}),
    ("right", {"right": -1}),
    ("outside", {"outside": 3}),
    ("bias", {"bias": torch.randn(H, W - 1)}),
    ("bias", {"left": 2}),
    ("bias", {"bias": torch.randn(H, W).double()}),
    ("query_rel", {"query_rel": torch.randn(D + 1, W)}),
    ("query_rel", {"query_rel": torch.randn(H + 1, D, W)}),
    ("query_rel", {"rel_query": torch.randn(B, T, H, 2)}),
    ("rel_query", {"rel_query": torch.randn(B, T + 1, H, D)}),
    ("rel_query", {"rel_query": torch.randn(B, T, H, D).half()}),
    ("key_rel", {"key_rel": torch.randn(D, W + 1)}),
    ("value_conv", {"value_conv": torch.randn(D, W)}),
    ("value_conv", {"value_conv": None}),
    ("value_conv_bias", {"value_conv_bias": torch.randn(H, D + 1)}),
    ("value_conv_scale", {"value_conv_scale": torch.randn(H, 1)}),
    ("key_mask", {"key_mask": torch.ones(B, S)}),
    ("key_mask", {"key_mask": torch.ones(B, S + 1, dtype=torch.bool)}),
    ("q", {"cu_seqlens_q": torch.tensor([0, T]), "cu_seqlens_k": torch.tensor([0, S])}),
    ("cu_seqlens_k", {"cu_seqlens_q": torch.tensor([0, T])}),
    ("dropout", {"dropout": 1.5}),
    ("seed", {"dropout": 0.5}),
]
PACKED_REFUSED = [
    ("cu_seqlens_q", torch.tensor([0, T + 5]), torch.tensor([0, S])),
    ("cu_seqlens_k", torch.tensor([0, T]), torch.tensor([0, S + 5])),
    ("cu_seqlens_k", torch.tensor([0, 2, T]), torch.tensor([0, S])),
    ("cu_seqlens_q", torch.tensor([0, 4, 2, T]), torch.tensor([0, 1, 2, S])),
    ("cu_seqlens_q", torch.tensor([0.0, 5.0]), torch.tensor([0, S])),
    ("cu_seqlens_q", torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)),
]


def native():
    reasons = ck.why_not("cpu", op=OP)
    if reasons:
        pytest.skip("; ".join(reasons))
    return torch.ops.convkernels


def refused(argument, kwargs):
    with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
        native()._attention.cpu(**kwargs)
    grad, lse = torch.randn(B, T, H, D), torch.randn(B, H, T)
    with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
        native()._attention_grad.cpu(grad, None, grad, lse, **kwargs)


@pytest.mark.parametrize("row", range(len(REFUSED)), ids=lambda i: f"{i}-{REFUSED[i][0]}")
def test_the_native_ops_refuse_to_leave_their_memory(row):
    argument, changes = REFUSED[row]
    good = {name: torch.randn(shape) for name, shape in GOOD.items()}
    refused(argument, {**good, "left": 1, "right": 2, **changes})


@pytest.mark.parametrize("row", range(len(PACKED_REFUSED)), ids=lambda i: f"{i}-{PACKED_REFUSED[i][0]}")
def test_the_native_ops_refuse_bad_boundaries(row):
    argument, of_queries, of_keys = PACKED_REFUSED[row]
    good = {name: torch.randn(1, *GOOD[name][1:]) for name in "qkv"}
    refused(argument, {**good, "cu_seqlens_q": of_queries, "cu_seqlens_k": of_keys})


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("grad", {"grad": torch.randn(B, T, H, D + 1)}),
        ("grad", {"grad": torch.randn(B, T, H, D).double()}),
        ("lse", {"lse": torch.randn(B, T, H)}),
        ("lse", {"lse": torch.randn(B, H, T).double()}),
        ("grad_lse", {"grad_lse": torch.randn(B, H, T + 1)}),
        ("grad_lse", {"grad_lse": torch.randn(B, H, T).half()}),
    ],
)
def test_the_native_gradient_refuses_to_leave_its_memory(argument, changes):
    good = {name: torch.randn(GOOD[name]) for name in "qkv"}
    extra = {"grad": torch.randn(B, T, H, D), "grad_lse": None, "out": torch.randn(B, T, H, D),
             "lse": torch.randn(B, H, T)}  # fmt: skip
    with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
        native()._attention_grad.cpu(**{**extra, **good, **changes})
