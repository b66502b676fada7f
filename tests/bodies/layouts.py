"""In one process: vLLM's real group creation for every rank of a large world.

torch's fake process groups stand in for the network, and the hand-shake (which needs the
other ranks) is left out; rank lists, seams and the otp group are the real ones.
"""

from __future__ import annotations

import functools
from typing import Any


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


def built(layouts: list[dict[str, int]]) -> list[list[dict[str, Any]]]:
    """For each layout (world, dp, pp, tp, size and others), what every rank's group is."""
    import torch.distributed as dist
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    import oproj_patch
    from oproj_patch import otp_group

    from .world import moe_model_config

    new_group = dist.new_group
    dist.new_group = functools.wraps(new_group)(
        lambda ranks, *_, **__: new_group(ranks, backend="fake")
    )
    otp_group.handshake.agree = lambda *_, **__: None
    parallel_state.GroupCoordinator = Coordinator
    told = []
    for layout in layouts:
        oproj_patch.enable(layout["size"])
        ranks = []
        for rank in range(layout["world"]):
            store = dist.HashStore()
            dist.init_process_group("fake", rank=rank, world_size=layout["world"], store=store)
            config = VllmConfig()
            config.parallel_config = ParallelConfig()
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
                assert group.layer_tp.rank == rank == group.ranks[group.rank]
                assert dist.get_process_group_ranks(group.device_group) == sorted(group.ranks)
                ranks.append(
                    {
                        "ranks": group.ranks,
                        "rank": group.rank,
                        "dp_start": group.dp_start,
                        "tp": [group.tp_rank, group.tp_size],
                        "layer_ranks": group.layer_tp.ranks,
                        "chunk": group.layer_tp.rank_in_group,
                    }
                )
                parallel_state.destroy_model_parallel()
                assert otp_group.current() is None
            parallel_state._WORLD = None
            dist.destroy_process_group()
        told.append(ranks)
        oproj_patch.disable()
    return told
