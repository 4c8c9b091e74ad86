"""Arguments of the convolutions that are wrong, and what the error says of each."""

import numpy as np
import torch
from helpers import nested, quantized

B, T, C, H, K = 2, 7, 12, 3, 5
ints = torch.tensor


def good(function):
    """Valid arguments of a function."""
    x = torch.randn(B, T, C)
    if function.endswith("_step"):
        weight = {"depthwise": (C, K), "lightweight": (H, K), "dynamic": (B, H, K)}[function.split("_")[0]]
        return {"x": x[:, 0].clone(), "state": torch.zeros(B, K - 1, C), "weight": torch.randn(weight)}
    weight = {"depthwise": (C, K), "lightweight": (H, K), "dynamic": (B, T, H, K)}[function.split("_")[0]]
    return {"x": x, "weight": torch.randn(weight)}


def packed(**changes):
    return {"x": torch.randn(1, T, C), **changes}


def serving(**changes):
    """Arguments of a step of packed sequences that continue from a pool."""
    offsets, slots = torch.tensor([0, 3, T]), torch.tensor([3, 0])
    return {
        "x": torch.randn(1, T, C),
        "state": torch.zeros(5, K - 1, C),
        "cu_seqlens": offsets,
        "slots": slots,
        **changes,
    }


def overlapping():
    """x is the newest row of the state."""
    state = torch.zeros(B, K - 1, C)
    return {"state": state, "x": state[:, -1]}


class Array:
    """Something like an array of numpy."""

    shape, dtype = (B, T, C), "float32"

    def __repr__(self):
        return "all its numbers"


L, D, P = "lightweight_conv1d", "dynamic_conv1d", "depthwise_conv1d"
LS, DS, PS = f"{L}_step", f"{D}_step", f"{P}_step"

