"""Encoder and decoder of ConvSeq2Seq: embeddings in, layers, norm out."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import can_return_tuple

from ..ops._validate import fail, tensor
from .base import CACHE, check_input, check_sequence, embedded, one_cache, recorded, recorders
from .blocks import Positions, RelativeBias, make_norm
from .cache import check_cache, check_held
from .configs import ConvSeq2SeqConfig
from .layers import DecoderLayer, EncoderLayer


class Stack(nn.Module):
    """What encoder and decoder share: embedding, positions, relative bias and the last norm."""

    def __init__(self, config: ConvSeq2SeqConfig, owner: nn.Module, causal: bool):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0
        # The embedding is a parameter of the model, which passes the embedded tokens. A stack that is called by itself
        # asks the model for it. The tuple keeps the model from being a submodule of the stack.
        self._owner = (owner,)
        self.positions = Positions(config) if config.positions is not None else None
        attends = config.mixer == "transformer" or (not causal and config.pair_attention is not None)
        self.relative_bias = RelativeBias(config, causal) if attends else None
        self.norm = make_norm(config) if config.final_norm else None

    @property
    def embed_tokens(self) -> nn.Module:
        return self._owner[0].embedding(self)

    def check(
        self, call: str, sizes: dict[str, int], T: str, input_ids, inputs_embeds, mask, position_ids, prefix: str = "",
        past: int = 0,
    ) -> None:  # fmt: skip
        """Check the inputs of the stack; ``T`` is the letter of their length."""
        sizes["C"] = self.config.d_model
        check_sequence(call, sizes, T, input_ids, inputs_embeds, mask, position_ids, prefix, past)
        if self.positions is not None:
            self.positions.check(call, past + sizes[T], position_ids)
        elif position_ids is not None:
            expected = "None, because the configuration has no absolute positions"
            fail(call, f"{prefix}position_ids", expected, position_ids)

    def _embed(self, input_ids, inputs_embeds, mask: Tensor | None, position_ids, past: int = 0) -> Tensor:
        x = embedded(self.embed_tokens, input_ids, inputs_embeds) * self.embed_scale
        if self.positions is not None:
            x = x + self.positions(x.shape[1], mask, past, x, position_ids)
        return F.dropout(x, self.dropout, self.training)

    def _finish(self, x: Tensor, states: list | None) -> Tensor:
        if self.norm is not None:
            x = F.dropout(self.norm(x), self.dropout, self.training)
        if states is not None:
            states.append(x)
        return x


def _as_mask(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.bool()


class Encoder(Stack):
    main_input_name = "input_ids"

    def __init__(self, config: ConvSeq2SeqConfig, owner: nn.Module):
        super().__init__(config, owner, causal=False)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.encoder_layers))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """input_ids [B,T] or inputs_embeds [B,T,C]; attention_mask [B,T], 0 for padding; position_ids [B,T] or [1,T],
        where the configuration has positions. Hidden states: the input of each layer, and the output; attentions: the
        weights [B,H,T,T] of each layer that attends."""
        self.check(type(self).__name__, {}, "T", input_ids, inputs_embeds, attention_mask, position_ids)
        states, weights = recorders(self.config, output_hidden_states, output_attentions)
        mask = _as_mask(attention_mask)
        x = self._embed(input_ids, inputs_embeds, mask, position_ids)
        bias = None if self.relative_bias is None else self.relative_bias()
        for layer in self.layers:
            if states is not None:
                states.append(x)
            x = layer(x, mask, bias, weights)
        x = self._finish(x, states)
        return BaseModelOutput(last_hidden_state=x, hidden_states=recorded(states), attentions=recorded(weights))


class Decoder(Stack):
    def __init__(self, config: ConvSeq2SeqConfig, owner: nn.Module):
        super().__init__(config, owner, causal=True)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))

    def check_after(
        self, call: str, sizes: dict[str, int], input_ids, inputs_embeds, mask, position_ids, cache, prefix: str = ""
    ) -> int:
        """``check`` for inputs that follow those in the cache; returns the number of positions in the cache."""
        if cache is not None:
            check_cache(call, cache, self.config)
        past = 0 if cache is None else cache.get_seq_length()
        self.check(call, sizes, "T", input_ids, inputs_embeds, mask, position_ids, prefix, past)
        if cache is not None:
            check_held(call, cache, sizes)
        return past

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache=None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """input_ids [B,T]: the positions after those that the cache (past_key_values, or by its other name cache)
        holds; attention_mask [B, past + T]. encoder_hidden_states [B,S,C], which may lack where the cache holds what
        attention needs of them; encoder_attention_mask [B,S]. The rest as in the encoder."""
        name, sizes = type(self).__name__, {"C": self.config.d_model}
        cache = one_cache(name, past_key_values, cache)
        if cache is None or not getattr(cache, "is_updated", {}).get(0):
            tensor(name, "encoder_hidden_states", encoder_hidden_states)
        check_input(name, sizes, "BSC", "encoder_hidden_states", encoder_hidden_states)
        check_input(name, sizes, "BS", "encoder_attention_mask", encoder_attention_mask)
        past = self.check_after(name, sizes, input_ids, inputs_embeds, attention_mask, position_ids, cache)
        states, weights = recorders(self.config, output_hidden_states, output_attentions)
        cross_weights = None if weights is None else []
        mask = _as_mask(attention_mask)
        x = self._embed(input_ids, inputs_embeds, mask, position_ids, past)
        if mask is not None and self.config.mixer != "transformer":
            mask = mask[:, past:]  # the convolutions' states hold the positions before
        bias = None if self.relative_bias is None else self.relative_bias()
        states_mask = _as_mask(encoder_attention_mask)
        for layer in self.layers:
            if states is not None:
                states.append(x)
            x = layer(
                x, mask, bias, encoder_hidden_states, states_mask, weights=weights, cross_weights=cross_weights,
                **{CACHE: cache},
            )  # fmt: skip
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self._finish(x, states),
            hidden_states=recorded(states),
            attentions=recorded(weights),
            cross_attentions=recorded(cross_weights),
            **{CACHE: cache},
        )
