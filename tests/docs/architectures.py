"""Every architecture of the newest vLLM that builds experts, and what becomes of its o_proj.

Tests compare the names with vLLM's registry and with what the package knows; another constructs
those of `CONSTRUCTED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.ranks import v4


def _of(name: str, model_type: str, **fields: Any) -> dict[str, Any]:
    """Return a configuration of four layers, for the class that has this name and type."""
    return {"model_type": model_type, "architectures": [name], "num_hidden_layers": 4, **fields}


_MTP = {"num_nextn_predict_layers": 1}
_DEEPSEEK = _of("DeepseekV3ForCausalLM", "deepseek_v3")
_DEEPSEEK_MTP = {**_DEEPSEEK, **_MTP, "num_experts": 8}
_QWEN = _of("Qwen3MoeForCausalLM", "qwen3_moe")
_SARVAM_MOE = {
    **_QWEN,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "score_function": None,
    "norm_topk_prob": True,
    "use_qk_norm": True,
    "moe_shared_expert_intermediate_size": 768,
    "head_dim": 128,
}
_BAILING_MOE = {
    **_SARVAM_MOE,
    "rotary_dim": 64,
    "moe_router_enable_expert_bias": False,
    "n_group": 1,
    "topk_group": 1,
    "hidden_act": "silu",
}
_BAILING = {
    **_DEEPSEEK,
    "num_experts": 8,
    "num_shared_experts": 1,
    "layer_group_size": 2,
    "use_bias": False,
    "use_qkv_bias": False,
    "head_dim": 128,
    "rope_theta": 10000.0,
    "moe_shared_expert_intermediate_size": 1024,
}
_BAILING_2_5 = {
    **_BAILING,
    "use_qk_norm": True,
    "group_norm_size": 4,
    "linear_silu": False,
    "partial_rotary_factor": 0.5,
}
_HY_V3 = _of(
    "HYV3ForCausalLM",
    "hy_v3",
    first_k_dense_replace=1,
    expert_hidden_dim=1024,
    num_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    route_norm=True,
)
_LONGCAT = _of(
    "LongcatFlashForCausalLM", "longcat_flash", mla_scale_q_lora=True, mla_scale_kv_lora=True
)
_MIMO_V2 = _of(
    "MiMoV2FlashForCausalLM",
    "mimo_v2_flash",
    hybrid_layer_pattern=[0, 1, 0, 1],
    moe_layer_freq=[0, 1, 1, 1],
    layernorm_epsilon=1e-06,
    swa_num_attention_heads=64,
    swa_num_key_value_heads=8,
    swa_head_dim=192,
    swa_v_head_dim=128,
    v_head_dim=128,
    sliding_window_size=128,
    attention_bias=False,
    n_routed_experts=8,
    swa_rope_theta=10000.0,
    rope_theta=1000000.0,
)

CONSTRUCTED: Mapping[str, dict[str, Any]] = {
    "AXK1ForCausalLM": _of("AXK1ForCausalLM", "axk1"),
    "AfmoeForCausalLM": _of(
        "AfmoeForCausalLM",
        "afmoe",
        score_func="sigmoid",
        route_norm=True,
        route_scale=1.0,
        n_group=1,
        topk_group=1,
    ),
    "AriaForConditionalGeneration": {
        "model_type": "aria",
        "architectures": ["AriaForConditionalGeneration"],
        "text_config": {"num_hidden_layers": 4, "model_type": "aria_text"},
    },
    "BailingMoeForCausalLM": _BAILING_MOE,
    "BailingMoeV25MTPModel": {**_BAILING_2_5, **_MTP},
    "BailingMoeV2ForCausalLM": _BAILING_MOE,
    "BailingMoeV2_5ForCausalLM": _BAILING_2_5,
    "BailingMoeV3ForCausalLM": {
        **_BAILING,
        "short_conv_kernel_size": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "vocab_size": 1024,
        "kda_safe_gate": False,
        "linear_attn_config": {},
        "no_kda_lora": True,
    },
    "BailingMoeV3MTPModel": {
        **_BAILING,
        **_MTP,
        "short_conv_kernel_size": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "Cohere2MoeForCausalLM": _of("Cohere2MoeForCausalLM", "cohere2_moe"),
    "DeepSeekMTPModel": _DEEPSEEK_MTP,
    "DeepseekForCausalLM": {**_DEEPSEEK, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0},
    "DeepseekV2ForCausalLM": _of(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        moe_intermediate_size=1536,
        intermediate_size=12288,
        first_k_dense_replace=1,
        n_routed_experts=8,
    ),
    "DeepseekV3BidirectionalModel": _DEEPSEEK,
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "DeepseekV4ForCausalLM": v4.config(256, 8, 4, compress_ratios=[0, 128, 4, 128]),
    "Eagle3DeepseekV2ForCausalLM": _DEEPSEEK_MTP,
    "Eagle3DeepseekV3ForCausalLM": _DEEPSEEK_MTP,
    "EagleMistralLarge3ForCausalLM": _DEEPSEEK_MTP,
    "Ernie4_5_MoeForCausalLM": _of("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
    "ExaoneMoEForCausalLM": _of("ExaoneMoeForCausalLM", "exaone_moe"),
    "ExaoneMoeForCausalLM": _of("ExaoneMoeForCausalLM", "exaone_moe"),
    "ExaoneMoeMTP": _of("ExaoneMoeForCausalLM", "exaone_moe", **_MTP),
    "FlexOlmoForCausalLM": _of("FlexOlmoForCausalLM", "flex_olmo"),
    "Gemma4ForCausalLM": _of(
        "Gemma4ForCausalLM",
        "gemma4_text",
        num_hidden_layers=6,
        num_experts=8,
        top_k_experts=2,
        enable_moe_block=True,
        moe_intermediate_size=512,
    ),
    "Glm4MoeForCausalLM": _of("Glm4MoeForCausalLM", "glm4_moe", head_dim=128),
    "Glm4MoeLiteForCausalLM": _of(
        "Glm4MoeLiteForCausalLM", "glm4_moe_lite", first_k_dense_replace=1
    ),
    "Glm4MoeLiteMTPModel": _of(
        "Glm4MoeLiteForCausalLM", "glm4_moe_lite", **_MTP, first_k_dense_replace=1
    ),
    "Glm4MoeMTPModel": _of("Glm4MoeForCausalLM", "glm4_moe", head_dim=128),
    "GptOssForCausalLM": _of("GptOssForCausalLM", "gpt_oss"),
    "GraniteMoeForCausalLM": _of("GraniteMoeForCausalLM", "granitemoe"),
    "GraniteMoeHybridForCausalLM": _of(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        layer_types=["mamba", "attention", "mamba", "attention"],
        layers_block_type=["mamba", "attention", "mamba", "attention"],
    ),
    "GraniteMoeSWAForCausalLM": _of("GraniteMoeSWAForCausalLM", "granitemoe_swa"),
    "GraniteMoeSharedForCausalLM": _of("GraniteMoeSharedForCausalLM", "granitemoeshared"),
    "HYV3ForCausalLM": _HY_V3,
    "HYV3MTPModel": {**_HY_V3, **_MTP},
    "HYV4ForCausalLM": _of("HYV4ForCausalLM", "hy_v4"),
    "HYV4MTPModel": _of("HYV4ForCausalLM", "hy_v4"),
    "HunYuanMoEV1ForCausalLM": _of(
        "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", head_dim=128, num_experts=8, moe_topk=2
    ),
    "JambaForCausalLM": _of("JambaForCausalLM", "jamba", num_hidden_layers=8),
    "JambaForSequenceClassification": _of(
        "JambaForSequenceClassification", "jamba", num_hidden_layers=8
    ),
    "KimiVLForConditionalGeneration": {
        "model_type": "kimi_vl",
        "architectures": ["KimiVLForConditionalGeneration"],
        "text_config": {
            "num_hidden_layers": 4,
            "model_type": "deepseek_v3",
            "n_routed_experts": 8,
            "moe_intermediate_size": 1024,
            "architectures": ["DeepseekV3ForCausalLM"],
        },
    },
    "LagunaForCausalLM": _of("LagunaForCausalLM", "laguna"),
    "Lfm2MoeForCausalLM": _of(
        "Lfm2MoeForCausalLM",
        "lfm2_moe",
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    ),
    "Llama4ForCausalLM": _of("Llama4ForCausalLM", "llama4_text"),
    "LongCatFlashMTPModel": _LONGCAT,
    "LongcatFlashForCausalLM": {
        **_LONGCAT,
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "hidden_dim": 6144,
        "hidden_act": "silu",
        "num_layers": 2,
        "moe_intermediate_size": 2048,
        "intermediate_size": 12288,
    },
    "MellumForCausalLM": _of("MellumForCausalLM", "mellum"),
    "MiMoV2FlashForCausalLM": _MIMO_V2,
    "MiMoV2ForCausalLM": _MIMO_V2,
    "MiniCPM3ForCausalLM": _of(
        "MiniCPM3ForCausalLM", "minicpm3", num_experts=8, num_experts_per_tok=2
    ),
    "MiniCPMForCausalLM": _of(
        "MiniCPM3ForCausalLM",
        "minicpm3",
        num_experts=8,
        num_experts_per_tok=2,
        num_key_value_heads=8,
    ),
    "MiniMaxM2ForCausalLM": _of(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        rotary_dim=64,
        scoring_func="sigmoid",
        use_routing_bias=True,
    ),
    "MistralLarge3ForCausalLM": _DEEPSEEK,
    "MixtralForCausalLM": _of("MixtralForCausalLM", "mixtral"),
    "OlmoeForCausalLM": _of("OlmoeForCausalLM", "olmoe"),
    "OpenPanguMTPModel": _DEEPSEEK_MTP,
    "PanguProMoEV2ForCausalLM": _DEEPSEEK,
    "PanguUltraMoEForCausalLM": _DEEPSEEK,
    "PhiMoEForCausalLM": _of("PhiMoEForCausalLM", "phimoe"),
    "Qwen2MoeForCausalLM": _of("Qwen2MoeForCausalLM", "qwen2_moe"),
    "Qwen3MoeForCausalLM": _QWEN,
    "Qwen3NextForCausalLM": _of("Qwen3NextForCausalLM", "qwen3_next"),
    "Qwen3NextMTP": _of("Qwen3NextForCausalLM", "qwen3_next"),
    "SarvamMLAForCausalLM": {
        **_DEEPSEEK,
        "num_experts": 8,
        "first_k_dense_replace": 1,
        "num_shared_experts": 1,
    },
    "SarvamMoEForCausalLM": _SARVAM_MOE,
    "Step3TextForCausalLM": _of("Step3TextForCausalLM", "step3_text", moe_layers_enum="1,2,3"),
    "Step3p5ForCausalLM": _of("Step3p5ForCausalLM", "step3p5", max_position_embeddings=4096),
    "TransformersMoEForCausalLM": _QWEN,
}
"""Sharded, and constructed on the meta device: what differs from the class's own defaults.

