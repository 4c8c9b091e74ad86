"""Models of this package with the weights of a T5, BERT or ConvBERT of transformers."""

import copy

from torch import Tensor
from transformers import PreTrainedModel

from ...models import (
    CompositeBertConfig,
    CompositeBertForMaskedLM,
    CompositeBertForSequenceClassification,
    CompositeBertModel,
    ConvSeq2SeqConfig,
    ConvSeq2SeqForConditionalGeneration,
)
from ...ops._validate import fail

_BERTS = {
    "BertModel": CompositeBertModel,
    "BertForMaskedLM": CompositeBertForMaskedLM,
    "BertForSequenceClassification": CompositeBertForSequenceClassification,
    "ConvBertModel": CompositeBertModel,
    "ConvBertForMaskedLM": CompositeBertForMaskedLM,
}


def convert(model: PreTrainedModel, **changes) -> PreTrainedModel:
    """A model of this package with the weights of a Hugging Face one, which computes the same.

    T5ForConditionalGeneration becomes ``ConvSeq2SeqForConditionalGeneration`` with the transformer mixer; BertModel,
    BertForMaskedLM and BertForSequenceClassification, ConvBertModel and ConvBertForMaskedLM become their
    ``CompositeBert`` namesakes. changes: fields of the configuration to set otherwise. ValueError for another model.
    """
    name = type(model).__name__
    if name == "T5ForConditionalGeneration":
        made, state = ConvSeq2SeqForConditionalGeneration(_t5_config(model.config, changes)), _t5_state(model)
    elif name in _BERTS:
        convolutional = name.startswith("ConvBert")
        config = _bert_config(model.config, convolutional, changes)
        more = {"add_pooling_layer": True} if name == "BertModel" and model.pooler is not None else {}
        made = _BERTS[name](config, **more)
        state = convbert_names(model.state_dict()) if convolutional else model.state_dict()
    else:
        fail("convert", "model", f"T5ForConditionalGeneration or one of {tuple(_BERTS)}", name)
    made = made.to(model.dtype)
    made.load_state_dict(state, strict=True)
    if made.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).train(model.training)


def _common(source, changes: dict) -> dict:
    """The fields that all configurations have and that change what a model computes or returns."""
    fields = ["problem_type", "bos_token_id", "return_dict", "output_hidden_states", "use_cache"]
    if "num_labels" not in changes:
        fields += ["id2label", "label2id"]
    return {name: getattr(source, name) for name in fields if hasattr(source, name)}


def _t5_config(source, changes: dict) -> ConvSeq2SeqConfig:
    if source.feed_forward_proj not in ("relu", "gated-gelu"):
        fail("convert", "feed_forward_proj", "'relu' or 'gated-gelu'", repr(source.feed_forward_proj))
    options = dict(
        mixer="transformer", vocab_size=source.vocab_size, d_model=source.d_model, d_ff=source.d_ff,
        num_heads=source.num_heads, head_dim=source.d_kv, encoder_layers=source.num_layers,
        decoder_layers=source.num_decoder_layers, norm_eps=source.layer_norm_epsilon, norm_placement="pre",
        feed_forward=source.feed_forward_proj, relative_buckets=source.relative_attention_num_buckets,
        relative_max_distance=source.relative_attention_max_distance, dropout=source.dropout_rate,
        attention_dropout=source.dropout_rate, activation_dropout=source.dropout_rate,
        scale_output=source.scale_decoder_outputs, tie_word_embeddings=source.tie_word_embeddings,
        pad_token_id=source.pad_token_id, eos_token_id=source.eos_token_id,
        initializer_factor=source.initializer_factor,
        decoder_start_token_id=0 if source.decoder_start_token_id is None else source.decoder_start_token_id,
    )  # fmt: skip
    return ConvSeq2SeqConfig(**(_common(source, changes) | options | changes))


_T5_BLOCK = {
    "SelfAttention": "mixer",
    "EncDecAttention": "cross_attention",
    "DenseReluDense": "feed_forward",
}


def _t5_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = {"model.shared.weight": model.shared.weight, "lm_head.weight": model.lm_head.weight}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] not in ("encoder", "decoder") or parts[1] == "embed_tokens":
            continue
        if parts[1] == "final_layer_norm":
            state[f"model.{parts[0]}.norm.weight"] = value
            continue
        stack, layer, part, leaf = parts[0], parts[2], parts[4], ".".join(parts[5:])
        if leaf == "relative_attention_bias.weight" or parts[6:7] == ["relative_attention_bias"]:
            state[f"model.{stack}.relative_bias.weight"] = value
        elif parts[5] == "layer_norm":
            inside = ("mixer", "cross_attention", "feed_forward") if stack == "decoder" else ("mixer", "feed_forward")
            state[f"model.{stack}.layers.{layer}.{inside[int(part)]}_norm.weight"] = value
        else:
            inner = {"wi_0": "wi", "wi_1": "gate"}.get(parts[6], parts[6])
            state[f"model.{stack}.layers.{layer}.{_T5_BLOCK[parts[5]]}.{inner}.weight"] = value
    return state


def _bert_config(source, convolutional: bool, changes: dict) -> CompositeBertConfig:
    if getattr(source, "is_decoder", False):
        fail("convert", "is_decoder", "False", True)
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob", "classifier_dropout",
        "attention_probs_dropout_prob", "initializer_range", "pad_token_id", "eos_token_id", "tie_word_embeddings",
    )  # fmt: skip
    fields = _common(source, changes) | {name: getattr(source, name) for name in same}
    attention = {}
    if convolutional:
        for name, expected in (("head_ratio", 2), ("num_groups", 1)):
            if getattr(source, name) != expected:
                fail("convert", name, str(expected), getattr(source, name))
        attention = dict(span="output", span_kernel_size=source.conv_kernel_size)
    fields |= dict(
        embedding_size=getattr(source, "embedding_size", source.hidden_size),
        absolute_positions=True,
        attention=attention,
    )
    return CompositeBertConfig(**(fields | changes))


_CONVBERT = {
    "key_conv_attn_layer.depthwise": "span.depthwise",
    "key_conv_attn_layer.pointwise": "span.pointwise",
    "key_conv_attn_layer": "span.pointwise",  # its bias
    "conv_kernel_layer": "span.kernel",
    "conv_out_layer": "span.value",
    "generator_predictions": "cls.predictions.transform",
    "generator_lm_head": "cls.predictions.decoder",
}


def convbert_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a ConvBertSelfAttention, or of a model of them, under the names they have here."""
    state = {}
    for name, value in theirs.items():
        old = next((old for old in _CONVBERT if old in name), None)
        if old is not None:
            name = name.replace(old, _CONVBERT[old])
        if "span.pointwise." in name:
            value = value.squeeze(-1)
        state["bert." + name.removeprefix("convbert.") if name.startswith("convbert.") else name] = value
    if "cls.predictions.decoder.bias" in state:
        state["cls.predictions.bias"] = state["cls.predictions.decoder.bias"]
    return state
