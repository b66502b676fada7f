"""Exact rank lists, by hand for small worlds; properties of any."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oproj_patch.errors import OprojValueError
from oproj_patch.sharding import topology

# name: (dp groups, tp groups) as vLLM lists them; group size; otp groups; layer groups
BY_HAND: dict[str, tuple[Any, Any, int, Any, Any]] = {
    "dp2": ([[0, 1]], [[0], [1]], 2, [[0, 1]], [[0, 1]]),
    "dp4, two groups": (
        [[0, 1, 2, 3]], [[0], [1], [2], [3]], 2, [[0, 1], [2, 3]], [[0, 1], [2, 3]],
    ),
    "dp4, one group": ([[0, 1, 2, 3]], [[0], [1], [2], [3]], 4, [[0, 1, 2, 3]], [[0, 1, 2, 3]]),
    "dp2 tp2": (
        [[0, 2], [1, 3]], [[0, 1], [2, 3]], 2, [[0, 2], [1, 3]], [[0, 2, 1, 3]],
    ),
    "dp4 tp2": (
        [[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], 2,
        [[0, 2], [4, 6], [1, 3], [5, 7]], [[0, 2, 1, 3], [4, 6, 5, 7]],
    ),
    "dp2 pp2": (
        [[0, 2], [1, 3]], [[0], [1], [2], [3]], 2, [[0, 2], [1, 3]], [[0, 2], [1, 3]],
    ),
    "dp2 pp2 tp2": (
        [[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], 2,
        [[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 4, 1, 5], [2, 6, 3, 7]],
    ),
    "external dp2 x dp2": (
        [[0, 1], [2, 3]], [[0], [1], [2], [3]], 2, [[0, 1], [2, 3]], [[0, 1], [2, 3]],
    ),
    "dp3": ([[0, 1, 2]], [[0], [1], [2]], 3, [[0, 1, 2]], [[0, 1, 2]]),
    "dp6 by 3": (
        [[0, 1, 2, 3, 4, 5]], [[0], [1], [2], [3], [4], [5]], 3,
        [[0, 1, 2], [3, 4, 5]], [[0, 1, 2], [3, 4, 5]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", BY_HAND)
def test_groups_by_hand(layout: str) -> None:
    dp_groups, tp_groups, size, otp, layer = BY_HAND[layout]
    assert topology.otp_groups(dp_groups, size) == otp
    assert sorted(topology.layer_groups(otp, tp_groups)) == sorted(layer)


def rank_of(layout: dict[str, int], external: int, dp: int, pp: int, pcp: int, tp: int) -> int:
    """vLLM's documented order: external DP x DP x PP x PCP x TP."""
    rank = external * layout["dp"] + dp
    rank = rank * layout["pp"] + pp
    rank = rank * layout.get("pcp", 1) + pcp
    return rank * layout["tp"] + tp


@given(
    external=st.integers(1, 3),
    blocks=st.integers(1, 4),
    size=st.integers(2, 8),
    pp=st.integers(1, 3),
    tp=st.integers(1, 4),
)
def test_groups_partition_the_world(
    external: int, blocks: int, size: int, pp: int, tp: int
) -> None:
    dp = blocks * size
    layout = {"dp": dp, "pp": pp, "tp": tp}
    world = external * dp * pp * tp
    dp_groups = [
        [rank_of(layout, e, d, p, 0, t) for d in range(dp)]
        for e in range(external) for p in range(pp) for t in range(tp)
    ]  # fmt: skip
    tp_groups = [list(range(start, start + tp)) for start in range(0, world, tp)]
    otp = topology.otp_groups(dp_groups, size)
    layer = topology.layer_groups(otp, tp_groups)
    for groups, length in ((otp, size), (layer, size * tp)):
        assert all(len(group) == length for group in groups)
        assert sorted(rank for group in groups for rank in group) == list(range(world))
    for group in otp:
        step = pp * tp
        assert [b - a for a, b in itertools.pairwise(group)] == [step] * (size - 1)
    for group in layer:
        for chunk, rank in enumerate(group):
            assert rank % tp == chunk // size
            assert (rank % tp) * size + chunk % size == chunk


@pytest.mark.parametrize(
    ("size", "dp", "remedy"),
    [
        (3, 8, "accepted are the divisors of the data-parallel size 8 above 1 (2, 4, 8)"),
        (16, 8, "accepted are the divisors of the data-parallel size 8 above 1 (2, 4, 8)"),
        (2, 3, "accepted are the divisors of the data-parallel size 3 above 1 (3)"),
        (2, 1, "the data-parallel size is 1, so there is nothing to shard over"),
    ],
)
def test_size_refused(size: int, dp: int, remedy: str) -> None:
    with pytest.raises(OprojValueError) as raised:
        topology.check_size(size, dp)
    assert str(raised.value) == (
        f"OPROJ003: OPROJ_TENSOR_PARALLEL_SIZE is {size}; {remedy}: change it, change the "
        "data-parallel size, or unset it."
    )


