"""The models whose training steps the suite `models` times, and their batches of text.

ConvSeq2Seq as in Tay et al. 2021, with every mixer: its transformer also without T5's bias, on the fastest attention
that torch has, which takes no bias. CompositeBert as in Chang et al. 2021: beside transformers' BertForMaskedLM of the
same shape, and with its attention as published. Nothing is dropped out, as in T5 1.1: dropout would keep torch from its
fast attention on CPUs. No position is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from benchmarks import text
from benchmarks.peers import column_index, published_attention
from benchmarks.suites.models_tables import PUBLISHED, SEQ2SEQ, STOCK_BERT, STOCK_T5, T5_BIAS, TRANSFORMER
from convkernels.models import (
    CompositeBertConfig,
    CompositeBertForMaskedLM,
    ConvSeq2SeqConfig,
    ConvSeq2SeqForConditionalGeneration,
)


class SdpaAttention(nn.Module):
    """A ConvSeq2Seq's self-attention without its bias; the parameters are those of `own`."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, mask: Tensor | None, *rest) -> Tensor:
        own = self.own
        q, k, v = (linear(x).unflatten(2, (-1, own.head_dim)).transpose(1, 2) for linear in (own.q, own.k, own.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=own.causal, scale=own.scale)
        return own.o(y.transpose(1, 2).flatten(2))


class PublishedAttention(nn.Module):
    """A CompositeBert's attention as its authors compute it; the parameters are those of `own`."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        own = self.own
        q, k, v = (linear(x).unflatten(2, (own.heads, -1)) for linear in (own.query, own.key, own.value))
        tables = own.convfixed_param.view(own.heads, -1), own.convq_param.expand(own.heads, -1, -1)
        return published_attention(column_index(x.shape[1], own.window[0], x.device), q, k, v, *tables).flatten(2)


@dataclass(frozen=True)
class Network:
    """A line of the suite: a model of `size` with `layers` (None: all) in each stack, for up to `longest` positions."""

    case: str
    line: str
    size: str
    layers: int | None
    longest: int
    backend: str = "auto"

    @property
    def config(self):
        """Of the model of this package that has the shape."""
        if self.case == SEQ2SEQ:
            names, options = ("encoder_layers", "decoder_layers"), {"dropout": 0.0}
            kind = ConvSeq2SeqConfig
            variant = "transformer" if self.line in (TRANSFORMER, T5_BIAS, STOCK_T5) else self.line
        else:
            names, variant, kind = ("num_hidden_layers",), "composite", CompositeBertConfig
            options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        # The text has more words than the vocabulary of the size "tiny".
        options["vocab_size"] = kind().vocab_size
        if self.layers is not None:
            options |= dict.fromkeys(names, self.layers)
        config = kind.preset(variant, self.size, backend=self.backend, **options)
        if self.case != SEQ2SEQ:
            config.embedding_size = config.hidden_size  # as in BERT
        return config

    def build(self) -> nn.Module:
        """The model; those of this package with the same shapes have the same parameters."""
        torch.manual_seed(0)
        config = self.config
        if self.line == STOCK_T5:
            return T5ForConditionalGeneration(_t5(config)).train()
        if self.line == STOCK_BERT:
            return BertForMaskedLM(_bert(config, self.longest)).train()
        if self.case == SEQ2SEQ:
            model = ConvSeq2SeqForConditionalGeneration(config)
            for stack in (model.model.encoder, model.model.decoder) if self.line == TRANSFORMER else ():
                stack.relative_bias = None
                for layer in stack.layers:
                    layer.mixer = SdpaAttention(layer.mixer)
        else:
            model = CompositeBertForMaskedLM(config)
            for layer in model.bert.encoder.layer if self.line == PUBLISHED else ():
                layer.attention.self = PublishedAttention(layer.attention.self)
        return model.train()


def _t5(config: ConvSeq2SeqConfig) -> T5Config:
    return T5Config(
        vocab_size=config.vocab_size, d_model=config.d_model, d_kv=config.head_dim, d_ff=config.d_ff,
        num_heads=config.num_heads, num_layers=config.encoder_layers, num_decoder_layers=config.decoder_layers,
        dropout_rate=0.0, decoder_start_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip


def _bert(config: CompositeBertConfig, longest: int) -> BertConfig:
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "hidden_dropout_prob", "attention_probs_dropout_prob")  # fmt: skip
    sizes = {name: getattr(config, name) for name in same}
    return BertConfig(**sizes, max_position_embeddings=longest, attn_implementation="sdpa")


def batch(case: str, size: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """What a model is called with: rows of text for the task that it is trained with."""
    inputs, labels = (text.span_denoising if case == SEQ2SEQ else text.masked)(size, length)
    return {"input_ids": inputs.to(device), "labels": labels.to(device)}


def training_step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Forward pass, loss and backward pass: the gradients of all parameters. What an optimizer does with them depends
    on the number of parameters alone, and is left out."""
    return torch.autograd.grad(model(**inputs).loss, [p for p in model.parameters() if p.requires_grad])
