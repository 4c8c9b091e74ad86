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
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)
from transformers.utils import ModelOutput, can_return_tuple

from .. import nn as cknn
from ..ops._validate import describe, fail
from .base import CACHE, PreTrained, check_input, check_sequence, embedded, one_cache, recorders
from .blocks import Attention, FeedForward, Positions, RelativeBias
from .cache import check_cache, decoder_cache
from .configs import ConvSeq2SeqConfig
from .losses import check_classes, classification_loss, token_loss
from .stacks import Decoder, Encoder, Stack


class _PreTrained(PreTrained):
    config_class = ConvSeq2SeqConfig
    base_model_prefix = "model"
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        """T5's initial values for the parts that T5 has; the modules of the convolutions draw their own."""
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


class _Embedded(_PreTrained):
    """A model that owns the embeddings of its stacks."""

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        apart = config.source_vocab_size is not None
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.source = nn.Embedding(config.source_vocab_size, config.d_model) if apart else None
        self.encoder = Encoder(config, self)

    def embedding(self, stack: Stack) -> nn.Module:
        """The embedding of a stack's tokens."""
        return self.source if self.source is not None and isinstance(stack, Encoder) else self.shared

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, value):
        self.shared = value

    def get_encoder(self, modality=None):
        return self.encoder

    def _encode(self, input_ids, attention_mask, inputs_embeds, position_ids, attentions, hidden_states):
        embeds = embedded(self.embedding(self.encoder), input_ids, inputs_embeds)
        return self.encoder(None, attention_mask, embeds, position_ids, attentions, hidden_states, return_dict=True)


