"""One decoding step with state, beside the stock way: join the newest input to the state and contract with the taps."""

import pytest
import torch

import convkernels


def stock_step(x, state, weight):
    window = torch.cat([state, x[:, None]], 1)
    state.copy_(window[:, 1:])
    return torch.einsum("bkhr,hk->bhr", window.unflatten(2, (weight.shape[0], -1)), weight.softmax(-1)).flatten(1)


STEPS = {"convkernels": convkernels.lightweight_conv1d_step, "stock": stock_step}


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("taps", [7, 31])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_step(timed, benchmark, device, batch, taps, form):
    benchmark.group = f"lightweight step B={batch} K={taps}"
    x = torch.randn(batch, 768, device=device)
    state = torch.randn(batch, taps - 1, 768, device=device)
    weight = torch.randn(12, taps, device=device)
    with torch.no_grad():
        results = [step(x, state.clone(), weight) for step in STEPS.values()]
        torch.testing.assert_close(*results)
        timed(lambda: STEPS[form](x, state, weight))
