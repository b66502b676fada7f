"""Every grid of N ranks on real ranks: shards bit for bit, results against float64."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from oproj_patch.cli import plan
from oproj_patch.sharding import topology
from tests.ranks import launch, layers
from tests.ranks.launch import World
from tests.ranks.layers import finish, made, reference, sharding, whole
from tests.ranks.models import CONFIGS, create, engine_config, write

# Of the largest output. bfloat16: what today's layout allows, of partial results that are rounded.
LIMITS = {"float32": 5e-6, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """A layer [hidden, columns] on dp x tp ranks of one group, for each grid of dp.

    options: of RowParallelLinear; buffer: bytes above which a step is cut; gather: from how many
    rows on the weight is gathered; compiled: torch.compile traces it.
    """

    dp: int
    tp: int = 1
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=lambda: {"bias": True})
    buffer: int | None = None
    gather: int = 0
    compiled: bool = False


QUICK = "plain", "bfloat16", "parts", "tp"  # of four ranks
CASES = {
    4: {
        "plain": Case(4),
        "bfloat16": Case(4, dtype="bfloat16"),
        "parts": Case(4, buffer=64),
        "gather": Case(4, gather=16),
        "compiled": Case(4, compiled=True),
        "tp": Case(2, tp=2),
        "tp, gather": Case(2, tp=2, gather=16),
        "tp, whole input": Case(2, tp=2, options={"input_is_parallel": False}),
    },
    6: {"plain": Case(6)},
    8: {"plain": Case(8), "tp": Case(4, tp=2), "bfloat16": Case(8, dtype="bfloat16")},
    9: {"plain": Case(9)},
    16: {"plain": Case(16), "tp": Case(8, tp=2, gather=16)},
}


def _marks(size: int, case: str) -> list[pytest.MarkDecorator]:
    if size > 4:
        return [pytest.mark.long]
    return [pytest.mark.quick] if case in QUICK else []


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
    for grid in topology.grids(case.dp):
        world.run(equal, case, str(grid))


def equal(case: Case, grid: str) -> None:
    """In a rank: its block of weight and bias, and the unsharded layer's results."""
    import oproj_patch
    from oproj_patch.sharding import layer as sharded
    from oproj_patch.sharding import otp_group

    dp, tp, kind = case.dp, case.tp, getattr(torch, case.dtype)
    (a, b), columns, hidden = map(int, grid.split("x")), 3 * dp * tp, 5 * dp
    rank, tp_rank = divmod(int(os.environ["RANK"]), tp)
    i, j = divmod(rank, b)
    env = {"OPROJ_GRID": grid, "OPROJ_WEIGHT_GATHER_ROWS": str(case.gather)}
    with sharding(dp, dp, tp, kind, **env) as config, layers.cut_up(case.buffer):
        layer, weight, offset = made(hidden, columns, **case.options)
        layer._cpu_skip_gemm_dispatch = bool(case.gather)  # not packed: it can be gathered
        parts = weight.chunk(tp * a, 1)[tp_rank * a + i].chunk(b, 0)
        assert torch.equal(layer.weight.data, parts[j])
        assert offset is None or torch.equal(layer.bias.data, offset.chunk(b)[j])
        assert (layer.output_size, layer.output_size_per_partition) == (hidden, hidden // b)
        status, size = oproj_patch.status(), kind.itemsize
        bias = 0 if offset is None else hidden // b * size
        assert status.grid == grid == str(layer.oproj.grid)
        assert status.bytes_kept == parts[j].numel() * size + bias
        assert status.bytes_saved == parts[j].numel() * size * (dp - 1) + bias * (b - 1)
        finish(layer)
        forward = torch.compile(layer, fullgraph=True, dynamic=True) if case.compiled else layer
        least = 2 if case.compiled else 0
        steps = [[3] * dp, [0] * dp, [5, *[least] * (dp - 1)], [*range(2, dp), 40, 2], [17] * dp]
        for step, counts in enumerate(steps):
            x = whole(counts[rank], columns, kind, seed=100 * step + rank)
            mine = x.chunk(tp, -1)[tp_rank].contiguous() if layer.input_is_parallel else x
            with torch.inference_mode(), layers.forward_context(config, counts, step % 2 == 0):
                output = forward(mine)[0]
            expected = reference(x, weight, offset)
            assert output.dtype == kind and output.shape == expected.shape
            if x.numel():
                worst = float((output.double() - expected).abs().max() / expected.abs().max())
                assert worst <= LIMITS[case.dtype], (step, worst)
        group = otp_group.require("the test")
        assert group.steps == len(steps) and group.gathers == bool(case.gather)
        assert f"); grid {grid}" in sharded.summary(group)
    torch._dynamo.reset()


@pytest.mark.quick
@pytest.mark.parametrize("world", [4], indirect=True)
def test_bytes_and_kernels_of_a_step(world: World) -> None:
    """Pack, all-to-all, GEMM, all-to-all, sum: run, and recorded by a graph."""
    rows, columns, hidden = 6, 48, 40
    for grid in topology.grids(4):
        sent, ran, recorded = world.run(one_step, str(grid), rows, columns, hidden)[0]
        parts = columns // grid.inputs, hidden // grid.outputs
        assert sent == rows * topology.step_bytes(4, *parts, 4)
        total = "add.out" if grid.inputs == 2 else "sum.dim_IntList"  # of two: an addition
        assert ran == sorted(["copy_", "mm", total.partition(".")[0]])
        both = "c10d::alltoall_base_"
        assert recorded == ["aten::copy_", both, "aten::matmul", both, f"aten::{total}"]


def one_step(grid: str, rows: int, columns: int, hidden: int) -> tuple[int, list[str], list[str]]:
    """In a rank: the bytes that it sends to others in a step, and its `layers.kernels`.

    The layer multiplies with torch's own kernel.
    """
    from oproj_patch.sharding import exchange

    with sharding(4, 4, OPROJ_GRID=grid):
        layer, _, _ = made(hidden, columns)
        x = whole(rows, columns, torch.float32)
        plain = mock.patch.object(
            layer.quant_method, "apply", lambda layer, x, bias: x @ layer.weight.data.t()
        )
        with plain, torch.inference_mode():
            layer(x)
            with layers.bytes_sent(4) as sent:
                exchange.exchange(layer, x, (rows,) * 4)
            return sum(sent), *layers.kernels(lambda: exchange.exchange(layer, x, (rows,) * 4))


@dataclass(frozen=True)
class Odd:
    """A layer that the grid of four ranks does not cut; what the line says, or the refusal."""

    grid: str
    told: str
    columns: int = 512
    hidden: int = 512
    options: dict[str, Any] = field(default_factory=dict)


ODD = {
    "skipped bias": Odd("2x2", "(the host adds its whole bias itself)",
                        options={"bias": True, "skip_bias_add": True}),
    "outputs": Odd("2x2", "(512 columns and 511 outputs)", hidden=511),
    "columns": Odd("2x2", "(511 columns and 512 outputs)", columns=511),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("world", [4], indirect=True)
@pytest.mark.parametrize("case", ODD.values(), ids=ODD)
def test_refused_where_the_user_named_the_grid(world: World, case: Odd) -> None:
    for sentence in world.run(refused, case):
        assert sentence == (
            f"OPROJ005: OPROJ_GRID is {case.grid}, which does not cut {layers.O_PROJ} on 1 "
            f"tensor-parallel ranks {case.told}; accepted are auto, Nx1 and grids that leave an "
            "equal part on every rank: change or unset OPROJ_GRID."
        )


def refused(case: Odd) -> str:
    import oproj_patch

    options = {"bias": False, **case.options}
    with (
        sharding(4, 4, OPROJ_GRID=case.grid),
        pytest.raises(oproj_patch.OprojValueError) as raised,
    ):
        layers.build(layers.O_PROJ, case.hidden, case.columns, **options)
    return str(raised.value)


@pytest.mark.quick
@pytest.mark.parametrize("world", [4], indirect=True)
def test_a_named_grid_of_a_layer_that_is_not_quantized(world: World) -> None:
    """The blocks of the model's other layers do not matter."""
    assert world.run(beside_blocks) == [[144, 512]] * 4


def beside_blocks() -> list[int]:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    quant_config = Fp8Config(True, "dynamic", [layers.O_PROJ], [128, 128])
    with sharding(4, 4, OPROJ_GRID="1x4"):
        options = {"bias": False, "quant_config": quant_config}
        return list(layers.build(layers.O_PROJ, 576, 512, **options).weight.shape)


@pytest.mark.parametrize(
    ("size", "grid"), [(4, "2x2"), pytest.param(8, "4x2", marks=pytest.mark.long)]
)
def test_plan_names_the_grid_that_a_start_logs(size: int, grid: str, tmp_path: Path) -> None:
    """Real ranks build the model as a worker does, and run one step."""
    model = write({**CONFIGS["qwen3_moe"], "hidden_size": 128}, tmp_path)
    rows = plan.make_plan(model, plan.load_model(model), dp=size)["rows"]
    assert [row["grid"] for row in rows if row["otp_size"] == size] == [grid]
    line = rf"oproj_patch \S+: o_proj sharded {size}-way over ranks .*: 2 layers, .*; grid {grid};"
    for lines in launch.run(size, started, model, size, env={launch.SIZE: str(size)}):
        assert len(lines) == 1 and re.match(line, lines[0]), lines


def started(model: str, dp: int) -> list[str]:
    """In a rank: plug-ins, configuration, groups, model, a step of a layer; return our log."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config, told = engine_config(model), logging.Handler()
    lines: list[str] = []
    logger = logging.getLogger("vllm.oproj_patch")
    with layers.world(), layers.model_groups(dp, config=config):
        layer = create(config).model.layers[0].self_attn.o_proj
        finish(layer)
        logger.setLevel(logging.INFO)
        logger.addHandler(told)
        with mock.patch.object(told, "emit", lambda record: lines.append(record.getMessage())):
            assert layer(torch.zeros(2, 128))[0].shape == (2, 128)
    return lines


@pytest.mark.quick
@pytest.mark.parametrize("world", [4], indirect=True)
def test_auto_takes_the_grid_of_the_model_where_the_layer_can(world: World) -> None:
    for lines in world.run(chosen):
        assert lines == ["grid 2x2", "grid 2x2 (1 layers 4x1: the host adds its whole bias itself)"]


def chosen() -> list[str]:
    """In a rank: a model of 64 columns and 96 outputs, with two layers on its grid and one not."""
    from oproj_patch.sharding import layer as sharded
    from oproj_patch.sharding import otp_group

    config = layers.configuration()
    text = SimpleNamespace(num_attention_heads=4, head_dim=16, hidden_size=96)
    moe = vars(layers.moe_model_config())
    config.model_config = SimpleNamespace(**moe, hf_text_config=text, dtype=torch.float32)
    with mock.patch.object(layers, "configuration", lambda: config), sharding(4, 4):
        group = otp_group.require("the test")
        for index, skipped in enumerate((False, True)):
            name = f"model.layers.{index}.self_attn.o_proj"
            layer, weight, _ = made(96, 64, True, name, skip_bias_add=skipped)
            assert layer.weight.shape == ((96, 16) if skipped else (48, 32))
            finish(layer)
        for layer in group.layers.values():
            x = whole(3, 64, torch.float32, seed=group.rank)
            output, skipped_bias = layer(x)
            offset = whole(1, 96, torch.float32, seed=1)[0]
            expected = reference(x, weight, None if skipped_bias is not None else offset)
            assert float((output.double() - expected).abs().max()) <= 5e-6
        lines = [sharded.summary(group).partition("); ")[2]]
        group.layers.popitem()
        lines.insert(0, sharded.summary(group).partition("); ")[2])
    return [line.partition("; ")[0] for line in lines]
