"""Peak memory: no step needs more than the profile run, from which vLLM sizes its KV cache.

The profile run has as many rows as a step can have, on every rank. Counted is what torch allocates,
by its own tracker: in ranks over gloo, and for DeepSeek-R1's shape on meta tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from tests.ranks.launch import World
from tests.ranks.layers import cut_up, finish, forward_context, made, sharding, whole

MOST = 96
"""Rows of the profile run on each of three ranks."""
WORST = [
    *([MOST, 0, 0], [0, MOST, MOST], [1, MOST, 1], [MOST, MOST - 1, 7], [MOST, 80, MOST]),
    *([MOST, MOST, MOST], [3, 3, 3], [0, 0, 1], [31, 60, 90]),
]


def peak(call: Callable[[], object], group: Any, x: torch.Tensor) -> int:
    """Return the most bytes that were alive at once while `call` ran.

    The group's buffers and the step's input are among them.
    """
    tracker, device = MemTracker(), x.device.type
    tracker.track_external(x, *group.buffers.values())
    with tracker:
        call()
    found = tracker.get_tracker_snapshot("peak")
    return sum(kinds["Total"] for at, kinds in found.items() if at.type == device)


def held(group: Any) -> int:
    """Return the bytes of the group's buffers."""
    return sum(memory.nbytes for memory in group.buffers.values())


@pytest.mark.parametrize("world", [3], indirect=True)
@pytest.mark.parametrize("gather_from", ["0", "40"], ids=["exchange", "gather"])
@pytest.mark.parametrize("buffer", [0, 6_000], ids=["whole", "cut"])
def test_no_step_needs_more_than_the_profile_run(
    world: World, gather_from: str, buffer: int
) -> None:
    world.run(profiled, gather_from, buffer)


def profiled(gather_from: str, buffer: int) -> None:
    """In a rank: profile, then step with the worst counts."""
    from oproj_patch.sharding import exchange, otp_group

    columns, hidden = 48, 20
    with (
        sharding(3, 3, OPROJ_WEIGHT_GATHER_ROWS=gather_from) as config,
        cut_up(buffer),
    ):
        layer, _, _ = made(hidden, columns)
        layer._cpu_skip_gemm_dispatch = True  # not packed: it can be gathered
        finish(layer)
        group = otp_group.require("the test")
        rank = config.parallel_config.data_parallel_rank

        def step(counts: list[int]) -> int:
            x = whole(counts[rank], columns, torch.float32)
            with torch.inference_mode(), forward_context(config, counts, True):
                return peak(lambda: exchange.run(layer, x), group, x)

        with torch.inference_mode(), forward_context(config, [1, 1, 1], True):
            layer(whole(1, columns, torch.float32))  # the layers are settled and compared
        group.buffers.clear()
        group.views.clear()
        most = step([MOST] * 3)
        kept = held(group)
        assert 0 < kept < most
        assert (group.gathers > 0) == (gather_from != "0")
        for counts in WORST:
            needed = step(counts)
            assert kept < needed <= most, (counts, needed, most)
            assert kept == held(group)


@pytest.mark.long
@pytest.mark.parametrize("graph_rows", [0, 512])
def test_r1_on_eight_ranks_on_meta_tensors(graph_rows: int) -> None:
    """[16384 -> 7168] in bfloat16, 8,192 rows: what a rank needs for 200 mixtures of counts."""
    from oproj_patch.sharding import exchange
    from oproj_patch.sharding.otp_group import OtpGroup

    most, n = 8192, 8
    room = exchange.BUFFER_BYTES
    plan = exchange.Plan(n, 16384, 7168, 2, graph_rows, 0, room)
    weight = torch.empty(7168, 16384 // n, dtype=torch.bfloat16, device="meta")
    ranks = list(range(n))
    group: Any = OtpGroup(ranks, 0, 0, [0], 0, None, None, None, None, "", graph_rows)
    shard = SimpleNamespace(
        group=group,
        plan=plan,
        wire=None,
        gemm=lambda x, _=(), __=None: torch.nn.functional.linear(x, weight),
    )
    layer = SimpleNamespace(oproj=shard, output_size=7168)
    group.layers["o_proj"] = layer

    def step(counts: tuple[int, ...]) -> int:
        x = torch.empty(counts[group.rank], 16384, dtype=torch.bfloat16, device="meta")
        parts = exchange.decide(counts, plan).parts
        return peak(lambda: exchange.exchange(layer, x, counts, parts), group, x)

    generator = random.Random(0)
    mixtures = [(most, *[0] * 7), (0, *[most] * 7), (1, *[most] * 7), (most, *[1] * 7)]
    for _ in range(196):
        top = generator.choice([1, 24, graph_rows or 7, 600, most])
        mixtures.append(tuple(generator.randint(0, top) for _ in ranks))
    with mock.patch.object(exchange, "_all_to_all"):
        exchange.reserve(group, weight)
        reserved = held(group)
        profile = step((most,) * n)
        kept = held(group)
        if graph_rows:
            assert kept == reserved, "a captured graph holds the addresses of the buffers"
        # Bounded whatever the rows are: three buffers in each of two lanes.
        most_of_one = max(room, graph_rows * n * 7168 * 2)
        assert kept <= 3 * (room + most_of_one + 2 * n * 7168 * 2)
        for counts in mixtures:
            assert step(counts) <= profile, counts
