"""composite_attention under torch.func: vmap over every kind of input; forward-mode derivatives do not exist."""

import itertools
import warnings
from functools import partial

import pytest
import torch
from attention_inputs import DOUBLE, TERMS, B, D, H, T, W, leaf
from helpers import close
from torch.autograd import forward_ad
from torch.func import grad, vmap

import convkernels as ck
from convkernels.testing.inputs import values

OP = "attention_grad"
N = 3


@pytest.mark.parametrize("mapped", [
    *itertools.combinations(["q", "k", "bias", "query_rel", "value_conv_bias"], 1),
    ("q", "k", "v"),
    ("k", "key_rel"),
    ("value_conv", "value_conv_scale"),
    ("q", "k", "v", "key_mask"),
    ("key_mask",),
    ("bias", "key_mask"),
    ("q", "k", "v", *TERMS),
], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("tables", [False, True], ids=["", "tables"])
def test_vmap(mapped, tables, backend):
    """Forward and gradients of everything equal a loop, whatever is mapped."""
    names = ["q", "k", "v", *(TERMS if tables or set(mapped) & set(TERMS) else ())]
    every = {name: leaf(name).detach() for name in names} | {"key_mask": values((B, T), DOUBLE, 40) > -0.5}
    for name in mapped:
        if name in every:
            stacked = [every[name]] + [values(every[name].shape, DOUBLE, 50 + n + len(name)) for n in range(N - 1)]
            every[name] = torch.stack(
                [s > -0.5 if name == "key_mask" and s.is_floating_point() else s for s in stacked], 1
            )
    in_dims = tuple(1 if name in mapped else None for name in every)
    cotangent = values((B, T, H, D), DOUBLE, 9)

    def call(*tensors):
        y, lse = ck.composite_attention(
            **dict(zip(every, tensors, strict=True)), window=(1, 2), backend=backend, return_lse=True
        )
        return (y * cotangent).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()

    for function in (call, grad(call, argnums=tuple(range(len(names))))):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*batching rule.*")
            together = vmap(function, in_dims=in_dims)(*every.values())
        single = [
            function(*(t if d is None else t.select(d, n) for t, d in zip(every.values(), in_dims, strict=True)))
            for n in range(N)
        ]
        expected = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *single)
        close(together, expected)


def test_vmap_with_dropout_and_packing(backend):
    q, k, v = (values((N, 1, T, n, D), DOUBLE, n) for n in (H, 2, 2))
    options = dict(bias=leaf("bias").detach(), window=(1, 2), backend=backend)
    for more in (
        {"dropout": 0.4, "training": True, "seed": torch.tensor([5])},
        {"cu_seqlens_q": torch.tensor([0, 2, T])},
    ):
        together = vmap(lambda q, k, v, more=more: ck.composite_attention(q, k, v, **options, **more))(q, k, v)
        close(together, torch.stack([ck.composite_attention(q[n], k[n], v[n], **options, **more) for n in range(N)]))


def test_tangents_are_refused(backend):
    inputs = {name: leaf(name).detach() for name in ("q", "k", "v", "rel_query", *TERMS)} | {
        "query_rel": leaf("query_rel", shape=(H, 2, W)).detach()
    }
    call = partial(ck.composite_attention, window=(1, 2), backend=backend)
    q = leaf("q")
    y = call(q, inputs["k"], inputs["v"])
    with forward_ad.dual_level():
        for name, value in inputs.items():
            dual = forward_ad.make_dual(value, value)
            with pytest.raises(NotImplementedError, match=f"argument '{name}': expected no tangent"):
                call(**{**inputs, name: dual})
        with pytest.raises(NotImplementedError, match="argument 'grad': expected no tangent"):
            torch.autograd.grad(y, q, forward_ad.make_dual(inputs["q"], inputs["q"]))
    with pytest.raises(NotImplementedError, match="argument 'q': expected no tangent"):
        torch.func.jvp(lambda q: call(q, inputs["k"], inputs["v"]), (inputs["q"],), (inputs["q"],))
