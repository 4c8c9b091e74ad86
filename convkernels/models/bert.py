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
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
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
from .base import PreTrained, check_input, check_sequence, embedded, recorded, recorders
from .configs import CompositeBertConfig
from .losses import check_classes, classification_loss, span_loss, token_loss


class _Embeddings(nn.Module):
    """Tokens, segments and, where the configuration has them, absolute positions; then LayerNorm."""

    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        size, self.limit = config.embedding_size, config.max_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        if config.absolute_positions:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        else:
            self.position_embeddings = None
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def check(self, call: str, length: int, position_ids) -> None:
        """That there are positions, and as many as the input needs."""
        if self.position_embeddings is None:
            if position_ids is not None:
                fail(call, "position_ids", "None, because the configuration has no absolute_positions", position_ids)
        elif position_ids is None and length > self.limit:
            limit = f"max_position_embeddings = {self.limit}"
            raise ValueError(f"{call}: expected at most {limit} positions, got {length}")

    def forward(self, input_ids, token_type_ids, inputs_embeds, position_ids) -> Tensor:
        x = embedded(self.word_embeddings, input_ids, inputs_embeds)
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
        x = x + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = torch.arange(x.shape[1], device=x.device)
            x = x + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))


class _Output(nn.Module):
    """A linear map, the residual sum, LayerNorm."""

    def __init__(self, config: CompositeBertConfig, inputs: int):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class _Attention(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.self = CompositeAttention(
            config.hidden_size,
            config.num_attention_heads,
            dropout=config.attention_probs_dropout_prob,
            backend=config.backend,
            **config.attention,
        )
        self.output = _Output(config, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, weights: list | None = None) -> Tensor:
        if weights is not None:
            weights.append(self.self.weights(x, mask))
        return self.output(self.self(x, mask), x)


class _Intermediate(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class CompositeBertLayer(GradientCheckpointingLayer):
    """Composite attention and a feed-forward block, each followed by its residual sum and LayerNorm."""

    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor | None = None, weights: list | None = None) -> Tensor:
        """x [B,T,C], mask bool [B,T]. weights: gets those of the attention."""
        x = self.attention(x, mask, weights)
        return self.output(self.intermediate(x), x)


class _Encoder(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.layer = nn.ModuleList(CompositeBertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None, states: list | None, weights: list | None) -> Tensor:
        for layer in self.layer:
            if states is not None:
                states.append(x)
            x = layer(x, mask, weights)
        if states is not None:
            states.append(x)
        return x


class _PreTrained(PreTrained):
    config_class = CompositeBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["CompositeBertLayer"]

    def _check(self, input_ids, inputs_embeds) -> dict[str, int]:
        """The sizes B and T of what a head gets, for checks before anything is computed; ``bert`` checks the rest."""
        sizes = {"C": self.config.embedding_size}
        check_sequence(type(self).__name__, sizes, "T", input_ids, inputs_embeds)
        return sizes

    @torch.no_grad()
    def _init_weights(self, module):
        """BERT's initial values, N(0, initializer_range) and 0; the attention module knows its own."""
        if isinstance(module, CompositeAttention):
            module.reset_parameters()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, _Predictions):
            init.zeros_(module.bias)


class CompositeBertModel(_PreTrained):
    """The encoder: hidden states [B,T,hidden_size], and with ``add_pooling_layer`` BERT's pooled first position."""

    def __init__(self, config: CompositeBertConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.embeddings_project = None
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)
        self.encoder = _Encoder(config)
        self.pooler = _Pooler(config) if add_pooling_layer else None
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


class _Pooler(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class _Transform(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))


class _Predictions(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.transform = _Transform(config)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class _Head(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.predictions = _Predictions(config)


class CompositeBertForMaskedLM(_PreTrained):
    """The encoder and BERT's head over the vocabulary, whose matrix is that of the embeddings."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: CompositeBertConfig):
        super().__init__(config)
        self.bert = CompositeBertModel(config)
        self.cls = _Head(config)
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
    that do not count."""

    output_class = TokenClassifierOutput

    def _check_labels(self, sizes: dict[str, int], labels) -> None:
        check_input(type(self).__name__, sizes, "BT", "labels", labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return token_loss(logits, labels)


class CompositeBertForQuestionAnswering(_PreTrained):
    """The encoder and a linear map to two numbers, which say how likely the answer begins and ends at a position."""

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
        """start_logits, end_logits [B,T]; start_positions, end_positions [B] or [B,1]: places in the sequence, those
        outside, also negative ones, are ignored."""
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
