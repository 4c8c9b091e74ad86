"""Decoding with a cache equals the whole sequence at once, and padding changes nothing."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
from modelling import MIXERS, VARIANTS, bert, generator, near, prompt, quick, ragged, seq2seq, text
from transformers.cache_utils import DynamicLayer

from convkernels.models import ConvSeq2SeqConfig, ConvSeq2SeqForSequenceClassification
from convkernels.models.cache import ConvState, decoder_cache


def unchanged(short, long, real):
    near(long[:, : short.shape[1]][real], short[real], 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_does_not_change_a_bert(variant):
    model = bert(variant)
    ids, mask = ragged(text(3, 24), [24, 15, 3])
    wide = torch.nn.functional.pad
    with torch.no_grad():
        short, long = model(ids, mask).logits, model(wide(ids, (0, 9), value=7), wide(mask, (0, 9))).logits
        alone = model(ids[1:2, :15]).logits
    unchanged(short, long, mask.bool())
    near(short[1:2, :15], alone, 1e-6)


@pytest.mark.parametrize("style", quick(("paper", "fairseq", "released"), ("paper",)))
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_does_not_change_an_encoder_decoder(mixer, style):
    model = seq2seq(mixer, style, pair_attention=1)
    ids, mask = ragged(text(3, 24), [24, 15, 3])
    targets, target_mask = ragged(text(3, 20, skip=3), [20, 9, 2])
    wide = torch.nn.functional.pad
    with torch.no_grad():
        short = model(ids, mask, targets).logits
        long = model(wide(ids, (0, 9), value=7), wide(mask, (0, 9)), wide(targets, (0, 5), value=7)).logits
        alone = model(ids[1:2, :15], None, targets[1:2, :9]).logits
        # Padding to the left, as prompts have it.
        prompt = model(
            ids, mask, wide(targets, (4, 0), value=7), decoder_attention_mask=wide(torch.ones_like(targets), (4, 0))
        ).logits
    unchanged(short, long, target_mask.bool())
    near(short[1:2, :9], alone, 1e-6)
    near(prompt[:, 4:], short, 1e-6)


@pytest.mark.parametrize("dual", [False, True])
def test_padding_does_not_change_a_classifier(dual):
    model = seq2seq("lightweight", made=ConvSeq2SeqForSequenceClassification, dual_encoder=dual)
    ids, mask = ragged(text(3, 24), [24, 15, 3])
    others, other_mask = ragged(text(3, 20, skip=3), [20, 9, 2])
    pair = (others, other_mask) if dual else ()
    with torch.no_grad():
        logits = model(ids, mask, *pair).logits
        pair = (others[1:2, :9],) if dual else ()
        alone = model(ids[1:2, :15], None, *(p for q in pair for p in (q, None))).logits
    assert logits.shape == (3, 2)
    near(logits[1:2], alone, 1e-6)


NEW = 40  # more than twice any window below
DECODERS = {
    "transformer": lambda: generator("transformer"),
    "lightweight": lambda: generator("lightweight"),
    "dynamic": generator,
    "dilated": lambda: generator("dilated", dilation=[3, 2]),
    "lightweight-fairseq": lambda: generator("lightweight", "fairseq", positions="sinusoidal", position_offset=2),
    "dynamic-released": lambda: generator("dynamic", "released"),
}


@pytest.mark.parametrize("name", quick(DECODERS, ("transformer", "dynamic", "dilated")))
def test_greedy_decoding_equals_the_full_forward(name):
    """Also when it goes on from a prompt of several tokens."""
    model, (ids, mask) = DECODERS[name](), prompt()
    for given in (None, text(3, 5, skip=9)):
        more = {} if given is None else {"decoder_input_ids": given}
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **more,
        )  # fmt: skip
        tokens = generated.sequences
        with torch.no_grad():
            full = model(ids, mask, tokens, use_cache=False).logits
        steps = torch.stack(generated.logits, 1)
        full = full[:, -NEW - 1 : -1]
        torch.testing.assert_close(steps, full, rtol=0, atol=1e-5 * full.abs().max().item())
        assert torch.equal(tokens[:, -NEW:], full.argmax(2))
        assert len(tokens[:, -NEW:].unique()) > 5, "these tokens show nothing"


@pytest.mark.parametrize("name", quick(DECODERS, ("transformer", "dynamic", "dilated")))
def test_beam_search_equals_the_full_forward(name):
    """Beams are reordered at every step, so the states must follow."""
    model, (ids, mask) = DECODERS[name](), prompt()
    search = dict(attention_mask=mask, max_new_tokens=NEW, num_beams=4, num_return_sequences=2, do_sample=False)
    tokens = model.generate(ids, **search)
    assert torch.equal(tokens, model.generate(ids, use_cache=False, **search))
    assert not torch.equal(tokens[::2], model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("name", ["transformer", "dynamic", "dynamic-released", "lightweight-fairseq"])
def test_prompts_of_different_lengths(name):
    """Padded to the left, each goes on as it does alone."""
    model, (ids, mask), lengths = DECODERS[name](), prompt(), (9, 4, 1)
    given = text(3, 9, skip=9)
    decoder_mask = torch.stack([torch.arange(9) >= 9 - length for length in lengths]).long()
    given[torch.arange(3), 9 - torch.tensor(lengths)] = model.config.decoder_start_token_id
    search = dict(max_new_tokens=NEW, do_sample=False)
    together = model.generate(
        ids, attention_mask=mask, decoder_input_ids=given, decoder_attention_mask=decoder_mask, **search
    )
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = model.generate(ids[one], attention_mask=mask[one], decoder_input_ids=given[one, 9 - length :], **search)
        assert torch.equal(together[one, -NEW:], alone[:, -NEW:])


def test_reordering_costs_no_copy_and_adds_up():
    """Two reorders before a step are one permutation; the state itself stays where it is."""
    model = generator("lightweight")
    cache = decoder_cache(model.config)
    states = torch.randn(4, 6, 32)
    tokens = text(4, 9)
    with torch.no_grad():
        run = lambda ids, cache: model.model.decoder(ids, None, states, None, cache).last_hidden_state  # noqa: E731
        for t in range(8):
            run(tokens[:, t : t + 1], cache)
        other = copy.deepcopy(cache)
        layer = cache.self_attention_cache.layers[0]
        where = layer.state.data_ptr()
        first, second = torch.tensor([1, 1, 3, 0]), torch.tensor([2, 0, 0, 3])
        cache.reorder_cache(first)
        cache.reorder_cache(second)
        assert layer.state.data_ptr() == where
        other.batch_select_indices(first[second])
        torch.testing.assert_close(run(tokens[:, 8:], cache), run(tokens[:, 8:], other))
        other.batch_repeat_interleave(2)
        assert other.self_attention_cache.layers[0].state.shape[0] == 8
    assert cache.get_seq_length() == 9
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.state is None


def test_a_cache_is_kept_only_to_go_on():
    model, ids = generator(), text(2, 9)
    assert model(ids, None, ids).past_key_values.get_seq_length() == 9
    assert model(ids, None, ids, use_cache=False).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None
    assert model.train()(ids, None, ids).past_key_values is None


def test_labels_become_the_input_of_the_decoder():
    model, ids, labels = generator(), text(2, 9), text(2, 6, skip=2)
    labels[0, 4:] = -100
    given = torch.cat([torch.zeros(2, 1, dtype=torch.int64), labels[:, :-1].clamp(min=0)], 1)
    logits = model(ids, None, given).logits
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_the_cache_of_a_convolution_keeps_its_size():
    for mixer, kind in (("dynamic", ConvState), ("transformer", DynamicLayer)):
        cache = decoder_cache(ConvSeq2SeqConfig.preset(mixer, "tiny"))
        assert all(type(layer) is kind for layer in cache.self_attention_cache.layers)
    model, (ids, mask) = DECODERS["dilated"](), prompt()
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, return_dict_in_generate=True)
    assert generated.past_key_values.get_seq_length() == NEW
    layers = generated.past_key_values.self_attention_cache.layers
    assert [layer.state.shape[1] for layer in layers] == [(4 - 1) * 3, (7 - 1) * 2]
    assert all(layer.length == NEW for layer in layers)
    with pytest.raises(NotImplementedError, match="what came before"):
        layers[0].crop(1)
    with pytest.raises(ValueError, match="'cache_implementation': expected None or 'dynamic', got 'static'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
