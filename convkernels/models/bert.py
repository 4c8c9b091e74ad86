"""BERTs whose attention has convolutional terms (Chang et al. 2021). Parameter names are those of the authors'
checkpoints."""

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from ..nn import CompositeAttention
from ..ops._validate import fail
from .base import PreTrained, check_input, check_sequence, recorded, recorders
from .bert_layers import Embeddings, Encoder, Head, Pooler, Predictions
from .configs import CompositeBertConfig
from .losses import check_classes, classification_loss, span_loss, token_loss


class _PreTrained(PreTrained):
    config_class = CompositeBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["CompositeBertLayer"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """False: the attention has terms that no implementation of transformers computes."""
        return False

    def _check(self, input_ids, inputs_embeds) -> dict[str, int]:
        """Check a head's main input before anything is computed, and return its sizes; ``bert`` checks the rest."""
        sizes = {"C": self.config.embedding_size}
        check_sequence(type(self).__name__, sizes, "T", input_ids, inputs_embeds)
        return sizes

    @torch.no_grad()
    def _init_weights(self, module):
        """BERT's initial values, N(0, initializer_range) and 0; the attention module draws its own."""
        if isinstance(module, (CompositeAttention, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Predictions):
            init.zeros_(module.bias)


class CompositeBertModel(_PreTrained):
    """The encoder: hidden states [B,T,hidden_size], and with ``add_pooling_layer`` BERT's pooled first position."""

    def __init__(self, config: CompositeBertConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.embeddings_project = None
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """input_ids [B,T] or inputs_embeds [B,T,embedding_size]; attention_mask [B,T], 0 for padding; token_type_ids
        [B,T], by default 0; position_ids [B,T] or [1,T], where the configuration has absolute positions. Hidden states:
        the input of each layer, and the output; attentions: the weights [B,H,T,T] of each layer, H counting the heads
        that attend."""
        name, sizes = type(self).__name__, {"C": self.config.embedding_size}
        check_sequence(name, sizes, "T", input_ids, inputs_embeds, attention_mask, position_ids)
        check_input(name, sizes, "BT", "token_type_ids", token_type_ids)
        self.embeddings.check(name, sizes["T"], position_ids)
        states, weights = recorders(self.config, output_hidden_states, output_attentions)
        x = self.embeddings(input_ids, token_type_ids, inputs_embeds, position_ids)
        if self.embeddings_project is not None:
            x = self.embeddings_project(x)
        x = self.encoder(x, None if attention_mask is None else attention_mask.bool(), states, weights)
        pooled = None if self.pooler is None else self.pooler(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=pooled, hidden_states=recorded(states), attentions=recorded(weights)
        )


class CompositeBertForMaskedLM(_PreTrained):
    """The encoder and BERT's head over the vocabulary, whose matrix is that of the embeddings."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: CompositeBertConfig):
        super().__init__(config)
        self.bert = CompositeBertModel(config)
        self.cls = Head(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value):
        self.cls.predictions.decoder = value
        self.cls.predictions.bias = value.bias

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> MaskedLMOutput:
        """logits [B,T,vocab_size]; labels [B,T], -100 where there is nothing to predict. The rest as in
        ``CompositeBertModel``."""
        check_input(type(self).__name__, self._check(input_ids, inputs_embeds), "BT", "labels", labels)
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, inputs_embeds, position_ids, output_attentions,
            output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.cls.predictions(outputs.last_hidden_state)
        loss = None if labels is None else token_loss(logits, labels)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class _Classifier(_PreTrained):
    """The encoder, dropout and a linear classifier."""

    _keys_to_ignore_on_load_unexpected = [r"cls\.", "pooler"]
    pooled = False

    def __init__(self, config: CompositeBertConfig):
        super().__init__(config)
        self.bert = CompositeBertModel(config, add_pooling_layer=self.pooled)
        given = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if given is None else given)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ):
        self._check_labels(self._check(input_ids, inputs_embeds), labels)
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, inputs_embeds, position_ids, output_attentions,
            output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.pooler_output if self.pooled else outputs.last_hidden_state))
        loss = None if labels is None else self._loss(logits, labels)
        return self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CompositeBertForSequenceClassification(_Classifier):
    """The encoder, BERT's pooled first position, and a linear classifier: logits [B,num_labels]; labels as in
    ``losses.classification_loss``."""

    _keys_to_ignore_on_load_unexpected = [r"cls\."]
    pooled, output_class = True, SequenceClassifierOutput

    def _check_labels(self, sizes: dict[str, int], labels) -> None:
        check_classes(type(self).__name__, self.config, sizes["B"], labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return classification_loss(self.config, logits, labels)


class CompositeBertForTokenClassification(_Classifier):
    """The encoder and a linear classifier of each position: logits [B,T,num_labels]; labels [B,T], -100 for positions
    without a loss."""

    output_class = TokenClassifierOutput

    def _check_labels(self, sizes: dict[str, int], labels) -> None:
        check_input(type(self).__name__, sizes, "BT", "labels", labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return token_loss(logits, labels)


class CompositeBertForQuestionAnswering(_PreTrained):
    """The encoder and a linear map to two logits per position: the answer begins there, the answer ends there."""

    _keys_to_ignore_on_load_unexpected = [r"cls\.", "pooler"]

    def __init__(self, config: CompositeBertConfig):
        super().__init__(config)
        self.bert = CompositeBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """start_logits, end_logits [B,T]; start_positions, end_positions [B] or [B,1]: indices from 0 to T - 1; others,
        also negative ones, are ignored."""
        name, sizes = type(self).__name__, self._check(input_ids, inputs_embeds)
        if (start_positions is None) != (end_positions is None):
            fail(name, "end_positions", "given where start_positions is, and only there", end_positions)
        check_input(name, sizes, "B or B1", "start_positions", start_positions)
        check_input(name, sizes, "B or B1", "end_positions", end_positions)
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, inputs_embeds, position_ids, output_attentions,
            output_hidden_states, return_dict=True,
        )  # fmt: skip
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(CompositeBertConfig.model_type, CompositeBertConfig)
AutoModel.register(CompositeBertConfig, CompositeBertModel)
AutoModelForMaskedLM.register(CompositeBertConfig, CompositeBertForMaskedLM)
AutoModelForSequenceClassification.register(CompositeBertConfig, CompositeBertForSequenceClassification)
AutoModelForTokenClassification.register(CompositeBertConfig, CompositeBertForTokenClassification)
AutoModelForQuestionAnswering.register(CompositeBertConfig, CompositeBertForQuestionAnswering)
