"""Real model classes, tiny: which layers are sharded, what is in them, what is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bodies.model_configs import CONFIGS, write
from tests.warm import Warm

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
SELF = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
# What it is called here -> its configuration, and the environment it is built in.
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "DeepSeek-V3": ("deepseek_v3", {}),
    "DeepSeek-V3 without MLA": ("deepseek_v3", {"VLLM_MLA_DISABLE": "1"}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "GLM4-MoE": ("glm4_moe", {}),
    "Kimi-VL": ("kimi_vl", {}),
}
# The class vLLM builds, the attention in it, the layers that are sharded.
EXPECTED: dict[str, tuple[str, str, list[str]]] = {
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV2MLAAttention", SELF),
    "DeepSeek-V3 without MLA": ("DeepseekV3ForCausalLM", "DeepseekV2Attention", SELF),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeAttention", SELF),
    "GLM4-MoE": ("Glm4MoeForCausalLM", "Glm4MoeAttention", SELF),
    "Kimi-VL": (
        "KimiVLForConditionalGeneration",
        "DeepseekV2MLAAttention",
        [f"language_model.{name}" for name in SELF],
    ),
}
VISION = [f"vision_tower.encoder.blocks.{i}.{name}" for i in (0, 1) for name in ("mlp.fc1", "wo")]


@pytest.fixture(scope="module")
def built(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    models = {
        name: {"path": write(CONFIGS[config], tmp_path_factory.mktemp(config)), "env": env}
        for name, (config, env) in MODELS.items()
    }
    return warm.run(
        2, "tests.bodies.models:told", {"models": models, "dp": 2}, env={TOGGLE: "2"}, seconds=240
    )


@pytest.mark.parametrize("name", MODELS)
def test_model(built: list[dict[str, Any]], name: str) -> None:
    model, attention, sharded = EXPECTED[name]
    for of_rank in built:
        told = of_rank[name]
        assert "error" not in told, told["error"]
        assert (told["model"], told["attention"]) == (model, [attention])
        assert sorted(told["sharded"]) == sharded
        for layer in told["sharded"].values():
            assert layer["exact"] and layer["ways"] == 2
            assert layer["error"] <= 5e-7
        assert told["without a cache"] == []
        for key, layer in told["plain"].items():
            assert layer["own class"] and layer["ways"] == 1, key


def test_vision_encoder_untouched(built: list[dict[str, Any]]) -> None:
    """vLLM's class itself, holding its whole weight bit for bit."""
    for of_rank in built:
        plain = of_rank["Kimi-VL"]["plain"]
        assert sorted(key for key in plain if "vision" in key) == VISION
        assert all(plain[key]["exact"] for key in VISION)
