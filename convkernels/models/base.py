"""What the models of this package are to transformers."""

from dataclasses import fields

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqModelOutput

from ..ops._validate import fail

# The name of the cache in outputs and in what ``generate`` passes on: "cache" from transformers 5.24 on, before it
# "past_key_values". As arguments the models take both.
CACHE = next(field.name for field in fields(Seq2SeqModelOutput) if field.name in ("cache", "past_key_values"))


class PreTrained(PreTrainedModel):
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers calls ``_init_weights`` for modules without parameters of their own, too: it
        writes only to parameters that have not been loaded."""
        return False


def one_cache(call: str, past_key_values, cache):
    """The cache, which is given under one name."""
    if past_key_values is not None and cache is not None:
        fail(call, "cache", "None beside past_key_values, which is another name of it", type(cache).__name__)
    return past_key_values if cache is None else cache


def embedded(call: str, embedding: nn.Module, ids: Tensor | None, embeds: Tensor | None, prefix: str = "") -> Tensor:
    """What a stack takes in, [B,T,C]: ``embeds``, or ``ids`` through ``embedding``."""
    if (ids is None) == (embeds is None):
        got = "neither" if ids is None else "both"
        fail(call, f"{prefix}input_ids", f"either {prefix}input_ids or {prefix}inputs_embeds", got)
    return embedding(ids) if embeds is None else embeds


def recorders(config, hidden_states: bool | None, attentions: bool | None) -> tuple[list | None, list | None]:
    """Lists for the hidden states and for the attention weights where the call or else the configuration asks."""
    asked = (
        (hidden_states, config.output_hidden_states),
        (attentions, config.output_attentions),
    )
    return tuple([] if (default if given is None else given) else None for given, default in asked)


def recorded(values: list | None) -> tuple | None:
    """What has been recorded, None if there is nothing."""
    return tuple(values) if values else None
