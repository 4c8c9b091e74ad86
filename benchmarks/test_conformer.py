"""Two modules of a Conformer layer as large as Parakeet's of 0.6 billion parameters, for 30 s of speech and for 2 min,
beside those of transformers with the same weights."""

import pytest
import torch

from benchmarks.suites import BOTH, FORWARD
from convkernels.nn import ConformerConv, RelativeAttention
from convkernels.ops._dtypes import dtype_name

parakeet = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")

CHANNELS, HEADS, TAPS = 1024, 8, 9


def convolution():
    config = parakeet.ParakeetEncoderConfig(hidden_size=CHANNELS, conv_kernel_size=TAPS, convolution_bias=False)
    stock = parakeet.ParakeetEncoderConvolutionModule(config)
    return ConformerConv(CHANNELS, TAPS, bias=False), stock, stock


def attention():
    sizes = dict(hidden_size=CHANNELS, num_attention_heads=HEADS, attention_bias=False)
    config = parakeet.ParakeetEncoderConfig(**sizes, attn_implementation="sdpa")
    stock = parakeet.ParakeetEncoderAttention(config, 0)
    positions = parakeet.ParakeetEncoderRelPositionalEncoding(config)
    return RelativeAttention(CHANNELS, HEADS, bias=False), stock, lambda x: stock(x, positions(x))[0]


MODULES = {"convolution": convolution, "attention": attention}


@pytest.mark.parametrize("form", ["convkernels", "transformers"])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("length", [375, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("module", MODULES)
def test_modules(timed, benchmark, device, module, dtype, length, direction, form):
    benchmark.group = f"{module} C={CHANNELS} T={length} {dtype_name(dtype)} {direction}"
    ours, stock, call = MODULES[module]()
    ours.load_state_dict(stock.state_dict())
    for made in (ours, stock):
        made.to(device, dtype).train(direction == BOTH)
    x = torch.randn(1, length, CHANNELS, device=device, dtype=dtype)
    run, owner = (ours, ours) if form == "convkernels" else (call, stock)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), call(x), rtol=0.05, atol=0.05)
        if direction == FORWARD:
            return timed(lambda: run(x))
    inputs, grad = (x.requires_grad_(), *owner.parameters()), torch.randn_like(x)
    timed(lambda: torch.autograd.grad(run(x), inputs, grad))
