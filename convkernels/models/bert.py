"""BERTs whose attention has convolutional terms (Chang et al. 2021). Parameter names are those of the authors'
checkpoints."""

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from ..nn import CompositeAttention
from .base import PreTrained
from .configs import CompositeBertConfig
from .seq2seq import classification_loss, token_loss


class _Embeddings(nn.Module):
    """Tokens, segments and, where the configuration has them, absolute positions; then LayerNorm."""

    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        size = config.embedding_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        if config.absolute_positions:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        else:
            self.position_embeddings = None
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids, inputs_embeds) -> Tensor:
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            limit = self.position_embeddings.num_embeddings
            if x.shape[1] > limit:
                raise ValueError(f"expected at most max_position_embeddings = {limit} positions, got {x.shape[1]}")
            x = x + self.position_embeddings.weight[: x.shape[1]]
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

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B,T,C], mask bool [B,T]."""
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class _Encoder(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.layer = nn.ModuleList(CompositeBertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class _PreTrained(PreTrained):
    config_class = CompositeBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["CompositeBertLayer"]

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
    ) -> BaseModelOutputWithPooling:
        """input_ids [B,T] or inputs_embeds [B,T,embedding_size]; attention_mask [B,T], 0 for padding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__}: expected either input_ids or inputs_embeds")
        x = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        if self.embeddings_project is not None:
            x = self.embeddings_project(x)
        x = self.encoder(x, None if attention_mask is None else attention_mask.bool())
        pooled = None if self.pooler is None else self.pooler(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)


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
    ) -> MaskedLMOutput:
        """logits [B,T,vocab_size]; labels [B,T], -100 where there is nothing to predict."""
        x = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, return_dict=True).last_hidden_state
        logits = self.cls.predictions(x)
        loss = None if labels is None else token_loss(logits, labels)
        return MaskedLMOutput(loss=loss, logits=logits)


class CompositeBertForSequenceClassification(_PreTrained):
    """The encoder, BERT's pooled first position, and a linear classifier."""

    _keys_to_ignore_on_load_unexpected = [r"cls\."]

    def __init__(self, config: CompositeBertConfig):
        super().__init__(config)
        self.bert = CompositeBertModel(config, add_pooling_layer=True)
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
    ) -> SequenceClassifierOutput:
        """logits [B,num_labels]; labels [B], floats for one output."""
        pooled = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds, return_dict=True).pooler_output
        logits = self.classifier(self.dropout(pooled))
        return SequenceClassifierOutput(loss=classification_loss(logits, labels), logits=logits)


AutoConfig.register(CompositeBertConfig.model_type, CompositeBertConfig)
AutoModel.register(CompositeBertConfig, CompositeBertModel)
AutoModelForMaskedLM.register(CompositeBertConfig, CompositeBertForMaskedLM)
AutoModelForSequenceClassification.register(CompositeBertConfig, CompositeBertForSequenceClassification)
