"""Hugging Face transformers: this package's attention in its models, and its models' weights in this package's.

``register`` makes ``attn_implementation="convkernels"`` known; ``replace_attention`` swaps the self-attention modules
of a model in place; ``convert`` makes a model of this package from a T5, BERT or ConvBERT.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from numbers import Integral

import torch
from torch import Tensor, nn

from ..models import needs_transformers

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sliding_window_causal_mask_function,
        sliding_window_overlay,
    )
except ModuleNotFoundError as error:
    needs_transformers(__name__, error)

from ..models import (
    CompositeBertConfig,
    CompositeBertForMaskedLM,
    CompositeBertForSequenceClassification,
    CompositeBertModel,
    ConvSeq2SeqConfig,
    ConvSeq2SeqForConditionalGeneration,
)
from ..models.base import PreTrained
from ..nn import CompositeAttention, DynamicConv1d, LightweightConv1d
from ..ops._validate import fail
from ..ops.attention.api import composite_attention

NAME = "convkernels"
_CALL = f"attn_implementation={NAME!r}"
# Models whose position_bias is a function of the distance alone.
_RELATIVE = ("t5", "mt5", "umt5")
# Models whose attention is transformers' interface in one part alone, or with a mask that they make themselves.
_MIXED = ("bigbird_pegasus", "layoutlm", "markuplm")
# Models of BERT's form whose attention is not softmax(QK^T)V, or has more than a padding mask for an input.
_UNLIKE = ("Mra", "Nystromformer", "Yoso", "BigBirdPegasus", "Git", "LayoutLM", "MarkupLM", "RoFormer")
# Arguments of transformers' attention functions that change results, and that composite_attention does not have.
_UNKNOWN = (
    "softcap", "s_aux", "sinks", "indices", "block_indices", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "head_mask",
    "output_attentions",
)  # fmt: skip
# What replace_attention puts in, and the arguments of these that the replaced module decides.
_KINDS = {"composite": CompositeAttention, "lightweight": LightweightConv1d, "dynamic": DynamicConv1d}
_DECIDED = (
    "channels", "heads", "kernel_size", "query_size", "causal", "dropout", "padding", "weight_dropout", "device",
    "dtype",
)  # fmt: skip
# Arguments that reach self-attention modules of transformers and change nothing there.
_HARMLESS = ("num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids", "use_cache")


_registered: set[str] = set()


def register(name: str = NAME) -> None:
    """Make this package's attention known to transformers, as ``attn_implementation=name``.

    Models then call ``composite_attention``: padding and causality without a mask of T x T, sliding windows, shared
    key heads, T5's relative bias. Models that compute their attention themselves refuse the name: ValueError. Calling
    it again does no harm.
    """
    if not _registered:
        method = "get_correct_attn_implementation"
        setattr(PreTrainedModel, method, _checking(getattr(PreTrainedModel, method)))
    _registered.add(name)
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, padding_mask)


def _checking(original: Callable) -> Callable:
    """transformers lets every model have an implementation that was registered, also those that never call it and add
    the mask made for it to their scores."""

    @functools.wraps(original)
    def checked(model: PreTrainedModel, requested_attention: str | None, *args, **options) -> str:
        if requested_attention in _registered and not _calls_interface(type(model)):
            expected = "'eager', because the model computes its attention itself (replace_attention may change that)"
            fail(type(model).__name__, "attn_implementation", expected, repr(requested_attention))
        return original(model, requested_attention, *args, **options)

    return checked


def _calls_interface(made: type[PreTrainedModel]) -> bool:
    """Whether a model calls the attention it is told to, as it says itself or as transformers finds in its source."""
    if made._supports_attention_backend or issubclass(made, PreTrained):
        return True
    if getattr(made.config_class, "model_type", None) in _MIXED:
        return False
    bases = (base for base in made.__mro__ if issubclass(base, PreTrainedModel) and base is not PreTrainedModel)
    return all(base._can_set_attn_implementation() for base in bases)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    device=None,
    **unused,
) -> Tensor | None:
    """transformers' mask for this attention: bool [B,S], or None where nothing hides a key from any query.

    A causal one ends at the last query: a static cache has keys beyond that, and ``attention_mask`` may have columns.
    ``attention_forward`` goes by its attributes ``causal``, ``sliding_window`` and ``full``, which is whether it is
    True everywhere. NotImplementedError for what a mask can say beyond that: packed sequences, chunks, windows to both
    sides, masks of a model's own.
    """
    causal, window = mask_function is not bidirectional_mask_function, None
    if causal and mask_function is not causal_mask_function:
        window = _sliding_window(mask_function)
    end = int(q_offset) + q_length if causal else kv_offset + kv_length
    if attention_mask is None:
        if not causal:
            return None
        mask = torch.ones(batch_size, end - kv_offset, dtype=torch.bool, device=device)
    elif hasattr(attention_mask, "causal"):  # made here before, as generate does for a static cache
        return attention_mask
    else:
        width = attention_mask.shape[-1]
        if attention_mask.dim() != 2 or (causal and width < end):
            fail(_CALL, "attention_mask", f"shape [B,S] with a column for each of {end} keys", attention_mask)
        mask = torch.nn.functional.pad(attention_mask.bool(), (0, max(end - width, 0)))[:, kv_offset:end].contiguous()
    mask.causal, mask.sliding_window, mask.full = causal, window, attention_mask is None
    return mask


def _sliding_window(mask_function) -> int:
    """The size of transformers' sliding window under a causal mask; an error for any other function."""
    overlay = sliding_window_overlay(1).__qualname__
    if getattr(mask_function, "__qualname__", "") == sliding_window_causal_mask_function(1).__qualname__:
        parts = mask_function.__closure__[0].cell_contents
        if len(parts) == 2 and parts[0].__qualname__ == overlay and parts[1] is causal_mask_function:
            return parts[0].__closure__[0].cell_contents
    expected = "the causal or bidirectional one or a causal sliding window (use 'sdpa' for this model)"
    fail(_CALL, "mask_function", expected, mask_function, NotImplementedError)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B,H,T,D], key and value [B,G,S,D] -> [B,T,H,D], and no weights.

    attention_mask: bool [B,S] as made by ``padding_mask``, which decides whether the attention is causal and has a
    sliding window; without it the other arguments and the module do. NotImplementedError for what
    ``composite_attention`` does not do: soft caps, attention sinks, packed sequences, weights as an output, a
    position_bias that is not T5's.
    """
    unknown = {name: value for name, value in kwargs.items() if name in _UNKNOWN}
    _refuse(_CALL, unknown, " (attn_implementation='eager' may)")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)  # as transformers has it
    if attention_mask is not None:
        _check_mask(attention_mask)
        causal = getattr(attention_mask, "causal", causal)
        sliding_window = getattr(attention_mask, "sliding_window", sliding_window)
        if causal:  # a static cache is longer than what has been written to it
            k, v = k[:, : attention_mask.shape[1]], v[:, : attention_mask.shape[1]]
        expected = [k.shape[0], k.shape[1]]
        if list(attention_mask.shape) != expected:
            fail(_CALL, "attention_mask", f"shape [B,S] = {expected}, a column for each key", attention_mask)
        if getattr(attention_mask, "full", False):
            attention_mask = None
    T, S = q.shape[1], k.shape[1]
    options = {}
    if position_bias is not None:
        options = dict(bias=_by_distance(module, position_bias[..., :S]), window=(S - 1, T - 1))
    if sliding_window is not None:
        if options:
            fail(_CALL, "sliding_window", "None, because of position_bias", sliding_window, NotImplementedError)
        options = dict(window=(sliding_window - 1, 0), outside="mask")
    y = composite_attention(
        q,
        k,
        v,
        causal=causal,
        key_mask=attention_mask,
        scale=scaling,
        dropout=dropout,
        training=dropout > 0.0,
        **options,
    )
    return y, None


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 2 or mask.dtype != torch.bool:
        fail(_CALL, "attention_mask", "a bool tensor [B,S], the padding (for a mask of more: 'eager')", mask)


def _by_distance(module: nn.Module, bias: Tensor) -> Tensor:
    """A bias [1,H,T,S] that depends on the distance alone, as a table [H, S-1 + 1 + T-1]. The last query has the
    distances from -(S-1) to 0, the first one those from T-S to T-1; with T > S the first key has those between."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind not in _RELATIVE or bias.shape[0] != 1:
        fail(_CALL, "position_bias", f"that of one of {_RELATIVE}", f"that of {kind}", NotImplementedError)
    T, S = bias.shape[2:]
    between = bias[0, :, 1 : T - S, 0].flip(1) if T > S else bias[0, :, 0, :0]
    return torch.cat([bias[0, :, -1], between, bias[0, :, 0, max(S - T + 1, 0) :]], 1)


