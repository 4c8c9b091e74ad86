"""This package's attention as attn_implementation="convkernels" in models of transformers: numbers, gradients, masks,
caches, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
import transformers
from modelling import ragged, text
from stock_models import REGISTERED, bert, equal_where_real, inputs, llama, stirred, with_sinks
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_bidirectional_mask_function

from convkernels.interop import huggingface
from convkernels.models.base import CACHE


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()


@pytest.mark.parametrize("name", REGISTERED)
def test_under_the_attention_interface(name):
    model, given = REGISTERED[name](), inputs()
    mask = given["attention_mask"]
    if name == "t5":
        given["decoder_input_ids"], mask = text(3, 9, skip=3), torch.ones(3, 9)
    results = []
    for implementation in ("eager", "convkernels"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(**given).logits
        logits[mask.bool()].square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (actual, found) = results
    equal_where_real(actual, expected, mask)
    assert found.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        size = max(gradient.abs().max().item(), 1e-2)
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-4 * size, msg=parameter)


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_longer_than_the_encoder(name, padded):
    """Decoders of every length beside an encoder of 3: numbers and gradients of the bias's table too."""
    made = getattr(transformers, f"{name}ForConditionalGeneration")
    config = made.config_class(
        vocab_size=256, d_model=16, d_kv=6, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0
    )
    model, results = stirred(made, config), []
    given = dict(input_ids=text(2, 3), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 1 - padded]]))
    for implementation in ("eager", "convkernels"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = [model(**given, decoder_input_ids=text(2, T, skip=3)).logits for T in (1, 2, 3, 4, 5, 6, 13)]
        torch.cat(logits, 1).square().mean().backward()
        results.append((torch.cat(logits, 1).detach(), {n: p.grad for n, p in model.named_parameters()}))
    (expected, gradients), (actual, found) = results
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    for parameter, gradient in gradients.items():
        size = max(gradient.abs().max().item(), 1e-2)
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-4 * size, msg=parameter)


def test_distances_of_a_bias():
    """Every difference of positions has its own column, whichever of the two sequences is longer."""
    module = torch.nn.Module()
    module.config = transformers.T5Config()
    for T in range(1, 7):
        for S in range(1, 7):
            distance = torch.arange(S) - torch.arange(T)[:, None] + T - S
            terms = huggingface.attention._by_distance(module, distance[None, None].float(), T, S)
            assert terms["bias"].tolist() == [list(range(1 - S, T))] and terms["window"] == (S - 1, T - 1)


def test_compiled_with_a_sliding_window():
    """One graph; what dynamo cannot tell from it is refused."""
    model, given = REGISTERED["mistral"](), inputs()
    model.set_attn_implementation("convkernels")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
    model.config.attention_chunk_size = 4
    torch._dynamo.reset()
    with pytest.raises(Exception, match="argument 'mask_function': expected the causal or bidirectional one"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(**given)


@pytest.mark.parametrize("name", ["t5", "llama", "mistral", "gpt_oss"])
def test_generation_under_the_attention_interface(name):
    """Prompts padded to the left, as generation wants them."""
    model = REGISTERED[name]()
    ids, mask = (value.flip(1) for value in ragged(text(3, 12), [12, 7, 3]))
    search = dict(attention_mask=mask, max_new_tokens=12, num_beams=2, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **search)
    model.set_attn_implementation("convkernels")
    assert torch.equal(model.generate(ids, **search), expected)


def test_a_static_cache_under_the_attention_interface():
    model, ids = llama(), text(2, 6)
    search = dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **search)
    model.set_attn_implementation("convkernels")
    for mask in (None, torch.ones_like(ids)):
        found = model.generate(ids, attention_mask=mask, cache_implementation="static", **search)
        assert torch.equal(found, expected)


CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: transformers.DynamicCache(config=config),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=20),
}
DECODERS = {
    "llama": llama,
    "mistral": REGISTERED["mistral"],
    "gpt_oss": REGISTERED["gpt_oss"],
    "qwen2": lambda: llama("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", DECODERS)
def test_masks_of_any_width(name, kind):
    """As wide as what was written, or wider, or none, at once, in chunks and in steps: column s belongs to key s."""
    model, ids = DECODERS[name](), text(3, 13)
    for sizes in ([13],) if kind == "none" else ([13], [6, 7], [3, 1, 1, 4, 4], [1] * 13):
        for left in (0, 5):
            mask = torch.ones(3, 13, dtype=torch.long)
            mask[1, :left] = mask[2, : 2 * left] = 0
            logits, stock = {}, "sdpa" if model._supports_sdpa else "eager"
            # transformers' own need a cache for a mask that is wider than the input
            for implementation, more in ((stock, 0), ("convkernels", 0), ("convkernels", 7), ("convkernels", None)):
                if more is None and left:
                    continue
                model.set_attn_implementation(implementation)
                cache, parts, end = CACHES[kind](model.config), [], 0
                for size in sizes:
                    end += size
                    given = None if more is None else F.pad(mask, (0, more)) if more else mask[:, :end]
                    with torch.no_grad():
                        out = model(
                            ids[:, end - size : end], attention_mask=given, use_cache=cache is not None,
                            **{CACHE: cache},
                        )  # fmt: skip
                    parts.append(out.logits)
                logits[implementation, more] = torch.cat(parts, 1)[mask.bool()]
            expected = logits.pop((stock, 0))
            for found in logits.values():
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", CACHES)
def test_masks_that_leave_keys_out(kind):
    model, ids = llama(attn_implementation="convkernels"), text(2, 13)
    options = {CACHE: CACHES[kind](model.config), "use_cache": kind != "none"}
    with pytest.raises(ValueError, match="'attention_mask': expected .* each of 13 keys, got bool .* \\[2, 9\\]"):
        model(ids, attention_mask=torch.ones(2, 9), **options)
    if kind != "none":
        model(ids, **options)
        with pytest.raises(ValueError, match="argument 'attention_mask': expected .* for each of 14 keys"):
            model(ids[:, :1], attention_mask=torch.ones(2, 1), **options)
    for mask in (torch.ones(2, 9), torch.ones(2, 20), torch.ones(1, 13)):
        with pytest.raises(ValueError, match="argument 'attention_mask': expected shape .* \\[2, 13\\], a column"):
            bert(attn_implementation="convkernels")(ids, attention_mask=mask)


def test_masks_decide_on_the_window():
    """Phimoe's attention does not pass it on."""
    model, (ids, mask) = llama("PhimoeForCausalLM", sliding_window=5, num_local_experts=2), inputs().values()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("convkernels")
        equal_where_real(model(ids, attention_mask=mask).logits, expected, mask)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Gemma3ForCausalLM"])
def test_a_static_cache_of_windows(name):
    """generate makes the masks for it beforehand."""
    more = {} if name[0] == "M" else dict(head_dim=8, layer_types=["sliding_attention", "full_attention"])
    made = getattr(transformers, name)
    config = made.config_class if name[0] == "M" else transformers.Gemma3TextConfig
    options = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = stirred(made, config(**options, intermediate_size=64, sliding_window=5, eos_token_id=None, **more))
    ids, mask = (value.flip(1) for value in ragged(text(3, 12), [12, 7, 3]))
    search = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **search)
    model.set_attn_implementation("convkernels")
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(ids, cache_implementation=cache, **search), expected)


