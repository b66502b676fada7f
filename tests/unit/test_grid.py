"""Which grid a layer takes, from what its constructor is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from oproj_patch.errors import OprojValueError
from oproj_patch.settings import Settings
from oproj_patch.sharding import grid
from oproj_patch.sharding.topology import Grid

BLOCKS = SimpleNamespace(weight_block_size=[128, 128])
GROUPS = SimpleNamespace(group_size=64)


@pytest.mark.parametrize(
    ("owners", "found"),
    [
        ((), (1, 1)),
        ((None, object()), (1, 1)),
        ((BLOCKS,), (128, 128)),
        ((GROUPS,), (64, 1)),
        ((SimpleNamespace(group_size=-1), SimpleNamespace(block_size=32)), (32, 1)),
        ((GROUPS, SimpleNamespace(weight_block_size=[1, 96])), (192, 1)),
    ],
)
def test_blocks(owners: Any, found: tuple[int, int]) -> None:
    assert grid.blocks(*owners) == found


@pytest.mark.parametrize(
    ("hidden", "quant_config", "chosen"),
    [
        (7168, None, "4x2"),
        (7168, BLOCKS, "4x2"),
        (7168, GROUPS, "4x2"),
        (7168, SimpleNamespace(weight_block_size=[2048, 128]), "8x1"),
        (7232, None, "4x2"),
        (7232, GROUPS, "8x1"),  # no whole 128 outputs
    ],
)
def test_auto_of_a_model(hidden: int, quant_config: Any, chosen: str) -> None:
    assert str(grid.fewest_bytes(8, 16384, hidden, quant_config)) == chosen


@pytest.mark.parametrize(
    ("of_group", "quant_config", "bias", "found"),
    [
        ((4, 2), None, False, ((4, 2), "")),
        ((4, 2), GROUPS, False, ((8, 1), "16384 columns and 7232 outputs in blocks of 64 and 128")),
        ((8, 1), GROUPS, False, ((8, 1), "16384 columns and 7232 outputs in blocks of 64 and 128")),
        ((4, 2), None, True, ((8, 1), "the host adds its whole bias itself")),
        ((8, 1), None, False, ((8, 1), "")),
    ],
)
def test_auto_of_a_layer(of_group: Any, quant_config: Any, bias: bool, found: Any) -> None:
    group: Any = SimpleNamespace(grid=Grid(*of_group), size=8, tp_size=1, settings=Settings(size=8))
    given = {
        "prefix": "o_proj", "input_size": 16384, "output_size": 7232, "bias": bias,
        "skip_bias_add": bias, "quant_config": quant_config,
    }  # fmt: skip
    assert grid.of_layer(given, group) == found


def test_a_named_grid_does_not_depend_on_the_blocks_of_other_layers() -> None:
    group: Any = SimpleNamespace(
        grid=Grid(2, 4), size=8, tp_size=1, settings=Settings(size=8, grid="2x4")
    )
    given = {"prefix": "o_proj", "input_size": 16384, "output_size": 7232, "quant_config": BLOCKS}
    assert grid.of_layer(given, group) == ((2, 4), "")
    given["output_size"] = 7233
    with pytest.raises(OprojValueError, match=r"OPROJ005: OPROJ_GRID is 2x4, .* and 7233 outputs"):
        grid.of_layer(given, group)


@pytest.mark.parametrize(
    ("cut", "hidden", "told"),
    [
        ((2, 4), 7168, ""),
        ((2, 4), 7232, "has 128 outputs; "),
        ((8, 1), 7232, ""),
        ((256, 1), 7168, "has 128 columns; "),
    ],
)
def test_a_part_of_a_block_is_refused(cut: Any, hidden: int, told: str) -> None:
    """Whoever chose the grid: when the layer is built, before it is loaded."""
    shard = SimpleNamespace(
        grid=Grid(*cut), hidden=hidden, name="o_proj", group=SimpleNamespace(size=8)
    )
    layer = SimpleNamespace(
        oproj=shard, quant_method=SimpleNamespace(quant_config=BLOCKS),
        input_size_per_partition=16384 // cut[0], named_parameters=lambda recurse: (),
    )  # fmt: skip
    shard.layer = layer
    if not told:
        grid.check_blocks(layer)
        return
    with pytest.raises(OprojValueError, match=rf"OPROJ006: .* \(grid {Grid(*cut)}\), but .*{told}"):
        grid.check_blocks(layer)
