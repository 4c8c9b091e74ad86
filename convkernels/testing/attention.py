"""Problems of attention and their tensors, as `inputs` has those of the convolutions."""

from dataclasses import dataclass, replace

import torch

from convkernels.testing.inputs import arrange, values

TABLES = ("bias", "query_rel", "key_rel", "value_conv", "value_conv_bias", "value_conv_scale")
INPUTS = (
    "q",
    "k",
    "v",
    "bias",
    "query_rel",
    "rel_query",
    "key_rel",
    "value_conv",
    "value_conv_bias",
    "value_conv_scale",
)
DELTA_THROUGH_OUT = ("triton", "cuda")
"""Backends whose delta is grad·(out less the depthwise term), with all the rounding of out."""


@dataclass(frozen=True)
class AttentionProblem:
    """One call of attention or attention_grad.

    query_rel, key_rel: 0 none, 1 shared by the heads, 2 one per head. rank: R of a separate rel_query, 0: none.
    value_conv: 0 none, 1 taps, 2 with bias, 3 with bias and scale. padding: 0 no mask, 1 random, 2 the last row of the
    batch has no key, 3 none has; masked keys and values are NaN. lengths, key_lengths: packed sequences.
    """

    batch: int = 2
    length: int = 5
    keys: int = 5
    groups: int = 2
    sharing: int = 1
    head_size: int = 3
    left: int = 1
    right: int = 1
    outside: int = 0
    causal: bool = False
    qk: bool = True
    dropout: float = 0.0
    bias: bool = False
    query_rel: int = 0
    rank: int = 0
    key_rel: int = 0
    value_conv: int = 0
    padding: int = 0
    lengths: tuple = ()
    key_lengths: tuple = ()
    dtype: torch.dtype = torch.float32
    table_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    table_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    seed: int = 0

    @property
    def heads(self):
        return self.groups * self.sharing

    @property
    def sizes(self):
        """B, T and S."""
        if not self.lengths:
            return self.batch, self.length, self.keys
        return 1, sum(self.lengths), sum(self.key_lengths or self.lengths)

    def with_(self, **changes):
        return replace(self, **changes)

    def tensors(self):
        """The op's tensor arguments by name, None where absent, and cotangents grad and grad_lse."""
        (B, T, S), H, D, W = self.sizes, self.heads, self.head_size, self.left + self.right + 1

        def own(salt, *shape):
            return arrange(values(shape, self.dtype, self.seed + salt), self.layout)

        def table(given, salt, *shape):
            return arrange(values(shape, self.table_dtype, self.seed + salt), self.table_layout) if given else None

        R = self.rank or D
        mask = None
        if self.padding:
            mask = values((B, S), torch.float64, self.seed + 11) > -0.4
            if self.padding == 2:
                mask[-1:] = False
            if self.padding == 3:
                mask[:] = False
        k, v = (values((B, S, self.groups, D), self.dtype, self.seed + salt).clone() for salt in (2, 3))
        if mask is not None and self.layout != "expanded":
            k[~mask] = v[~mask] = float("nan")
        k, v = (arrange(value, self.layout) for value in (k, v))
        lse_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return {
            "q": own(1, B, T, H, D),
            "k": k,
            "v": v,
            "seed": torch.tensor([self.seed * 7919 + 3]) if self.dropout else None,
            "bias": table(self.bias, 4, H, W),
            "query_rel": table(self.query_rel, 5, *((H,) if self.query_rel == 2 else ()), R, W),
            "rel_query": own(6, B, T, H, R) if self.query_rel and self.rank else None,
            "key_rel": table(self.key_rel, 7, *((H,) if self.key_rel == 2 else ()), D, W),
            "value_conv": table(self.value_conv, 8, H, D, W),
            "value_conv_bias": table(self.value_conv > 1, 9, H, D),
            "value_conv_scale": table(self.value_conv > 2, 10, H),
            "key_mask": mask,
            "cu_seqlens_q": torch.tensor([0, *self.lengths]).cumsum(0) if self.lengths else None,
            "cu_seqlens_k": torch.tensor([0, *(self.key_lengths or self.lengths)]).cumsum(0) if self.lengths else None,
            "grad": arrange(values((B, T, H, D), self.dtype, self.seed + 12), self.grad_layout),
            "grad_lse": values((B, H, T), lse_dtype, self.seed + 13) if self.seed % 3 == 0 else None,
        }

    def op_arguments(self, t):
        """Arguments of the op attention, in schema order."""
        scale = self.head_size**-0.5
        return (
            t["q"], t["k"], t["v"], self.left, self.right, self.outside, self.causal, self.qk, scale,
            scale if t["rel_query"] is None else 1.0, self.dropout, t["seed"], t["bias"], t["query_rel"],
            t["rel_query"], t["key_rel"], t["value_conv"], t["value_conv_bias"], t["value_conv_scale"], t["key_mask"],
            t["cu_seqlens_q"], t["cu_seqlens_k"],
        )  # fmt: skip

    def plan_facts(self):
        """What a call with these tensors looks like to the plans of the cuda backend."""
        (batch, queries, keys), low_rank = self.sizes, bool(self.query_rel and self.rank)
        return {
            "batch": batch, "queries": queries, "keys": keys, "heads": self.heads, "groups": self.groups,
            "channels": self.head_size, "rank": self.rank if low_rank else self.head_size,
            "window": self.left + self.right + 1, "sequences": max(len(self.lengths), 1),
            "dtype": str(self.dtype).removeprefix("torch."), "packed": bool(self.lengths),
            "relative": self.bias or bool(self.query_rel) or bool(self.key_rel), "query_rel": bool(self.query_rel),
            "key_rel": bool(self.key_rel), "low_rank": low_rank,
            "boxes": self.head_size * self.dtype.itemsize % 16 == 0,
        }  # fmt: skip

    def grad_arguments(self, t, out, lse, needs=1023):
        """Arguments of the op attention_grad, in schema order."""
        return (t["grad"], t["grad_lse"], out, lse, *self.op_arguments(t), needs)
