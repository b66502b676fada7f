"""NPU kernels in plain torch, and what stands in for attention's, in a rank on a CPU."""

from __future__ import annotations

import contextlib
import importlib
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from oproj_patch.releases import in_range
from tests.ranks.layers import whole


def kernels() -> None:
    """Single NPU kernels of the layers around attention, in plain torch."""
    import torch_npu
    from vllm.platforms import current_platform

    def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def npu_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-6) -> Any:
        return rms(x, weight, epsilon), None

    def npu_add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-6
    ) -> Any:
        total = x + residual
        return rms(total, weight, epsilon), None, total

    def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        gate, up = x.chunk(2, dim)
        return torch.nn.functional.silu(gate) * up

    def npu_add_rms_norm_bias(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, _: Any, epsilon: float
    ) -> Any:
        return npu_add_rms_norm(x, residual, weight, epsilon)

    if in_range(metadata.version("vllm-ascend"), "0.27"):  # asks for its library, then its op
        from vllm_ascend import utils

        utils._CUSTOM_OP_ENABLED = False
        sys.modules["vllm_ascend.vllm_ascend_C"] = ModuleType("vllm_ascend_C")
        torch.ops._C_ascend.npu_add_rms_norm_bias = npu_add_rms_norm_bias
    torch_npu.npu_rms_norm = npu_rms_norm
    torch_npu.npu_add_rms_norm = npu_add_rms_norm
    torch_npu.npu_swiglu = npu_swiglu
    # 0.9.1 makes a mask for its experts on the device in each forward context.
    type(current_platform).device_type = "cpu"
    torch_npu._npu_reshape_and_cache = lambda **_: None
    torch_npu._npu_rotary_embedding = lambda *_: None
    torch_npu.npu_mrope = lambda _, query, key, *__, **___: (query, key)


