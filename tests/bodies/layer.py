"""In a rank: the sharded layer against the unsharded one."""

from __future__ import annotations

import os
from typing import Any

import torch

from .world import groups, whole


def build(prefix: str, hidden: int, columns: int, **options: Any) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(columns, hidden, prefix=prefix, **options)


def load(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.weight.weight_loader(layer.weight, weight)
    if bias is not None:
        layer.bias.weight_loader(layer.bias, bias)


def equal(
    dp: int,
    tp: int = 1,
    rows: list[list[int]] = [[3, 3]],  # noqa: B006
    columns: int = 48,
    hidden: int = 20,
    dtype: str = "float32",
    bias: bool = False,
    compiled: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Errors of the sharded layer for several steps; `rows[step][dp rank]` rows each."""
    import oproj_patch

    kind = getattr(torch, dtype)
    torch.set_default_dtype(kind)
    rank = int(os.environ["RANK"])
    with groups(dp, tp) as config:
        from vllm.distributed import get_tensor_model_parallel_rank

        dp_rank, tp_rank = config.parallel_config.data_parallel_rank, get_tensor_model_parallel_rank()
        layer = build("model.layers.0.self_attn.o_proj", hidden, columns, bias=bias, **options)
        weight = whole(hidden, columns, kind)
        offset = whole(1, hidden, kind, seed=1)[0] if bias else None
        load(layer, weight, offset)
        status = oproj_patch.status()
        shard = layer.weight.detach().clone()
        layer.quant_method.process_weights_after_loading(layer)
        forward = torch.compile(layer, fullgraph=True, dynamic=True) if compiled else layer
        result: dict[str, Any] = {
            "shard": list(shard.shape),
            "index": [i for i in range(0, columns, shard.shape[1])
                      if torch.equal(shard, weight[:, i : i + shard.shape[1]])],
            "errors": [], "scales": [], "ranks": list(status.otp_ranks),
            "kept": status.bytes_kept, "saved": status.bytes_saved, "layers": status.layers,
        }
        for step, counts in enumerate(rows):
            x = whole(max(counts[dp_rank], 0), columns, kind, seed=100 * step + dp_rank)
            mine = x
            if layer.input_is_parallel:
                mine = x.chunk(tp, dim=-1)[tp_rank].contiguous()
            with torch.inference_mode():
                output = forward(mine)
            expected = x.double() @ weight.double().t()
            told_bias = None
            if layer.return_bias:
                output, told_bias = output
            if bias and not options.get("skip_bias_add"):
                expected = expected + offset.double()
            if bias and options.get("skip_bias_add"):
                assert told_bias is not None and torch.equal(told_bias.data, offset)
            if not options.get("reduce_results", True) and tp > 1:
                from vllm.distributed import tensor_model_parallel_all_reduce

                output = tensor_model_parallel_all_reduce(output)
            assert output.dtype == kind and output.shape == expected.shape, output.shape
            result["errors"].append(float((output.double() - expected).abs().max()) if x.numel() else 0.0)
            result["scales"].append(float(expected.abs().max()) if x.numel() else 1.0)
        result["exchanges"] = oproj_patch.status().exchanges
        result["rank"] = rank
    assert oproj_patch.status().otp_ranks == ()
    return result
