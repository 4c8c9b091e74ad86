"""The causal convolution of today's state-space and hybrid models with its SiLU, [B,C,T], beside what transformers runs
where no kernel is installed: F.conv1d over channels, cut, and F.silu; and a copy of x, the least that memory allows."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from benchmarks.suites import BOTH, FORWARD
from convkernels import depthwise_conv1d_step
from convkernels.interop.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from convkernels.ops._dtypes import dtype_name

TOKENS, BATCH, LAYERS = 4096, 2, 16
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


@pytest.mark.parametrize("form", [*UPDATES, "copy"])
@pytest.mark.parametrize("layout", ["[B,C,W]", "[B,W,C]"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_updates(timed, benchmark, device, dtype, layout, form):
    """A position of 64 rows; states as caches of transformers have them, and with channels innermost; a copy of as many
    bytes as are moved at least. Layer after layer, as a model decodes, so that no cache holds them."""
    benchmark.group = f"update B=64 C=8192 K=4 {layout} {dtype_name(dtype)}"
    layers = []
    for _ in range(LAYERS):
        x, weight = inputs(8192, 4, dtype, device, 64)
        state = torch.randn(64, 8192, 3, device=device).to(dtype)
        layers.append((x, state if layout == "[B,C,W]" else state.mT.contiguous().mT, weight))
    turn = itertools.cycle(layers)
    if form == "copy":
        moved = x.numel() + state.numel() + weight.numel() // 2
        turn = itertools.cycle([torch.randn(2, moved, device=device).to(dtype) for _ in range(LAYERS)])
        return timed(lambda: torch.Tensor.copy_(*next(turn)))
    with torch.no_grad():
        torch.testing.assert_close(*(update(x, state.clone(), weight) for update in UPDATES.values()), **LOOSE)
        timed(lambda: UPDATES[form](*next(turn)))


SERVED = {"1 token": (1, 3), "4 tokens, 0 to 4 accepted": (4, 7)}


@pytest.mark.parametrize("tokens", SERVED)
@pytest.mark.parametrize("layout", ["[S,C,W]", "[S,W,C]"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_serving(timed, benchmark, device, dtype, layout, tokens):
    """64 rows that continue from slots of a pool."""
    benchmark.group = f"serving B=64 C=8192 K=4 {layout} {dtype_name(dtype)}"
    count, rows = SERVED[tokens]
    x, weight = torch.randn(64, count, 8192, device=device, dtype=dtype), inputs(8192, 4, dtype, device, 64)[1]
    pool = torch.randn(80, rows, 8192, device=device, dtype=dtype)
    pool = pool if layout == "[S,W,C]" else pool.mT.contiguous().mT
    slots = torch.randperm(80, device=device)[:64]
    accepted = torch.randint(count + 1, (64,), device=device) if rows > 3 else None
    with torch.no_grad():
        timed(lambda: depthwise_conv1d_step(x, pool, weight, activation="silu", slots=slots, accepted=accepted))
