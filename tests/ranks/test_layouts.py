"""vLLM's real group creation for every rank of worlds up to 64, in one process.

torch's fake process groups stand in for the network, and the hand-shake (which needs the other
ranks) is left out; rank lists, seams and the otp group are the real ones.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.ranks import launch
from tests.ranks.layers import configuration, moe_model_config


def rank_of(layout: dict[str, int], external: int, dp: int, pp: int, pcp: int, tp: int) -> int:
    """vLLM's documented order: external DP x DP x PP x PCP x TP."""
    rank = external * layout["dp"] + dp
    rank = rank * layout["pp"] + pp
    rank = rank * layout.get("pcp", 1) + pcp
    return rank * layout["tp"] + tp


def expected(layout: dict[str, int]) -> list[dict[str, Any]]:
    """Return what each rank of the world must find, written out."""
    pcps, size, tps = layout.get("pcp", 1), layout["size"], layout["tp"]
    external = layout["world"] // (layout["dp"] * layout["pp"] * pcps * tps)
    told: dict[int, dict[str, Any]] = {}
    for e in range(external):
        for dp in range(layout["dp"]):
            start = dp // size * size
            for pp in range(layout["pp"]):
                for pcp in range(pcps):
                    members = [
                        [rank_of(layout, e, start + j, pp, pcp, t) for j in range(size)]
                        for t in range(tps)
                    ]
                    for tp in range(tps):
                        told[rank_of(layout, e, dp, pp, pcp, tp)] = {
                            "ranks": members[tp],
                            "rank": dp - start,
                            "dp_start": start,
                            "tp": [tp, tps],
                            "layer_ranks": [rank for group in members for rank in group],
                            "chunk": tp * size + dp - start,
                        }
    return [told[rank] for rank in range(layout["world"])]


LAYOUTS = [
    {"world": 2, "dp": 2, "pp": 1, "tp": 1, "size": 2},
    {"world": 12, "dp": 6, "pp": 2, "tp": 1, "size": 3},
    {"world": 16, "dp": 4, "pp": 1, "tp": 2, "pcp": 2, "size": 2},
    {"world": 32, "dp": 4, "pp": 2, "tp": 2, "size": 4},  # and 2 external replicas
    {"world": 64, "dp": 64, "pp": 1, "tp": 1, "size": 8},
    {"world": 64, "dp": 8, "pp": 1, "tp": 8, "size": 8},
    {"world": 64, "dp": 8, "pp": 2, "tp": 4, "dcp": 2, "size": 4},
    {"world": 64, "dp": 16, "pp": 2, "tp": 1, "size": 16},  # and 2 external replicas
]


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items())
)
def test_vllm_groups_of_every_rank(layout: dict[str, int]) -> None:
    launch.run(1, built, layout)


class Coordinator:
    """What vLLM keeps of a group, without its communicators."""

    def __init__(self, group_ranks: list[list[int]], group_name: str, **_: Any) -> None:
        import torch.distributed as dist

        self.group_ranks = group_ranks
        self.ranks = next(ranks for ranks in group_ranks if dist.get_rank() in ranks)
        self.rank_in_group = self.ranks.index(dist.get_rank())
        self.world_size = len(self.ranks)
        self.local_rank = 0
        self.device_group = dist.group.WORLD

    def destroy(self) -> None:
        pass


def built(layout: dict[str, int]) -> None:
    """In one process: create the groups of every rank of a layout; compare them with `expected`."""
    import torch.distributed as dist
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    import oproj_patch
    from oproj_patch.sharding import agreement, otp_group

    new_group = dist.new_group
    dist.new_group = functools.wraps(new_group)(
        lambda ranks, *_, **__: new_group(ranks, backend="fake")
    )
    agreement.agree = lambda *_, **__: None  # type: ignore[assignment]
    parallel_state.GroupCoordinator = Coordinator
    oproj_patch.enable(layout["size"])
    for rank, wanted in enumerate(expected(layout)):
        store = dist.HashStore()
        dist.init_process_group("fake", rank=rank, world_size=layout["world"], store=store)
        config = configuration()
        config.parallel_config.data_parallel_size = layout["dp"]
        # Not a ModelConfig: only what vLLM and the package read of one here.
        object.__setattr__(config, "model_config", moe_model_config())
        parallel_state._WORLD = Coordinator([list(range(layout["world"]))], "world")
        with set_current_vllm_config(config):
            parallel_state.initialize_model_parallel(
                layout["tp"], layout["pp"], layout.get("pcp", 1), layout.get("dcp", 1)
            )
            group = otp_group.current()
            assert group is not None
            layer_tp = group.layer_tp[group.grid]
            assert layer_tp.rank == rank == group.ranks[group.rank]
            assert dist.get_process_group_ranks(group.device_group) == sorted(group.ranks)
            assert wanted == {
                "ranks": group.ranks,
                "rank": group.rank,
                "dp_start": group.dp_start,
                "tp": [group.tp_rank, group.tp_size],
                "layer_ranks": layer_tp.ranks,
                "chunk": layer_tp.rank_in_group,
            }
            parallel_state.destroy_model_parallel()
            assert otp_group.current() is None
        parallel_state._WORLD = None
        dist.destroy_process_group()
    oproj_patch.disable()
