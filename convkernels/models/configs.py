"""Configurations of the models, and the named ones of the papers."""

import sys

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..ops._select import known
from ..ops._validate import expect

MIXERS = ("transformer", "lightweight", "dynamic")
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
# The filter sizes of Tay et al. 2021, section 4.1, layer by layer, which the paper calls dilated; shorter models have
# a part of them.
WINDOWS = {
    "base": [4, 4, 7, 7, 15, 15, 15, 15, 15, 31, 31, 31],
    "small": [4, 7, 15, 15, 15, 31],
    "tiny": [4, 7],
}
SEQ2SEQ_SIZES = {
    "base": dict(d_model=768, d_ff=3072, num_heads=12, encoder_layers=12, decoder_layers=12),
    "small": dict(d_model=512, d_ff=2048, num_heads=8, encoder_layers=6, decoder_layers=6),
    "tiny": dict(vocab_size=256, d_model=32, d_ff=64, num_heads=2, encoder_layers=2, decoder_layers=2),
}
SEQ2SEQ_STYLES = {
    "paper": dict(),
    "fairseq": dict(
        use_bias=True, norm="layer", norm_eps=1e-5, norm_placement="post", final_norm=False, scale_attention=True,
        scale_embedding=True, scale_output=False, mask_query=True,
    ),
    "released": dict(
        norm_placement="pre", mixer_bias=True, pointwise=True, depthwise_bias=True, kernel_bias=True,
        positions="learned",
    ),
}  # fmt: skip


def _expect(config, argument: str, good: bool, expected: str) -> None:
    expect(type(config).__name__, argument, good, expected, getattr(config, argument))


