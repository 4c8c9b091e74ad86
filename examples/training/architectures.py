"""Tokenizers, and configurations of the models that the scripts train, from names."""

import math
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from convkernels.models import CompositeBertConfig, ConvSeq2SeqConfig

from .files import first_line, json_object


def loaded(option: str, name: str, load: Callable, **more):
    """What is loaded from the folder or Hub name that an option gives; ValueError of one line for what cannot be."""
    try:
        return load(name, **more)
    except (OSError, ValueError, SafetensorError) as error:
        which = "" if Path(name).exists() else "there is no such folder, and of the Hub: "
        raise ValueError(f"{option} {name}: {which}{first_line(error)}") from None


def tokenizer(name: str, family: str, option: str = "--tokenizer") -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the Hub, which an option names. ValueError if it does not mark texts as models of
    the family, "seq2seq" or "bert", expect it."""
    found = loaded(option, name, AutoTokenizer.from_pretrained)
    ids = found("a").input_ids
    marked = ids[-1:] == [found.eos_token_id] if family == "seq2seq" else ids[:1] == [found.cls_token_id]
    if not marked or found.pad_token_id is None:
        form = "text </s>" if family == "seq2seq" else "[CLS] text [SEP]"
        raise ValueError(
            f"{option} {name}: expected one that makes {form!r} and has a token for padding, as one of "
            f"train_tokenizer.py --kind {family}; got one that makes {found.decode(ids)!r}"
        )
    return found


def fields(text: str | None, kind: type[PreTrainedConfig]) -> dict:
    """Fields of a configuration, given as JSON. ValueError for what it does not have."""
    found = json_object(text, "--config") if text else {}
    known = {*kind().to_dict(), *kind.attribute_map}
    unknown = sorted(found.keys() - known)
    if unknown:
        raise ValueError(f"--config: expected fields of {kind.__name__}, got {', '.join(unknown)}")
    return found


def seq2seq(mixer: str, size: str, style: str, tokenizer: PreTrainedTokenizerBase, **changes) -> ConvSeq2SeqConfig:
    """``ConvSeq2SeqConfig.preset`` with the tokenizer's vocabulary and special tokens."""
    pad = tokenizer.pad_token_id
    tokens = dict(
        vocab_size=len(tokenizer), pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=pad
    )
    config = ConvSeq2SeqConfig.preset(mixer, size, style, **(tokens | changes))
    check_size(config, tokenizer, "--config")
    return config


def bert(variant: str, size: str, tokenizer: PreTrainedTokenizerBase, **changes) -> CompositeBertConfig:
    """``CompositeBertConfig.preset`` with the tokenizer's vocabulary and padding."""
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config = CompositeBertConfig.preset(variant, size, **(tokens | changes))
    check_size(config, tokenizer, "--config")
    return config


def fitting(option: str, length: int | None, config: PreTrainedConfig, default: int = 0) -> int:
    """The length that an option gives; without one the default, or as many positions as the model has, if these are
    fewer. ValueError if what is given is more than those."""
    bert = isinstance(config, CompositeBertConfig)
    name = "max_position_embeddings" if bert else "max_positions"
    most = getattr(config, name) if bert or config.positions == "learned" else math.inf
    if length is None:
        return min(default, most)
    if length > most:
        raise ValueError(f"{option}: expected at most the {name} of the model, {most}, got {length}")
    return length


def check_tokens(tokenizer: PreTrainedTokenizerBase, name: str, model: str) -> None:
    """ValueError if --tokenizer names one with other tokens than that in the folder of --model, if there is one."""
    try:
        own = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--tokenizer {name}: expected the tokens of --model {model}, got others")


def check_size(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """ValueError naming an option if the tokenizer has more tokens than the vocabulary."""
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"{option}: expected a vocabulary of at least the tokenizer's {len(tokenizer)} tokens, got one of "
            f"{config.vocab_size}"
        )