# function, changed arguments, exception, argument named, expected, got
TABLE = [
    (L, {"x": None}, TypeError, "x", "a tensor", "None of type NoneType"),
    (L, {"x": [1.0]}, TypeError, "x", "a tensor", r"\[1.0\] of type list"),
    (L, {"x": torch.randn(T, C)}, ValueError, "x", "3 dimensions", r"shape \[7, 12\]"),
    (L, {"x": torch.randn(B, T, C, 1)}, ValueError, "x", "3 dimensions", r"shape \[2, 7, 12, 1\]"),
    (L, {"x": torch.ones(B, T, C, dtype=torch.int64)}, TypeError, "x", "float", "int64"),
    (L, {"x": torch.ones(B, T, C, dtype=torch.bool)}, TypeError, "x", "float", "bool"),
    (L, {"x": torch.ones(B, T, C, dtype=torch.complex64)}, TypeError, "x", "float", "complex64"),
    (L, {"x": torch.randn(B, T, C).to_sparse()}, TypeError, "x", "dense", "sparse"),
    *(
        case
        for f in (L, D, P, LS, DS, PS)
        for case in (
            (f, {"activation": "relu"}, ValueError, "activation", "one of None, 'silu'", "'relu'"),
            (f, {"activation": True}, ValueError, "activation", "one of None, 'silu'", "True"),
            (f, {"gate_activation": None}, ValueError, "gate_activation", "one of 'sigmoid', 'silu', 'none'", "None"),
            (f, {"gate_activation": "tanh"}, ValueError, "gate_activation", "one of 'sigmoid', ", "'tanh'"),
        )
    ),
    (L, {"out_gate": torch.randn(B, T, 1)}, ValueError, "out_gate", r"\[B,T,C\] = \[2, 7, 12\]", r"\[2, 7, 1\]"),
    (P, {"residual": torch.randn(B, T, C).double()}, TypeError, "residual", "the dtype of x, torch.float32", "float64"),
    (D, {"residual": 1.0}, TypeError, "residual", "a tensor or None", "1.0"),
    (P, {"out_gate": Array()}, TypeError, "out_gate", "a tensor or None", "Array of shape"),
    (P, {"residual": np.ones((B, T, C))}, TypeError, "residual", "a tensor or None", "ndarray of shape"),
    (P, {"gate_activation": np.ones(2)}, ValueError, "gate_activation", "one of 'sigmoid', ", "array"),
    (P, {"activation": np.ones(2)}, ValueError, "activation", "one of None, 'silu'", "array"),
    (LS, {"out_gate": torch.randn(B, C + 1)}, ValueError, "out_gate", r"\[B,C\] = \[2, 12\]", r"\[2, 13\]"),
    (L, {"weight": None}, TypeError, "weight", "a tensor", "None"),
    (L, {"weight": torch.randn(K)}, ValueError, "weight", r"2 dimensions \[H,K\]", r"shape \[5\]"),
    (L, {"weight": torch.randn(H, 1, K)}, ValueError, "weight", r"\[H,K\] \(from a Conv1d: weight.squeeze\(1\)\)",
     r"shape \[3, 1, 5\]"),
    (P, {"weight": torch.randn(C, 1, K)}, ValueError, "weight", r"weight.squeeze\(1\)", r"shape \[12, 1, 5\]"),
    (D, {"weight": torch.randn(B, T, H * K)}, ValueError, "weight", r"weight.unflatten\(-1, \(H, K\)\)",
     r"shape \[2, 7, 15\]"),
    (P, {"x": torch.randn(B, C, T)}, ValueError, "weight", r"\[7, 5\]", r"shape \[12, 5\].* \(x is .*: give x.mT"),
    (D, {"x": torch.randn(B, C, T)}, ValueError, "weight", r"\[2, 12, 3, 5\]", r"7, 3, 5\].* \(x is .*: give x.mT"),
    (L, {"x": torch.randn(B, C, T)}, ValueError, "weight", "divides C = 7", r"\[3, 5\].* \(x is .*: give x.mT"),
    (L, {"x": torch.randn(B, T, T)}, ValueError, "weight", "divides C = 7", r"shape \[3, 5\] on cpu$"),
    (L, {"weight": torch.randn(5, K)}, ValueError, "weight", "divides C = 12", r"shape \[5, 5\]"),
    (L, {"weight": torch.randn(0, K)}, ValueError, "weight", "at least one row", r"shape \[0, 5\]"),
    (L, {"weight": torch.randn(H, 0)}, ValueError, "weight", "at least one tap", r"shape \[3, 0\]"),
    (L, {"weight": torch.ones(H, K, dtype=torch.int32)}, TypeError, "weight", "float", "int32"),
    (L, {"weight": torch.randn(H, K).double()}, TypeError, "weight", "not float64", "float64"),
    (L, {"x": torch.randn(B, T, C).double()}, TypeError, "weight", "float64, because x is float64", "float32"),
    (L, {"weight": torch.randn(H, K, device="meta")}, ValueError, "weight", "on cpu", "on meta"),
    (P, {"weight": torch.randn(H, K)}, ValueError, "weight", r"\[C,K\] = \[12, 3\]|\[C,K\] = \[12, 5\]",
     r"shape \[3, 5\]"),
    (D, {"weight": torch.randn(H, K)}, ValueError, "weight", r"4 dimensions \[B,T,H,K\]", r"shape \[3, 5\]"),
    (D, {"weight": torch.randn(B, T + 1, H, K)}, ValueError, "weight", r"\[2, 7, 3, 5\]", r"shape \[2, 8, 3, 5\]"),
    (D, {"weight": torch.randn(1, T, H, K)}, ValueError, "weight", r"\[2, 7, 3, 5\]", r"shape \[1, 7, 3, 5\]"),
    (L, {"bias": torch.randn(C + 1)}, ValueError, "bias", r"\[C\] = \[12\]", r"shape \[13\]"),
    (L, {"bias": torch.randn(C, 1)}, ValueError, "bias", r"\[C\] = \[12\]", r"shape \[12, 1\]"),
    (L, {"bias": torch.randn(C).double()}, TypeError, "bias", "not float64", "float64"),
    (L, {"bias": 1.0}, TypeError, "bias", "a tensor or None", "1.0 of type float"),
    (L, {"softmax": 1}, TypeError, "softmax", "True or False", "1 of type int"),
    (L, {"softmax": None}, TypeError, "softmax", "True or False", "None"),
    (L, {"renormalize": "yes"}, TypeError, "renormalize", "True or False", "'yes'"),
    (L, {"renormalize": True, "softmax": False}, ValueError, "renormalize", "False, because without softmax", "True"),
    (L, {"dilation": 0}, ValueError, "dilation", "positive integer", "got 0"),
    (L, {"dilation": 2**63 - 1}, ValueError, "dilation", r"at most 2\^30, also times K - 1 = 4", "9223372036854775807"),
    (L, {"dilation": 2**28 + 1}, ValueError, "dilation", r"at most 2\^30, also times K - 1 = 4", "268435457"),
    (P, {"weight": torch.randn(C, 1), "dilation": 2**30 + 1}, ValueError, "dilation", r"at most 2\^30", "1073741825"),
    (DS, {"dilation": 2**62}, ValueError, "dilation", r"at most 2\^30", "4611686018427387904"),
    (LS, {"state": torch._neg_view(torch.zeros(B, K - 1, C))}, ValueError, "state", "resolve_neg", "negated view"),
    (L, {"x": Array()}, TypeError, "x", "a tensor", r"Array of shape \[2, 7, 12\]$"),
    (L, {"x": [0.0] * 10000}, TypeError, "x", "a tensor", r"\[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, \.\.\.\] of type list"),
    (L, {"x": nested(torch.strided)}, TypeError, "x", "one after the other in one row, with cu_seqlens", "nested"),
    (L, {"x": nested(torch.jagged)}, TypeError, "x", "one after the other in one row, with cu_seqlens", "nested"),
    (P, {"bias": nested(torch.strided)}, TypeError, "bias", "one after the other", "nested"),
    (D, {"weight": nested(torch.strided)}, TypeError, "weight", "one after the other", "nested"),
    (L, {"x": quantized()}, TypeError, "x", "not quantized", "qint8 tensor"),
    (L, {"dilation": -2}, ValueError, "dilation", "positive integer", "-2"),
    (L, {"dilation": 1.0}, TypeError, "dilation", "positive integer", "1.0 of type float"),
    (L, {"dilation": True}, TypeError, "dilation", "positive integer", "True"),
    (L, {"padding": "valid"}, ValueError, "padding", "'same', 'causal' or an integer from 0 to .* = 4", "'valid'"),
    (L, {"padding": -1}, ValueError, "padding", "an integer from 0 to", "-1"),
    (L, {"padding": K}, ValueError, "padding", "an integer from 0 to .* = 4", "5"),
    (L, {"padding": 9, "dilation": 2}, ValueError, "padding", "= 8", "9"),
    (L, {"padding": 1.5}, TypeError, "padding", "'same', 'causal' or an integer", "1.5 of type float"),
    (L, {"padding": (1, 2)}, TypeError, "padding", "'same', 'causal' or an integer", r"\(1, 2\)"),
    (L, {"weight_dropout": 1.5}, ValueError, "weight_dropout", "probability from 0 to 1", "1.5"),
    (L, {"weight_dropout": -0.1}, ValueError, "weight_dropout", "probability", "-0.1"),
    (L, {"weight_dropout": float("nan")}, ValueError, "weight_dropout", "probability", "nan"),
    (L, {"weight_dropout": "0.1"}, TypeError, "weight_dropout", "probability", "'0.1'"),
    (L, {"training": 1}, TypeError, "training", "True or False", "1 of type int"),
    (L, {"seed": 3}, TypeError, "seed", "a tensor or None", "3 of type int"),
    (L, {"seed": torch.tensor([1], dtype=torch.int32)}, TypeError, "seed", "int64", "int32"),
    (L, {"seed": torch.tensor([1, 2])}, ValueError, "seed", r"\[1\]", r"shape \[2\]"),
    (L, {"gate": torch.randn(B, T, C + 1)}, ValueError, "gate", r"\[B,T,C\] = \[2, 7, 12\]", r"shape \[2, 7, 13\]"),
    (L, {"gate": torch.randn(B, T, C).half()}, TypeError, "gate", "dtype of x, torch.float32", "float16"),
    (L, {"mask": torch.ones(B, T)}, TypeError, "mask", "bool", "float32"),
    (L, {"mask": torch.ones(B, T + 1, dtype=torch.bool)}, ValueError, "mask", r"\[B,T\] = \[2, 7\]", r"shape \[2, 8\]"),
    (L, {"mask": [True] * T}, TypeError, "mask", "a tensor or None", "of type list"),
    (L, packed(cu_seqlens=torch.tensor([0.0, 7.0])), TypeError, "cu_seqlens", "int32 or int64", "float32"),
    (L, packed(cu_seqlens=torch.tensor([0])), ValueError, "cu_seqlens", r"\[N\+1\]", r"shape \[1\]"),
    (L, packed(cu_seqlens=torch.tensor([[0, 7]])), ValueError, "cu_seqlens", r"\[N\+1\]", r"shape \[1, 2\]"),
    (L, packed(cu_seqlens=torch.tensor([1, 7])), ValueError, "cu_seqlens", "first boundary of 0", "got 1"),
    (L, packed(cu_seqlens=torch.tensor([0, 6])), ValueError, "cu_seqlens", "last boundary of T = 7", "got 6"),
    (L, packed(cu_seqlens=torch.tensor([0, 5, 3, 7])), ValueError, "cu_seqlens", "never decrease", r"\[0, 5, 3, 7\]"),
    (L, {"cu_seqlens": torch.tensor([0, 7])}, ValueError, "x", r"\[1,T,C\].*cu_seqlens", r"shape \[2, 7, 12\]"),
    (L, {"initial_state": torch.zeros(B, K - 1, C)}, ValueError, "padding", "'causal', because initial_state",
     "'same'"),
    (L, {"return_state": True}, ValueError, "padding", "'causal', because return_state is given", "'same'"),
    (L, {"return_state": 1}, TypeError, "return_state", "True or False", "1 of type int"),
    (L, {"initial_state": torch.zeros(B, K, C), "padding": "causal"}, ValueError, "initial_state", r"\[2, 4, 12\]",
     r"shape \[2, 5, 12\]"),
    (L, {"initial_state": torch.zeros(B, K - 1, C).half(), "padding": "causal"}, TypeError, "initial_state",
     "dtype of x", "float16"),
    (L, packed(cu_seqlens=torch.tensor([0, 3, 7]), padding="causal", initial_state=torch.zeros(1, K - 1, C)),
     ValueError, "initial_state", r"\[N,S,C\].*\[2, 4, 12\]", r"shape \[1, 4, 12\]"),
    (L, {"backend": "cudnn"}, ValueError, "backend", "one of 'auto'", "'cudnn'"),
    (L, {"backend": []}, ValueError, "backend", "one of 'auto'", r"\[\]"),
    (LS, {"backend": {}}, ValueError, "backend", "one of 'auto'", r"\{\}"),
    (P, {"padding": torch.ones(2).numpy()}, TypeError, "padding", "'same', 'causal' or an integer", "ndarray of shape"),
    (D, {"weight": torch.randn(B, T, 5, K)}, ValueError, "weight", "divides C = 12", r"shape \[2, 7, 5, 5\]"),
    (P, {"bias": torch.randn(1)}, ValueError, "bias", r"\[12\]", r"shape \[1\]"),
    (LS, {"x": torch.randn(B, 1, 1, C)}, ValueError, "x", r"\[B,C\] or \[B,T,C\]", r"shape \[2, 1, 1, 12\]"),
    (LS, {"x": torch.randn(C)}, ValueError, "x", r"\[B,C\] or \[B,T,C\]", r"shape \[12\]"),
    (LS, {"state": None}, TypeError, "state", "a tensor", "None"),
    (LS, {"state": torch.zeros(B, K - 2, C)}, ValueError, "state", r"\[B,W,C\], W at least .* = 4",
     r"shape \[2, 3, 12\]"),
    (LS, {"state": torch.zeros(B, C, K - 1)}, ValueError, "state", r"\[B,W,C\] = \[2, 4, 12\] .*state.mT",
     r"shape \[2, 12, 4\]"),
    (LS, {"state": torch.zeros(B, K - 1, C).half()}, TypeError, "state", "dtype of x", "float16"),
    (LS, {"state": torch.zeros(1, K - 1, C).expand(B, -1, -1)}, ValueError, "state",
     "every element in memory of its own",
     r"strides \[0, 12, 1\]"),
    (LS, {"state": torch.zeros(60).as_strided((B, K - 1, C), (4, 12, 1))}, ValueError, "state", "memory of its own",
     r"strides \[4, 12, 1\]"),
    (LS, {"state_index": torch.tensor([0, 2])}, ValueError, "state_index", "0 to 1", r"\[0, 2\]"),
    (LS, {"state_index": torch.tensor([-1, 0])}, ValueError, "state_index", "0 to 1", r"\[-1, 0\]"),
    (LS, overlapping(), ValueError, "x", "apart from the state", "overlapping"),
    (LS, {"dilation": 2}, ValueError, "state", r"\[B,W,C\], W at least \(K-1\)\*dilation = 8", r"shape \[2, 4, 12\]"),
    (LS, {"state_index": torch.tensor([0])}, ValueError, "state_index", r"\[B\] = \[2\]", r"shape \[1\]"),
    (LS, {"state_index": torch.tensor([0, 1]).short()}, TypeError, "state_index", "int32 or int64", "int16"),
    (LS, {"slots": 1}, TypeError, "slots", "a tensor or None", "1 of type int"),
    (LS, {"slots": ints([0.0, 1.0])}, TypeError, "slots", "int32 or int64", "float32"),
    (LS, {"slots": ints([0])}, ValueError, "slots", r"\[B\] = \[2\]", r"shape \[1\]"),
    (LS, {"slots": ints([0, 2])}, ValueError, "slots", "slots below 2, none of them twice", r"\[0, 2\]"),
    (LS, {"slots": ints([1, 1])}, ValueError, "slots", "slots below 2, none of them twice", r"\[1, 1\]"),
    (LS, {"slots": ints([0, 1]), "state_index": ints([0, 1])}, ValueError, "state_index", "None, because",
     r"int64 tensor of shape \[2\]"),
    (LS, {"slots": ints([0, 1]), "state": torch.zeros(K - 1, C)}, ValueError, "state", r"\[S,W,C\]", r"\[4, 12\]"),
    (LS, {"accepted": ints([1, 2])}, ValueError, "accepted", r"T - 0 to T, T = \[1\]", r"\[1, 2\]"),
    (LS, {"accepted": ints([0, 1])}, ValueError, "accepted", r"T - 0 to T, T = \[1\]", r"\[0, 1\]"),
    (LS, {"accepted": ints([True, True])}, TypeError, "accepted", "int32 or int64", "bool"),
    (LS, {"cu_seqlens": ints([0, 1, 2])}, ValueError, "x", r"\[1,T,C\]", r"shape \[2, 12\]"),
    (LS, {"x": torch.randn(1, C), "cu_seqlens": ints([0, C])}, ValueError, "x", r"\[1,T,C\], because cu_seqlens",
     r"shape \[1, 12\]"),
    (LS, serving(cu_seqlens=ints([0, 3, 8])), ValueError, "cu_seqlens", "T = 7", "8"),
    (LS, serving(slots=ints([0, 1, 2])), ValueError, "slots", r"\[N\] = \[2\]", r"shape \[3\]"),
    (LS, serving(slots=None), ValueError, "state", r"\[B,W,C\] = \[2, 4, 12\]", r"shape \[5, 4, 12\]"),
    (LS, serving(slots=None, state=torch.zeros(2, K - 1, C), state_index=ints([0, 1])), ValueError,
     "state_index", "None, because cu_seqlens is given", "int64"),
    (LS, serving(accepted=ints([3, 5])), ValueError, "accepted", r"T - 0 to T, T = \[3, 4\]", r"\[3, 5\]"),
    (LS, serving(save_at=ints([3])), ValueError, "save_at", "save_at and save_slots go together", "one of them"),
    (LS, {"save_at": ints([1]), "save_slots": ints([1])}, ValueError, "save_at", "None, because cu_seqlens",
     r"int64 tensor of shape \[1\]"),
    (LS, serving(save_at=ints([[1]]), save_slots=ints([1])), ValueError, "save_at", r"a tensor \[M\]",
     r"shape \[1, 1\]"),
    (LS, serving(save_at=ints([0]), save_slots=ints([1])), ValueError, "save_at", "1 to T = 7", r"\[0\]"),
    (LS, serving(save_at=ints([8]), save_slots=ints([1])), ValueError, "save_at", "1 to T = 7", r"\[8\]"),
    (LS, serving(save_at=ints([1]), save_slots=ints([3])), ValueError, "save_slots", "or in slots", r"\[3\]"),
    (LS, serving(save_at=ints([1]), save_slots=ints([5])), ValueError, "save_slots", "below 5", r"\[5\]"),
    (LS, serving(save_at=ints([1, 2]), save_slots=ints([1])), ValueError, "save_slots", r"\[M\] = \[2\]",
     r"shape \[1\]"),
    (LS, {"position": torch.tensor([0, 1, 2])}, ValueError, "position", r"\[B\] = \[2\] or \[1\]", r"shape \[3\]"),
    (LS, {"position": torch.tensor([-1, 0])}, ValueError, "position", "positions >= 0", r"\[-1, 0\]"),
    (LS, {"position": 3}, TypeError, "position", "a tensor or None", "3 of type int"),
    (LS, {"x": torch.randn(B, C, requires_grad=True)}, ValueError, "x", "no gradient", "requires_grad=True"),
    (LS, {"gate": torch.randn(B, T, C)}, ValueError, "gate", r"\[B,C\] = \[2, 12\]", r"shape \[2, 7, 12\]"),
    (DS, {"weight": torch.randn(H, K)}, ValueError, "weight", r"3 dimensions \[B,H,K\]", r"shape \[3, 5\]"),
    (PS, {"weight": torch.randn(H, K)}, ValueError, "weight", r"\[C,K\]", r"shape \[3, 5\]"),
]  # fmt: skip