class _CompositeSelfAttention(nn.Module):
    """``CompositeAttention`` in the place of a BERT-like self-attention module."""

    def __init__(self, old: nn.Module, **options):
        super().__init__()
        linear = old.query
        self.attention = CompositeAttention(
            linear.in_features, old.num_attention_heads, dropout=_dropout(old), causal=_causal(old),
            device=linear.weight.device, dtype=linear.weight.dtype, **options,
        )  # fmt: skip
        with torch.no_grad():
            for name in ("query", "key", "value"):
                _take_over(self.attention, name, getattr(old, name))
            # The new terms start at zero, so that the model computes what it did.
            new = self.attention
            for parameter in (new.convfixed_param, new.convq_param, new.convk_param):
                if parameter is not None:
                    parameter.zero_()
            if new.convolution is not None:
                new.convolution.weight.zero_()
                new.convolution.bias.zero_()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *more, **options):
        _check_call(attention_mask, more, options)
        return self.attention(hidden_states, attention_mask), None


class _ConvSelfAttention(nn.Module):
    """A gated convolution in the place of a BERT-like self-attention module: conv(value(x) * sigmoid(gate(x)))."""

    def __init__(self, old: nn.Module, kind: str, kernel_size: int | None, filters: int | None, **options):
        super().__init__()
        channels = old.value.in_features
        placed = dict(device=old.value.weight.device, dtype=old.value.weight.dtype)
        self.value = old.value
        self.gate = nn.Linear(channels, channels, **placed)
        size = 7 if kernel_size is None else kernel_size
        filters = old.num_attention_heads if filters is None else filters
        padding = "causal" if _causal(old) else "same"
        self.conv = _KINDS[kind](
            channels, size, filters, padding=padding, weight_dropout=_dropout(old), **placed, **options,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *more, **options):
        _check_call(attention_mask, more, options)
        return self.conv(self.value(hidden_states), attention_mask, gate=self.gate(hidden_states)), None


