"""Configurations of the models that the scripts train, from names and a tokenizer."""

from transformers import PreTrainedTokenizerBase

from convkernels.models import CompositeBertConfig, ConvSeq2SeqConfig

from .files import json_object


def fields(text: str | None) -> dict:
    """Fields of a configuration, given as JSON."""
    return json_object(text, "--config") if text else {}


def seq2seq(mixer: str, size: str, style: str, tokenizer: PreTrainedTokenizerBase, **changes) -> ConvSeq2SeqConfig:
    """``ConvSeq2SeqConfig.preset`` with the tokenizer's vocabulary and special tokens."""
    pad = tokenizer.pad_token_id
    tokens = dict(
        vocab_size=len(tokenizer), pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=pad
    )
    return ConvSeq2SeqConfig.preset(mixer, size, style, **(tokens | changes))


def bert(variant: str, size: str, tokenizer: PreTrainedTokenizerBase, **changes) -> CompositeBertConfig:
    """``CompositeBertConfig.preset`` with the tokenizer's vocabulary and padding."""
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    return CompositeBertConfig.preset(variant, size, **(tokens | changes))
