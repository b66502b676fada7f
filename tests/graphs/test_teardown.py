"""The end of a process whose graphs hold collectives of the group."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.ranks import launch
from tests.ranks.layers import finish, made, sharding, whole

from . import emulator


def test_graphs_are_released_before_the_groups() -> None:
    """NCCL would wait forever for a graph that is alive, as seen on a GPU.

    A graph that was there before the group stays: it may be another engine's, or a trainer's.
    """
    assert launch.run(2, ended) == [(5, 0, 2)] * 2


def ended() -> tuple[int, int, int]:
    """In a rank: recorded calls of a graph before the end, and when the group is destroyed.

    The third number is of a graph that is older than the group.
    """
    from oproj_patch.sharding import otp_group

    held: dict[Any, int] = {}
    with emulator.installed():
        older: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(older):
            torch.ones(2) + 1
        gc.freeze()  # as a trainer may
        destroy = dist.destroy_process_group

        def watched(group: Any = None) -> None:
            held[group] = len(graph.calls)
            destroy(group)

        with mock.patch.object(dist, "destroy_process_group", watched), sharding(2, 2):
            found = otp_group.require("the test")
            # As after a start with graphs.
            found.older_graphs, found.graph_rows = otp_group._graphs(), 4
            group = found.device_group
            graph: Any = torch.cuda.CUDAGraph()
            layer, _, _ = made(16, 32)
            finish(layer)
            x = whole(3, 32, torch.float32)
            with torch.inference_mode():
                layer(x)
                with torch.cuda.graph(graph):
                    layer(x)
            before = len(graph.calls)
            gc.freeze()  # as vLLM does after its start
    return before, held[group], len(older.calls)