@pytest.mark.parametrize("name", ["Splinter", "NllbMoe"])
def test_masks_decide_what_is_causal(name):
    """Splinter's attention does not say that it is not, and that of NllbMoe's decoder says wrongly that it is not."""
    ids, mask = ragged(text(3, 12), [12, 7, 3])
    given = dict(input_ids=ids)
    options = dict(vocab_size=256, max_position_embeddings=64)
    if name == "Splinter":
        options |= dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    else:
        sides = [(f"{side}_layers", f"{side}_attention_heads", f"{side}_ffn_dim") for side in ("encoder", "decoder")]
        options |= dict(d_model=32, encoder_sparse_step=0, decoder_sparse_step=0)
        options |= {key: value for side in sides for key, value in zip(side, (2, 4, 64), strict=True)}
        given["decoder_input_ids"] = ids
    made = getattr(transformers, f"{name}Model")
    model = stirred(made, made.config_class(**options))
    for attention_mask in (None, mask):
        results = []
        for implementation in ("eager", "convkernels"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                results.append(model(**given, attention_mask=attention_mask).last_hidden_state)
        equal_where_real(results[1], results[0], mask)


SINKS = [name for name in ("Flint", "GptOss", "GraniteSwa", "GraniteMoeSwa") if hasattr(transformers, f"{name}Model")]


@pytest.mark.parametrize("name", SINKS)
def test_attention_sinks(name):
    """Numbers, and the gradient of the sinks too; tokens with a cache."""
    model, given, results = with_sinks(f"{name}ForCausalLM"), inputs(), []
    for implementation in ("eager", "convkernels"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(**given).logits
        logits[given["attention_mask"].bool()].square().mean().backward()
        sinks = torch.cat([p.grad for n, p in model.named_parameters() if n.endswith("sinks")])
        tokens = model.generate(text(2, 9), max_new_tokens=9, do_sample=False, pad_token_id=0)
        results.append((logits.detach(), sinks, tokens))
    (expected, gradient, tokens), (actual, found, ours) = results
    equal_where_real(actual, expected, given["attention_mask"])
    assert gradient.any() and torch.equal(ours, tokens)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


EAGER = [
    "BigBird", "BigBirdPegasus", "Bloom", "Canine", "ConvBert", "IBert", "LED", "Luke", "MPNet", "MegatronBert", "Mpt",
    "LayoutLM", "MarkupLM", "Nystromformer", "RemBert", "RoFormer",
    *(name for name in ("DeepseekV4",) if hasattr(transformers, f"{name}Model")),
]  # fmt: skip


@pytest.mark.parametrize("name", EAGER)
def test_models_without_the_interface_refuse_it(name):
    """They would add its masks to their scores, or do without."""
    made = getattr(transformers, f"{name}Model")
    sizes = dict(
        vocab_size=256, hidden_size=32, n_embed=32, d_model=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, attention_window=4,
    )  # fmt: skip
    known = made.config_class().to_dict()
    config = made.config_class(**{key: value for key, value in sizes.items() if key in known})
    huggingface.register()  # twice does no harm
    expected = f"{name}Model: argument 'attn_implementation': expected 'eager', because .* got 'convkernels'"
    derived = type(made.__name__, (made,), {"__module__": __name__})  # elsewhere than its attention
    for model in (derived, made):
        with torch.device("meta"), pytest.raises(ValueError, match=expected):
            model._from_config(copy.deepcopy(config), attn_implementation="convkernels")


def test_what_the_interface_refuses():
    q = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    with pytest.raises(NotImplementedError, match="argument 'softcap': expected None, .* got 30.0"):
        huggingface.attention_forward(module, q, q, q, None, softcap=30.0)
    with pytest.raises(ValueError, match=r"argument 'sinks': expected shape \[B,H,T,1\] = \[1, 2, 4, 1\]"):
        huggingface.attention_forward(module, q, q, q, None, sinks=torch.zeros(2))
    for argument in ("indices", "cu_seq_lens_q", "head_mask"):
        with pytest.raises(NotImplementedError, match=f"argument '{argument}': expected None, because"):
            huggingface.attention_forward(module, q, q, q, None, **{argument: torch.zeros(2)})
    with pytest.raises(
        NotImplementedError, match="argument 'output_attentions': expected None, .*'eager' may.*, got True"
    ):
        llama(attn_implementation="convkernels")(text(1, 8), output_attentions=True)
    with pytest.raises(ValueError, match="argument 'attention_mask': expected a bool tensor.* \\[1, 1, 4, 4\\]"):
        huggingface.attention_forward(module, q, q, q, torch.zeros(1, 1, 4, 4))
    with pytest.raises(NotImplementedError, match="argument 'position_bias': expected that of one of"):
        huggingface.attention_forward(module, q, q, q, None, position_bias=torch.zeros(1, 2, 4, 4))
    model = llama(attn_implementation="convkernels")
    ids = text(1, 8)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(NotImplementedError, match="argument 'mask_function': expected the causal"):
        model(ids, position_ids=packed, use_cache=False)
    for mask in (chunked_causal_mask_function(4, torch.zeros(1)), sliding_window_bidirectional_mask_function(4)):
        with pytest.raises(NotImplementedError, match="argument 'mask_function': expected the causal"):
            huggingface.padding_mask(1, 8, 8, mask_function=mask)
