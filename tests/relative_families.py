"""The model families of transformers whose attention has relative positions, small and with random parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
import transformers
from causal_families import config_of

_SEQ2SEQ = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
    relative_attention_num_buckets=8, relative_attention_max_distance=9, decoder_start_token_id=0,
)  # fmt: skip
_ENCODER = dict(
    vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=40,
)  # fmt: skip
_SPEECH = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
    conv_kernel=(3, 3), conv_stride=(2, 1), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, feat_extract_norm="group", feat_proj_dropout=0.0, hidden_dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, apply_spec_augment=False, final_dropout=0.0,
    feat_proj_layer_norm=False, vocab_size=32, conv_depthwise_kernel_size=3, conformer_conv_dropout=0.0,
)  # fmt: skip
_SEAMLESS = dict(
    hidden_size=32, feature_projection_input_dim=12, speech_encoder_layers=2, speech_encoder_attention_heads=4,
    speech_encoder_intermediate_size=48, speech_encoder_dropout=0.0, speech_encoder_layerdrop=0.0,
    conv_depthwise_kernel_size=3, adaptor_dropout=0.0, add_adapter=False, left_max_position_embeddings=6,
    right_max_position_embeddings=2, max_source_positions=64, num_adapter_layers=1,
)  # fmt: skip
_DEBERTA = dict(
    relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=10, position_biased_input=False,
    type_vocab_size=0,
)  # fmt: skip
_BUCKETS = dict(position_buckets=6, norm_rel_ebd="layer_norm", share_att_key=True, conv_kernel_size=3)
_DECODER = dict(
    vocab_size=64, hidden_size=32, n_layer=2, num_hidden_layers=2, n_head=4, num_attention_heads=4, d_model=32,
    n_heads=4, n_layers=2, hidden_dropout=0.0, attention_dropout=0.0, max_seq_len=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=None,
)  # fmt: skip
_INKLING = dict(
    num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"], sliding_window_size=8, rel_extent=6,
    log_scaling_n_floor=4,
)  # fmt: skip
_INKLING2 = (
    "TextModel", "SlidingAttention", "FullAttention", "RelativePositionBias", "BlockAttentionResidual",
    "ShortConvolution", "DynamicShortConvolution",
)  # fmt: skip


def text(T: int = 21) -> dict:
    """Two rows of tokens, the second one with padding behind it."""
    ids = torch.randint(2, 60, (2, T))
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def texts() -> dict:
    return text() | dict(decoder_input_ids=torch.randint(2, 60, (2, 13)))


def left() -> dict:
    """The second row with padding before it."""
    given = text()
    return dict(input_ids=given["input_ids"], attention_mask=given["attention_mask"].flip(1))


def waves() -> dict:
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[1, -30:] = 0
    return dict(input_values=torch.randn(2, 90), attention_mask=mask)


def features(T: int = 23, size: int = 12) -> dict:
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[1, -7:] = 0
    return dict(input_features=torch.randn(2, T, size), attention_mask=mask)


@dataclass(frozen=True)
class Family:
    model: str  # a class of the family's file
    fields: dict
    inputs: Callable[[], dict]
    modules: frozenset  # the classes that change
    family: str = ""  # the folder of transformers.models, where it is not the name of the case
    output: str = "logits"
    causal: bool = False  # generates, and has its padding on the left
    single: bool = False  # the family's own code takes the softmax of float64 in float32


def _family(model, fields, inputs, *modules, **more) -> Family:
    return Family(model, fields, inputs, frozenset(modules), **more)


FAMILIES = {
    "bloom": _family("BloomForCausalLM", _DECODER, left, "BloomModel", "BloomAttention", causal=True, single=True),
    "bloom_6_heads": _family(
        "BloomForCausalLM", _DECODER | dict(n_head=6, hidden_size=48), left, "BloomModel", "BloomAttention",
        family="bloom", causal=True, single=True,
    ),
    "deberta": _family("DebertaForMaskedLM", _ENCODER | _DEBERTA, text, "DebertaEncoder", "DisentangledSelfAttention"),
    "deberta_v2": _family(
        "DebertaV2ForMaskedLM", _ENCODER | _DEBERTA, text, "DebertaV2Encoder", "DisentangledSelfAttention",
    ),
    "deberta_v3": _family(
        "DebertaV2ForTokenClassification", _ENCODER | _DEBERTA | _BUCKETS, text, "DebertaV2Encoder",
        "DisentangledSelfAttention", family="deberta_v2",
    ),
    "deberta_v2_c2p": _family(
        "DebertaV2ForMaskedLM",
        _ENCODER | _DEBERTA | dict(pos_att_type=["c2p"], position_buckets=6, hidden_size=32), text, "DebertaV2Encoder",
        "DisentangledSelfAttention", family="deberta_v2",
    ),
    "falcon": _family(
        "FalconForCausalLM", _DECODER | dict(alibi=True, multi_query=True), left, "FalconModel", "FalconAttention",
        causal=True,
    ),
    "falcon_groups": _family(
        "FalconForCausalLM", _DECODER | dict(alibi=True, new_decoder_architecture=True, num_kv_heads=2), left,
        "FalconModel", "FalconAttention", family="falcon", causal=True,
    ),
    "inkling": _family(
        "InklingForCausalLM", _INKLING, left, "InklingAttention", "InklingRelativeLogits", "InklingShortConvolution",
        causal=True, single=True,
    ),
    "inkling2": _family(
        "Inkling2ForCausalLM", _INKLING, left, *(f"Inkling2{part}" for part in _INKLING2), causal=True, single=True,
    ),
    "inkling2_loop": _family(
        "Inkling2LoopForCausalLM", _INKLING, left, *(f"Inkling2Loop{part}" for part in _INKLING2),
        "Inkling2LoopMessageAttentionResidual", causal=True, single=True,
    ),
    "mpnet": _family("MPNetForMaskedLM", _ENCODER, text, "MPNetEncoder", "MPNetSelfAttention"),
    "mpt": _family("MptForCausalLM", _DECODER, left, "MptAttention", causal=True, single=True),
    "mt5": _family("MT5ForConditionalGeneration", _SEQ2SEQ, texts, "MT5Attention"),
    "parakeet": _family(
        "ParakeetForCTC",
        dict(vocab_size=32, encoder_config=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_mel_bins=80,
            subsampling_factor=2, subsampling_conv_channels=8, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
            activation_dropout=0.0, dropout_positions=0.0,
        )),
        lambda: features(60, 80), "ParakeetEncoderAttention",
    ),
    "pop2piano": _family(
        "Pop2PianoForConditionalGeneration", _SEQ2SEQ | dict(composer_vocab_size=4), texts, "Pop2PianoAttention",
    ),
    "seamless_m4t": _family(
        "SeamlessM4TSpeechEncoder", _SEAMLESS | dict(position_embeddings_type="relative"), features,
        "SeamlessM4TConformerSelfAttention", output="last_hidden_state",
    ),
    "seamless_m4t_v2": _family(
        "SeamlessM4Tv2SpeechEncoder", _SEAMLESS | dict(position_embeddings_type="relative_key"), features,
        "SeamlessM4Tv2ConformerEncoder", "SeamlessM4Tv2ConformerSelfAttention", output="last_hidden_state",
    ),
    "sew_d": _family(
        "SEWDForCTC", _SPEECH | _DEBERTA | dict(squeeze_factor=2, hidden_dropout_prob=0.0, hidden_size=48), waves,
        "SEWDTransformerEncoder", "DisentangledSelfAttention",
    ),
    "switch_transformers": _family(
        "SwitchTransformersForConditionalGeneration", _SEQ2SEQ | dict(num_experts=2, expert_capacity=64), texts,
        "SwitchTransformersAttention",
    ),
    "t5": _family("T5ForConditionalGeneration", _SEQ2SEQ, texts, "T5Attention"),
    "umt5": _family(  # whose decoder is not causal under SDPA in transformers 5.17
        "UMT5ForConditionalGeneration", _SEQ2SEQ | dict(attn_implementation="eager"), texts, "UMT5Attention",
    ),
    "wav2vec2_bert": _family(
        "Wav2Vec2BertForCTC",
        _SPEECH | dict(feature_projection_input_dim=12, position_embeddings_type="relative_key",
                       left_max_position_embeddings=6, right_max_position_embeddings=2, add_adapter=True,
                       num_adapter_layers=1, output_hidden_size=32),
        features, "Wav2Vec2BertSelfAttention",
    ),
    "wav2vec2_bert_relative": _family(
        "Wav2Vec2BertForCTC",
        _SPEECH | dict(feature_projection_input_dim=12, position_embeddings_type="relative", max_source_positions=64),
        features, "Wav2Vec2BertSelfAttention", family="wav2vec2_bert",
    ),
    "wav2vec2_conformer": _family(
        "Wav2Vec2ConformerForCTC", _SPEECH | dict(position_embeddings_type="relative", max_source_positions=64), waves,
        "Wav2Vec2ConformerSelfAttention",
    ),
    "wavlm": _family("WavLMForCTC", _SPEECH | dict(num_buckets=16, max_bucket_distance=9), waves, "WavLMAttention"),
}  # fmt: skip


def _built(name: str):
    family = FAMILIES[name]
    folder = family.family or name
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    made = getattr(module, family.model)
    torch.manual_seed(0)
    kind = made.config_class
    model = made(config_of(kind, family.fields) if folder.startswith("inkling") else kind(**family.fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def made(name):
    """A model of that family, in evaluation, or a skip where the installed transformers has none."""
    try:
        return _built(name)
    except (ImportError, AttributeError):
        pytest.skip(f"transformers {transformers.__version__} has no {FAMILIES[name].model}")


def given(name, dtype=torch.float32):
    torch.manual_seed(1)
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in FAMILIES[name].inputs().items()}


def real(output, inputs):
    """Which rows of an output [B,T,...] do not belong to padding; of speech, whose frames are fewer, most of them."""
    B, T = output.shape[:2]
    mask = inputs["attention_mask"]
    if "decoder_input_ids" in inputs:
        return torch.ones(B, T, dtype=torch.bool)
    if mask.shape[1] == T:
        return mask.bool()
    lengths = mask.sum(1) * T // mask.shape[1] - 2
    lengths[mask.all(1)] = T
    return torch.arange(T) < lengths[:, None]
