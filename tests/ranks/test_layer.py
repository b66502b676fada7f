"""The sharded layer on real ranks, against float64 and against vLLM's own layer at TP=N."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.ranks import layers
from tests.ranks.launch import World
from tests.ranks.layers import O_PROJ, build, finish, load, made, place, reference, sharding, whole

COLUMNS, HIDDEN = 48, 20
LIMIT = 5e-6
quick = pytest.mark.quick
two_ranks = pytest.mark.parametrize("world", [2], indirect=True)


@dataclass(frozen=True)
class Case:
    """A layer [hidden, columns] on dp x tp ranks, run once for each entry of `rows`.

    rows[step][data-parallel rank]: rows of that rank; announced: vLLM tells the ranks these;
    buffer: bytes of a shared buffer, above which a step is cut; options: of RowParallelLinear.
    """

    dp: int
    rows: list[list[int]]
    size: int = 0
    tp: int = 1
    columns: int = COLUMNS
    hidden: int = HIDDEN
    compiled: bool = False
    announced: bool = False
    dims: int = 2
    buffer: int | None = None
    debug: bool = False
    options: dict[str, Any] = field(default_factory=dict)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "skip": {"bias": True, "skip_bias_add": True},
    "bare": {"bias": True, "return_bias": False},
    "bare-skip": {"bias": True, "skip_bias_add": True, "return_bias": False},
    "unreduced": {"reduce_results": False},
    "unreduced-skip": {"reduce_results": False, "bias": True, "skip_bias_add": True},
    "whole-input": {"input_is_parallel": False, "bias": True},
    "whole-input-unreduced": {"input_is_parallel": False, "reduce_results": False},
}
BIAS = OPTIONS["bias"]
ROWS2 = [[3, 3], [0, 5], [5, 0], [1, 300], [256, 2], [0, 0], [7, 1]]
ROWS3 = [[3, 3, 3], [0, 5, 1], [200, 0, 0]]
ROWS4 = [[3, 3, 3, 3], [0, 5, 1, 2], [100, 0, 0, 7]]
ROWS8 = [[3] * 8, [0, 1, 2, 3, 4, 5, 6, 200]]
COMPILED = [[2, 5], [3, 3], [300, 2], [17, 64], [5, 2]]

CASES: dict[int, dict[str, Case]] = {
    2: {
        **{name: Case(2, ROWS2, options=options) for name, options in OPTIONS.items()},
        "announced": Case(2, ROWS2, announced=True),
        # Larger messages go between pairs.
        "parts": Case(2, ROWS2, buffer=64, options=BIAS),
        "some-parts": Case(2, ROWS2, buffer=500, options=BIAS),
        "three-dimensions": Case(2, [[3, 4], [2, 2]], dims=3),
        "wide": Case(2, [[4, 9], [64, 64]], columns=2048, hidden=512),
        "compiled": Case(2, COMPILED, compiled=True, options=BIAS),
        "compiled-announced": Case(2, COMPILED, compiled=True, announced=True),
        "compiled-few-rows": Case(2, [[1, 1], [0, 4], [1, 0]], compiled=True),
    },
    3: {
        "plain": Case(3, ROWS3, debug=True),
        "bias": Case(3, ROWS3, debug=True, options=BIAS),
        "odd": Case(3, ROWS3, debug=True, columns=21, hidden=7),
        "parts": Case(3, ROWS3, debug=True, buffer=64),
    },
    4: {
        "two-groups": Case(4, ROWS4, size=2, options=BIAS),
        "bias": Case(4, ROWS4, options=BIAS),
        "parts": Case(4, ROWS4, buffer=64),
        **{f"tp-{name}": Case(2, ROWS2, tp=2, options=opts) for name, opts in OPTIONS.items()},
        "tp-compiled": Case(2, COMPILED, tp=2, compiled=True),
        "tp-compiled-whole-input": Case(
            2, COMPILED, tp=2, compiled=True, announced=True, options={"input_is_parallel": False}
        ),
    },
    8: {
        "bias": Case(8, ROWS8, options=BIAS),
        "two-groups": Case(8, ROWS8, size=4),
        "parts": Case(8, ROWS8, buffer=1024),
        "tp2": Case(4, [[2] * 4, [0, 1, 9, 90]], tp=2, options=BIAS),
        "tp4": Case(2, [[2, 2], [0, 9]], tp=4, options=BIAS),
    },
}


def _marks(size: int, case: str) -> list[pytest.MarkDecorator]:
    if size == 8 or case.startswith("tp-compiled"):
        return [pytest.mark.long]
    return [] if size == 3 or "compiled" in case else [quick]


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(size, case, id=f"{size}-{name}", marks=_marks(size, name))
        for size, cases in CASES.items()
        for name, case in cases.items()
    ],
    indirect=["world"],
)
def test_equal(world: World, case: Case) -> None:
    world.run(equal, case)


def equal(case: Case) -> None:
    """In a rank: the shard is cut bit for bit, and every step's rows are the unsharded layer's."""
    import oproj_patch

    size, tp, hidden = case.size or case.dp, case.tp, case.hidden
    bias = bool(case.options.get("bias"))
    with (
        sharding(size, case.dp, tp, OPROJ_PATCH_DEBUG=str(int(case.debug))) as config,
        layers.cut_up(case.buffer),
    ):
        from vllm.model_executor.layers.linear import RowParallelLinear

        dp_rank, tp_rank = divmod(int(os.environ["RANK"]), tp)
        start, width = dp_rank // size * size, case.columns // (tp * size)
        layer, weight, offset = made(hidden, case.columns, **case.options)
        assert isinstance(layer, RowParallelLinear) and type(layer) is not RowParallelLinear
        assert type(layer).__name__ == type(layer).__qualname__ == "RowParallelLinear"
        assert type(layer).__module__ == RowParallelLinear.__module__
        assert layer.weight.shape == (hidden, width)
        chunk = tp_rank * size + dp_rank - start
        assert place(layer.weight.data, weight) == [chunk * width], "the shard is not bit-exact"
        status = oproj_patch.status()
        assert list(status.otp_ranks) == [(start + j) * tp + tp_rank for j in range(size)]
        assert status.bytes_kept == 4 * hidden * (width + bias)
        assert status.bytes_saved == 4 * hidden * width * (size - 1)
        assert status.layers == 1
        finish(layer)
        forward = torch.compile(layer, fullgraph=True, dynamic=True) if case.compiled else layer
        torch._dynamo.utils.counters.clear()
        errors, scale = [], 0.0
        for step, counts in enumerate(case.rows):
            x = whole(counts[dp_rank], case.columns, torch.float32, seed=100 * step + dp_rank)
            mine = x.chunk(tp, dim=-1)[tp_rank].contiguous() if layer.input_is_parallel else x
            for _ in range(case.dims - 2):
                mine = mine.unsqueeze(0)
            with (
                torch.inference_mode(),
                layers.forward_context(config, counts, case.announced),
            ):
                output = forward(mine)
            expected = reference(x, weight, None if layer.skip_bias_add else offset)
            output = _without_bias(layer, output, offset)
            if not layer.reduce_results and tp > 1:
                from vllm.distributed import tensor_model_parallel_all_reduce

                output = tensor_model_parallel_all_reduce(output)
            assert output.shape == (*mine.shape[:-1], hidden)
            output = output.reshape(-1, hidden)
            assert output.dtype == torch.float32 and output.shape == expected.shape
            if x.numel():
                errors.append(float((output.double() - expected).abs().max()))
                scale = max(scale, float(expected.abs().max()))
        assert all(error <= LIMIT * scale for error in errors), errors
        assert oproj_patch.status().exchanges == len(case.rows)
        if case.compiled and min(min(counts) for counts in case.rows) > 1:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert graphs == 1, "recompiled for a row count"
    torch._dynamo.reset()


def _without_bias(layer: Any, output: Any, bias: Any) -> Any:
    """Return the output alone; the bias beside it must be there exactly where vLLM returns it."""
    if not layer.return_bias:
        return output
    output, told = output
    if layer.skip_bias_add and bias is not None:
        assert torch.equal(told.data, bias)
    else:
        assert told is None
    return output


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "world",
    [pytest.param(2, marks=quick), 3, 4, pytest.param(8, marks=pytest.mark.long)],
    indirect=True,
)
def test_no_worse_than_tensor_parallel(world: World, dtype: str) -> None:
    world.run(precise, world.size, dtype)


def precise(ways: int, dtype: str) -> None:
    """In a rank: the RMS error is no larger than that of vLLM's own layer and all-reduce."""
    import oproj_patch

    columns, hidden, rows, kind = 1536, 512, 96, getattr(torch, dtype)
    rank = int(os.environ["RANK"])
    inputs = [whole(rows, columns, kind, seed=10 + other) for other in range(ways)]
    expected = reference(inputs[rank], whole(hidden, columns, kind), None)

    def figures(output: Any) -> tuple[float, float]:
        error = output.double() - expected
        return float(error.pow(2).mean().sqrt()), float(error.abs().max())

    with sharding(ways, ways, dtype=kind):
        layer, _, _ = made(hidden, columns)
        finish(layer)
        rms, largest = figures(layer(inputs[rank])[0])
        assert oproj_patch.status().exchanges == 1
    with sharding(0, 1, ways, dtype=kind):
        layer, _, _ = made(hidden, columns)
        assert not hasattr(layer, "oproj")
        finish(layer)
        outputs = [layer(x.chunk(ways, -1)[rank].contiguous())[0] for x in inputs]
        tp_rms, tp_largest = figures(outputs[rank])
    assert 0 < rms <= 1.02 * tp_rms and largest <= 1.5 * tp_largest
    assert largest <= float(expected.abs().max()) * (LIMIT if dtype == "float32" else 1e-2)


