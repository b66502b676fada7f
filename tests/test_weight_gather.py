"""Gathering weights instead of exchanging activations: when, and that results stay right."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oproj_patch import weight_gather
from oproj_patch.settings import Settings

from .warm import Warm

STEPS = [[8, 8], [7, 7], [9, 8], [40, 40], [1, 40], [0, 8], [8, 11], [300, 300], [3, 3], [8, 10]]
"""Rows that cross a threshold of 8 between consecutive steps, and unequal ones."""
LIMIT = {"float32": 5e-6, "bfloat16": 1e-2}


Run = Callable[..., list[Any]]


@pytest.fixture
def run(warm: Warm) -> Run:
    """Results by rank of the layer on `dp` x `tp` ranks."""

    def start(dp: int, tp: int = 1, gather_rows: str = "8", **options: Any) -> list[Any]:
        return warm.run(
            dp * tp,
            "tests.bodies.weight_gather:equal",
            {"dp": dp, "tp": tp, **options},
            env={"OPROJ_TENSOR_PARALLEL_SIZE": str(dp), "OPROJ_WEIGHT_GATHER_ROWS": gather_rows},
        )

    return start


def right(results: list[Any], dtype: str = "float32") -> None:
    for result in results:
        assert max(result["errors"]) <= LIMIT[dtype], result["errors"]
        assert result["exchanges"] == len(result["errors"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"dtype": "bfloat16", "bias": True},
        {"transposed": True},
        {"reload": True, "bias": True},
        {"tp": 2, "bias": True},
        {"tp": 2, "input_is_parallel": False},
    ],
    ids=str,
)
def test_results_are_right_on_both_sides_of_the_threshold(
    run: Run, options: dict[str, Any]
) -> None:
    results = run(2, rows=STEPS, **options)
    right(results, options.get("dtype", "float32"))
    for result in results:
        assert result["gathers"] == [1, 0, 1, 1, 0, 0, 0, 1, 0, 1]
        assert result["threshold"] == 8


def test_four_ranks(run: Run) -> None:
    steps = [[16] * 4, [16, 17, 18, 20], [16, 17, 18, 21], [16, 16, 16, 0], [15] * 4]
    results = run(4, rows=steps, gather_rows="16", bias=True)
    right(results)
    for result in results:
        assert result["gathers"] == [1, 1, 0, 0, 0]


def test_by_default_from_where_it_moves_fewer_bytes(run: Run) -> None:
    # K*H / (K + N*H) = 48*20 / (48 + 2*20) = 10.9
    results = run(2, rows=[[10, 10], [11, 11]], gather_rows="")
    right(results)
    for result in results:
        assert (result["threshold"], result["gathers"]) == (11, [0, 1])
        weight = 48 * 20 * 4
        assert weight <= result["buffer"] < weight + 2 * weight_gather.ALIGNMENT
        assert "; weights gathered from 11 rows a rank on, through a buffer of" in result["summary"]


def test_zero_is_never(run: Run) -> None:
    results = run(2, rows=[[8, 8], [300, 300]], gather_rows="0")
    right(results)
    for result in results:
        assert result["gathers"] == [0, 0] and result["buffer"] == 0
        assert "gather" not in result["summary"]


def test_a_weight_that_the_host_has_packed_is_not_gathered(run: Run) -> None:
    results = run(2, rows=[[8, 8], [300, 300]], packed=True)
    right(results)
    for result in results:
        assert result["gathers"] == [0, 0] and result["buffer"] == 0
        assert "; weights not gathered: the host has packed the weights" in result["summary"]


def test_a_quant_method_that_reads_something_else_is_found_out(run: Run) -> None:
    results = run(2, rows=[[8, 8], [300, 300]], hidden_weight=True)
    right(results)
    for result in results:
        assert result["gathers"] == [0, 0] and result["threshold"] == 0


def o_proj(columns: int, hidden: int, ranks: int, weight: torch.dtype) -> tuple[Any, Any]:
    layer = torch.nn.Linear(
        columns // ranks, hidden, bias=False, device="meta", dtype=torch.bfloat16
    )
    layer.weight.requires_grad = False
    layer.weight.data = layer.weight.data.to(weight)
    layer.__dict__.update(
        input_size_per_partition=columns // ranks,
        output_size=hidden,
        params_dtype=torch.bfloat16,
        oproj=SimpleNamespace(saved=columns // ranks * hidden * 2 * (ranks - 1)),
    )
    return layer, SimpleNamespace(size=ranks, settings=Settings(size=ranks))


@pytest.mark.parametrize(("size", "rows"), [(2, 3823), (4, 2607), (8, 1593), (16, 896)])
def test_threshold_of_deepseek_r1(size: int, rows: int) -> None:
    assert abs(weight_gather.threshold(*o_proj(16384, 7168, size, torch.bfloat16)) - rows) <= 1
    # An int8 weight is half as much to gather; the activations stay 16 bits wide.
    assert abs(weight_gather.threshold(*o_proj(16384, 7168, size, torch.int8)) - rows / 2) <= 1


@given(st.integers(0, 5000), st.lists(st.integers(0, 5000), min_size=2, max_size=8))
def test_decision(least: int, counts: list[int]) -> None:
    chosen = weight_gather.wins(least, tuple(counts))
    assert chosen == (0 < least <= min(counts) and max(counts) <= 1.25 * min(counts))
    assert chosen == weight_gather.wins(least, tuple(sorted(counts)))
