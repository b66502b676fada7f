"""In a rank on the newest vllm-ascend: DeepSeek V4 and V4.1 in fp8 blocks, as on an Ascend 950.

Stand-ins, in plain torch: the kernels that quantize rows to fp8 with a scale for 32 values and that
multiply them.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.ranks import v4
from tests.ranks.layers import on_grid, whole

from .ascend import forward_context

HIDDEN, GROUPS, RANK = 256, 8, 128
# Without compression no layer of V4.1 is a source of keys for others.
SOURCES: v4.Config = {
    "kv_source_layer_ids": [],
    "index_source_layer_ids": [],
    "engram_layer_ids": [],
    "candidate_source_layer_id": -1,
    "candidate_topk_blocks": 0,
    "candidate_block_size": 0,
}
CONFIG = v4.config(
    HIDDEN, GROUPS, 4, o_lora_rank=RANK, q_lora_rank=128, expert_dtype="fp4", **SOURCES
)


def check_blocks(config: Any) -> None:
    """Compare steps of both layers, and of wo_b alone, with float64."""
    import torch_npu

    from oproj_patch.hosts import deepseek_v4

    profiles: Any = importlib.import_module("vllm_ascend.device.hardware_profile")
    kinds: Any = importlib.import_module("vllm_ascend.device.hardware").AscendDeviceType
    newest = profiles.get_hardware_profile(kinds.A5)
    with (
        mock.patch.object(profiles, "_CURRENT_HARDWARE_PROFILE", newest),
        mock.patch.object(torch_npu, "npu_dynamic_mx_quant", quantized, create=True),
        mock.patch.object(torch_npu, "npu_transpose_quant_batchmatmul", by_group, create=True),
        mock.patch.object(torch_npu, "npu_quant_matmul", multiplied),
        mock.patch.object(torch_npu, "float8_e8m0fnu", torch.float8_e8m0fnu, create=True),
    ):
        for place, (version, outputs) in enumerate((v, b) for v in ("v4", "v41") for b in (1, 2)):
            with on_grid(2 // outputs, outputs):
                attention, weights = _attention(config, place, version)
            deepseek_v4.join(attention, ascend=True)
            assert (attention.wo_b.oproj.pair is not None) == (outputs == 1)
            _steps(config, attention, *weights)


def _attention(config: Any, place: int, version: str) -> tuple[Any, list[torch.Tensor]]:
    """Return vllm-ascend's attention, loaded, and what its two weights stand for."""
    from vllm_ascend.quantization.configs.fp8_config import AscendDeepseekV4FP8Config

    quant_config = AscendDeepseekV4FP8Config(True, "dynamic", None, [128, 128])
    config.quant_config = quant_config
    home: Any = importlib.import_module(f"vllm_ascend.models.deepseek_{version}.model")
    attention = getattr(home, f"Deepseek{version.upper()}Attention")(
        config, config.model_config.hf_config, 512, config.cache_config, quant_config,
        prefix=f"model.layers.{place}.self_attn",
    )  # fmt: skip
    shapes = {"wo_a": (GROUPS * RANK, v4.HEAD_DIM), "wo_b": (HIDDEN, GROUPS * RANK)}
    stand_for = []
    for seed, (name, shape) in enumerate(shapes.items()):
        layer = getattr(attention, name)
        weight, scale, dense = v4.in_blocks(whole(*shape, torch.float32, seed=seed))
        layer.weight.weight_loader(layer.weight, weight)
        layer.weight_scale.weight_loader(layer.weight_scale, scale)
        layer.quant_method.process_weights_after_loading(layer)
        stand_for.append(dense)
    return attention, stand_for


def _steps(config: Any, attention: Any, first: torch.Tensor, second: torch.Tensor) -> None:
    impl, name = attention.dsa_attn.dsa_attn.impl, attention.wo_b.oproj.name
    group, mine = attention.wo_b.oproj.group, config.parallel_config.data_parallel_rank
    for counts in ([3, 5], [4, -2], [-1, 3], [-1, -1]):
        rows = abs(counts[mine])
        output = torch.full((rows, HIDDEN), 7.0, dtype=torch.bfloat16)
        o = whole(rows, GROUPS * v4.HEAD_DIM, torch.bfloat16, seed=60 + mine) * 9
        o = o.view(rows, GROUPS, v4.HEAD_DIM)
        before = group.steps
        with torch.inference_mode(), forward_context(config, rows, None):
            if v41 := getattr(attention, "v41_impl", None):
                hidden = torch.zeros_like(output)
                if counts[mine] < 0:  # without metadata it returns before both layers
                    torch.ops.vllm.dsa_v41_forward(hidden, output, attention.v41_layer_name)
                else:
                    v41._project_output(attention, o, hidden, None, projected=output)
            elif counts[mine] < 0:  # a rank whose metadata have no token returns before both layers
                caches = {impl.swa_cache_layer.prefix: SimpleNamespace(num_actual_tokens=0)}
                impl.forward(name, o.flatten(1), (), caches, output=output)
            else:
                impl._forward_o_proj(o, output)
        assert group.steps == before + 1
        if counts[mine] < 0:
            assert not output.any()
            continue
        x = opened(*quantized(o)).double()
        z = torch.einsum("tgk,grk->tgr", x, first.view(GROUPS, RANK, -1)).flatten(1)
        expected = opened(*quantized(z.bfloat16())).double() @ second.t()
        error = float((output.double() - expected).abs().max() / expected.abs().max())
        assert error < 0.02, (counts, error)


def quantized(x: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [..., K] in fp8, and exponents [..., K / 64, 2] of its blocks of 32 values."""
    blocks = x.float().unflatten(-1, (-1, 32))
    exponents = blocks.abs().amax(-1).clamp(min=1e-30).log2().floor() - 8
    values = (blocks / 2.0 ** exponents.unsqueeze(-1)).clamp(-448, 448)
    scale = (exponents + 127).to(torch.uint8).unflatten(-1, (-1, 2))
    return values.to(torch.float8_e4m3fn).flatten(-2), scale


def opened(values: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return what `quantized` values stand for, in float32."""
    scale = 2.0 ** (exponents.view(torch.uint8).flatten(-2).float() - 127)
    return values.float() * scale.repeat_interleave(32, -1)


def by_group(
    x: torch.Tensor, weight: torch.Tensor, *, x1_scale: torch.Tensor, x2_scale: torch.Tensor,
    dtype: torch.dtype, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """Multiply x [rows, groups, K] by weight [groups, K, R]."""
    held = opened(weight.transpose(1, 2), x2_scale.view(torch.uint8).transpose(1, 2).contiguous())
    return torch.einsum("tgk,grk->tgr", opened(x, x1_scale), held).to(dtype)


def multiplied(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, pertoken_scale: torch.Tensor,
    output_dtype: torch.dtype, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """Multiply x [rows, K] by weight [K, N]."""
    held = opened(weight.t(), scale.transpose(0, 1).contiguous())
    return (opened(x, pertoken_scale) @ held.t()).to(output_dtype)
