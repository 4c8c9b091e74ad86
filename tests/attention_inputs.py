"""Small inputs of composite_attention in float64, in every mode, that the tests of attention share."""

import torch

import convkernels as ck
from convkernels.testing.inputs import values

DOUBLE = torch.float64
B, T, H, D, W = 2, 5, 4, 3, 4
TERMS = {"bias": (H, W), "query_rel": (H, D, W), "key_rel": (D, W), "value_conv": (H, D, W), "value_conv_bias": (H, D),
         "value_conv_scale": (H,)}  # fmt: skip
SHAPES = {"q": (B, T, H, D), "k": (B, T, 2, D), "v": (B, T, 2, D), "rel_query": (B, T, H, 2), **TERMS}


def leaf(name, salt=0, dtype=DOUBLE, shape=None):
    value = values(shape or SHAPES[name], dtype, list(SHAPES).index(name) + 1 + salt)
    return value.clone().requires_grad_()


# Inputs beside q, k and v, changed shapes, and options.
MODES = {
    "plain": ((), {}, {}),
    "bias": (("bias",), {}, {"window": (1, 2)}),
    "query_rel": (("query_rel",), {"query_rel": (D, W)}, {"window": (1, 2), "outside": "zero"}),
    "rel_query": (("query_rel", "rel_query"), {"query_rel": (2, W)},
                  {"window": (W - 1, 0), "outside": "zero", "causal": True}),
    "key_rel": (("key_rel",), {}, {"window": (2, 1), "outside": "mask"}),
    "value_conv": (("value_conv", "value_conv_bias", "value_conv_scale"), {}, {"window": (2, 1), "causal": True}),
    "no_qk": (("bias", "key_rel"), {}, {"window": (1, 2), "qk": False}),
    "everything": (tuple(TERMS), {},
                   {"window": (1, 2), "mask": True, "dropout": 0.4, "training": True, "seeded": True}),
    "empty_rows": (("bias", "key_rel"), {}, {"window": (1, 2), "mask": "none"}),
    "longer_keys": (tuple(TERMS), {"k": (B, 7, 2, D), "v": (B, 7, 2, D)}, {"window": (1, 2), "causal": True}),
    "packed": (tuple(TERMS), {n: (1, *SHAPES[n][1:]) for n in "qkv"},
               {"window": (1, 2), "cu_seqlens_q": (0, 2, 2, 5), "cu_seqlens_k": (0, 1, 2, 5)}),
    "no_queries": (("bias",), {"q": (B, 0, H, D)}, {"window": (1, 2)}),
    "no_keys": (("bias",), {"k": (B, 0, 2, D), "v": (B, 0, 2, D)}, {"window": (1, 2)}),
}  # fmt: skip


def build(mode, backend, lse=False):
    """The function of its differentiable inputs alone, and these inputs."""
    extra, shapes, options = MODES[mode]
    inputs = {name: leaf(name, shape=shapes.get(name)) for name in ("q", "k", "v", *extra)}
    options = dict(options)
    mask = options.pop("mask", None)
    if mask:
        options["key_mask"] = values(inputs["k"].shape[:2], DOUBLE, 40) > -0.4
        options["key_mask"][-1] &= mask != "none"
    if options.pop("seeded", False):
        options["seed"] = torch.tensor([1234567890123])
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            options[name] = torch.tensor(options[name])
    names = list(inputs)

    def call(*tensors):
        named = dict(zip(names, tensors, strict=True))
        result = ck.composite_attention(**named, backend=backend, return_lse=lse, **options)
        if not lse:
            return result
        return result[0], torch.where(result[1].isfinite(), result[1], 0.0)

    return call, tuple(inputs.values())


def qkv(dtype=DOUBLE, heads=2, **shapes):
    return [values(shapes.get(n, (B, T, H if n == "q" else heads, D)), dtype, i + 1) for i, n in enumerate("qkv")]
