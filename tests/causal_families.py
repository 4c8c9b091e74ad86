"""The model families of transformers that convolve causally, small and with random parameters, and inputs for them."""

from dataclasses import dataclass, field

import pytest
import torch
import transformers

from convkernels.interop import causal_conv1d

# Fields of their configurations, for those that have them. The seeds of the tests decide all else.
SMALL = dict(
    vocab_size=64, unpadded_vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_head_dim=16, sliding_window=8,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4, rel_extent=16,
    mamba_n_heads=8, mamba_d_ssm=64, mamba_d_state=8, mamba_chunk_size=8, mamba_num_heads=8, mamba_head_dim=8,
    mamba_n_groups=2, mamba_ngroups=2, n_groups=2, num_heads=8, state_size=8, ssm_state_size=8, chunk_size=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_head_dim=16, linear_num_heads=4, kv_lora_rank=8, q_lora_rank=8, v_head_dim=8, qk_nope_head_dim=8,
    qk_rope_head_dim=8, index_topk=4, index_kpool=2, index_head_dim=8, index_n_heads=2, adapter_rank=4,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, shared_intermediate_size=16,
    moe_shared_expert_intermediate_size=16, num_experts=4, n_routed_experts=4, num_local_experts=4,
    num_experts_per_tok=2, num_experts_per_token=2, n_group=1, topk_group=1, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    model: str
    module: str  # the class whose convolutions are replaced
    changes: dict = field(default_factory=dict)  # of SMALL


FAMILIES = {
    "bailing_hybrid": Family(
        "BailingHybridForCausalLM", "BailingHybridDeltaAttention",
        dict(layer_group_size=2, first_k_dense_replace=1, num_key_value_heads=4),
    ),
    "bamba": Family("BambaForCausalLM", "BambaMixer", dict(attn_layer_indices=[1], mamba_d_head=8)),
    "falcon_h1": Family("FalconH1ForCausalLM", "FalconH1Mixer", dict(mamba_d_head=8)),
    "falcon_mamba": Family("FalconMambaForCausalLM", "FalconMambaMixer"),
    "glm5_next": Family(
        "Glm5NextForConditionalGeneration", "Glm5NextTextLinearAttention",
        dict(num_key_value_heads=4, qk_rope_head_dim=0),
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM", "GraniteMoeHybridMambaLayer",
        dict(layer_types=["mamba", "attention"] * 2, mamba_d_head=8),
    ),
    "inkling": Family("InklingForCausalLM", "InklingShortConvolution"),
    "inkling2": Family("Inkling2ForCausalLM", "Inkling2ShortConvolution"),
    "inkling2_loop": Family("Inkling2LoopForCausalLM", "Inkling2LoopShortConvolution"),
    "jamba": Family("JambaForCausalLM", "JambaMambaMixer", dict(attn_layer_period=2, attn_layer_offset=1)),
    "kimi_linear": Family(
        "KimiLinearForCausalLM", "KimiLinearDeltaAttention",
        dict(layer_types=["linear_attention", "full_attention"] * 2, num_key_value_heads=4),
    ),
    "lara_mini": Family("LaraMiniForCausalLM", "LaraMiniGatedDeltaNet"),
    "lfm2": Family("Lfm2ForCausalLM", "Lfm2ShortConv", dict(layer_types=["conv", "full_attention"] * 2)),
    "lfm2_moe": Family("Lfm2MoeForCausalLM", "Lfm2MoeShortConv", dict(layer_types=["conv", "full_attention"] * 2)),
    "lfm3": Family("Lfm3ForCausalLM", "Lfm3ShortConv"),
    "mamba": Family("MambaForCausalLM", "MambaMixer"),
    "mamba2": Family("Mamba2ForCausalLM", "Mamba2Mixer"),
    "nemotron_h": Family("NemotronHForCausalLM", "NemotronHMamba2Mixer"),
    "olmo_hybrid": Family("OlmoHybridForCausalLM", "OlmoHybridGatedDeltaNet"),
    "qwen3_5": Family("Qwen3_5ForCausalLM", "Qwen3_5GatedDeltaNet"),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", "Qwen3_5MoeGatedDeltaNet"),
    "qwen3_next": Family("Qwen3NextForCausalLM", "Qwen3NextGatedDeltaNet"),
    "qwen4_exp": Family(
        "Qwen4ExpForCausalLM", "Qwen4ExpTextGatedDeltaNet",
        dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2,
             hc_lowrank=8, ple_layer_ids=[1], ple_embed_dim=32, heads_per_ngram=2, ngram_vocab_size_base=50,
             make_ngram_vocab_size_divisible_by=8, split_ngram_parts=2, eos_token_id=62),
    ),
    "zamba": Family("ZambaForCausalLM", "ZambaMambaMixer", dict(num_hidden_layers=8, mamba_n_heads=2, n_mamba_heads=2)),
    "zamba2": Family(
        "Zamba2ForCausalLM", "Zamba2MambaMixer",
        dict(layers_block_type=["linear_attention", "hybrid"] * 2, n_mamba_heads=8),
    ),
}  # fmt: skip


def built(name, **changes):
    """A model of that family, in evaluation."""
    if not hasattr(transformers, FAMILIES[name].model):
        pytest.skip(f"transformers {transformers.__version__} has no {FAMILIES[name].model}")
    made = getattr(transformers, FAMILIES[name].model)
    torch.manual_seed(0)
    model = made(config_of(made.config_class, FAMILIES[name].changes | changes))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            wide = ".conv" in parameter_name  # so that what is left of a convolution is not rounding
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if wide else 0.1)
    return model.eval()


def config_of(kind, changes):
    parts = getattr(kind, "sub_configs", {})
    if "text_config" in parts:
        return kind(**{name: config_of(part, changes).to_dict() for name, part in parts.items()}, image_token_id=63)
    known = {name: value for name, value in (SMALL | changes).items() if name in dir(kind) or name in changes}
    return kind(**known)


def tokens(T=11):
    torch.manual_seed(1)
    return torch.randint(2, 60, (2, T))


def near(actual, expected, tolerance=1e-5):
    """Equal to the tolerance, relative to the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def counted(monkeypatch):
    """A list that gets the names of the functions of interop.causal_conv1d as they are called."""
    names = []
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        monkeypatch.setattr(causal_conv1d, name, _noted(names, name, getattr(causal_conv1d, name)))
    return names


def _noted(names, name, function):
    def noted(*args, **options):
        names.append(name)
        return function(*args, **options)

    return noted