class ConvSeq2SeqEncoderModel(_Embedded):
    """The encoder of ``ConvSeq2SeqModel``, whose checkpoints it loads."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", "lm_head"]

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        self.post_init()

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
        """As ``Encoder``; ValueError if attention weights are asked for and nothing attends."""
        asked = recorders(self.config, None, output_attentions)[1] is not None
        if asked and self.encoder.relative_bias is None:
            expected = f"False, because mixer={self.config.mixer!r} has no attention weights"
            fail(type(self).__name__, "output_attentions", expected, True)
        self.encoder.check(type(self).__name__, {}, "T", input_ids, inputs_embeds, attention_mask, position_ids)
        return self._encode(
            input_ids, attention_mask, inputs_embeds, position_ids, output_attentions, output_hidden_states
        )


def _encoded(call: str, sizes: dict[str, int], outputs) -> ModelOutput:
    """Outputs of the encoder, which may be given as a tuple."""
    if isinstance(outputs, (tuple, list)) and outputs:
        outputs = BaseModelOutput(*outputs[:3])
    if not isinstance(outputs, ModelOutput) or outputs.get("last_hidden_state") is None:
        expected = "the encoder's outputs, or a tuple of them that begins with the hidden states [B,S,C]"
        fail(call, "encoder_outputs", expected, describe(outputs), TypeError)
    check_input(call, sizes, "BSC", "encoder_outputs", outputs["last_hidden_state"])
    return outputs


class ConvSeq2SeqModel(_Embedded):
    """Encoder and decoder without a head: hidden states [B,T,d_model] of the decoder."""

    def __init__(self, config: ConvSeq2SeqConfig):
        super().__init__(config)
        self.decoder = Decoder(config, self)
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
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache=None,
    ) -> Seq2SeqModelOutput:
        """input_ids [B,S], decoder_input_ids [B,T]; masks are 0 for padding, attention_mask [B,S],
        decoder_attention_mask [B, past + T]; encoder_outputs: of an earlier call, then input_ids are not used.
        use_cache: keep what decoding needs to go on (by default as the configuration says, never while training).
        past_key_values, or by its other name cache: what an earlier call kept. position_ids [B,S] or [1,S] and
        decoder_position_ids [B,T] or [1,T]: where the configuration has positions. Attention weights: those of the
        decoder's attention to the encoder, and of each layer that attends to its own input."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        name, sizes = type(self).__name__, {"C": self.config.d_model}
        cache = one_cache(name, past_key_values, cache)
        if encoder_outputs is None:
            self.encoder.check(name, sizes, "S", input_ids, inputs_embeds, attention_mask, position_ids)
        else:
            encoder_outputs = _encoded(name, sizes, encoder_outputs)
            check_input(name, sizes, "BS", "attention_mask", attention_mask)
        self.decoder.check_after(
            name, sizes, decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, decoder_position_ids, cache,
            "decoder_",
        )  # fmt: skip
        decoder_embeds = embedded(self.embedding(self.decoder), decoder_input_ids, decoder_inputs_embeds)
        asked = (output_attentions, output_hidden_states)
        if encoder_outputs is None:
            encoder_outputs = self._encode(input_ids, attention_mask, inputs_embeds, position_ids, *asked)
        if use_cache and cache is None and not self.training:
            cache = decoder_cache(self.config)
        states = encoder_outputs["last_hidden_state"]
        outputs = self.decoder(
            None, decoder_attention_mask, states, attention_mask, None, decoder_embeds, decoder_position_ids, *asked,
            cache=cache, return_dict=True,
        )  # fmt: skip
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=states,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            **{CACHE: outputs.get(CACHE)},
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
        for field in ("decoder_start_token_id", "pad_token_id"):
            if getattr(self.config, field) is None:
                expected = "a token, because the decoder's input is made from labels (or pass decoder_input_ids)"
                fail(type(self).__name__, f"config.{field}", expected, None)
        labels = labels.long()
        first = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([first, labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = one_cache("generate", model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if given is not None:
            model_kwargs[CACHE] = given
            check_cache("generate", given, self.config)
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache:
            wanted = generation_config.cache_implementation
            if wanted not in (None, "dynamic"):
                fail("generate", "cache_implementation", "None or 'dynamic'", repr(wanted))
            model_kwargs[CACHE] = decoder_cache(self.config)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()

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
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache=None,
    ) -> Seq2SeqLMOutput:
        """As ``ConvSeq2SeqModel``; labels [B,T] (-100: ignored) give a loss, and the decoder's input if there is none.

        logits: [B,T,vocab_size].
        """
        if labels is not None:
            name, sizes = type(self).__name__, {"C": self.config.d_model}
            if encoder_outputs is None:
                check_sequence(name, sizes, "S", input_ids, inputs_embeds)
            else:
                encoder_outputs = _encoded(name, sizes, encoder_outputs)
            check_input(name, sizes, "BT", "decoder_input_ids", decoder_input_ids)
            check_input(name, sizes, "BTC", "decoder_inputs_embeds", decoder_inputs_embeds)
            check_input(name, sizes, "BT", "labels", labels)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache if labels is None else False, position_ids,
            decoder_position_ids, output_attentions, output_hidden_states, cache, return_dict=True,
        )  # fmt: skip
        x = outputs.last_hidden_state
        if self.config.scale_output:
            x = x * self.config.d_model**-0.5
        logits = self.lm_head(x)
        loss = None if labels is None else token_loss(logits, labels)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, **{k: v for k, v in outputs.items() if k != "last_hidden_state"}
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

    def _pool(self, input_ids, attention_mask, *options) -> tuple[Tensor, BaseModelOutput]:
        """The mean over real tokens, [B,C], of the encoder's outputs."""
        outputs = self.model(input_ids, attention_mask, *options, return_dict=True)
        x = outputs.last_hidden_state
        if attention_mask is None:
            return x.mean(1), outputs
        real = attention_mask.bool()[..., None]
        return torch.where(real, x, 0.0).sum(1) / real.sum(1).clamp(min=1), outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pair_input_ids: Tensor | None = None,
        pair_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pair_inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        pair_position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """input_ids [B,T] and, for a dual encoder, pair_input_ids [B,S], or their embeddings, with masks and position
        ids of the same sizes (these also of one row); labels as in ``classification_loss``. Hidden states and attention
        weights: those of the encoder, for a dual one those of the second sequence behind those of the first."""
        name, sizes, check = type(self).__name__, {}, self.model.encoder.check
        check(name, sizes, "T", input_ids, inputs_embeds, attention_mask, position_ids)
        pair = (pair_input_ids, pair_inputs_embeds, pair_attention_mask, pair_position_ids)
        if self.config.dual_encoder:
            if pair_input_ids is None and pair_inputs_embeds is None:
                fail(name, "pair_input_ids", "token ids, because of dual_encoder", None)
            check(name, sizes, "S", *pair, "pair_")
        elif any(value is not None for value in pair):
            fail(name, "pair_input_ids", "None without dual_encoder, as all of the second sequence", "some of it")
        check_classes(name, self.config, sizes["B"], labels)
        asked = (output_attentions, output_hidden_states)
        x, outputs = self._pool(input_ids, attention_mask, inputs_embeds, position_ids, *asked)
        hidden_states, attentions = outputs.hidden_states, outputs.attentions
        if self.config.dual_encoder:
            other, outputs = self._pool(
                pair_input_ids, pair_attention_mask, pair_inputs_embeds, pair_position_ids, *asked
            )
            hidden_states = hidden_states and hidden_states + outputs.hidden_states
            attentions = attentions and attentions + outputs.attentions
            x = torch.cat([x, other, (x - other).abs(), x * other], 1)
        x = torch.tanh(self.dense(F.dropout(x, self.config.dropout, self.training)))
        logits = self.classifier(F.dropout(x, self.config.dropout, self.training))
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions)


AutoConfig.register(ConvSeq2SeqConfig.model_type, ConvSeq2SeqConfig)
AutoModel.register(ConvSeq2SeqConfig, ConvSeq2SeqModel)
AutoModelForSeq2SeqLM.register(ConvSeq2SeqConfig, ConvSeq2SeqForConditionalGeneration)
AutoModelForSequenceClassification.register(ConvSeq2SeqConfig, ConvSeq2SeqForSequenceClassification)
