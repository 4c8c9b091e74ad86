"""Encoder-decoders whose layers mix positions by convolution or attention (Tay et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from .. import nn as cknn
from ..ops._validate import fail
from .base import PreTrained
from .blocks import Attention, FeedForward, Positions, RelativeBias, make_norm
from .cache import decoder_cache
from .configs import ConvSeq2SeqConfig
from .layers import DecoderLayer, EncoderLayer


class _PreTrained(PreTrained):
    config_class = ConvSeq2SeqConfig
    base_model_prefix = "model"
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        """T5's initial values for what T5 has; the convolutions' modules know their own."""
        config = self.config
        factor, width = config.initializer_factor, config.d_model

        def linear(part: nn.Linear | None, std: float):
            if part is not None:
                init.normal_(part.weight, std=factor * std)
                if part.bias is not None:
                    init.zeros_(part.bias)

        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=factor * (1.0 if config.scale_output else width**-0.5))
        elif isinstance(module, (RelativeBias, Positions)):
            if module.weight is not None:
                init.normal_(module.weight, std=factor * width**-0.5)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, Attention):
            linear(module.q, width**-0.5 * (1.0 if config.scale_attention else config.head_dim**-0.5))
            linear(module.k, width**-0.5)
            linear(module.v, width**-0.5)
            linear(module.o, (config.num_heads * config.head_dim) ** -0.5)
        elif isinstance(module, FeedForward):
            for part in (module.wi, module.gate):
                linear(part, width**-0.5)
            linear(module.wo, config.d_ff**-0.5)
        elif isinstance(module, (cknn.GatedConv, cknn.LightweightConv1d, cknn.DynamicConv1d)):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            linear(module, width**-0.5)


class _Stack(nn.Module):
    """What encoder and decoder share: embeddings in, layers, norm out."""

    def __init__(self, config: ConvSeq2SeqConfig, embed_tokens: nn.Embedding, causal: bool):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0
        # The embedding belongs to the model, so it is not registered here: it has one name in a checkpoint.
        object.__setattr__(self, "embed_tokens", embed_tokens)
        self.positions = Positions(config) if config.positions is not None else None
        attends = config.mixer == "transformer" or (not causal and config.pair_attention is not None)
        self.relative_bias = RelativeBias(config, causal) if attends else None
        self.norm = make_norm(config) if config.final_norm else None

    def _embed(self, input_ids, inputs_embeds, mask: Tensor | None, past: int = 0) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__}: expected either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x * self.embed_scale
        if self.positions is not None:
            x = x + self.positions(x.shape[1], mask, past, x)
        return F.dropout(x, self.dropout, self.training)

    def _finish(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = F.dropout(self.norm(x), self.dropout, self.training)
        return x


def _as_mask(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.bool()


class Encoder(_Stack):
    main_input_name = "input_ids"

    def __init__(self, config: ConvSeq2SeqConfig, embed_tokens: nn.Embedding):
        super().__init__(config, embed_tokens, causal=False)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.encoder_layers))

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds=None, **unused
    ) -> BaseModelOutput:
        """input_ids [B,T] or inputs_embeds [B,T,C]; attention_mask [B,T], 0 for padding."""
        mask = _as_mask(attention_mask)
        x = self._embed(input_ids, inputs_embeds, mask)
        bias = None if self.relative_bias is None else self.relative_bias()
        for layer in self.layers:
            x = layer(x, mask, bias)
        return BaseModelOutput(last_hidden_state=self._finish(x))


class Decoder(_Stack):
    def __init__(self, config: ConvSeq2SeqConfig, embed_tokens: nn.Embedding):
        super().__init__(config, embed_tokens, causal=True)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """input_ids [B,T]: the positions after those that past_key_values holds; attention_mask [B, past + T]."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = _as_mask(attention_mask)
        x = self._embed(input_ids, inputs_embeds, mask, past)
        if mask is not None and self.config.mixer != "transformer":
            mask = mask[:, -x.shape[1] :]  # what lies before is in the convolutions' states
        bias = None if self.relative_bias is None else self.relative_bias()
        states_mask = _as_mask(encoder_attention_mask)
        for layer in self.layers:
            x = layer(x, mask, bias, encoder_hidden_states, states_mask, past_key_values=past_key_values)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self._finish(x), past_key_values=past_key_values
        )


class _Embedded(_PreTrained):
    """A model that owns the embeddings of its stacks."""

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        apart = config.source_vocab_size is not None
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.source = nn.Embedding(config.source_vocab_size, config.d_model) if apart else None
        self.encoder = Encoder(config, self.source if apart else self.shared)

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, value):
        self.shared = value
        for stack in (self.encoder if self.source is None else None, getattr(self, "decoder", None)):
            if stack is not None:
                object.__setattr__(stack, "embed_tokens", value)

    def get_encoder(self, modality=None):
        return self.encoder


