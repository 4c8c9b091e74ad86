"""The causal convolution of today's state-space and hybrid models with its SiLU, [B,C,T], beside what transformers runs
where no kernel is installed: F.conv1d over channels, cut, and F.silu; and a copy of x, the least that memory allows."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.suites import BOTH, FORWARD
from convkernels.interop.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from convkernels.ops._dtypes import dtype_name

TOKENS, BATCH = 4096, 2
SHAPES = [(8192, 4), (5376, 4), (2048, 3), (2048, 7)]  # channels and taps of Qwen3-Next, Mamba-2, LFM2 and LFM3
DTYPES = [torch.float32, torch.bfloat16]
LOOSE = {"rtol": 0.02, "atol": 0.05}  # the stock forms round more often


def stock(x, weight):
    return F.silu(F.conv1d(x, weight[:, None], padding=weight.shape[1] - 1, groups=x.shape[1])[..., : x.shape[2]])


def stock_update(x, state, weight):
    window = torch.cat([state, x[..., None]], 2)
    state.copy_(window[:, :, 1:])
    return F.silu((window * weight).sum(2))


FORMS = {"convkernels": lambda x, weight: causal_conv1d_fn(x, weight, activation="silu"), "stock": stock}
UPDATES = {
    "convkernels": lambda x, state, weight: causal_conv1d_update(x, state, weight, activation="silu"),
    "stock": stock_update,
}


def inputs(channels, taps, dtype, device, *leading):
    """Rows as a linear layer leaves them, channels innermost."""
    x = torch.randn(*leading, channels, device=device, dtype=dtype)
    return (x.mT if x.dim() == 3 else x), torch.randn(channels, taps, device=device, dtype=dtype)


@pytest.mark.parametrize("form", [*FORMS, "copy"])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("channels", "taps"), SHAPES, ids=str)
def test_sequences(timed, benchmark, device, channels, taps, dtype, direction, form):
    benchmark.group = f"C={channels} K={taps} {dtype_name(dtype)} {direction}"
    x, weight = inputs(channels, taps, dtype, device, BATCH, TOKENS // BATCH)
    if form == "copy":
        timed(x.clone)
    elif direction == FORWARD:
        with torch.no_grad():
            torch.testing.assert_close(FORMS[form](x, weight), stock(x, weight), **LOOSE)
            timed(lambda: FORMS[form](x, weight))
    else:
        leaves, grad = (x.requires_grad_(), weight.requires_grad_()), torch.randn_like(x)
        timed(lambda: torch.autograd.grad(FORMS[form](x, weight), leaves, grad))


@pytest.mark.parametrize("form", UPDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_updates(timed, benchmark, device, dtype, form):
    """A position of 64 rows; the state as caches of transformers have it, [B,C,K-1]."""
    benchmark.group = f"update B=64 C=8192 K=4 {dtype_name(dtype)}"
    x, weight = inputs(8192, 4, dtype, device, 64)
    state = torch.randn(64, 8192, 3, device=device, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(*(update(x, state.clone(), weight) for update in UPDATES.values()), **LOOSE)
        timed(lambda: UPDATES[form](x, state, weight))
