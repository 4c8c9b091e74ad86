"""Caches of decoding: both names, caches of the user, padding, assisted decoding."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
from modelling import PAIRS, generator, near, text
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from convkernels.models.base import CACHE
from convkernels.models.cache import ConvState
from convkernels.nn import DepthwiseConv1d, DynamicConv1d, LightweightConv1d


@pytest.mark.parametrize("mixer", ["transformer", "dynamic"])
def test_both_names_of_the_cache(mixer):
    model, ids = generator(mixer), text(2, 6)
    with torch.no_grad():
        expected = model(ids, decoder_input_ids=ids, use_cache=False).logits[:, -1:]
        for name in ("past_key_values", "cache"):
            first = model(ids, decoder_input_ids=ids[:, :-1])
            assert CACHE in first
            rest = model(ids, decoder_input_ids=ids[:, -1:], **{name: first[CACHE]})
            near(rest.logits, expected)
            assert rest[CACHE].get_seq_length() == 6
            hidden = model.model.decoder(ids[:, :1], None, rest.encoder_last_hidden_state, **{name: rest[CACHE]})
            assert hidden[CACHE].get_seq_length() == 7
        with pytest.raises(ValueError, match="argument 'cache': expected None beside past_key_values"):
            model.model(ids, decoder_input_ids=ids, cache=first[CACHE], past_key_values=first[CACHE])
    assert {"cache", "past_key_values"} <= set(model.config.keys_to_ignore_at_inference)


@pytest.mark.parametrize("mixer", ["transformer", "dynamic"])
def test_caches_of_the_user(mixer):
    """An empty one gets the layers that the mixer needs; others are refused before anything is computed."""
    model, ids = generator(mixer), text(2, 6)
    search = dict(max_new_tokens=5, do_sample=False)
    expected = model.generate(ids, **search)
    for name in ("past_key_values", "cache"):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        assert torch.equal(model.generate(ids, **{name: cache}, **search), expected)
        assert cache.get_seq_length() == 5
    configured = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    if mixer == "transformer":
        assert torch.equal(model.generate(ids, **{CACHE: configured}, **search), expected)
    else:
        with pytest.raises(TypeError, match="2 layers ConvState, because of mixer='dynamic'.*got.*DynamicLayer"):
            model(ids, decoder_input_ids=ids, **{CACHE: configured})
    static = StaticCache(config=model.config, max_cache_len=8)
    for cache in (DynamicCache(), EncoderDecoderCache(static, DynamicCache())):
        with pytest.raises(TypeError, match="expected an EncoderDecoderCache of two DynamicCaches"):
            model.generate(ids, **{CACHE: cache}, **search)


def test_a_cache_can_be_used_again_after_a_reset():
    model, ids = generator(), text(2, 6)
    with torch.no_grad():
        cache = model(text(2, 9, skip=3), decoder_input_ids=ids)[CACHE]
        cache.reset()
        expected = model(ids, decoder_input_ids=ids).logits
        near(model(ids, decoder_input_ids=ids, **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("mixer", "style"), PAIRS)
def test_padding_does_not_enter_the_state(mixer, style, size):
    """One position at a time, too, a decoder gives what it gives for the whole sequence."""
    model, ids, targets = generator(mixer, style), text(2, 6), text(2, 8, skip=3)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        full = model(ids, decoder_input_ids=targets, decoder_attention_mask=mask).logits
        cache, parts = None, []
        for t in range(0, 8, size):
            out = model(
                ids, decoder_input_ids=targets[:, t : t + size], decoder_attention_mask=mask[:, : t + size],
                use_cache=True, **{CACHE: cache},
            )  # fmt: skip
            cache = out[CACHE]
            parts.append(out.logits)
    near(torch.cat(parts, 1)[mask.bool()], full[mask.bool()])
    with pytest.raises(ValueError, match=r"'decoder_attention_mask': expected shape \[B,L\] = \[2, 9\], 8 columns of"):
        model(ids, decoder_input_ids=ids[:, :1], decoder_attention_mask=mask[:, :1], **{CACHE: cache})


def test_a_step_of_a_module_takes_a_mask():
    x, gate = torch.randn(2, 2, 7, 4)
    mask = torch.rand(2, 7) < 0.6
    x[~mask] = gate[~mask] = torch.nan
    options = dict(padding="causal", backend="reference")
    convs = [DepthwiseConv1d(4, 3, **options), LightweightConv1d(4, 3, 2, **options), DynamicConv1d(4, 3, 2, **options)]
    for conv in convs:
        with torch.no_grad():
            full, final = conv(x, mask, gate=gate, return_state=True)
            state = conv.init_state(2)
            steps = [conv.step(x[:, t], state, gate=gate[:, t], mask=mask[:, t]) for t in range(7)]
        near(torch.stack(steps, 1)[mask], full[mask])
        near(state, final)


@pytest.mark.parametrize("mixer", ["transformer", "dynamic", "dilated"])
def test_assisted_decoding_and_prompt_lookup(mixer):
    """Rejected drafts are taken back: the tokens are those of greedy decoding."""
    model, ids = generator(mixer), text(1, 9)
    search = dict(max_new_tokens=24, do_sample=False)
    expected = model.generate(ids, **search)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **search), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight), alpha=0.2)
    assert torch.equal(model.generate(ids, assistant_model=other, **search), expected)


def test_crop_takes_back_what_was_recorded():
    model, targets = generator("dilated"), text(2, 12)
    states = torch.randn(2, 5, 32)
    run = lambda ids, cache: model.model.decoder(ids, None, states, cache=cache).last_hidden_state  # noqa: E731
    with torch.no_grad():
        full = run(targets, None)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        run(targets[:, :3], cache)
        cache.activate_past_recording()
        for start, end in ((3, 4), (4, 8), (8, 9)):
            run(targets[:, start:end].flip(0) if start == 8 else targets[:, start:end], cache)
        cache.crop(-3)  # one whole call and half of another
        assert cache.get_seq_length() == 6
        with pytest.raises(NotImplementedError, match="does not hold what came before it"):
            cache.crop(-1)
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.reorder_cache(torch.tensor([1, 0]))
        near(run(targets[:, 6:8], cache), full[:, 6:8])
        cache.crop(0)
        near(run(targets[:, 8:], cache), full[:, 8:])
    assert isinstance(cache.self_attention_cache.layers[0], ConvState)