def _check_call(attention_mask, more: tuple, options: dict) -> None:
    """What a model gives its self-attention beside the states; caches go by "cache" or "past_key_values"."""
    if attention_mask is not None:
        _check_mask(attention_mask)
    given = {f"number {number}": value for number, value in enumerate(more, 3)}
    _refuse("replace_attention", given | {name: options[name] for name in options if name not in _HARMLESS})


def _refuse(function: str, arguments: dict, instead: str = "") -> None:
    """NotImplementedError for an argument that asks for something; None and False do not. instead: what has it."""
    for argument, value in arguments.items():
        if value is not None and value is not False:
            shown = value if isinstance(value, Tensor | bool | int | float | str) else f"a {type(value).__name__}"
            expected = f"None, because the attention here has no such thing{instead}"
            fail(function, argument, expected, shown, NotImplementedError)


def _dropout(old: nn.Module) -> float:
    return float(getattr(getattr(old, "dropout", None), "p", 0.0))


def _causal(old: nn.Module) -> bool:
    return bool(getattr(old, "is_causal", False))


def _take_over(new: CompositeAttention, name: str, old: nn.Linear) -> None:
    """The old linear map where the new module has one, as a whole or for the second half of the heads."""
    linear = getattr(new, name, None) or getattr(new, f"{name}_linear", None)
    if linear is not None:
        rows = linear.out_features
        linear.weight.copy_(old.weight[-rows:])
        if old.bias is None:
            linear.bias.zero_()
        else:
            linear.bias.copy_(old.bias[-rows:])


