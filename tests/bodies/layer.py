"""In a rank: the sharded layer against the unsharded one."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .world import model_groups, whole, world

O_PROJ = "model.layers.0.self_attn.o_proj"
Result = dict[str, Any]


def build(prefix: str, hidden: int, columns: int, **options: Any) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(columns, hidden, prefix=prefix, **options)


def load(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.weight.weight_loader(layer.weight, weight)
    if bias is not None:
        layer.bias.weight_loader(layer.bias, bias)


def finish(layer: Any) -> None:
    """Post-load processing, as vLLM's loader calls it."""
    layer.quant_method.process_weights_after_loading(layer)


def place(shard: torch.Tensor, weight: torch.Tensor) -> list[int]:
    """First columns at which `shard` is found, bit for bit, in `weight`."""
    width = shard.shape[1]
    return [
        start
        for start in range(0, weight.shape[1], width)
        if torch.equal(shard, weight[:, start : start + width])
    ]


def run_cases(cases: list[Result]) -> list[Result]:
    """Every case, one after the other, with groups of its own in the same processes."""
    told = []
    with world():
        for case in cases:
            options = dict(case)
            name, size = options.pop("case", "equal"), options.pop("size", 0)
            import oproj_patch
            from oproj_patch import exchange

            oproj_patch.enable(size)
            buffer = exchange.BUFFER_BYTES
            exchange.BUFFER_BYTES = options.pop("buffer", buffer)
            try:
                told.append(CASES[name](**options))
            finally:
                torch.set_default_dtype(torch.float32)
                exchange.BUFFER_BYTES = buffer
                oproj_patch.disable()
    return told


@contextlib.contextmanager
def forward_context(config: Any, counts: list[int], announced: bool) -> Iterator[None]:
    """One forward pass; `announced`: vLLM tells the ranks each other's row counts."""
    from vllm.forward_context import set_forward_context

    if not announced:
        yield
        return
    rank = config.parallel_config.data_parallel_rank
    with set_forward_context(
        None,
        config,
        num_tokens=counts[rank],
        num_tokens_across_dp=torch.tensor(counts, dtype=torch.int32),
    ):
        yield


def equal(
    dp: int,
    tp: int = 1,
    rows: list[list[int]] = [[3, 3]],  # noqa: B006
    columns: int = 48,
    hidden: int = 20,
    dtype: str = "float32",
    bias: bool = False,
    compiled: bool = False,
    announced: bool = False,
    dims: int = 2,
    **options: Any,
) -> Result:
    """Errors of the sharded layer for several steps; `rows[step][dp rank]` rows each."""
    import oproj_patch

    kind = getattr(torch, dtype)
    torch.set_default_dtype(kind)
    with model_groups(dp, tp) as config:
        from vllm.distributed import get_tensor_model_parallel_rank
        from vllm.model_executor.layers.linear import RowParallelLinear

        dp_rank = config.parallel_config.data_parallel_rank
        tp_rank = get_tensor_model_parallel_rank()
        layer = build(O_PROJ, hidden, columns, bias=bias, **options)
        assert isinstance(layer, RowParallelLinear) and type(layer) is not RowParallelLinear
        assert type(layer).__name__ == type(layer).__qualname__ == "RowParallelLinear"
        assert type(layer).__module__ == RowParallelLinear.__module__
        weight = whole(hidden, columns, kind)
        offset = whole(1, hidden, kind, seed=1)[0] if bias else None
        load(layer, weight, offset)
        status = oproj_patch.status()
        shard = layer.weight.detach().clone()
        finish(layer)
        forward = torch.compile(layer, fullgraph=True, dynamic=True) if compiled else layer
        result: Result = {
            "rank": int(os.environ["RANK"]),
            "shard": list(shard.shape),
            "index": place(shard, weight),
            "errors": [],
            "scale": 0.0,
            "ranks": list(status.otp_ranks),
            "kept": status.bytes_kept,
            "saved": status.bytes_saved,
            "layers": status.layers,
        }
        torch._dynamo.utils.counters.clear()
        for step, counts in enumerate(rows):
            x = whole(counts[dp_rank], columns, kind, seed=100 * step + dp_rank)
            mine = x.chunk(tp, dim=-1)[tp_rank].contiguous() if layer.input_is_parallel else x
            for _ in range(dims - 2):
                mine = mine.unsqueeze(0)
            with torch.inference_mode(), forward_context(config, counts, announced):
                output = forward(mine)
            told_bias = None
            if layer.return_bias:
                output, told_bias = output
            expected = x.double() @ weight.double().t()
            if offset is not None and not layer.skip_bias_add:
                expected = expected + offset.double()
            if offset is not None and layer.skip_bias_add and layer.return_bias:
                assert told_bias is not None and torch.equal(told_bias.data, offset)
            else:
                assert told_bias is None
            if not layer.reduce_results and tp > 1:
                from vllm.distributed import tensor_model_parallel_all_reduce

                output = tensor_model_parallel_all_reduce(output)
            assert output.shape[:-1] == mine.shape[:-1] and output.shape[-1] == hidden
            output = output.reshape(-1, hidden)
            assert output.dtype == kind and output.shape == expected.shape, output.shape
            if x.numel():
                result["errors"].append(float((output.double() - expected).abs().max()))
                result["scale"] = max(result["scale"], float(expected.abs().max()))
        result["exchanges"] = oproj_patch.status().exchanges
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert oproj_patch.status().otp_ranks == ()
    torch._dynamo.reset()
    return result