@two_ranks
def test_compiled_stack(world: World) -> None:
    world.run(stacked)


def stacked() -> None:
    """In a rank: three layers in one graph, one compilation for all row counts."""
    import oproj_patch

    columns = 24
    with sharding(2, 2) as config:
        dp_rank = config.parallel_config.data_parallel_rank
        stack = [build(f"model.layers.{i}.self_attn.o_proj", columns, columns, bias=False)
                 for i in range(3)]  # fmt: skip
        weights = [whole(columns, columns, torch.float32, seed=i) for i in range(3)]
        for layer, weight in zip(stack, weights, strict=True):
            load(layer, weight, None)
            finish(layer)

        class Stack(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.layers = torch.nn.ModuleList(stack)

            def forward(self, x: Any) -> Any:
                for layer in self.layers:
                    x = torch.tanh(layer(x)[0]) + 1
                return x

        model = torch.compile(Stack(), fullgraph=True, dynamic=True)
        torch._dynamo.utils.counters.clear()
        for step, counts in enumerate(COMPILED):
            x = whole(counts[dp_rank], columns, torch.float32, seed=50 * step + dp_rank)
            with torch.inference_mode():
                output = model(x)
            expected = x.double()
            for weight in weights:
                expected = torch.tanh(expected @ weight.double().t()) + 1
            assert float((output.double() - expected).abs().max()) <= LIMIT
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert oproj_patch.status().exchanges == 3 * len(COMPILED)
    torch._dynamo.reset()


@pytest.mark.long
@two_ranks
def test_groups_created_again(world: World) -> None:
    world.run(created_again)


def created_again() -> None:
    """In a rank: ten times groups, and the same process groups, files and threads as before."""
    import gc
    import threading

    import torch.distributed as dist

    import oproj_patch

    process_groups = dist.distributed_c10d._world.pg_map
    seen = []
    for _ in range(10):
        with sharding(2, 2):
            layer, _, _ = made(HIDDEN, COLUMNS)
            finish(layer)
            layer(whole(2, COLUMNS, torch.float32))
            assert oproj_patch.status().exchanges == 1 and oproj_patch.status().layers == 1
            inside = len(process_groups)
        del layer
        gc.collect()
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        seen.append((inside, len(process_groups), files, threading.active_count()))
    inside_, outside, files_, threads = zip(*seen, strict=True)
    assert len(set(inside_)) == 1 and len(set(outside)) == 1
    # The first rounds may open what stays open (loggers, shared memory).
    assert files_[-1] <= files_[2] and threads[-1] <= threads[2]


@quick
@two_ranks
def test_loaders(world: World) -> None:
    world.run(loaded)


def loaded() -> None:
    """In a rank: both weight loaders cut the same shard, and refuse what has another shape."""
    with sharding(2, 2) as config:
        rank, width = config.parallel_config.data_parallel_rank, COLUMNS // 2
        weight = whole(HIDDEN, COLUMNS, torch.float32)
        mine = weight[:, rank * width : (rank + 1) * width]
        for name in ("weight_loader", "weight_loader_v2"):
            layer = build(f"{name}.self_attn.o_proj", HIDDEN, COLUMNS, bias=True)
            getattr(layer, name)(layer.weight, weight)
            assert torch.equal(layer.weight.data, mine), name
        layer = build("own.self_attn.o_proj", HIDDEN, COLUMNS, bias=True)
        assert layer.weight.weight_loader.__name__ == "weight_loader_v2"
        layer.bias.weight_loader(layer.bias, weight[:, 0])
        assert torch.equal(layer.bias.data, weight[:, 0])
        layer.weight.is_sharded_weight = True  # a checkpoint that is cut already
        layer.weight_loader(layer.weight, mine.clone())
        assert torch.equal(layer.weight.data, mine)
        for wrong in (weight[:, : width - 1], weight[:10]):
            with pytest.raises((AssertionError, RuntimeError, IndexError)):
                layer.weight.weight_loader(layer.weight, wrong)


@quick
@two_ranks
@pytest.mark.parametrize("grid", ["2x1", "1x2"])
def test_weights_loaded_again(world: World, grid: str) -> None:
    world.run(loaded_again, grid)


def loaded_again(grid: str) -> None:
    """In a rank: other weights in a processed layer, by vLLM's layerwise reload and without it."""
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.parameter import ModelWeightParameter

    with sharding(2, 2, OPROJ_GRID=grid) as config:
        rank, cut = config.parallel_config.data_parallel_rank, int(grid == "2x1")
        model = torch.nn.Module()
        layer = model.o_proj = build(O_PROJ, HIDDEN, COLUMNS, bias=True)
        x = whole(5, COLUMNS, torch.float32, seed=70 + rank)

        def right(weight: Any, bias: Any) -> None:
            output = model.o_proj(x)[0].double()
            assert float((output - reference(x, weight, bias)).abs().max()) <= LIMIT

        reload.record_metadata_for_reloading(model)
        for cycle in range(3):
            weight = whole(HIDDEN, COLUMNS, torch.float32, seed=cycle)
            bias = whole(1, HIDDEN, torch.float32, seed=9 + cycle)[0]
            if cycle:
                reload.initialize_layerwise_reload(model)
            load(model.o_proj, weight, bias)
            if cycle:
                reload.finalize_layerwise_reload(model, config.model_config)
            else:
                finish(model.o_proj)
            right(weight, bias)
        layer = model.o_proj
        layer.weight = ModelWeightParameter(
            data=torch.empty_like(weight.chunk(2, cut)[rank]), input_dim=1, output_dim=0,
            weight_loader=layer.weight_loader_v2,
        )  # fmt: skip
        layer.update_param_tp_status()
        weight = whole(HIDDEN, COLUMNS, torch.float32, seed=40)
        load(layer, weight, bias)
        assert torch.equal(layer.weight.data, weight.chunk(2, cut)[rank])
        finish(layer)
        right(weight, bias)


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


@quick
@two_ranks
@pytest.mark.parametrize("prefix", NOT_O_PROJ)
def test_other_layers_untouched(world: World, prefix: str) -> None:
    world.run(untouched, prefix)


@quick
@two_ranks
def test_a_layer_that_asks_for_no_tensor_parallelism_stays_whole(world: World) -> None:
    world.run(untouched, O_PROJ, {"disable_tp": True})


def untouched(prefix: str, options: Any = None) -> None:
    """In a rank: vLLM's class itself, whole weight, its own forward."""
    import oproj_patch

    with sharding(2, 2):
        from vllm.model_executor.layers.linear import RowParallelLinear

        layer = build(prefix, HIDDEN, COLUMNS, bias=False, **(options or {}))
        assert type(layer) is RowParallelLinear
        assert layer.tp_size == 1 and layer.weight.shape == (HIDDEN, COLUMNS)
        method = layer.quant_method
        process = method.process_weights_after_loading
        assert process.__func__ is type(method).process_weights_after_loading
        assert "forward" not in vars(layer) and "oproj" not in vars(layer)
        assert oproj_patch.status().layers == 0


@quick
@two_ranks
def test_rows_other_than_announced(world: World) -> None:
    world.run(other_rows)


def other_rows() -> None:
    """In a rank: fewer rows than vLLM announced are filled up, more are refused."""
    import oproj_patch

    rank = int(os.environ["RANK"])
    with sharding(2, 2) as config:
        layer, weight, _ = made(HIDDEN, COLUMNS)
        finish(layer)
        with layers.forward_context(config, [4, 4], announced=True):
            # vLLM 0.11.0 announces padded rows for an idle rank that runs one.
            x = whole(1 if rank else 4, COLUMNS, torch.float32, seed=rank)
            output = layer(x)[0]
            assert output.shape[0] == x.shape[0]
            error = (output.double() - reference(x, weight, None)).abs().max()
            assert float(error) <= LIMIT * float(output.abs().max())
            with pytest.raises(oproj_patch.OprojError) as raised:
                layer(whole(5, COLUMNS, torch.float32))
    assert str(raised.value) == (
        f"OPROJ014: o_proj got 5 rows on rank {rank} at {layers.O_PROJ}, but the host's "
        "data-parallel metadata says [4, 4] for ranks [0, 1]: this forward pass changes its row "
        "count between layers or hides it, which is not supported; please report model and "
        "options."
    )


@quick
@pytest.mark.parametrize("world", [4], indirect=True)
def test_compiled_graphs_of_each_setting_have_their_own_key(world: World) -> None:
    settings: list[tuple[int, dict[str, str]]] = [(2, {}), (4, {}), (4, {"OPROJ_GRID": "2x2"})]
    settings += [(4, {"OPROJ_WEIGHT_GATHER_ROWS": rows}) for rows in ("0", "64")]
    settings += [(4, {"OPROJ_WIRE": "off"}), (4, {"OPROJ_PATCH_DEBUG": "1"})]
    keys = [[world.run(key, size, env)[0] for size, env in settings] for _ in range(2)]
    assert keys[0] == keys[1] and len(set(keys[0])) == len(settings)


def key(size: int, env: dict[str, str]) -> str:
    """In a rank: the key of vLLM's configuration in its caches."""
    with sharding(size, 4, **env) as config:
        digest: str = config.compute_hash()
        return digest
