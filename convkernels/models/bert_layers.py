"""The parts of CompositeBert. Their names are those of the authors' checkpoints."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ..nn import CompositeAttention
from ..ops._validate import fail
from .base import embedded
from .configs import CompositeBertConfig


class Embeddings(nn.Module):
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
        """Check that there are positions where they are given, and as many as the input needs."""
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


class Encoder(nn.Module):
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


class Pooler(nn.Module):
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


class Predictions(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.transform = _Transform(config)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class Head(nn.Module):
    def __init__(self, config: CompositeBertConfig):
        super().__init__()
        self.predictions = Predictions(config)