def _integer(value, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _number(value, maximum: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= maximum


# Which values a field may have: a test, and how errors name it.
_KINDS = {
    "size": (lambda value: _integer(value, 1), "a positive integer"),
    "count": (lambda value: _integer(value, 0), "an integer, 0 or more"),
    "probability": (lambda value: _number(value, 1), "a probability from 0 to 1"),
    "scale": (lambda value: _number(value, sys.float_info.max), "a finite number, 0 or more"),
    "flag": (lambda value: isinstance(value, bool), "True or False"),
}


def _expect_all(config, **fields: str) -> None:
    """fields: kind=names of fields; behind a name, "?" says that None is allowed."""
    for kind, names in fields.items():
        good, expected = _KINDS[kind]
        for argument, optional, _ in (name.partition("?") for name in names.split()):
            value = getattr(config, argument)
            none = " or None" if optional else ""
            _expect(config, argument, good(value) or (value is None and bool(optional)), expected + none)
    _expect(config, "problem_type", config.problem_type in (None, *PROBLEMS), f"None or one of {PROBLEMS}")
    known(type(config).__name__, config.backend)


class ConvSeq2SeqConfig(PreTrainedConfig):
    """Configuration of the encoder-decoders of Tay et al. 2021, "Are pre-trained convolutions better than pre-trained
    transformers?"; ``preset`` makes those of the paper. ValueError naming the field for a value that it cannot have.

    mixer: what mixes positions in both stacks: "transformer" (self-attention with T5's bucketed bias), "lightweight" or
        "dynamic" convolutions, symmetric in the encoder and causal in the decoder.
    encoder_kernel_size, decoder_kernel_size: number of taps, one for all layers or a list, one for each (what the paper
        calls dilated); the decoder's is by default the encoder's. dilation: distance between taps, likewise.
    num_filters: H, the number of different filters of a layer. conv_dim: channels inside the block, by default d_model.
    glu, pointwise: as in ``nn.GatedConv``. kernel_softmax: softmax over the taps. mask_query: as in
        ``nn.DynamicConv1d``. depthwise_bias: a bias behind the convolution. kernel_bias: a bias of the linear map that
        predicts dynamic filters.
    use_bias: biases of the linear maps; mixer_bias: of those in the convolutional block, by default use_bias.
    norm: "rms" or "layer"; norm_placement: "res_post" (x + norm(f(x)), the paper's text), "post" (norm(x + f(x)),
        fairseq's default) or "pre" (x + f(norm(x)), T5 and the released code); final_norm: one more behind each stack.
    feed_forward: "relu", "gelu" or "gated-gelu" (T5 1.1).
    positions: None, "learned" or "sinusoidal", added to the embeddings; position_offset: the row of the first position.
    relative_buckets, relative_max_distance: of T5's bias. head_dim: by default d_model / num_heads.
    scale_attention: divide scores by sqrt(head_dim); T5 does not. scale_embedding: multiply embeddings by
        sqrt(d_model). scale_output: divide the states before the output layer by sqrt(d_model), as T5 does where that
        layer is tied to the embeddings (the default).
    pair_attention: the number of the encoder layer behind which one layer of full self-attention stands, the paper's
        remedy for tasks on pairs of sentences given as one sequence (section 6.1).
    dual_encoder: the classifier takes two sequences, encoded apart.
    source_vocab_size: a vocabulary, and an embedding, of its own for the encoder.
    backend: of all operators.
    """

    model_type = "conv_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # older and newer transformers
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "encoder_layers",
    }

    vocab_size: int = 32128
    source_vocab_size: int | None = None
    d_model: int = 768
    d_ff: int = 3072
    num_heads: int = 12
    head_dim: int | None = None
    encoder_layers: int = 12
    decoder_layers: int = 12
    mixer: str = "lightweight"
    encoder_kernel_size: int | list[int] = 7
    decoder_kernel_size: int | list[int] | None = None
    dilation: int | list[int] = 1
    num_filters: int = 2
    conv_dim: int | None = None
    glu: bool = True
    pointwise: bool = False
    kernel_softmax: bool = True
    mask_query: bool = False
    depthwise_bias: bool = False
    kernel_bias: bool = False
    use_bias: bool = False
    mixer_bias: bool | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_placement: str = "res_post"
    final_norm: bool = True
    feed_forward: str = "relu"
    positions: str | None = None
    max_positions: int = 512
    position_offset: int = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    scale_attention: bool = False
    scale_embedding: bool = False
    scale_output: bool | None = None
    pair_attention: int | None = None
    dual_encoder: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    input_dropout: float = 0.0
    weight_dropout: float = 0.0
    initializer_factor: float = 1.0
    backend: str = "auto"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        _expect_all(
            self,
            size="vocab_size source_vocab_size? d_model d_ff num_heads head_dim? num_filters conv_dim? max_positions"
            " relative_buckets relative_max_distance",
            count="encoder_layers decoder_layers position_offset pad_token_id? decoder_start_token_id?",
            probability="dropout attention_dropout activation_dropout input_dropout weight_dropout",
            scale="norm_eps initializer_factor",
            flag="glu pointwise kernel_softmax mask_query depthwise_bias kernel_bias use_bias mixer_bias? final_norm"
            " scale_attention scale_embedding scale_output? dual_encoder",
        )
        for argument, choices in (
            ("mixer", MIXERS),
            ("norm", ("rms", "layer")),
            ("norm_placement", ("res_post", "post", "pre")),
            ("feed_forward", ("relu", "gelu", "gated-gelu")),
            ("positions", (None, "learned", "sinusoidal")),
        ):
            _expect(self, argument, getattr(self, argument) in choices, f"one of {choices}")
        if self.head_dim is None:
            _expect(self, "num_heads", self.d_model % self.num_heads == 0, f"a divisor of d_model = {self.d_model}")
            self.head_dim = self.d_model // self.num_heads
        if self.conv_dim is None:
            self.conv_dim = self.d_model
        if self.mixer != "transformer":
            divides = self.conv_dim % self.num_filters == 0
            _expect(self, "num_filters", divides, f"a divisor of conv_dim = {self.conv_dim}")
        if self.mixer == "transformer" or self.pair_attention is not None:
            pairs = self.relative_buckets % 2 == 0 and self.relative_buckets >= 4
            _expect(self, "relative_buckets", pairs, "an even number, 4 or more")
            exact = self.relative_buckets // (2 if self.mixer == "transformer" else 4)
            far = self.relative_max_distance > exact
            _expect(self, "relative_max_distance", far, f"more than the {exact} distances with buckets of their own")
        if self.mixer_bias is None:
            self.mixer_bias = self.use_bias
        if self.scale_output is None:
            self.scale_output = self.tie_word_embeddings
        if self.decoder_kernel_size is None:
            self.decoder_kernel_size = self.encoder_kernel_size
        for argument, layers in (
            ("encoder_kernel_size", self.encoder_layers),
            ("decoder_kernel_size", self.decoder_layers),
            ("dilation", max(self.encoder_layers, self.decoder_layers)),
        ):
            value = getattr(self, argument)
            several = isinstance(value, (list, tuple)) and len(value) >= layers
            fits = all(_integer(one, 1) for one in (value if several else [value]))
            _expect(self, argument, fits, f"a positive integer or a list with one for each of {layers} layers")
        inside = self.pair_attention is None or (
            _integer(self.pair_attention, 1) and self.pair_attention <= self.encoder_layers
        )
        _expect(self, "pair_attention", inside, f"None or the number of an encoder layer, 1 to {self.encoder_layers}")
        super().__post_init__(**kwargs)

    def taps(self, stack: str, layer: int) -> tuple[int, int]:
        """Number of taps and dilation of a layer; stack: "encoder" or "decoder"."""
        taps, dilation = getattr(self, f"{stack}_kernel_size"), self.dilation
        return (
            taps if isinstance(taps, int) else taps[layer],
            dilation if isinstance(dilation, int) else dilation[layer],
        )

    @classmethod
    def preset(cls, mixer: str = "lightweight", size: str = "base", style: str = "paper", **changes):
        """A named configuration.

        mixer: "transformer" (T5), "lightweight", "dynamic", or "dilated" (lightweight with the paper's windows).
        size: "base" (12 + 12 layers of 768 channels, 3072 inside the feed-forward blocks, 12 heads), "small" (6 + 6 of
            512), "tiny" (2 + 2 of 32, for tests).
        style: "paper" (its equations: norm on the branch, no biases, 7 taps, 2 filters; the transformer is T5),
            "fairseq" (Wu et al.'s block: LayerNorm behind each residual sum, biases) or "released" (the code published
            with the paper: pre-norm, 9 taps, a filter for each channel, another linear map behind the convolution,
            learned positions).
        changes: fields to set otherwise.
        """
        for argument, value, choices in (
            ("mixer", mixer, (*MIXERS, "dilated")),
            ("size", size, tuple(SEQ2SEQ_SIZES)),
            ("style", style, tuple(SEQ2SEQ_STYLES)),
        ):
            expect(f"{cls.__name__}.preset", argument, value in choices, f"one of {choices}", value)
        options = {**SEQ2SEQ_SIZES[size], **SEQ2SEQ_STYLES[style], "mixer": mixer}
        if mixer == "transformer":
            options |= dict(mixer_bias=None, positions=None)
        if mixer == "transformer" and style == "paper":
            options |= dict(norm_placement="pre")
        if style == "released":
            options |= dict(num_filters=options["d_model"], encoder_kernel_size=9)
        if mixer == "dilated":
            options |= dict(mixer="lightweight", encoder_kernel_size=WINDOWS[size])
        return cls(**(options | changes))


# Chang et al. 2021, tables 1 to 3, 6 and 7: arguments of CompositeAttention, windows of 8 positions to each side.
COMPOSITE = dict(bias=True, query_rel=True)
BERT_VARIANTS = {
    "none": dict(),
    "absolute": dict(),
    "fixed": dict(bias=True),
    "dynamic": dict(query_rel=True),
    "composite": COMPOSITE,
    "composite-key": dict(COMPOSITE, key_rel=True),
    "depthwise": dict(value_conv=True),
    "composite-depthwise": dict(COMPOSITE, value_conv=True),
    "conv-qk": dict(query_key="mixed"),
    "conv-v": dict(value="mixed"),
    "conv-qkv": dict(query_key="mixed", value="mixed"),
    "composite-conv-qk": dict(COMPOSITE, query_key="mixed"),
    "composite-conv-v": dict(COMPOSITE, value="mixed"),
    "composite-conv-qkv": dict(COMPOSITE, query_key="mixed", value="mixed"),
    "convbert": dict(span="key"),
    "convbert-absolute": dict(span="key"),
    "convbert-output": dict(span="output", span_mask=True),
}
# Table 4.
BERT_SIZES = {
    "base": dict(embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "small": dict(embedding_size=128, hidden_size=256, num_attention_heads=4, intermediate_size=1024),
    "tiny": dict(
        vocab_size=256, embedding_size=16, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        num_hidden_layers=2,
    ),
}  # fmt: skip


class CompositeBertConfig(PreTrainedConfig):
    """Configuration of the BERTs of Chang et al. 2021, "Convolutions and self-attention: re-interpreting relative
    positions in pre-trained language models"; ``preset`` makes those of the paper. ValueError naming the field for a
    value that it cannot have.

    attention: arguments of ``nn.CompositeAttention`` beside its sizes: window, bias, query_rel, value_conv, span, ...
    absolute_positions: add learned embeddings of absolute positions.
    embedding_size: of the tokens; where it differs from hidden_size a linear map stands between.
    backend: of all operators.
    The other fields are BERT's.
    """

    model_type = "composite_bert"

    vocab_size: int = 30004
    embedding_size: int = 128
    hidden_size: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    attention: dict | None = None
    absolute_positions: bool = False
    max_position_embeddings: int = 128
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    backend: str = "auto"
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        _expect_all(
            self,
            size="vocab_size embedding_size hidden_size num_attention_heads intermediate_size max_position_embeddings"
            " type_vocab_size",
            count="num_hidden_layers pad_token_id?",
            probability="hidden_dropout_prob attention_probs_dropout_prob classifier_dropout?",
            scale="layer_norm_eps initializer_range",
            flag="absolute_positions",
        )
        divides = self.hidden_size % self.num_attention_heads == 0
        _expect(self, "num_attention_heads", divides, f"a divisor of hidden_size = {self.hidden_size}")
        known_act = isinstance(self.hidden_act, str) and self.hidden_act in ACT2FN
        _expect(self, "hidden_act", known_act, f"one of {tuple(ACT2FN)}")
        good = self.attention is None or isinstance(self.attention, dict)
        _expect(self, "attention", good, "None or a dictionary of arguments of CompositeAttention")
        self.attention = dict(self.attention or {})
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, variant: str = "composite", size: str = "small", **changes):
        """A named configuration: ``variant`` is a row of the paper's tables 1 to 3, ``size`` "small" or "base"
        (table 4) or "tiny", for tests.

        Variants: none, absolute (BERT's own positions), fixed, dynamic, composite, composite-key, depthwise,
        composite-depthwise; conv-qk, conv-v, conv-qkv (half of the heads), each also composite-...; convbert (the
        paper's re-implementation, which predicts filters at the key), convbert-absolute, and convbert-output (as
        published by Jiang et al. 2020, but blind to padding). changes: fields to set otherwise.
        """
        for argument, value, choices in (("variant", variant, BERT_VARIANTS), ("size", size, BERT_SIZES)):
            expect(f"{cls.__name__}.preset", argument, value in choices, f"one of {tuple(choices)}", value)
        options = dict(
            BERT_SIZES[size],
            attention=dict(BERT_VARIANTS[variant]),
            absolute_positions=variant.endswith("absolute"),
        )
        return cls(**(options | changes))
