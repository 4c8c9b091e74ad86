"""A model of transformers with and without ``optimize``: LFM2 in the sizes of LFM2-350M, of whose 16 layers 10 are
gated causal convolutions; the logits of a prompt, and a training step."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Lfm2Config, Lfm2ForCausalLM

from benchmarks.suites import BOTH, FORWARD
from convkernels.interop.huggingface import optimize
from convkernels.ops._dtypes import dtype_name

TOKENS = 512
SIZES = dict(hidden_size=1024, intermediate_size=6656, num_hidden_layers=16, num_attention_heads=16)
LFM2_350M = dict(**SIZES, num_key_value_heads=8, full_attn_idxs=[2, 5, 8, 10, 12, 14])


@pytest.fixture(scope="module")
def models():
    """By form and dtype; in each dtype two models of the same weights, one of them optimized."""
    made = {}

    def get(form, dtype, device):
        if (dtype, device) not in made:
            made.clear()  # there is not room for all
            torch.manual_seed(0)
            stock = Lfm2ForCausalLM(Lfm2Config(**LFM2_350M)).to(device, dtype)
            ours = Lfm2ForCausalLM(stock.config).to(device, dtype)
            ours.load_state_dict(stock.state_dict())
            optimize(ours)
            made[dtype, device] = {"stock": stock, "convkernels": ours}
        return made[dtype, device][form]

    return get


@pytest.mark.parametrize("form", ["convkernels", "stock"])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_lfm2(timed, benchmark, device, models, dtype, direction, form):
    benchmark.group = f"LFM2-350M {dtype_name(dtype)} {direction}"
    model = models(form, dtype, device)
    tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS), device=device)

    def train():
        model(tokens, labels=tokens).loss.backward()
        model.zero_grad()

    if direction == BOTH:
        timed(train)
    else:
        with torch.no_grad():
            timed(lambda: model(tokens, use_cache=True, logits_to_keep=1))
