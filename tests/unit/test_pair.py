"""Two layers in one step: how heads and positions travel, and when the first layer is sharded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from oproj_patch.settings import Settings  # noqa: E402
from oproj_patch.sharding.pair import Pair, obstacle, placed  # noqa: E402


def _group(size: int) -> Any:
    return SimpleNamespace(size=size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_positions_travel_behind_the_heads(dtype: str) -> None:
    kind = getattr(torch, dtype)
    size, group = kind.itemsize, _group(2)
    pair = Pair(None, heads=8, width=4, positions=True)
    assert (pair.chunk(group, size), pair.tail(size)) == (16 + 16 // size, 16 // size)
    heads = torch.randn(3, 16).to(kind)
    positions = torch.tensor([5, 2**33 + 1, 7])
    rows = torch.full((3, pair.chunk(group, size)), float("nan"), dtype=kind)
    behind = placed(positions, kind)
    rows[:, :16], rows[:, 16 : 16 + behind.shape[1]] = heads, behind
    told: list[Any] = []

    def project(o: Any, places: Any) -> Any:
        told.append((o, places))
        return o.flatten(1)

    pair.project = project
    for count in (3, 0):
        assert torch.equal(pair.run(rows[:count]), heads[:count])
        o, places = told.pop()
        assert o.shape == (count, 4, 4) and torch.equal(places, positions[:count])


def test_without_positions_a_chunk_is_its_heads() -> None:
    pair = Pair(None, heads=8, width=4)
    assert (pair.chunk(_group(4), 2), pair.tail(2)) == (8, 0)
    pair.project = lambda o, places: o if places is None else places
    assert pair.run(torch.zeros(5, 8)).shape == (5, 2, 4)


@pytest.mark.parametrize(
    ("heads", "groups", "tp", "size", "grid", "told"),
    [
        (128, 16, 1, 8, "auto", ""),
        (128, 16, 2, 8, "8x1", ""),
        (64, 8, 1, 8, "Nx1", ""),
        (64, 8, 1, 16, "auto", "8 groups over 16 ranks"),
        (64, 8, 2, 8, "auto", "8 groups over 16 ranks"),
        (128, 16, 1, 8, "4x2", "the grid 4x2 cuts the outputs"),
    ],
)
def test_obstacle(heads: int, groups: int, tp: int, size: int, grid: str, told: str) -> None:
    group: Any = SimpleNamespace(tp_size=tp, size=size, settings=Settings(size=size))
    assert obstacle(heads, groups, group, grid) == told


def test_rows_of_two_layers_do_not_travel_in_8_bits() -> None:
    group: Any = SimpleNamespace(tp_size=1, size=8, settings=Settings(size=8, wire="int8"))
    told = "only rows of the second layer can travel in int8"
    assert obstacle(128, 16, group, "auto") == told
