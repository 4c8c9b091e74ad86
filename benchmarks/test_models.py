"""A step of decoding early and late: with convolutions it costs the same, with attention it grows."""

import pytest
import torch

pytest.importorskip("transformers")
from convkernels.models import ConvSeq2SeqConfig, ConvSeq2SeqForConditionalGeneration
from convkernels.models.cache import decoder_cache

BATCH, SOURCE = 8, 64


@pytest.mark.parametrize("position", [16, 256, 2048])
@pytest.mark.parametrize("mixer", ["lightweight", "dynamic", "dilated", "transformer"])
def test_decoding_step(timed, benchmark, device, mixer, position):
    benchmark.group = f"decoding step, {mixer}"
    torch.manual_seed(0)
    config = ConvSeq2SeqConfig.preset(mixer, "small", vocab_size=1000)
    model = ConvSeq2SeqForConditionalGeneration(config).eval().to(device)
    ids = torch.randint(1000, (BATCH, position), device=device)
    states = torch.randn(BATCH, SOURCE, config.d_model, device=device)
    cache = decoder_cache(config)
    with torch.no_grad():
        model.model.decoder(ids, encoder_hidden_states=states, past_key_values=cache)
        assert cache.get_seq_length() == position

        def step():
            model.model.decoder(ids[:, :1], encoder_hidden_states=states, past_key_values=cache)

        timed(step)