def _all_rows(dp: int, columns: int, kind: torch.dtype, rows: int) -> list[torch.Tensor]:
    return [whole(rows, columns, kind, seed=10 + rank) for rank in range(dp)]


def precision(ways: int, columns: int, hidden: int, rows: int, dtype: str) -> Result:
    """RMS and largest error against float64: sharded here, and vLLM's own layer at TP=ways."""
    import oproj_patch

    kind = getattr(torch, dtype)
    torch.set_default_dtype(kind)
    weight = whole(hidden, columns, kind)
    inputs = _all_rows(ways, columns, kind, rows)
    expected = [x.double() @ weight.double().t() for x in inputs]
    rank = int(os.environ["RANK"])

    def figures(output: torch.Tensor, of: int) -> list[float]:
        error = output.double() - expected[of]
        return [float(error.pow(2).mean().sqrt()), float(error.abs().max())]

    with model_groups(ways):
        layer = build(O_PROJ, hidden, columns, bias=False)
        load(layer, weight, None)
        finish(layer)
        sharded = figures(layer(inputs[rank])[0], rank)
        assert oproj_patch.status().exchanges == 1
    size = oproj_patch.status().size
    oproj_patch.disable()
    with model_groups(1, ways):
        layer = build(O_PROJ, hidden, columns, bias=False)
        assert not hasattr(layer, "oproj")
        load(layer, weight, None)
        finish(layer)
        outputs = [layer(x.chunk(ways, -1)[rank].contiguous())[0] for x in inputs]
        ordinary = figures(outputs[rank], rank)
    oproj_patch.enable(size)
    return {"sharded": sharded, "ordinary": ordinary, "scale": float(expected[rank].abs().max())}


