"""The sharded layer on real ranks, against float64 and against vLLM's own layer at TP=N."""

from __future__ import annotations

from typing import Any

import pytest

from tests import ranks
from tests.warm import Warm

Case = dict[str, Any]
UNEVEN2 = [[3, 3], [0, 5], [5, 0], [1, 300], [256, 2], [0, 0], [7, 1]]
OPTIONS: list[Case] = [
    {},
    {"bias": True},
    {"bias": True, "skip_bias_add": True},
    {"bias": True, "return_bias": False},
    {"bias": True, "skip_bias_add": True, "return_bias": False},
    {"reduce_results": False},
    {"reduce_results": False, "bias": True, "skip_bias_add": True},
    {"input_is_parallel": False, "bias": True},
    {"input_is_parallel": False, "reduce_results": False},
]
COMPILED = [[2, 5], [3, 3], [300, 2], [17, 64], [5, 2]]

EQUAL: dict[int, list[Case]] = {
    2: [
        *({"dp": 2, "size": 2, "rows": UNEVEN2, **options} for options in OPTIONS),
        {"dp": 2, "size": 2, "rows": UNEVEN2, "announced": True},
        # Bytes of a buffer, above which a step is cut into parts.
        {"dp": 2, "size": 2, "rows": UNEVEN2, "bias": True, "buffer": 64},
        {"dp": 2, "size": 2, "rows": UNEVEN2, "bias": True, "buffer": 500},
        {"dp": 2, "size": 2, "rows": [[3, 4], [2, 2]], "dims": 3},
        {"dp": 2, "size": 2, "rows": [[4, 9], [64, 64]], "columns": 2048, "hidden": 512},
        {"dp": 2, "size": 2, "rows": COMPILED, "compiled": True, "bias": True},
        {"dp": 2, "size": 2, "rows": COMPILED, "compiled": True, "announced": True},
        {"dp": 2, "size": 2, "rows": [[1, 1], [0, 4], [1, 0]], "compiled": True},
    ],
    3: [
        {"dp": 3, "size": 3, "rows": [[3, 3, 3], [0, 5, 1], [200, 0, 0]], **options}
        for options in ({}, {"bias": True}, {"columns": 21, "hidden": 7}, {"buffer": 64})
    ],
    4: [
        {"dp": 4, "size": 2, "rows": [[3, 3, 3, 3], [0, 5, 1, 2], [100, 0, 0, 7]], "bias": True},
        {"dp": 4, "size": 4, "rows": [[3, 3, 3, 3], [0, 5, 1, 2], [100, 0, 0, 7]], "bias": True},
        {"dp": 4, "size": 4, "rows": [[3, 3, 3, 3], [0, 5, 1, 2], [100, 0, 0, 7]], "buffer": 64},
        *({"dp": 2, "tp": 2, "size": 2, "rows": UNEVEN2, **options} for options in OPTIONS),
        {"dp": 2, "tp": 2, "size": 2, "rows": COMPILED, "compiled": True},
        {
            "dp": 2, "tp": 2, "size": 2, "rows": COMPILED, "compiled": True,
            "input_is_parallel": False, "announced": True,
        },
    ],
    8: [
        {"dp": 8, "size": 8, "rows": [[3] * 8, [0, 1, 2, 3, 4, 5, 6, 200]], "bias": True},
        {"dp": 8, "size": 4, "rows": [[3] * 8, [0, 1, 2, 3, 4, 5, 6, 200]]},
        {"dp": 8, "size": 8, "rows": [[3] * 8, [0, 1, 2, 3, 4, 5, 6, 200]], "buffer": 64},
        {"dp": 4, "tp": 2, "size": 4, "rows": [[2] * 4, [0, 1, 9, 90]], "bias": True},
        {"dp": 2, "tp": 4, "size": 2, "rows": [[2, 2], [0, 9]], "bias": True},
    ],
}  # fmt: skip
PRECISION: Case = {"case": "precision", "columns": 1536, "hidden": 512, "rows": 96}
OTHERS: dict[int, list[Case]] = {
    2: [
        {"case": "stack", "dp": 2, "size": 2, "rows": COMPILED},
        {"case": "recreate", "dp": 2, "size": 2, "times": 10},
        {"case": "loaders", "dp": 2, "size": 2},
        {"case": "reload", "dp": 2, "size": 2},
        {"case": "others", "dp": 2, "size": 2},
        {"case": "wrong_rows", "dp": 2, "size": 2},
    ],
}


def cases(world: int) -> list[Case]:
    precise = [{**PRECISION, "ways": world, "size": world, "dtype": dtype}
               for dtype in ("bfloat16", "float32")]  # fmt: skip
    return [*EQUAL[world], *precise, *OTHERS.get(world, [])]


