"""The base class of the models, the checks of their inputs, and the names that transformers gives the cache."""

from dataclasses import fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqModelOutput

from ..ops._validate import FLOATS, fail, tensor

# The name of the cache in outputs and in what ``generate`` passes on: "cache" from transformers 5.24 on, before it
# "past_key_values". As arguments the models take both.
CACHE = next(field.name for field in fields(Seq2SeqModelOutput) if field.name in ("cache", "past_key_values"))

_INDICES = (torch.int64, torch.int32)
_INTEGERS = (*_INDICES, torch.int16, torch.int8, torch.uint8)
# What an input holds, by the last word of its name.
_CONTENTS = {
    "ids": ("int64 or int32", _INDICES),
    "labels": ("integers", _INTEGERS),
    "positions": ("integers", _INTEGERS),
    "mask": ("real numbers or bool", (torch.bool, *_INTEGERS, *FLOATS)),
    **dict.fromkeys(("embeds", "states", "outputs"), ("floats", FLOATS)),
}


class PreTrained(PreTrainedModel):
    """A model of this package among those of transformers."""

    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers calls ``_init_weights`` for modules without parameters of their own, too: it
        writes only to parameters that have not been loaded."""
        return False


def one_cache(call: str, past_key_values, cache):
    """The cache, from the one of its two arguments that is given."""
    if past_key_values is not None and cache is not None:
        fail(call, "cache", "None beside past_key_values, which is another name of it", type(cache).__name__)
    return past_key_values if cache is None else cache


def check_input(call: str, sizes: dict[str, int], shapes: str, argument: str, value) -> None:
    """Check that an input is None, or a tensor of one of the ``shapes``, such as "BT or 1T", and of a dtype that fits
    the last word of its name.

    A letter is the same number in all inputs of a call: ``sizes`` has those that are known, and takes in those that the
    first of the ``shapes`` adds. Values are not read, so that this can be compiled and exported.
    """
    if value is None:
        return
    tensor(call, argument, value)
    content, dtypes = _CONTENTS[argument.rpartition("_")[2]]
    if value.dtype not in dtypes:
        fail(call, argument, f"a tensor of {content}", value, TypeError)
    choices = shapes.split(" or ")
    if value.dim() == len(choices[0]):
        for letter, size in zip(choices[0], value.shape, strict=True):
            sizes.setdefault(letter, size)
    wanted = [[1 if letter == "1" else sizes.get(letter, letter) for letter in choice] for choice in choices]
    if not any(_equal(value.shape, want) for want in wanted):
        named = [
            f"[{','.join(choice)}] = [{', '.join(map(str, want))}]"
            for choice, want in zip(choices, wanted, strict=True)
        ]
        past = f", {sizes['P']} columns of them for what the cache holds" if "P" in sizes and "L" in shapes else ""
        fail(call, argument, f"shape {' or '.join(named)}{past}", value)


def _equal(shape: torch.Size, wanted: list) -> bool:
    return len(shape) == len(wanted) and all(size == want for size, want in zip(shape, wanted, strict=True))


def check_sequence(
    call: str,
    sizes: dict[str, int],
    T: str,
    ids,
    embeds,
    mask=None,
    position_ids=None,
    prefix: str = "",
    past: int = 0,
) -> None:
    """Check the inputs that describe one sequence, whose length has the letter ``T``: token ids or embeddings [B,T,C],
    and where they are given the mask [B, past + T] and the position ids, [B,T] or one row for all."""
    if (ids is None) == (embeds is None):
        got = "neither" if ids is None else "both"
        fail(call, f"{prefix}input_ids", f"either {prefix}input_ids or {prefix}inputs_embeds", got)
    check_input(call, sizes, f"B{T}", f"{prefix}input_ids", ids)
    check_input(call, sizes, f"B{T}C", f"{prefix}inputs_embeds", embeds)
    if past:
        sizes.update(P=past, L=past + sizes[T])
    check_input(call, sizes, "BL" if past else f"B{T}", f"{prefix}attention_mask", mask)
    check_input(call, sizes, f"B{T} or 1{T}", f"{prefix}position_ids", position_ids)


def embedded(embedding: nn.Module, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    """The input of a stack, [B,T,C]: ``embeds``, or ``ids`` through ``embedding``."""
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
