"""Stand-ins, in plain torch, for DeepSeek V4's CPU kernels where the build lacks them.

vLLM builds them for processors with AVX-512 only. Test support: layers without compression.
"""

from typing import Any

import torch
from vllm.model_executor.kernels import mhc

from tests.graphs import emulator

ROPE = 64
"""Trailing values of a head that a position turns, in pairs of neighbors."""


def convert_weight_packed(weight: torch.Tensor) -> torch.Tensor:
    return weight.clone()


def bmm_cpu(
    out: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, is_vnni: bool,
    scale: torch.Tensor | None,
) -> None:  # fmt: skip
    out.copy_(mat1 @ mat2.transpose(1, 2))


def _turned(
    x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, way: int
) -> torch.Tensor:
    """Turn the trailing values of x [rows, heads, dim], in float32; way: 1, or -1 for back."""
    x = x.float()
    cos, sin = table[positions].float().unsqueeze(1).chunk(2, -1)
    even, odd = x[..., -ROPE::2], x[..., -ROPE + 1 :: 2]
    both = torch.stack((even * cos - way * odd * sin, odd * cos + way * even * sin), -1)
    return torch.cat((x[..., :-ROPE], both.flatten(-2)), -1)


def inverse_gptj_rope_o_proj_cpu(
    o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, rope_dim: int
) -> torch.Tensor:
    return _turned(o, positions, cos_sin_cache, -1)


def fused_qnorm_rope_kv_insert_cpu(
    q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor,
    slot_mapping: torch.Tensor, cos_sin_cache: torch.Tensor, q_head_padded: int, eps: float,
    cache_block_size: int,
) -> torch.Tensor:  # fmt: skip
    """Write a token's key in one byte a value, but for the turned ones, which take two."""
    normed = torch.nn.functional.rms_norm(q.float(), (q.shape[-1],), eps=eps)
    keys = _turned(kv.unsqueeze(1), positions, cos_sin_cache, 1)[:, 0]
    known = slot_mapping >= 0
    keys, slots = keys[: len(slot_mapping)][known], slot_mapping[known]
    nope = keys[:, :-ROPE].to(torch.float8_e4m3fn).view(torch.uint8)
    rope = keys[:, -ROPE:].to(torch.bfloat16).contiguous().view(torch.uint8)
    width = cache.shape[1] // cache_block_size
    at = (slots // cache_block_size), (slots % cache_block_size)
    pages = cache.view(cache.shape[0], cache_block_size, width)
    pages[(*at, slice(0, nope.shape[1] + rope.shape[1]))] = torch.cat((nope, rope), 1)
    return _turned(normed, positions, cos_sin_cache, 1).to(q.dtype)


def flash_mla_with_kvcache_cpu(
    out: torch.Tensor, q: torch.Tensor, window_cache: torch.Tensor, window_slots: torch.Tensor,
    window_block_size: int, compressed_cache: torch.Tensor, compressed_slots: torch.Tensor,
    compressed_block_size: int, attn_sink: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Attend over the window alone."""
    assert compressed_slots.shape[1] == 0
    dim, width = q.shape[-1], window_cache.shape[1] // window_block_size
    pages = window_cache.view(-1, window_block_size, width)
    slots = window_slots.clamp(min=0)
    rows = pages[slots // window_block_size, slots % window_block_size]
    nope = rows[..., : dim - ROPE].contiguous().view(torch.float8_e4m3fn).float()
    rope = rows[..., dim - ROPE : dim + ROPE].contiguous().view(torch.bfloat16).float()
    keys = torch.cat((nope, rope), -1)
    scores = torch.einsum("thd,tkd->thk", q.float(), keys) * scale
    scores = scores.masked_fill((window_slots < 0).unsqueeze(1), float("-inf"))
    sink = attn_sink.float()[: q.shape[1]].view(1, -1, 1).expand(q.shape[0], -1, 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    out.copy_(torch.einsum("thk,tkd->thd", weights.nan_to_num(), keys))


def biased_topk_cpu(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, correction_bias: torch.Tensor,
    topk: int, renormalize: bool, scoring_func: str, num_fused_shared_experts: int,
    routed_scaling_factor: float, apply_routed_scaling_factor_on_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    scores = torch.nn.functional.softplus(gating_output.float()).sqrt()
    ids = (scores + correction_bias).topk(topk, -1).indices
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * routed_scaling_factor
    return weights, ids.to(torch.int32)


def hc_head_fused_cpu(
    x: torch.Tensor, hc_fn: torch.Tensor, hc_scale: torch.Tensor, hc_base: torch.Tensor,
    hc_eps: float, norm_eps: float,
) -> torch.Tensor:  # fmt: skip
    flat = x.flatten(-2).float()
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    mix = torch.sigmoid(flat @ hc_fn.t() * hc_scale + hc_base) + hc_eps
    return (mix.unsqueeze(-1) * x.float()).sum(-2).to(x.dtype)


def hc_pre_fused_cpu(
    x: torch.Tensor, hc_fn: torch.Tensor, hc_scale: torch.Tensor, hc_base: torch.Tensor,
    hc_mult: int, sinkhorn_iters: int, rms_eps: float, hc_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    post, comb, layer_input = mhc.mhc_pre_torch(
        x, hc_fn, hc_scale, hc_base, rms_eps, hc_eps, hc_eps, 2.0, sinkhorn_iters
    )
    return layer_input, post.squeeze(-1), comb


def hc_post_fused_cpu(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    output: torch.Tensor = mhc.mhc_post_torch(x, residual, post.unsqueeze(-1), comb)
    return output


_library = torch.library.Library("_C", "FRAGMENT")


def stand_in() -> None:
    """Register those that this build of vLLM lacks."""
    kernels: dict[str, list[Any]] = {
        "out": [bmm_cpu, flash_mla_with_kvcache_cpu],
        "cache": [fused_qnorm_rope_kv_insert_cpu],
        "": [
            convert_weight_packed, inverse_gptj_rope_o_proj_cpu, biased_topk_cpu,
            hc_head_fused_cpu, hc_pre_fused_cpu, hc_post_fused_cpu,
        ],
    }  # fmt: skip
    for mutated, those in kernels.items():
        for kernel in those:
            if hasattr(torch.ops._C, kernel.__name__):
                continue
            schema = torch.library.infer_schema(kernel, mutates_args=[mutated] if mutated else ())
            _library.define(kernel.__name__ + schema)
            recorded = emulator.as_kernel(kernel, kernel.__name__)
            _library.impl(kernel.__name__, recorded, "CompositeImplicitAutograd")
