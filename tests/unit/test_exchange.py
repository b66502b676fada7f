"""One step: the decision between patterns of communication, and the sum of partial results."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oproj_patch.settings import Settings
from oproj_patch.sharding import exchange
from oproj_patch.sharding.exchange import Pattern, Plan
from oproj_patch.sharding.otp_group import OtpGroup

# DeepSeek-R1's layer on 8 ranks, bfloat16, graphs up to 512 rows.
R1 = Plan(8, 16384, 7168, 2, 512, 0, 64 << 20)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 20), (300, 7168)], ids=str)
def test_sum_is_that_of_float64_rounded_once(ranks: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(ranks)
    parts = torch.randn((ranks, *shape), generator=generator).bfloat16()
    total = exchange.add_up(parts)
    assert total.dtype == torch.bfloat16 and total.shape == shape
    exact = parts.double().sum(0)
    # Half a unit in the last of 8 bits, and float32's own rounding.
    assert bool(((total.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all())


def test_small_terms_are_not_lost_between_large_ones() -> None:
    parts = torch.tensor([256.0, 1.0, 1.0, -256.0]).bfloat16().view(4, 1, 1).expand(4, 1, 4)
    assert exchange.add_up(parts).tolist() == [[2.0] * 4]


@given(st.lists(st.integers(0, 512), min_size=8, max_size=8), st.integers(0, 4000))
def test_up_to_the_largest_captured_size_there_is_one_pattern(
    counts: list[int], gather_from: int
) -> None:
    plan = R1._replace(gather_from=gather_from)
    assert exchange.decide(tuple(counts), plan) == Pattern(gather=False, parts=1)


@given(st.lists(st.integers(0, 9000), min_size=8, max_size=8), st.integers(0, 4000))
def test_every_part_fits_the_buffers(counts: list[int], gather_from: int) -> None:
    plan = R1._replace(gather_from=gather_from)
    pattern = exchange.decide(tuple(counts), plan)
    if pattern.gather:
        assert min(counts) >= gather_from > 0 and max(counts) > 512
        return
    parts = pattern.parts
    starts = [[count * part // parts for count in counts] for part in range(parts + 1)]
    assert starts[0] == [0] * 8 and starts[-1] == counts
    for before, after in itertools.pairwise(starts):
        some = [b - a for a, b in zip(before, after, strict=True)]
        if max(counts) > 512:
            # One more row of a rank than its share, because rows cannot be cut.
            room = plan.buffer_bytes + 8 * 7168 * 2
            assert 8 * max(some) * 7168 * 2 <= room
            assert max(8 * max(some), sum(some)) * 2048 * 2 <= room


@pytest.mark.parametrize("graph_rows", [0, 24])
@pytest.mark.parametrize("buffer_bytes", [100, 1000, 100_000])
def test_the_most_rows_of_one_gemm(graph_rows: int, buffer_bytes: int) -> None:
    """For all counts of three ranks no GEMM has more, and nearly as many occur."""
    plan = Plan(3, 48, 40, 4, graph_rows, 0, buffer_bytes)
    for most in (1, 7, 30):
        found = []
        for counts in itertools.product(range(most + 1), repeat=3):
            parts = exchange.decide(counts, plan).parts
            cuts = [tuple(count * part // parts for count in counts) for part in range(parts + 1)]
            found += [sum(after) - sum(before) for before, after in itertools.pairwise(cuts)]
        told = exchange.most_rows(plan, most)
        assert max(found) <= told <= max(most, max(found) + plan.size), (most, max(found), told)


def test_the_decision_sees_nothing_that_one_rank_knows_alone() -> None:
    """Its inputs are the counts of the pass and what the ranks compared before the first step."""
    assert list(inspect.signature(exchange.decide).parameters) == ["counts", "plan"]
    assert all(isinstance(value, int) for value in R1)


CAPTURED = (1, 2, 4, 8, 24)
SMALL = Plan(3, 48, 40, 4, CAPTURED[-1], 6, 100_000)
"""Weights are gathered from 6 rows on every rank on, were it not for the graphs."""


def test_an_eager_rank_decides_as_every_rank_that_replays() -> None:
    """For all counts that one graph serves: a replay does what its capture of equal rows did."""
    for size in CAPTURED:
        captured = exchange.decide((size,) * SMALL.size, SMALL)
        for counts in itertools.product(range(size + 1), repeat=SMALL.size):
            assert exchange.decide(counts, SMALL) == captured, (size, counts)


@dataclass
class Local:
    """What only one rank knows of a step."""

    capturing: bool
    announced: bool
    leads: bool
    debug: bool
    has_gathered: bool
    verified: bool
    inference: bool
    short: bool  # fewer rows than announced


@pytest.mark.parametrize(
    ("counts", "gathers"),
    [((24, 24, 24), False), ((25, 30, 25), True), ((60, 3, 0), False), ((0, 0, 700), False)],
)
def test_a_step_communicates_alike_whatever_a_rank_knows_alone(
    counts: tuple[int, ...], gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[Any, ...]] = []

    def gathered(x: torch.Tensor, layer: Any) -> torch.Tensor:
        done.append(("gather",))
        return x.new_zeros(x.shape[0], SMALL.hidden)

    def exchanged(layer: Any, x: torch.Tensor, rows: Any, parts: int, tail: None) -> torch.Tensor:
        done.append(("exchange", rows, parts))
        return x.new_zeros(x.shape[0], SMALL.hidden)

    monkeypatch.setattr(exchange.weight_gather, "run", gathered)
    monkeypatch.setattr(exchange, "exchange", exchanged)
    monkeypatch.setattr(exchange.rows, "gather", lambda values, *_: [(*counts,)])
    monkeypatch.setattr(exchange.diagnosis, "compare_places", lambda *_: None)
    monkeypatch.setattr(exchange, "_gather_is_right", lambda *_: True)
    seen = set()
    every = itertools.product(range(3), *[(False, True)] * len(fields(Local)))
    for rank, *facts in every:
        local = Local(*facts)
        if local.capturing and len(set(counts)) > 1:
            continue  # all ranks capture the same rows
        announced = counts if local.announced else None
        host = SimpleNamespace(
            capturing=lambda local=local: local.capturing, announced=lambda _, told=announced: told
        )
        group: Any = SimpleNamespace(
            rank=rank, ranks=[0, 1, 2], size=3, counts=None, steps=5,
            settings=Settings(size=3, debug=local.debug), gathers=int(local.has_gathered),
        )  # fmt: skip
        shard = SimpleNamespace(
            group=group, plan=SMALL, host=host, name="o_proj", leads=local.leads,
            gather_verified=local.verified,
        )  # fmt: skip
        mine = max(0, counts[rank] - (local.short and not local.capturing))
        with torch.inference_mode(local.inference):
            exchange.run(SimpleNamespace(oproj=shard), torch.zeros(mine, SMALL.columns))
        seen.add(tuple(done))
        done.clear()
    (only,) = seen
    assert (only == (("gather",),)) is gathers


@pytest.mark.parametrize("graph_rows", [8, 512])
@hypothesis.settings(deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=4, max_size=4))
def test_no_step_needs_more_memory_than_is_reserved(graph_rows: int, counts: list[int]) -> None:
    """A captured graph holds the addresses of the buffers, so they never move after `reserve`."""
    plan = Plan(4, 64, 40, 4, graph_rows, 0, 20_000)
    group: Any = OtpGroup([0, 1, 2, 3], 0, 0, [0], 0, None, None, None, None, "", graph_rows)
    group.layers["o_proj"] = SimpleNamespace(oproj=SimpleNamespace(plan=plan))
    x = torch.empty(1, 64)
    exchange.reserve(group, x)
    before = {key: memory.data_ptr() for key, memory in group.buffers.items()}
    parts = exchange.decide(tuple(counts), plan).parts
    for part in range(parts):
        lane = part % 2
        some = [c * (part + 1) // parts - c * part // parts for c in counts]
        for mine in some:  # on each rank
            exchange.buffer("dispatch send", (4, mine, 16), x, group, lane)
            exchange.buffer("dispatch receive", (sum(some), 16), x, group, lane)
            exchange.buffer("combine receive", (4, mine, 40), x, group, lane)
    assert {key: memory.data_ptr() for key, memory in group.buffers.items()} == before
    assert group.outgrown == []


def test_parts_begin_in_one_order_and_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a part is multiplied, the next is on its way out and the last on its way back."""
    told: list[str] = []

    def begun(output: Any, input_: torch.Tensor, *_: Any) -> Any:
        number = sum(name.startswith("begin") for name in told)
        told.append(f"begin {number}")
        output.zero_()
        return SimpleNamespace(wait=lambda: told.append(f"wait {number}"))

    def gemm(x: torch.Tensor, *_: Any) -> torch.Tensor:
        told.append("gemm")
        return x.new_ones(x.shape[0], 40)

    plan = Plan(2, 64, 40, 4, 0, 0, 1)
    group: Any = OtpGroup([0, 1], 0, 0, [0], 0, None, None, None, None, "")
    shard = SimpleNamespace(group=group, plan=plan, gemm=gemm, wire=None)
    monkeypatch.setattr(exchange, "_all_to_all", begun)
    exchange.exchange(SimpleNamespace(oproj=shard), torch.zeros(5, 64), (5, 7), parts=3)
    # Out 0, out 1, back 0, out 2, back 1, back 2 are 0 to 5.
    assert told == [
        "begin 0", "wait 0", "begin 1", "gemm", "begin 2",
        "wait 1", "begin 3", "gemm", "begin 4", "wait 2",
        "wait 3", "gemm", "begin 5", "wait 4", "wait 5",
    ]  # fmt: skip
