"""One layer of models of transformers whose attention has relative positions, before and after ``optimize``.

Layers are as large as those of the models named, feed-forward blocks included. Inkling's has 16 of its 64 heads, of 64
channels, and next to no feed-forward block.
"""

import pytest
import torch

from benchmarks.suites import BOTH, FORWARD
from convkernels.ops._dtypes import dtype_name

transformers = pytest.importorskip("transformers")
parakeet = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")
inkling = pytest.importorskip("transformers.models.inkling.modeling_inkling")
wavlm = pytest.importorskip("transformers.models.wavlm.modeling_wavlm")

from convkernels.interop import huggingface  # noqa: E402 (needs transformers)

SPEECH = dict(hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, num_hidden_layers=1)
QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_layers=1, vocab_size=64)


def states(B, T, C, **more):
    return dict(inputs_embeds=torch.randn(B, T, C), attention_mask=torch.ones(B, T, dtype=torch.int64), **more)


def t5(B, T):
    config = transformers.T5Config(d_model=768, d_ff=3072, num_layers=1, num_heads=12, vocab_size=64, dropout_rate=0.0)
    return transformers.T5EncoderModel(config), states(B, T, 768)


def deberta(B, T):
    config = transformers.DebertaV2Config(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, position_biased_input=False, type_vocab_size=0, hidden_size=768, num_attention_heads=12,
        intermediate_size=3072, **QUIET,
    )  # fmt: skip
    return transformers.DebertaV2Model(config), states(B, T, 768)


class ParakeetLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=1024, num_attention_heads=8, intermediate_size=4096, attn_implementation="sdpa")
        off = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "dropout_positions"), 0.0)
        config = parakeet.ParakeetEncoderConfig(**sizes, **off)
        self.layer = parakeet.ParakeetEncoderBlock(config, 0)
        self.positions = parakeet.ParakeetEncoderRelPositionalEncoding(config)

    def forward(self, x):
        return self.layer(x, position_embeddings=self.positions(x), attention_mask=None)


def parakeet_layer(B, T):
    return ParakeetLayer(), dict(x=torch.randn(B, T, 1024))


def wav2vec2_bert(B, T):
    config = transformers.Wav2Vec2BertConfig(**SPEECH, apply_spec_augment=False, conformer_conv_dropout=0.0)
    return transformers.Wav2Vec2BertModel(config), dict(input_features=torch.randn(B, T, 160))


class WavLMLayer(wavlm.WavLMEncoderLayer):
    def forward(self, x):
        return super().forward(x)[0]


def wavlm_layer(B, T):
    return WavLMLayer(transformers.WavLMConfig(**SPEECH)), dict(x=torch.randn(B, T, 768))


def bloom(B, T):
    config = transformers.BloomConfig(vocab_size=64, hidden_size=1024, n_layer=1, n_head=16)
    return transformers.BloomModel(config), states(B, T, 1024, use_cache=False)


def inkling_layer(kind):
    def built(B, T):
        heads = dict(num_attention_heads=16, num_key_value_heads=4, head_dim=64)
        config = inkling.InklingTextConfig(
            vocab_size=64, hidden_size=1024, num_hidden_layers=1, intermediate_size=64, mlp_layer_types=["dense"],
            layer_types=[kind], sliding_window_size=512, rel_extent=512, d_rel=16, attn_implementation="sdpa", **heads,
            **{f"swa_{name}": value for name, value in heads.items()},
        )  # fmt: skip
        return inkling.InklingTextModel(config), states(B, T, 1024, use_cache=False)

    return built


LAYERS = {
    "t5-base 4x512": (t5, 4, 512),
    "deberta-v3-base 8x128": (deberta, 8, 128),
    "deberta-v3-base 4x512": (deberta, 4, 512),
    "parakeet-0.6b 1x375": (parakeet_layer, 1, 375),
    "parakeet-0.6b 1x1500": (parakeet_layer, 1, 1500),
    "wav2vec2-bert 1x1500": (wav2vec2_bert, 1, 1500),
    "wavlm-base 1x1500": (wavlm_layer, 1, 1500),
    "bloom-560m 1x2048": (bloom, 1, 2048),
    "inkling window 1x2048": (inkling_layer("hybrid_sliding"), 1, 2048),
    "inkling global 1x2048": (inkling_layer("hybrid"), 1, 2048),
}


@pytest.mark.parametrize("form", ["convkernels", "transformers"])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(timed, benchmark, device, layer, dtype, direction, form):
    benchmark.group = f"{layer} {dtype_name(dtype)} {direction}"
    build, B, T = LAYERS[layer]
    torch.manual_seed(0)
    model, inputs = build(B, T)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else None
    model.to(device).train(direction == BOTH)
    inputs = {name: x.to(device) if torch.is_tensor(x) else x for name, x in inputs.items()}

    def run():
        out = model(**inputs)
        return out if torch.is_tensor(out) else out[0]

    with torch.no_grad():
        expected = run()
        assert huggingface.optimize(model).replaced
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        if form == "transformers":
            huggingface.restore(model)
        model.to(dtype)
        inputs = {n: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
        if direction == FORWARD:
            return timed(run)
        grad = torch.randn_like(run())
    parameters = list(model.parameters())
    timed(lambda: torch.autograd.grad(run(), parameters, grad, allow_unused=True))