def _self_attention(model: nn.Module) -> list[str]:
    """Names of the self-attention modules of BERT and its relatives."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("SelfAttention")
        and not type(module).__name__.startswith(_UNLIKE)
        and ".crossattention." not in name  # of the same type in some models
        and all(isinstance(getattr(module, part, None), nn.Linear) for part in ("query", "key", "value"))
        and isinstance(getattr(module, "num_attention_heads", None), int)
        and module.query.in_features == module.query.out_features
        and all(module.query.weight.shape == getattr(module, part).weight.shape for part in ("key", "value"))
        and list(inspect.signature(module.forward).parameters)[:2] == ["hidden_states", "attention_mask"]
    ]


def _layers(layers: Iterable[int] | None, count: int) -> list[int]:
    """Those to replace, each once."""
    if layers is None:
        return list(range(count))
    try:
        given = list(layers)
    except TypeError:
        given = [None]
    if any(not isinstance(layer, Integral) or isinstance(layer, bool) or not 0 <= layer < count for layer in given):
        fail("replace_attention", "layers", f"numbers from 0 to {count - 1}", layers)
    if len(set(given)) < len(given):
        fail("replace_attention", "layers", "each layer once", given)
    return given


def replace_attention(
    model: PreTrainedModel,
    kind: str = "composite",
    *,
    layers: Iterable[int] | None = None,
    kernel_size: int | None = None,
    filters: int | None = None,
    **options,
) -> PreTrainedModel:
    """Swap the self-attention modules of a BERT, RoBERTa, ELECTRA or another model with modules of that form, in place.

    kind: "composite": ``nn.CompositeAttention`` with ``options`` as its arguments (window, bias, query_rel, key_rel,
        value_conv, query_key, value, ...). It takes over queries, keys and values, and its new terms start at zero, so
        unless ``query_key`` or ``value`` changes the projections the model computes what it did until it is trained.
        "lightweight", "dynamic": a gated convolution of ``kernel_size`` taps (by default 7) with ``filters`` filters
        (by default as many as heads), whose input is the old value map; ``options`` are arguments of the convolution.
    layers: which ones, counted from 0; by default all.

    The model's attention implementation becomes "convkernels", so that the new modules are given the padding mask as
    it is. Returns the model. To load such a model from a checkpoint make it again in this way and use load_state_dict.
    ValueError if there is nothing to replace.
    """
    if not isinstance(model, PreTrainedModel):
        expected = "a transformers.PreTrainedModel, as it is before it is compiled or given adapters"
        fail("replace_attention", "model", expected, type(model).__name__, TypeError)
    if kind not in tuple(_KINDS):
        fail("replace_attention", "kind", "'composite', 'lightweight' or 'dynamic'", repr(kind))
    if kind == "composite":
        for argument, value in (("kernel_size", kernel_size), ("filters", filters)):
            if value is not None:
                fail("replace_attention", argument, "None, because kind='composite' has none (see window)", value)
    allowed = [name for name in inspect.signature(_KINDS[kind]).parameters if name not in _DECIDED]
    for name in options:
        if name not in allowed:
            fail("replace_attention", name, f"an argument of kind={kind!r}: {', '.join(allowed)}", name, TypeError)
    found = _self_attention(model)
    if not found:
        expected = "self-attention of hidden_states and attention_mask, with maps query, key and value of equal sizes"
        fail("replace_attention", "model", expected, type(model).__name__)
    wanted = _layers(layers, len(found))
    whole = not _calls_interface(type(model))
    if whole and len(wanted) < len(found):
        expected = "None, because the other layers of this model cannot read the padding mask"
        fail("replace_attention", "layers", expected, wanted)
    new = {}
    for layer in wanted:
        old = model.get_submodule(found[layer])
        if kind == "composite":
            new[found[layer]] = _CompositeSelfAttention(old, **options)
        else:
            new[found[layer]] = _ConvSelfAttention(old, kind, kernel_size, filters, **options)
        new[found[layer]].train(old.training)
    register()
    for name, module in new.items():
        model.set_submodule(name, module)
    if whole:  # nothing is left that transformers could ask whether it takes the mask
        model.config._attn_implementation_internal = NAME
    else:
        model.set_attn_implementation(NAME)
    return model


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


def _common(theirs, changes: dict) -> dict:
    """The fields that all configurations have and that change what a model computes or returns."""
    fields = ["problem_type", "bos_token_id", "return_dict", "output_hidden_states", "use_cache"]
    if "num_labels" not in changes:
        fields += ["id2label", "label2id"]
    return {name: getattr(theirs, name) for name in fields if hasattr(theirs, name)}


_BERTS = {
    "BertModel": CompositeBertModel,
    "BertForMaskedLM": CompositeBertForMaskedLM,
    "BertForSequenceClassification": CompositeBertForSequenceClassification,
    "ConvBertModel": CompositeBertModel,
    "ConvBertForMaskedLM": CompositeBertForMaskedLM,
}


def _t5_config(theirs, changes: dict) -> ConvSeq2SeqConfig:
    if theirs.feed_forward_proj not in ("relu", "gated-gelu"):
        fail("convert", "feed_forward_proj", "'relu' or 'gated-gelu'", repr(theirs.feed_forward_proj))
    options = dict(
        mixer="transformer", vocab_size=theirs.vocab_size, d_model=theirs.d_model, d_ff=theirs.d_ff,
        num_heads=theirs.num_heads, head_dim=theirs.d_kv, encoder_layers=theirs.num_layers,
        decoder_layers=theirs.num_decoder_layers, norm_eps=theirs.layer_norm_epsilon, norm_placement="pre",
        feed_forward=theirs.feed_forward_proj, relative_buckets=theirs.relative_attention_num_buckets,
        relative_max_distance=theirs.relative_attention_max_distance, dropout=theirs.dropout_rate,
        attention_dropout=theirs.dropout_rate, activation_dropout=theirs.dropout_rate,
        scale_output=theirs.scale_decoder_outputs, tie_word_embeddings=theirs.tie_word_embeddings,
        pad_token_id=theirs.pad_token_id, eos_token_id=theirs.eos_token_id,
        initializer_factor=theirs.initializer_factor,
        decoder_start_token_id=0 if theirs.decoder_start_token_id is None else theirs.decoder_start_token_id,
    )  # fmt: skip
    return ConvSeq2SeqConfig(**(_common(theirs, changes) | options | changes))


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


def _bert_config(theirs, convolutional: bool, changes: dict) -> CompositeBertConfig:
    if getattr(theirs, "is_decoder", False):
        fail("convert", "is_decoder", "False", True)
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob", "classifier_dropout",
        "attention_probs_dropout_prob", "initializer_range", "pad_token_id", "eos_token_id", "tie_word_embeddings",
    )  # fmt: skip
    fields = _common(theirs, changes) | {name: getattr(theirs, name) for name in same}
    attention = {}
    if convolutional:
        for name, expected in (("head_ratio", 2), ("num_groups", 1)):
            if getattr(theirs, name) != expected:
                fail("convert", name, str(expected), getattr(theirs, name))
        attention = dict(span="output", span_kernel_size=theirs.conv_kernel_size)
    fields |= dict(
        embedding_size=getattr(theirs, "embedding_size", theirs.hidden_size),
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
