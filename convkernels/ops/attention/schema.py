"""The arguments of ``attention`` and ``attention_grad``: names, order, defaults, and the bits of ``needs``."""

from .._arguments import Inputs, Saved, arguments, replacing

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, int left=0, int right=0, int outside=0, bool causal=False, bool qk=True, "
    "float scale=1.0, float rel_scale=1.0, float dropout=0.0, Tensor? seed=None, Tensor? bias=None, "
    "Tensor? query_rel=None, Tensor? rel_query=None, Tensor? key_rel=None, Tensor? value_conv=None, "
    "Tensor? value_conv_bias=None, Tensor? value_conv_scale=None, Tensor? key_mask=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None"
)
ROWS = ("q", "k", "v", "rel_query")
"""Tensors with a row per query or key; their gradients have their layout."""
TABLES = ("bias", "query_rel", "key_rel", "value_conv", "value_conv_bias", "value_conv_scale")
_INPUTS = ("q", "k", "v", "bias", "query_rel", "rel_query", *TABLES[2:])

Attention = arguments("attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
AttentionGrad = arguments(
    "attention_grad",
    f"(Tensor grad, Tensor? grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}, int needs={2 ** len(_INPUTS) - 1}) "
    f"-> ({', '.join(['Tensor'] * len(_INPUTS))})",
    _INPUTS,
)

INPUTS = Inputs(Attention, _INPUTS)
# out and lse get no gradient of their own: they are functions of the other arguments, which get all of it.
GRAD_INPUTS = Inputs(AttentionGrad, ("grad", "grad_lse", *_INPUTS))
settled = replacing(Attention, "left", "right", "outside", "scale", "rel_scale", "dropout", "seed", "cu_seqlens_k")
FOR_GRAD = Saved(Attention, AttentionGrad, outputs=("out", "lse"), rest=("grad", "grad_lse", "needs"))
FOR_DOUBLE_BACKWARD = Saved(AttentionGrad, AttentionGrad, unused=("out", "lse"))
