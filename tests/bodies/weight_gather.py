"""In a rank: a sharded layer whose weight can be gathered, on both sides of the threshold."""

from __future__ import annotations

import types
from typing import Any

import torch

from .layer import build, load
from .world import groups, whole


def equal(
    dp: int,
    rows: list[list[int]],
    tp: int = 1,
    columns: int = 48,
    hidden: int = 20,
    dtype: str = "float32",
    bias: bool = False,
    packed: bool = False,
    transposed: bool = False,
    hidden_weight: bool = False,
    reload: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Errors and gathers of several steps; `rows[step][dp rank]` rows each.

    packed: let vLLM pack the weight for its CPU kernels, so that it cannot be read.
    transposed: keep the weight in the order [input, output], as many quant methods do.
    hidden_weight: a quant method that reads another tensor than the layer's parameter.
    reload: load other weights before every step.
    """
    import oproj_patch
    from oproj_patch import otp_group, row_parallel

    kind = getattr(torch, dtype)
    torch.set_default_dtype(kind)
    with groups(dp, tp) as config:
        from vllm.distributed import get_tensor_model_parallel_rank

        dp_rank = config.parallel_config.data_parallel_rank
        tp_rank = get_tensor_model_parallel_rank()
        layer = build("model.layers.0.self_attn.o_proj", hidden, columns, bias=bias, **options)
        # vLLM's own switch for layers that its CPU kernels do not pack.
        layer._cpu_skip_gemm_dispatch = not packed
        group = otp_group.require("the test")
        result: dict[str, Any] = {"errors": [], "gathers": []}

        def fill(seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            weight = whole(hidden, columns, kind, seed=seed)
            offset = whole(1, hidden, kind, seed=seed + 1)[0] if bias else None
            load(layer, weight, offset)
            layer.quant_method.process_weights_after_loading(layer)
            return weight, offset

        weight, offset = fill(0)
        if transposed:
            layer.weight.data = layer.weight.data.t().contiguous().t()
        if hidden_weight:
            other = layer.weight.detach().clone()
            layer.quant_method.apply = types.MethodType(
                lambda _, layer, x, bias=None: torch.nn.functional.linear(x, other, bias),
                layer.quant_method,
            )
        for step, counts in enumerate(rows):
            if reload:
                weight, offset = fill(10 + step)
            x = whole(counts[dp_rank], columns, kind, seed=1000 * step + dp_rank)
            mine = x
            if layer.input_is_parallel:
                mine = x.chunk(tp, dim=-1)[tp_rank].contiguous()
            before = group.gathers
            with torch.inference_mode():
                output = layer(mine)[0]
            expected = x.double() @ weight.double().t()
            if offset is not None:
                expected = expected + offset.double()
            assert output.dtype == kind and output.shape == expected.shape
            scale = float(expected.abs().max()) if x.numel() else 1.0
            worst = float((output.double() - expected).abs().max()) if x.numel() else 0.0
            result["errors"].append(worst / scale)
            result["gathers"].append(group.gathers - before)
        result["threshold"] = layer.oproj.gather_from
        result["summary"] = row_parallel.summary(group)
        result["exchanges"] = oproj_patch.status().exchanges
        result["buffer"] = group.scratch["weight"].numel() if "weight" in group.scratch else 0
    return result