def quantization_kernels() -> None:
    """Single NPU kernels of the quantized linear methods, in plain torch."""
    import torch_npu

    def quantize(x: torch.Tensor, scale: torch.Tensor, offset: Any, *_: Any) -> torch.Tensor:
        # vllm-ascend passes the reciprocal scale, in the input's dtype.
        moved = x.float() * scale.float() + (0 if offset is None else offset.float())
        return moved.round().clamp(-128, 127).to(torch.int8)

    def npu_dynamic_quant(x: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.float().abs().amax(-1) / 127
        return (x.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale

    def npu_quant_matmul(
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        pertoken_scale: torch.Tensor | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
        **_: Any,
    ) -> torch.Tensor:
        total = x.long() @ weight.long()
        if bias is not None:
            total = total + bias.long()
        result = total.double() * scale.double()
        if pertoken_scale is not None:
            result = result * pertoken_scale.double().unsqueeze(-1)
        return result.to(output_dtype)

    def npu_weight_quant_batchmatmul(
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        antiquant_scale: torch.Tensor,
        antiquant_group_size: int,
        **_: Any,
    ) -> torch.Tensor:
        scale = antiquant_scale.double().repeat_interleave(antiquant_group_size, 0)
        return (x.double() @ (weight.double() * scale)).to(x.dtype)

    torch_npu.npu_quantize = quantize
    torch_npu.npu_dynamic_quant = npu_dynamic_quant
    torch_npu.npu_quant_matmul = npu_quant_matmul
    torch_npu.npu_weight_quant_batchmatmul = npu_weight_quant_batchmatmul
    torch_npu.npu_convert_weight_to_int4pack = lambda weight, *_: weight


def torchair_kernels() -> None:
    """Single NPU kernels of torchair's attention, in plain torch: positions have no effect."""
    import torch_npu

    def npu_kv_rmsnorm_rope_cache(
        kv: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any
    ) -> Any:
        nope, rope = kv.split([weight.shape[0], kv.shape[-1] - weight.shape[0]], -1)
        return rope, nope, rope, nope

    with contextlib.suppress(ModuleNotFoundError):
        rotary = importlib.import_module("vllm_ascend.torchair.ops.torchair_rotary_embedding")
        # Makes its tables on the NPU.
        setattr(rotary, "__set_cos_sin_cache", lambda *_, **__: None)
    torch_npu.npu_kv_rmsnorm_rope_cache = npu_kv_rmsnorm_rope_cache
    torch_npu.npu_interleave_rope = lambda x, *_: x


def attentions(model: Any) -> list[Any]:
    """Return the attention layers of a model; from 0.30 on their indexers are layers too."""
    layers = [module for module in model.modules() if hasattr(module, "impl")]
    return [layer for layer in layers if "Indexer" not in type(layer.impl).__name__]


def kernels_stood_in(layer: Any) -> None:
    """Stand in for the kernels of one attention layer, by its implementation."""
    name = type(layer.impl).__name__
    if "MLA" in name:
        Attention(layer, layer.impl)
    elif "SFA" in name:
        SparseAttention(layer, layer.impl)
    else:
        GroupedQueryAttention(layer.impl)


class Attention:
    """Stands in for the kernels between an MLA implementation's input and its o_proj."""

    def __init__(self, layer: Any, impl: Any) -> None:
        self.columns = impl.num_heads * impl.v_head_dim
        # One cache per virtual engine, or the cache itself, according to the release.
        layer.kv_cache = torch.empty(2, 2, 2, 2)
        impl._mla_preprocess = self.preprocess
        impl._q_proj_and_k_up_proj = self.project
        impl.rotary_emb = lambda _, q_pe, k_pe: (q_pe, k_pe)
        impl._forward_decode = self.decode

    def preprocess(self, _: Any, hidden_states: torch.Tensor, *__: Any, **___: Any) -> Any:
        return SimpleNamespace(
            ql_nope=hidden_states, q_pe=None, k_nope=None, k_pe=None, dequant_scale_q_nope=None
        ), None

    def project(self, q_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q_c, torch.zeros(q_c.shape[0], 1, 1)

    def decode(self, given: Any, *_: Any, **__: Any) -> torch.Tensor:
        hidden_states = getattr(given, "ql_nope", given)  # from 0.30 on, what `preprocess` made
        mix = whole(self.columns, hidden_states.shape[-1], torch.float32, seed=7)
        return hidden_states @ mix.t()


class SparseAttention:
    """The same for an SFA implementation, whose steps have other names in 0.11."""

    def __init__(self, layer: Any, impl: Any) -> None:
        import torch_npu

        self.columns = impl.num_heads * impl.v_head_dim
        layer.kv_cache = torch.empty(4, 4, 4, 4)
        torch_npu.npu_scatter_nd_update_ = lambda *_: None
        if hasattr(impl, "_sfa_preprocess"):
            impl._sfa_preprocess = self.preprocess
            impl.apply_attention_fusion = self.fused
            return
        impl.enable_mlapo = False  # one fused kernel for all that follows
        if hasattr(impl, "_compose_sfa_kv_cache"):  # from 0.26 on, of two layers' caches
            impl._compose_sfa_kv_cache = lambda cache: cache
        if hasattr(impl, "_get_indexer_attn_metadata"):  # from 0.30 on
            impl._get_indexer_attn_metadata = lambda: "some"
            impl.indexer = lambda *_, **__: None
            impl.use_index_cache = False
        impl.indexer_select_pre_process = lambda **_: (torch.zeros(1, 4), torch.zeros(1, 4))
        impl.indexer_select_post_process = lambda **_: None
        impl.exec_kv = lambda *_: (None, None)
        impl._q_proj_and_k_up_proj = lambda q_c: (q_c, None)
        impl.rope_single = lambda x, *_: x
        impl._execute_sparse_flash_attention_process = lambda query, *_: query
        torch.ops._C_ascend.npu_sparse_flash_attention = lambda query, **_: query  # in 0.13
        impl._v_up_proj = self.mixed

    def preprocess(self, hidden_states: torch.Tensor, *_: Any) -> Any:
        return SimpleNamespace(query_states=hidden_states, key_states=None, topk_indices=None), None

    def fused(self, query_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.mixed(query_states)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x @ whole(self.columns, x.shape[-1], torch.float32, seed=7).t()


class GroupedQueryAttention:
    """The query is the result; an idle rank's early return is the implementation's own."""

    def __init__(self, impl: Any) -> None:
        self.original = impl.forward
        impl.forward = self.forward

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, cache: Any, told: Any, *rest: Any,
        **given: Any,
    ) -> Any:  # fmt: skip
        if told is None:
            return self.original(layer, query, key, value, cache, told, *rest, **given)
        output = given["output"] if "output" in given else rest[0]  # 0.11.0 gives it by place
        return output.copy_(query.view_as(output))


class TorchairAttention:
    """Stands in for the attention kernels alone, between real projections."""

    def __init__(self, impl: Any) -> None:
        self.impl = impl
        impl._forward_decode = self.decode
        impl._forward_prefill = self.prefill

    def decode(self, q_nope: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        output: torch.Tensor = self.impl._v_up_proj_and_o_proj(q_nope)
        return output

    def prefill(self, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return query[..., : self.impl.v_head_dim].reshape(query.shape[0], -1)
