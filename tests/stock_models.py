"""Small models of transformers itself with random parameters, and inputs with padding for them."""

import torch
import transformers
from modelling import near, prompt


def stirred(made, config):
    """A model of transformers with random parameters, norms and biases too."""
    torch.manual_seed(1)
    model = made(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def t5(**changes):
    options = dict(vocab_size=256, d_model=32, d_kv=12, d_ff=64, num_layers=2, num_heads=3, decoder_start_token_id=0)
    return stirred(transformers.T5ForConditionalGeneration, transformers.T5Config(**(options | changes)))


def _small(made, **options):
    made = getattr(transformers, made)
    sizes = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return stirred(made, made.config_class(**(sizes | options)))


def bert(made="BertForMaskedLM", **changes):
    return _small(made, **(dict(max_position_embeddings=64) | changes))


def llama(made="LlamaForCausalLM", **changes):
    return _small(made, **(dict(num_key_value_heads=2) | changes))


def with_sinks(made="GptOssForCausalLM", **changes):
    """Layers with and without a sliding window, and attention sinks."""
    experts = dict(num_local_experts=2, num_experts_per_tok=1)
    types = dict(head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    known = getattr(transformers, made).config_class().to_dict()
    options = {name: value for name, value in (types | experts | changes).items() if name in known}
    return llama(made, **options)


REGISTERED = {
    "bert": bert,
    "roberta": lambda: bert("RobertaForMaskedLM"),
    "t5": t5,
    "llama": llama,
    "mistral": lambda: llama("MistralForCausalLM", sliding_window=5),
    "gpt_oss": with_sinks,
}


def inputs():
    return dict(zip(("input_ids", "attention_mask"), prompt(), strict=True))


def equal_where_real(actual, expected, mask, tolerance=1e-5):
    """``near``, but for padding."""
    near(actual[mask.bool()], expected[mask.bool()], tolerance)