class Worlds:
    """One start of the ranks for all cases of a world size; a failed start fails its tests."""

    def __init__(self, warm: Warm) -> None:
        self.warm = warm
        self.told: dict[int, list[list[Any]]] = {}
        self.failed: dict[int, ranks.RankFailed] = {}

    def of(self, world: int, case: Case) -> list[Any]:
        if world in self.failed:
            raise self.failed[world]
        if world not in self.told:
            try:
                self.told[world] = self.warm.run(
                    world, "tests.bodies.layer:run_cases", {"cases": cases(world)}, seconds=300,
                    env={"OPROJ_PATCH_DEBUG": "1" if world == 3 else "0"},
                )  # fmt: skip
            except ranks.RankFailed as error:
                self.failed[world] = error
                raise
        index = cases(world).index(case)
        return [rank[index] for rank in self.told[world]]


@pytest.fixture(scope="module")
def worlds(warm: Warm) -> Worlds:
    return Worlds(warm)


@pytest.mark.parametrize(
    ("world", "case"),
    [(world, case) for world in EQUAL for case in EQUAL[world]],
    ids=lambda value: "-".join(
        f"{key}={v}" for key, v in value.items() if key != "rows"
    ) if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_equal(worlds: Worlds, world: int, case: Case) -> None:
    told = worlds.of(world, case)
    tp, size = case.get("tp", 1), case["size"]
    columns, hidden = case.get("columns", 48), case.get("hidden", 20)
    width = columns // (tp * size)
    for rank, of_rank in enumerate(told):
        dp_rank, tp_rank = rank // tp, rank % tp
        start = dp_rank // size * size
        chunk = tp_rank * size + dp_rank - start
        assert of_rank["shard"] == [hidden, width]
        assert of_rank["index"] == [chunk * width], "the shard is not bit-exact"
        assert of_rank["ranks"] == [(start + j) * tp + tp_rank for j in range(size)]
        assert of_rank["kept"] == 4 * hidden * (width + bool(case.get("bias")))
        assert of_rank["saved"] == 4 * hidden * width * (size - 1)
        assert of_rank["layers"] == 1
        assert of_rank["exchanges"] == len(case["rows"])
        assert len(of_rank["errors"]) == sum(counts[dp_rank] > 0 for counts in case["rows"])
        assert all(error <= 5e-6 * of_rank["scale"] for error in of_rank["errors"])
    if case.get("compiled") and min(min(counts) for counts in case["rows"]) > 1:
        assert {of_rank["graphs"] for of_rank in told} == {1}, "recompiled for a row count"


@pytest.mark.parametrize("world", EQUAL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_worse_than_tensor_parallel(worlds: Worlds, world: int, dtype: str) -> None:
    """Root mean square error no larger than that of vLLM's own layer and all-reduce."""
    for of_rank in worlds.of(world, {**PRECISION, "ways": world, "size": world, "dtype": dtype}):
        (rms, largest), (tp_rms, tp_largest) = of_rank["sharded"], of_rank["ordinary"]
        assert 0 < rms <= 1.02 * tp_rms and largest <= 1.5 * tp_largest
        assert largest <= of_rank["scale"] * (5e-6 if dtype == "float32" else 1e-2)


def test_compiled_stack(worlds: Worlds) -> None:
    """Three layers in one graph, one compilation for all row counts, every exchange run."""
    for of_rank in worlds.of(2, OTHERS[2][0]):
        assert of_rank["graphs"] == 1 and of_rank["exchanges"] == 3 * len(COMPILED)
        assert max(of_rank["errors"]) <= 5e-6


def test_groups_created_again(worlds: Worlds) -> None:
    for of_rank in worlds.of(2, OTHERS[2][1]):
        inside, outside, files, threads = zip(*of_rank["seen"], strict=True)
        assert len(inside) == 10 and len(set(inside)) == 1 and len(set(outside)) == 1
        # The first rounds may open what stays open (loggers, shared memory).
        assert files[-1] <= files[2] and threads[-1] <= threads[2]


def test_loaders(worlds: Worlds) -> None:
    for of_rank in worlds.of(2, OTHERS[2][2]):
        assert len(of_rank) == 7 and all(of_rank.values()), of_rank


def test_weights_loaded_again(worlds: Worlds) -> None:
    for rank, of_rank in enumerate(worlds.of(2, OTHERS[2][3])):
        assert len(of_rank["errors"]) == 4 and max(of_rank["errors"]) <= 5e-6
        assert of_rank["cut"] == [rank * of_rank["width"]]


def test_other_layers_untouched(worlds: Worlds) -> None:
    for of_rank in worlds.of(2, OTHERS[2][4]):
        assert len(of_rank) == 11 and all(map(all, of_rank.values())), of_rank


def test_rows_that_were_not_announced(worlds: Worlds) -> None:
    for rank, of_rank in enumerate(worlds.of(2, OTHERS[2][5])):
        assert of_rank["error"] == (
            f"OPROJ014: o_proj got 3 rows on rank {rank}, but the host's data-parallel metadata "
            "says [4, 4] for ranks [0, 1]: this forward pass changes its row count between "
            "layers or hides it, which is not supported; please report model and options."
        )