class ConvSeq2SeqEncoderModel(_Embedded):
    """The encoder of ``ConvSeq2SeqModel``, whose checkpoints it loads."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", "lm_head"]

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None) -> BaseModelOutput:
        return self.encoder(input_ids, attention_mask, inputs_embeds)


class ConvSeq2SeqModel(_Embedded):
    """Encoder and decoder without a head: hidden states [B,T,d_model] of the decoder."""

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        self.decoder = Decoder(config, self.shared)
        self.post_init()

    def get_decoder(self):
        return self.decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """input_ids [B,S], decoder_input_ids [B,T]; masks are 0 for padding; encoder_outputs: of an earlier call.
        use_cache: keep what decoding needs to go on (by default as the configuration says, never while training)."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds)
        if use_cache and past_key_values is None and not self.training:
            past_key_values = decoder_cache(self.config)
        states = encoder_outputs[0]
        outputs = self.decoder(
            decoder_input_ids, decoder_attention_mask, states, attention_mask, past_key_values, decoder_inputs_embeds
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            encoder_last_hidden_state=states,
        )


class ConvSeq2SeqForConditionalGeneration(_PreTrained, GenerationMixin):
    """Encoder, decoder and output layer; ``generate`` keeps the convolutions' states as its cache."""

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        self.model = ConvSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality=None):
        return self.model.encoder

    def get_decoder(self):
        return self.model.decoder

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels one position later, behind the start token; ignored ones (-100) become padding."""
        first = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([first, labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            wanted = generation_config.cache_implementation
            if wanted not in (None, "dynamic"):
                fail("generate", "cache_implementation", "None or 'dynamic'", repr(wanted))
            model_kwargs["past_key_values"] = decoder_cache(self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """As ``ConvSeq2SeqModel``; labels [B,T] (-100: ignored) give a loss, and the decoder's input if there is none.

        logits: [B,T,vocab_size].
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache=use_cache if labels is None else False, return_dict=True,
        )  # fmt: skip
        x = outputs.last_hidden_state
        if self.config.scale_output:
            x = x * self.config.d_model**-0.5
        logits = self.lm_head(x)
        loss = None if labels is None else token_loss(logits, labels)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
        )


class ConvSeq2SeqForSequenceClassification(_PreTrained):
    """The encoder, the mean over real tokens, and a classifier: one hidden layer with tanh.

    With ``config.dual_encoder`` it takes two sequences, encoded apart to u and v, and classifies [u, v, |u - v|,
    u * v]. Otherwise pairs come as one sequence; what convolutions miss there, ``config.pair_attention`` adds.
    """

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", "lm_head"]

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        self.model = ConvSeq2SeqEncoderModel(config)
        self.dense = nn.Linear(config.d_model * (4 if config.dual_encoder else 1), config.d_model)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def _pool(self, input_ids, attention_mask) -> Tensor:
        """[B,T] -> [B,C]"""
        x = self.model(input_ids, attention_mask).last_hidden_state
        if attention_mask is None:
            return x.mean(1)
        real = attention_mask.bool()[..., None]
        return torch.where(real, x, 0.0).sum(1) / real.sum(1).clamp(min=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pair_input_ids: Tensor | None = None,
        pair_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """input_ids [B,T] and, for a dual encoder, pair_input_ids [B,S]; labels [B], floats for one output."""
        if (pair_input_ids is not None) != self.config.dual_encoder:
            expected = "token ids, because of dual_encoder" if self.config.dual_encoder else "None without dual_encoder"
            fail(type(self).__name__, "pair_input_ids", expected, pair_input_ids)
        x = self._pool(input_ids, attention_mask)
        if self.config.dual_encoder:
            other = self._pool(pair_input_ids, pair_attention_mask)
            x = torch.cat([x, other, (x - other).abs(), x * other], 1)
        x = torch.tanh(self.dense(F.dropout(x, self.config.dropout, self.training)))
        logits = self.classifier(F.dropout(x, self.config.dropout, self.training))
        return SequenceClassifierOutput(loss=classification_loss(logits, labels), logits=logits)


def _precise(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits [B,T,V] over the labels [B,T] that are not -100."""
    return F.cross_entropy(_precise(logits.flatten(0, 1)), labels.flatten())


def classification_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Cross entropy, or squared error where there is one output."""
    if labels is None:
        return None
    if logits.shape[1] == 1:
        return F.mse_loss(_precise(logits[:, 0]), labels.to(_precise(logits).dtype))
    return F.cross_entropy(_precise(logits), labels)


AutoConfig.register(ConvSeq2SeqConfig.model_type, ConvSeq2SeqConfig)
AutoModel.register(ConvSeq2SeqConfig, ConvSeq2SeqModel)
AutoModelForSeq2SeqLM.register(ConvSeq2SeqConfig, ConvSeq2SeqForConditionalGeneration)
AutoModelForSequenceClassification.register(ConvSeq2SeqConfig, ConvSeq2SeqForSequenceClassification)