@pytest.mark.parametrize(("size", "dp"), [(2, 2), (2, 8), (4, 8), (8, 8), (3, 6), (64, 64)])
def test_size_accepted(size: int, dp: int) -> None:
    topology.check_size(size, dp)


def test_divisible() -> None:
    topology.check_divisible("layer", 16384, 1, 8)
    topology.check_divisible("layer", 48, 2, 3)
    with pytest.raises(OprojValueError) as raised:
        topology.check_divisible("model.layers.0.self_attn.o_proj", 48, 2, 5)
    assert str(raised.value) == (
        "OPROJ005: OPROJ_TENSOR_PARALLEL_SIZE is 5, but the input dimension 48 of "
        "model.layers.0.self_attn.o_proj is not divisible by tensor-parallel size * group size "
        "= 2 * 5; accepted are sizes that divide 24: change the variable."
    )


@given(st.integers(1, 64), st.integers(1, 4096), st.integers(1, 8))
def test_legal_sizes_are_exactly_the_accepted(dp: int, columns: int, tp: int) -> None:
    accepted = []
    for size in range(2, dp + 2):
        try:
            topology.check_size(size, dp)
            topology.check_divisible("", columns, tp, size)
        except OprojValueError:
            continue
        accepted.append(size)
    assert topology.legal_sizes(dp, columns, tp) == accepted


def test_grids() -> None:
    assert list(map(str, topology.grids(8))) == ["8x1", "4x2", "2x4", "1x8"]
    assert topology.grids(7) == [(7, 1), (1, 7)]


@pytest.mark.parametrize(
    ("text", "size", "grid"),
    [("auto", 8, None), ("Nx1", 8, (8, 1)), ("1xN", 6, (1, 6)), ("4x2", 8, (4, 2))],
)
def test_grid_named(text: str, size: int, grid: Any) -> None:
    assert topology.check_grid(text, size) == grid


@pytest.mark.parametrize("text", ["4x4", "3x2", "NxN", "2x2", "16x1"])
def test_grid_of_other_ranks_refused(text: str) -> None:
    with pytest.raises(OprojValueError) as raised:
        topology.check_grid(text, 8)
    assert str(raised.value) == (
        f"OPROJ002: OPROJ_GRID is {text}, which is no grid of 8 ranks "
        "(OPROJ_TENSOR_PARALLEL_SIZE); accepted are auto, Nx1, 8x1, 4x2, 2x4, 1x8: change one of "
        "the two, or unset OPROJ_GRID."
    )


# size, K, H, bytes of an element back, and out: the grid and its bytes per row.
CHOSEN = [
    (4, 16384, 7168, 2, 2, "4x1", 67584),
    (8, 16384, 7168, 2, 2, "4x2", 107520),
    (16, 16384, 7168, 2, 2, "8x2", 168960),
    (32, 16384, 7168, 2, 2, "8x4", 238080),
    (4, 16384, 7168, 2, 1, "2x2", 46080),
    (8, 16384, 7168, 2, 1, "4x2", 78848),
    (16, 16384, 7168, 2, 1, "4x4", 115200),
    (2, 2048, 7168, 2, 2, "1x2", 11264),
    (2, 48, 48, 2, 2, "2x1", 144),  # a tie
]


@pytest.mark.parametrize("case", CHOSEN)
def test_grid_of_the_fewest_bytes(case: tuple[int, int, int, int, int, str, int]) -> None:
    size, columns, hidden, back, out, grid, sent = case
    found = topology.choose_grid(size, columns, hidden, back, out)
    parts = columns // found.inputs, hidden // found.outputs
    assert (str(found), topology.step_bytes(size, *parts, back, out)) == (grid, sent)


def test_blocks_stay_whole() -> None:
    assert topology.choose_grid(16, 16384, 7168, 2, 1, (128, 128)) == (4, 4)
    assert topology.choose_grid(16, 16384, 7168, 2, 1, (128, 3584)) == (8, 2)
    assert topology.choose_grid(16, 16384, 7168, 2, 1, (8192, 128)) == (2, 8)
    assert topology.choose_grid(16, 16384, 7168, 2, 1, (128, 7168)) == (16, 1)


@pytest.mark.parametrize("outputs", [1, 2, 4, 8])
def test_layer_groups_of_a_grid(outputs: int) -> None:
    """DP 8, TP 2: rank (i, j) of each otp group, with its tensor-parallel peer's, by column j."""
    otp = [list(range(tp, 16, 2)) for tp in range(2)]
    groups = topology.layer_groups(otp, [[2 * dp, 2 * dp + 1] for dp in range(8)], outputs)
    assert sorted(groups) == [
        [2 * (i * outputs + j) + tp for tp in range(2) for i in range(8 // outputs)]
        for j in range(outputs)
    ]
