"""The otp group: create, hand-shake, look up, destroy; and "see the layer's own TP group".

Process groups of our own, never vLLM's: under HCCL the buffer of the "dp" group is tiny, and
names that begin with `tp` or `pp` get shared memory on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import handshake, topology
from .errors import OprojError
from .settings import TOGGLE, Settings


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
    main_layers: how many of `layers` belong to the first model; later ones are a drafter's.
    complete: no layer built from now on is sharded.
    layer_tp: see `LayerTPGroup`.
    exchanges: exchanges run so far; gathers: how many of them gathered the weight instead.
    rows, gathered_rows: this rank's own rows in them, summed.
    scratch: memory that all layers share; views: parts of it, for row counts seen before.
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
    gathers: int = 0
    rows: int = 0
    gathered_rows: int = 0
    sealed: bool = False
    main_layers: int = 0
    complete: bool = False
    layers: dict[str, Any] = field(default_factory=dict)
    scratch: dict[Any, torch.Tensor] = field(default_factory=dict)
    views: dict[Any, torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
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
    like: Any = None,
    refusal: OprojError | None = None,
) -> OtpGroup:
    """Create this process's otp group. Every rank of the world calls it at the same point.

    dp_groups, tp_groups: global ranks of all of vLLM's groups of that kind.
    backend: torch.distributed backend of the device group.
    like: vLLM's coordinator of this rank's data-parallel group; ours take its timeouts.
    refusal: why this rank cannot start; told to the others, so that all end alike.
    Raises OprojError when sizes do not fit, the ranks do not agree, or one gives no answer; then
    no process group of ours has been created on any rank.
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
    # Counted in the store: a process may have been part of other worlds before.
    key = f"oproj_patch/{store().add(f'oproj_patch/lives/{rank}', 1)}"
    record = {"size": str(size), **versions}
    if refusal is not None:
        record[handshake.REFUSAL] = str(refusal)
    seconds = settings.handshake_seconds
    world = sorted(itertools.chain.from_iterable(dp_groups))
    try:
        handshake.agree(
            store(),
            f"{key}/settings",
            rank,
            world,
            record,
            seconds,
            handshake.same_settings(record, seconds, _host),
        )
    except OprojError as error:
        if isinstance(error, handshake.RankAbsentError):
            # Where the store has ended with its rank, so have those that wait for it.
            with contextlib.suppress(RuntimeError):
                if rank == next(r for r in world if store().check([f"{key}/settings/{r}"])):
                    _end_unaware(len(dp_groups))
        if refusal is not None and str(error) == str(refusal):
            raise refusal from None
        raise
    otp = topology.otp_groups(dp_groups, size)
    layer = otp if all(len(g) == 1 for g in tp_groups) else topology.layer_groups(otp, tp_groups)
    ranks, device_group, cpu_group = _new_groups(otp, backend, like)
    if layer is otp:
        layer_ranks, layer_device, layer_cpu = ranks, device_group, cpu_group
    else:
        layer_ranks, layer_device, layer_cpu = _new_groups(layer, backend, like)
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

    A digest goes over the group itself, where the end of a peer is noticed at once and the
    group's timeout holds; only when it differs do the ranks tell each other their layers.
    Raises OprojError when they differ or a rank does not arrive.
    """
    names = {name: layer.oproj.description for name, layer in group.layers.items()}
    text = json.dumps(names, sort_keys=True)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digests = torch.empty(group.size, digest.numel(), dtype=torch.uint8)
    try:
        dist.all_gather(list(digests.unbind()), digest, group=group.cpu_group)
    except RuntimeError as error:
        raise OprojError(
            "OPROJ012",
            f"a rank of the group {group.ranks} ended, or did not reach its first forward pass "
            f"within the group's timeout ({str(error).splitlines()[0]}): look for its error in "
            "the logs of these ranks.",
        ) from error
    if not torch.equal(digests, digest.expand_as(digests)):
        handshake.agree(
            store(),
            f"{group.store_key}/layers",
            dist.get_rank(),
            group.ranks,
            {"layers": text},
            group.settings.handshake_seconds,
            handshake.same_layers(),
        )
    group.sealed = True


class layer_tp_group:
    """Within it `parallel_state.get_tp_group()` is the sharded layer's own group.

    A class, because it surrounds every GEMM and a generator costs several microseconds.
    """

    __slots__ = ("before", "group", "parallel_state")

    def __init__(self, parallel_state: Any, group: OtpGroup) -> None:
        self.parallel_state = parallel_state
        self.group = group

    def __enter__(self) -> None:
        self.before = self.parallel_state._TP
        self.parallel_state._TP = self.group.layer_tp

    def __exit__(self, *_: object) -> None:
        self.parallel_state._TP = self.before


def _new_groups(
    groups: Sequence[Sequence[int]], backend: str, like: Any
) -> tuple[list[int], Any, Any]:
    """The member list, device group and CPU group of this rank; all ranks create all groups."""
    mine: tuple[list[int], Any, Any] | None = None
    device_timeout = timeout_of(getattr(like, "device_group", None))
    cpu_timeout = timeout_of(getattr(like, "cpu_group", None))
    for ranks in groups:
        device_group = dist.new_group(list(ranks), timeout=device_timeout, backend=backend)
        cpu_group = (
            device_group
            if backend == "gloo"
            else dist.new_group(list(ranks), timeout=cpu_timeout, backend="gloo")
        )
        if dist.get_rank() in ranks:
            mine = list(ranks), device_group, cpu_group
    assert mine is not None, "vLLM's data-parallel groups cover every rank"
    return mine


def timeout_of(process_group: Any) -> timedelta | None:
    """Timeout of a process group; None, which means torch's default, where it is not told."""
    try:
        device = process_group._device_types[0]
        timeout: timedelta = process_group._get_backend(device).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None
    return timeout


def _end_unaware(groups: int) -> None:
    """Make vLLM's next process group fail on the ranks that are waiting for us in it.

    A rank that knows nothing of the hand-shake goes on to that group and would wait there for
    minutes, or start and live on without its peers. gloo raises when what another rank published
    is no address; the place is not documented, and where it is another one nothing happens.

    groups: how many groups of each kind vLLM creates at most.
    """
    c10d = dist.distributed_c10d
    following = c10d._world.group_count
    for name in range(following, following + 2 * groups):  # one for the device, one for the CPU
        place = c10d.PrefixStore("cpu/", c10d.PrefixStore(f"{name}/", store()))
        for rank in range(dist.get_world_size()):
            place.set(f"0/{rank}", "\0" * 64)


def _host(rank: int) -> str | None:
    """Host name of a rank, as gloo published it for one of vLLM's groups; None if unknown.

    gloo's record is not documented: it is believed where this rank's own record holds its name.
    """
    world = dist.distributed_c10d._world
    for process_group, (_, keys) in world.pg_map.items():
        members = world.pg_group_ranks[process_group]
        if rank not in members or dist.get_rank() not in members:
            continue
        names = [f"cpu//0/{members[r]}" for r in (dist.get_rank(), rank)]
        if keys.check(names):
            mine, theirs = (_leading_text(keys.get(name)) for name in names)
            return theirs if mine == socket.gethostname() else None
    return None


def _leading_text(record: bytes) -> str:
    """A text with its length before it, in the machine's integers of 8 bytes."""
    length = int.from_bytes(record[:8], sys.byteorder)
    return record[8 : 8 + length].decode(errors="replace")


def _containing(groups: Sequence[Sequence[int]], rank: int) -> list[int]:
    return next(list(ranks) for ranks in groups if rank in ranks)


def store() -> Any:
    """The key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()
