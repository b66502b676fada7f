"""Real model classes, tiny: which layers are sharded, what is in them, what is left alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ranks.launch import SIZE, World
from tests.ranks.layers import finish, join_world, model_groups, reference, whole
from tests.ranks.models import CONFIGS, create, engine_config, write

SELF = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
# Configuration, environment; the class vLLM builds, the attention in it, the sharded layers.
MODELS: dict[str, tuple[str, dict[str, str], str, str, list[str]]] = {
    "DeepSeek-V3": ("deepseek_v3", {}, "DeepseekV3ForCausalLM", "DeepseekV2MLAAttention", SELF),
    "DeepSeek-V3 without MLA": (
        "deepseek_v3",
        {"VLLM_MLA_DISABLE": "1"},
        "DeepseekV3ForCausalLM",
        "DeepseekV2Attention",
        SELF,
    ),
    "Qwen3-MoE": ("qwen3_moe", {}, "Qwen3MoeForCausalLM", "Qwen3MoeAttention", SELF),
    "GLM4-MoE": ("glm4_moe", {}, "Glm4MoeForCausalLM", "Glm4MoeAttention", SELF),
    "Kimi-VL": (
        "kimi_vl",
        {},
        "KimiVLForConditionalGeneration",
        "DeepseekV2MLAAttention",
        [f"language_model.{name}" for name in SELF],
    ),
}
VISION = [f"vision_tower.encoder.blocks.{i}.{name}" for i in (0, 1) for name in ("mlp.fc1", "wo")]


@pytest.mark.parametrize("name", MODELS)
def test_model(world: World, name: str, tmp_path: Path) -> None:
    world.run(model, name, write(CONFIGS[MODELS[name][0]], tmp_path), seconds=120)


def model(name: str, path: str) -> None:
    """In a rank: build the model, load it with its own `load_weights`, look at every layer."""
    from vllm.plugins import load_general_plugins

    _, env, _, _, _ = MODELS[name]
    join_world()
    with mock.patch.dict(os.environ, env | {SIZE: "2"}):
        load_general_plugins()
        config = engine_config(path)
        with model_groups(2, config=config):
            _look_at(name, config)


def _look_at(name: str, config: Any) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    from oproj_patch.sharding.layer import ShardedMixin

    _, _, model_class, attention, names = MODELS[name]
    # `check_model` has run in it.
    built = create(config)
    assert type(built).__name__ == model_class
    rank = config.parallel_config.data_parallel_rank
    layers = {k: m for k, m in built.named_modules() if isinstance(m, RowParallelLinear)}
    sharded: dict[str, Any] = {key: m for key, m in layers.items() if isinstance(m, ShardedMixin)}
    vision = [key for key in layers if "vision" in key]
    assert sorted(sharded) == names and sorted(vision) == (VISION if "VL" in name else [])
    assert {type(built.get_submodule(k.rpartition(".")[0])).__name__ for k in sharded} == {
        attention
    }
    weights = {
        key: whole(layer.output_size, layer.input_size, torch.float32, seed=index)
        for index, (key, layer) in enumerate(layers.items())
        if key in sharded or key in vision
    }
    built.load_weights((f"{key}.weight", weight) for key, weight in weights.items())
    for key, layer in layers.items():
        if key not in sharded:
            assert type(layer) is RowParallelLinear and layer.tp_size == 1, key
        if key in vision:
            assert torch.equal(layer.weight.data, weights[key])
    for key, layer in sharded.items():
        assert layer.tp_size == 2
        assert torch.equal(layer.weight.data, weights[key].chunk(2, 1)[rank])
        bias = None if layer.bias is None else layer.bias.data.fill_(0.5)
        finish(layer)
        x = whole(3 + rank, layer.input_size, torch.float32, seed=90 + rank)
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        assert float((output.double() - reference(x, weights[key], bias)).abs().max()) <= 5e-7
    caches = {
        prefix
        for prefix, module in config.compilation_config.static_forward_context.items()
        if hasattr(module, "kv_cache")
    }
    for key in sharded:
        block = key.rpartition(".")[0] + "."
        assert any(prefix.startswith(block) for prefix in caches), f"{key} has no cache beside it"
