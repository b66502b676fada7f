"""Which grid a layer takes, from what its constructor is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
