"""Self-attention modules of a transformers model replaced by composite attention or by gated convolutions."""

import inspect
from collections.abc import Iterable
from numbers import Integral

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...nn import CompositeAttention, DynamicConv1d, LightweightConv1d
from ...ops._validate import fail
from .attention import NAME, calls_interface, check_mask, refuse, register

# Models of BERT's form whose attention is not softmax(QK^T)V, or has more than a padding mask for an input.
_UNLIKE = ("Mra", "Nystromformer", "Yoso", "BigBirdPegasus", "Git", "LayoutLM", "MarkupLM", "RoFormer")
# The kinds of replacement, and the arguments of these modules that the replaced module decides.
_KINDS = {"composite": CompositeAttention, "lightweight": LightweightConv1d, "dynamic": DynamicConv1d}
_DECIDED = (
    "channels", "heads", "kernel_size", "query_size", "causal", "dropout", "padding", "weight_dropout", "device",
    "dtype",
)  # fmt: skip
# Arguments that reach self-attention modules of transformers and change nothing there.
_HARMLESS = ("num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids", "use_cache")


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
    """Refuse what a model gives its self-attention beside the states and the padding mask, such as a cache."""
    if attention_mask is not None:
        check_mask(attention_mask)
    given = {f"number {number}": value for number, value in enumerate(more, 3)}
    refuse("replace_attention", given | {name: options[name] for name in options if name not in _HARMLESS})


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
        fail("replace_attention", "layers", f"a list of numbers from 0 to {count - 1}", layers)
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
    whole = not calls_interface(type(model))
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
