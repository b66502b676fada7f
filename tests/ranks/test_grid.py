"""Every grid of N ranks on real ranks: shards bit for bit, results against float64."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from oproj_patch.sharding import topology
from tests.ranks import layers
from tests.ranks.launch import World
from tests.ranks.layers import finish, made, reference, sharding, whole

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


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(size, case, id=f"{size}-{name}", marks=[pytest.mark.quick] * (size == 4))
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