def stack(dp: int, rows: list[list[int]], depth: int = 3, columns: int = 24) -> Result:
    """Several layers compiled as one module: graphs, exchanges, errors."""
    import oproj_patch

    with model_groups(dp) as config:
        dp_rank = config.parallel_config.data_parallel_rank
        layers = [build(f"model.layers.{i}.self_attn.o_proj", columns, columns, bias=False)
                  for i in range(depth)]  # fmt: skip
        weights = [whole(columns, columns, torch.float32, seed=i) for i in range(depth)]
        for layer, weight in zip(layers, weights, strict=True):
            load(layer, weight, None)
            finish(layer)

        class Stack(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = torch.nn.ModuleList(layers)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    x = torch.tanh(layer(x)[0]) + 1
                return x

        model = torch.compile(Stack(), fullgraph=True, dynamic=True)
        torch._dynamo.utils.counters.clear()
        errors = []
        for step, counts in enumerate(rows):
            x = whole(counts[dp_rank], columns, torch.float32, seed=50 * step + dp_rank)
            with torch.inference_mode():
                output = model(x)
            expected = x.double()
            for weight in weights:
                expected = torch.tanh(expected @ weight.double().t()) + 1
            errors.append(float((output.double() - expected).abs().max()))
        told = {
            "errors": errors,
            "exchanges": oproj_patch.status().exchanges,
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        }
    torch._dynamo.reset()
    return told


def recreate(dp: int, times: int) -> Result:
    """Groups destroyed and created again: process groups, file descriptors and threads."""
    import gc
    import threading

    import torch.distributed as dist

    import oproj_patch

    seen = []
    for _ in range(times):
        with model_groups(dp):
            layer = build(O_PROJ, 20, 48, bias=False)
            load(layer, whole(20, 48, torch.float32), None)
            finish(layer)
            layer(whole(2, 48, torch.float32))
            assert oproj_patch.status().exchanges == 1 and oproj_patch.status().layers == 1
            inside = len(dist.distributed_c10d._world.pg_map)
        del layer
        gc.collect()
        seen.append(
            [
                inside,
                len(dist.distributed_c10d._world.pg_map),
                len(os.listdir("/proc/self/fd")),  # noqa: PTH208
                threading.active_count(),
            ]
        )
    return {"seen": seen}


def loaders(dp: int) -> Result:
    """Both weight loaders, before and after post-load processing, and what they refuse."""
    kind = torch.float32
    with model_groups(dp) as config:
        rank = config.parallel_config.data_parallel_rank
        weight = whole(20, 48, kind)
        width = 48 // dp
        mine = weight[:, rank * width : (rank + 1) * width]
        found = {}
        for name in ("weight_loader", "weight_loader_v2"):
            layer = build(f"{name}.self_attn.o_proj", 20, 48, bias=True)
            getattr(layer, name)(layer.weight, weight)
            found[name] = torch.equal(layer.weight.data, mine)
        layer = build("own.self_attn.o_proj", 20, 48, bias=True)
        found["of the parameter"] = layer.weight.weight_loader.__name__ == "weight_loader_v2"
        layer.bias.weight_loader(layer.bias, weight[:, 0])
        found["bias whole"] = torch.equal(layer.bias.data, weight[:, 0])
        layer.weight.is_sharded_weight = True  # a checkpoint that is cut already
        layer.weight_loader(layer.weight, mine.clone())
        found["cut already"] = torch.equal(layer.weight.data, mine)
        for wrong in (weight[:, : width - 1], weight[:10]):
            try:
                layer.weight.weight_loader(layer.weight, wrong)
                found[f"refused {tuple(wrong.shape)}"] = False
            except (AssertionError, RuntimeError, IndexError):
                found[f"refused {tuple(wrong.shape)}"] = True
    return found


def reload(dp: int) -> Result:
    """Weights loaded again into a processed layer, through vLLM's layerwise reload."""
    from vllm.model_executor.model_loader import reload as vllm_reload

    with model_groups(dp) as config:
        rank = config.parallel_config.data_parallel_rank
        model = torch.nn.Module()
        model.o_proj = build(O_PROJ, 20, 48, bias=True)
        vllm_reload.record_metadata_for_reloading(model)
        width = 48 // dp
        errors, shards = [], []
        for cycle in range(3):
            weight = whole(20, 48, torch.float32, seed=cycle)
            bias = whole(1, 20, torch.float32, seed=9 + cycle)[0]
            if cycle:
                vllm_reload.initialize_layerwise_reload(model)
            load(model.o_proj, weight, bias)
            if cycle:
                vllm_reload.finalize_layerwise_reload(model, config.model_config)
            else:
                finish(model.o_proj)
            x = whole(5, 48, torch.float32, seed=70 + rank)
            expected = x.double() @ weight.double().t() + bias.double()
            errors.append(float((model.o_proj(x)[0].double() - expected).abs().max()))
            # What the CPU keeps after processing is packed: look at what the loader cuts out.
            fresh = copy.deepcopy(weight)[:, rank * width : (rank + 1) * width]
            shards.append(list(fresh.shape))
        # And without the utilities: a new parameter, loaded and processed once more.
        from vllm.model_executor.parameter import ModelWeightParameter

        layer = model.o_proj
        layer.weight = ModelWeightParameter(
            data=torch.empty(20, width), input_dim=1, output_dim=0,
            weight_loader=layer.weight_loader_v2,
        )  # fmt: skip
        layer.update_param_tp_status()
        weight = whole(20, 48, torch.float32, seed=40)
        load(layer, weight, bias)
        cut = place(layer.weight.data, weight)
        finish(layer)
        expected = x.double() @ weight.double().t() + bias.double()
        errors.append(float((layer(x)[0].double() - expected).abs().max()))
    return {"errors": errors, "cut": cut, "width": width}


NOT_O_PROJ = [
    "model.layers.0.mlp.down_proj",
    "model.layers.0.mlp.experts.3.o_proj",
    "model.layers.0.mlp.shared_experts.down_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.linear_attn.out_proj",
    "visual.blocks.0.attn.proj",
    "vision_tower.encoder.layers.0.self_attn.o_proj",
    "audio_tower.layers.0.self_attn.out_proj",
    "lm_head",
    "o_proj",
    "",
]


def others(dp: int) -> Result:
    """Layers that are not an o_proj: vLLM's class itself, whole weight, its own forward."""
    import oproj_patch

    with model_groups(dp):
        from vllm.model_executor.layers.linear import RowParallelLinear

        found = {}
        for prefix in NOT_O_PROJ:
            layer = build(prefix, 20, 48, bias=False)
            finish_with = layer.quant_method.process_weights_after_loading
            found[prefix] = [
                type(layer) is RowParallelLinear,
                layer.tp_size == 1 and layer.weight.shape == (20, 48),
                finish_with.__func__ is type(layer.quant_method).process_weights_after_loading,
                "forward" not in vars(layer) and "oproj" not in vars(layer),
            ]
        assert oproj_patch.status().layers == 0
    return found


def wrong_rows(dp: int) -> Result:
    """A forward pass whose rows are not what vLLM announced is refused on that rank."""
    import oproj_patch

    with model_groups(dp) as config:
        rank = config.parallel_config.data_parallel_rank
        layer = build(O_PROJ, 20, 48, bias=False)
        load(layer, whole(20, 48, torch.float32), None)
        finish(layer)
        with forward_context(config, [4] * dp, announced=True):
            try:
                layer(whole(3, 48, torch.float32))
            except oproj_patch.OprojError as error:
                return {"rank": rank, "error": str(error)}
    return {}


CASES: dict[str, Callable[..., Result]] = {
    case.__name__: case
    for case in (equal, precision, stack, recreate, loaders, reload, others, wrong_rows)
}