`architectures` and `model_type` name the class: another's where transformers and vLLM have none.
"""

NEWER = "0.33.0 has it, of which no build for a CPU was released"
"""Why rows that the newest release with such a build lacks were not constructed."""

READ: Mapping[str, tuple[str, ...]] = {
    NEWER: (
        "AliceAIForCausalLM",
        "BeamForCausalLM",
        "ClefFlashForJointSchema",
        "FlintForCausalLM",
        "Kolibri1ForCausalLM",
        "MiniCPMOcrForConditionalGeneration",
        "MuseSparkDSparkModel",
        "MuseSparkForConditionalGeneration",
        "Step5ForCausalLM",
        "Step5MTP",
        "TransformersMoEForMTP",
    ),
    "its module imports torchvision, which the tests' environment lacks": (
        "BailingMoeV3VLForConditionalGeneration",
        "ClefOmniForJointSchema",
        "ColQwen3_5",
        "Cosmos3EdgeForConditionalGeneration",
        "DiffusionGemmaForBlockDiffusion",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "Glm5NextForCausalLM",
        "Glm5NextForConditionalGeneration",
        "Glm5NextMTPModel",
        "InternS1ProForConditionalGeneration",
        "InternS2MobiusForConditionalGeneration",
        "InternS2MobiusMTP",
        "InternS2PreviewForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "MiMoV2OmniForCausalLM",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "MiniMaxM3MTP",
        "MiniMaxM3SparseForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
        "NemotronH_Nano_Omni_Reasoning_V3",
        "NemotronH_Nano_VL_V2",
        "NemotronH_Omni_Reasoning_V3",
        "NemotronH_Super_Omni_Reasoning_V3",
        "OpenPanguVLForConditionalGeneration",
        "Qwen3OmniMoeForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MTP",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeMTP",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpForConditionalGeneration",
        "Qwen4ExpMTP",
    ),
    "vLLM does not build it on a CPU or without memory": (
        "DSparkDraftModel",
        "DSparkV41DraftModel",
        "DeepSeekV4MTPModel",
        "DeepseekV32ForCausalLM",
        "DeepseekV32MTPModel",
        "DeepseekV41ForCausalLM",
        "DeepseekV4ForConditionalGeneration",
        "Dots3NoteForCausalLM",
        "Dots3NoteMTPModel",
        "GlmMoeDsaForCausalLM",
        "InklingForCausalLM",
        "InklingForConditionalGeneration",
        "InklingMTPModel",
        "KimiK25ForConditionalGeneration",
        "KimiK3ForConditionalGeneration",
        "KimiK3MTPModel",
        "KimiLinearForCausalLM",
        "LongcatFlashNgramForCausalLM",
        "NemotronHForCausalLM",
        "NemotronHMTPModel",
        "NemotronHPuzzleForCausalLM",
    ),
    "no configuration of it was made": (
        "DFlashLagunaForCausalLM",
        "EagleDeepSeekMTPModel",
        "EagleLlama4ForCausalLM",
        "EagleMiniCPMForCausalLM",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Exaone4_5_MTP",
        "GlmOcrMTPModel",
        "HfMoondream",
        "K2HorizonForCausalLM",
        "MiniCPMV",
        "Moondream3ForCausalLM",
        "PanguEmbeddedForCausalLM",
        "Param2MoEForCausalLM",
        "Step3p5MTP",
        "TransformersMoEEmbeddingModel",
        "TransformersMoEForSequenceClassification",
        "TransformersMultiModalMoEForCausalLM",
    ),
}
"""Sharded by what its source says, and not constructed: why not."""

REFUSED: Mapping[str, tuple[str, ...]] = {
    "`OPROJ004`: vLLM finds no number of experts in its configuration, so it runs the ranks as "
    "those of a dense model": ("DbrxForCausalLM",),
    "`OPROJ007`: its attention has no KV cache": (
        "EmbeddingGemma2Model",
        "OpenAIPrivacyFilterForTokenClassification",
    ),
}
"""Refused: code and reason."""


def rows() -> list[str]:
    """Return the architecture of every row of the table."""
    groups = [*READ.values(), *REFUSED.values()]
    return [*CONSTRUCTED, *(name for group in groups for name in group)]
