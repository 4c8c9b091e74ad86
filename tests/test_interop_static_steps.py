"""Steps of decoding with a static cache: the position is data, so that one graph serves all of them."""

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from relative_families import made
from stock_models import llama

from convkernels.interop import huggingface

START, STEPS, SIZE = 6, 100, 128


def taken_over(name):
    """A model that this package computes the attention of."""
    if name == "llama":
        huggingface.register()
        model = llama()
        model.set_attn_implementation("convkernels")
        return model
    model = made(name)
    assert huggingface.optimize(model).replaced
    return model


def static(config):
    return transformers.StaticCache(config=config, max_cache_len=SIZE)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["bloom", "falcon", "llama", "mpt"])
def test_decoders(name, padded):
    """100 steps of one graph, and the logits of the full pass."""
    model = taken_over(name)
    torch.manual_seed(3)
    ids = torch.randint(2, 60, (2, START + STEPS))
    mask = torch.ones(2, SIZE, dtype=torch.int64)  # wide enough for every step
    if padded:
        mask[1, :3] = 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask[:, : ids.shape[1]], use_cache=False).logits
        cache, options = static(model.config), dict(attention_mask=mask) if padded else {}
        logits = [model(input_ids=ids[:, :START], past_key_values=cache, **options).logits]
        step = torch.compile(model, backend="eager", fullgraph=True)
        for i in range(START, START + STEPS):
            logits.append(step(input_ids=ids[:, i : i + 1], past_key_values=cache, **options).logits.clone())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    rows = mask[:, : ids.shape[1]].bool()
    torch.testing.assert_close(torch.cat(logits, 1)[rows], expected[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_encoder_decoders(name):
    model = taken_over(name)
    torch.manual_seed(3)
    ids, source = torch.randint(2, 60, (2, START + STEPS)), torch.randint(2, 60, (2, 9))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        encoded = model.encoder(source)
        expected = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits
        cache = transformers.EncoderDecoderCache(static(model.config), transformers.DynamicCache(config=model.config))
        given = dict(encoder_outputs=encoded, past_key_values=cache)
        logits = [model(decoder_input_ids=ids[:, :START], **given).logits]
        step = torch.compile(model, backend="eager", fullgraph=True)
        for i in range(START, START + STEPS):
            logits.append(step(decoder_input_ids=ids[:, i : i + 1], **given).logits.clone())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_step_beyond_the_mask():
    """Columns for the keys alone: one too few."""
    model = taken_over("llama")
    cache, ids = static(model.config), torch.randint(2, 60, (2, START + 1))
    with torch.no_grad():
        model(input_ids=ids[:, :START], past_key_values=cache)
        mask = torch.ones(2, START, dtype=torch.int64)
        with pytest.raises(
            ValueError, match=r"argument 'attention_mask': expected shape \[B,S\] with a column for each"
        ):
            model(input_ids=ids[:, START:], past_key_values=cache, attention_mask=mask)
