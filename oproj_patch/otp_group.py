"""The otp group: create, hand-shake, look up, destroy; and "see the layer's own TP group".

Process groups of our own, never vLLM's: under HCCL the buffer of the "dp" group is tiny, and
names that begin with `tp` or `pp` get shared memory on the CPU.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from . import handshake, topology
from .errors import OprojError
from .settings import TOGGLE, Settings

_epochs = itertools.count()


class LayerTPGroup:
    """What `parallel_state.get_tp_group()` returns while vLLM handles a sharded o_proj.

    Offers rank, size and collectives of the ranks that together hold the whole weight; any
    other attribute is refused instead of being answered from the wrong group.
    """

    def __init__(self, rank: int, ranks: Sequence[int], device_group: Any, cpu_group: Any) -> None:
        self.rank_in_group = rank
        self.ranks = list(ranks)
        self.world_size = len(self.ranks)
        self.rank = self.ranks[rank]
        self.device_group = device_group
        self.cpu_group = cpu_group

    @property
    def first_rank(self) -> int:
        return self.ranks[0]

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        output = input_.clone()
        dist.all_reduce(output, group=self.device_group)
        return output

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the tensor-parallel group of a sharded o_proj has no {name!r}: vLLM asked for it "
            "while building, loading or applying that layer, which oproj_patch has not met "
            "before; please report the vLLM version and the quantization method."
        )


@dataclass
class OtpGroup:
    """The otp group of this process.

    ranks: its global ranks; rank: this process's place among them.
    dp_start: place of its first member in vLLM's data-parallel group.
    tp_rank, tp_size: vLLM's own tensor-parallel coordinates of this rank.
    device_group, cpu_group: process groups over `ranks` (the same object on gloo).
    layer_tp: see `LayerTPGroup`.
    exchanges: exchanges run so far; by_scheme: the same by scheme, as (exchanges, rows).
    """

    ranks: list[int]
    rank: int
    dp_start: int
    tp_rank: int
    tp_size: int
    device_group: Any
    cpu_group: Any
    layer_tp: LayerTPGroup
    settings: Settings
    store_key: str
    exchanges: int = 0
    sealed: bool = False
    layers: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.ranks)


_current: OtpGroup | None = None


def current() -> OtpGroup | None:
    """This process's otp group, or None before vLLM created its groups."""
    return _current


def require(what: str) -> OtpGroup:
    """This process's otp group; raises OprojError naming `what` needs it."""
    if _current is None:
        raise OprojError(
            "OPROJ007",
            f"{what} cannot be sharded: {TOGGLE} is set but vLLM created its process groups "
            "before oproj_patch was active; import oproj_patch (or let vLLM load its plugin, see "
            "VLLM_PLUGINS) before the engine starts.",
        )
    return _current


def create(
    dp_groups: Sequence[Sequence[int]],
    tp_groups: Sequence[Sequence[int]],
    backend: str,
    settings: Settings,
    versions: dict[str, str],
) -> OtpGroup:
    """Create this process's otp group. Every rank of the world calls it at the same point.

    dp_groups, tp_groups: global ranks of all of vLLM's groups of that kind.
    backend: torch.distributed backend of the device group.
    Raises OprojError when sizes do not fit or the ranks do not agree; then no process group
    has been created on any rank.
    """
    global _current
    if _current is not None:
        raise OprojError(
            "OPROJ010",
            f"an otp group of size {_current.size} exists already in this process: destroy the "
            "engine before starting another one.",
        )
    size = settings.size
    rank = dist.get_rank()
    key = f"oproj_patch/{next(_epochs)}"
    record = {"size": str(size), **versions}
    handshake.agree(
        _default_store(),
        f"{key}/settings",
        rank,
        sorted(itertools.chain.from_iterable(dp_groups)),
        record,
        settings.handshake_seconds,
        handshake.same_settings(record, TOGGLE, settings.handshake_seconds),
    )
    otp = topology.otp_groups(dp_groups, size)
    layer = otp if all(len(g) == 1 for g in tp_groups) else topology.layer_groups(otp, tp_groups)
    ranks, device_group, cpu_group = _new_groups(otp, backend)
    if layer is otp:
        layer_ranks, layer_device, layer_cpu = ranks, device_group, cpu_group
    else:
        layer_ranks, layer_device, layer_cpu = _new_groups(layer, backend)
    dp_ranks = _containing(dp_groups, rank)
    tp_ranks = _containing(tp_groups, rank)
    _current = OtpGroup(
        ranks=ranks,
        rank=ranks.index(rank),
        dp_start=dp_ranks.index(ranks[0]),
        tp_rank=tp_ranks.index(rank),
        tp_size=len(tp_ranks),
        device_group=device_group,
        cpu_group=cpu_group,
        layer_tp=LayerTPGroup(layer_ranks.index(rank), layer_ranks, layer_device, layer_cpu),
        settings=settings,
        store_key=f"{key}/{ranks[0]}",
    )
    return _current


def destroy() -> None:
    """Destroy this process's otp group, if there is one."""
    global _current
    group, _current = _current, None
    if group is None:
        return
    owned = {
        id(g): g
        for g in (
            group.device_group,
            group.cpu_group,
            group.layer_tp.device_group,
            group.layer_tp.cpu_group,
        )
    }
    if dist.is_initialized():
        for process_group in owned.values():
            dist.destroy_process_group(process_group)


def seal(group: OtpGroup) -> None:
    """Compare the sharded layers of the group's ranks. Runs once, before the first exchange.

    Raises OprojError when they differ or a rank does not arrive within the group's timeout.
    """
    names = {name: layer.oproj.description for name, layer in group.layers.items()}
    handshake.agree(
        _default_store(),
        f"{group.store_key}/layers",
        dist.get_rank(),
        group.ranks,
        {"layers": json.dumps(names)},
        # Ranks load weights at different speeds; this is the patience of vLLM's own groups.
        dist.default_pg_timeout.total_seconds(),
        handshake.same_layers(names),
    )
    group.sealed = True


@contextmanager
def layer_tp_group(parallel_state: Any, group: OtpGroup) -> Iterator[None]:
    """Within it `parallel_state.get_tp_group()` is the sharded layer's own group."""
    before = parallel_state._TP
    parallel_state._TP = group.layer_tp
    try:
        yield
    finally:
        parallel_state._TP = before


def _new_groups(groups: Sequence[Sequence[int]], backend: str) -> tuple[list[int], Any, Any]:
    """The member list, device group and CPU group of this rank; all ranks create all groups."""
    mine: tuple[list[int], Any, Any] | None = None
    for ranks in groups:
        device_group = dist.new_group(list(ranks), backend=backend)
        cpu_group = (
            device_group if backend == "gloo" else dist.new_group(list(ranks), backend="gloo")
        )
        if dist.get_rank() in ranks:
            mine = list(ranks), device_group, cpu_group
    assert mine is not None, "vLLM's data-parallel groups cover every rank"
    return mine


def _containing(groups: Sequence[Sequence[int]], rank: int) -> list[int]:
    return next(list(ranks) for ranks in groups if rank in ranks)


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()
