"""The otp group (output-projection tensor parallelism): create, agree, look up, destroy.

`LayerScope` lets a host see the layer's own group in place of its tensor-parallel group.

Process groups of our own, never vLLM's: under HCCL the buffer of the "dp" group is tiny, and
names that begin with `tp` or `pp` get shared memory on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import OprojError
from ..settings import TOGGLE, Settings
from . import agreement, report, topology
from .topology import Grid

Counts = tuple[int, ...]
"""Rows of each rank of the group in one forward pass, in group order."""


class CollectiveError(RuntimeError):
    """A collective between the ranks of the group failed; `__cause__` is torch's error.

    seconds: its deadline; None: the group's timeout.
    """

    seconds: float | None = None


class LayerTPGroup:
    """What `parallel_state.get_tp_group()` returns while vLLM handles a sharded o_proj.

    It offers rank, size and all-reduce of the ranks that together hold the same outputs of the
    weight. It refuses any other attribute, because the answer would be another group's.
    """

    def __init__(self, rank: int, ranks: Sequence[int], device_group: Any, cpu_group: Any) -> None:
        self.rank_in_group = rank
        self.ranks = list(ranks)
        self.world_size = len(self.ranks)
        self.rank = self.ranks[rank]
        self.first_rank = self.ranks[0]
        self.device_group = device_group
        self.cpu_group = cpu_group

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

    ranks: its global ranks; rank: this process's place among them; dp_start: place of its first
        member in vLLM's data-parallel group.
    tp_ranks: global ranks of this process's tensor-parallel group; tp_rank: its place there.
    device_group, cpu_group: process groups over `ranks` (the same object on gloo).
    layer_tp: the tensor-parallel group for each grid that a layer may have: Nx1, and the group's
        own, which is the last.
    graph_rows: see `exchange.Plan`.
    layers: sharded layers by name; main_layers: how many are the first model's, the others are a
        drafter's; checked: how many the ranks have compared; complete: no further one is sharded.
    counts: what the ranks agreed on at the first layer of this forward pass.
    steps: steps run so far; gathers: how many of them gathered the weight.
    facts: what the ranks agreed on at the start, by name.
    buffers: memory that all layers share; outgrown: smaller memory that a graph may hold; views:
        of the buffers, by what `exchange.buffer` was asked for.
    older_graphs: CUDA graphs that were there before the group, so they hold nothing of it.
    """

    ranks: list[int]
    rank: int
    dp_start: int
    tp_ranks: list[int]
    tp_rank: int
    device_group: Any
    cpu_group: Any
    layer_tp: dict[Grid, LayerTPGroup]
    settings: Settings
    store_key: str
    graph_rows: int = 0
    layers: dict[str, Any] = field(default_factory=dict)
    main_layers: int = 0
    counts: Counts | None = None
    steps: int = 0
    gathers: int = 0
    checked: int = 0
    complete: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)
    buffers: dict[Any, torch.Tensor] = field(default_factory=dict)
    outgrown: list[torch.Tensor] = field(default_factory=list)
    views: dict[Any, torch.Tensor] = field(default_factory=dict)
    older_graphs: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    def __post_init__(self) -> None:
        self.size, self.tp_size = len(self.ranks), len(self.tp_ranks)

    @property
    def grid(self) -> Grid:
        return list(self.layer_tp)[-1]

    def totals(self) -> tuple[int, int]:
        """Return bytes of all sharded layers: (kept on this rank, saved on this rank)."""
        shards = [layer.oproj for layer in self.layers.values()]
        return sum(s.kept for s in shards), sum(s.saved for s in shards)

    def memory(self, key: Any, size: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        """Return `size` or more uninitialized elements, which all layers share."""
        kept = self.buffers.get(key)
        if kept is None or kept.numel() < size:
            if kept is not None and self.graph_rows:
                self.outgrown.append(kept)  # a captured graph may still write to it
            self.views.clear()
            # The model writes to it in and out of inference mode: no inference tensor.
            with torch.inference_mode(False):
                kept = self.buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return kept


_current: OtpGroup | None = None
_refusal: OprojError | None = None


def current() -> OtpGroup | None:
    """Return this process's otp group, or None before vLLM created its groups."""
    return _current


def require(what: str) -> OtpGroup:
    """Return this process's otp group; raises OprojError that names `what` needs it."""
    if _refusal is not None:
        raise _refusal
    if _current is None:
        raise OprojError(
            "OPROJ007",
            f"{what} cannot be sharded: {TOGGLE} is set but vLLM created its process groups "
            "before oproj_patch was active; import oproj_patch (or let vLLM load its plugin, see "
            "VLLM_PLUGINS) before the engine starts.",
        )
    return _current


def refuse(error: OprojError | None) -> None:
    """Remember why this start was refused; `require` repeats it. None: forget."""
    global _refusal
    _refusal = error


def agree_to_start(settings: Settings, equal: Mapping[str, str], refusal: OprojError | None) -> str:
    """Agree on one start with every rank of the world; return the key of the start.

    settings: as this rank read them; equal: what else must be equal on all ranks, by name.
    refusal: why this rank cannot start; told to the others, so that all end alike.
    Raises OprojError when a rank refuses, the ranks do not agree, or one gives no answer.
    """
    rank, world = dist.get_rank(), range(dist.get_world_size())
    record, seconds = {**settings.shared(), **equal}, settings.handshake_seconds

    def ask() -> str:
        # Number this start: one process may serve several engines in turn.
        with agreement.store_errors(refusal):
            key = f"oproj_patch/{store().add(f'oproj_patch/starts/{rank}', 1)}"
        agreement.agree(
            store(), f"{key}/settings", rank, world, record, seconds,
            functools.partial(agreement.same_settings, record, seconds), refusal, _end_unaware,
        )  # fmt: skip
        return key

    silent = OprojError(
        "OPROJ011",
        f"the key-value store of the process group (held by {agreement.HOLDER}) gave rank {rank} "
        f"no answer within {seconds + 2 * agreement.HEARD_SECONDS:g} s: look at the node and the "
        "log of rank 0 first.",
    )
    return agreement.within(seconds, ask, refusal or silent)


def create(
    dp_groups: Sequence[Sequence[int]], tp_groups: Sequence[Sequence[int]], backend: str,
    settings: Settings, key: str, like: Any = None, graph_rows: int = 0, grid: Grid | None = None,
    facts: Mapping[str, str] | None = None,
) -> OtpGroup:  # fmt: skip
    """Create this process's otp group. Every rank of the world calls it at the same point.

    dp_groups, tp_groups: global ranks of all of vLLM's groups of that kind.
    backend: torch.distributed backend of the device group; key: from `agree_to_start`.
    like: vLLM's coordinator of this rank's data-parallel group; ours take its timeouts.
    grid: the group's (default: Nx1, which its layers may always take); facts: see `OtpGroup`.
    Raises OprojError when a group exists already.
    """
    global _current
    if _current is not None:
        raise OprojError(
            "OPROJ010",
            f"an otp group of size {_current.size} exists already in this process: destroy the "
            "engine before starting another one.",
        )
    rank = dist.get_rank()
    otp = topology.otp_groups(dp_groups, settings.size)
    ranks, device_group, cpu_group = own = _new_groups(otp, backend, like)
    plain, layer_tp = Grid(settings.size, 1), {}
    for each in dict.fromkeys((plain, grid or plain)):
        members = own
        if each != plain or any(len(tp_group) > 1 for tp_group in tp_groups):
            lists = topology.layer_groups(otp, tp_groups, each.outputs)
            members = _new_groups(lists, backend, like)
        layer_tp[each] = LayerTPGroup(members[0].index(rank), *members)
    dp_ranks, tp_ranks = (
        next(list(ranks) for ranks in groups if rank in ranks) for groups in (dp_groups, tp_groups)
    )
    _current = OtpGroup(
        ranks=ranks, rank=ranks.index(rank), dp_start=dp_ranks.index(ranks[0]),
        tp_ranks=tp_ranks, tp_rank=tp_ranks.index(rank),
        device_group=device_group, cpu_group=cpu_group,
        layer_tp=layer_tp, settings=settings, store_key=f"{key}/{ranks[0]}", graph_rows=graph_rows,
        facts=facts or {}, older_graphs=_graphs() if graph_rows else weakref.WeakSet(),
    )  # fmt: skip
    return _current


def destroy() -> None:
    """Destroy this process's otp group, if there is one."""
    global _current
    group, _current = _current, None
    if group is None:
        return
    if group.graph_rows:
        _release_graphs(group)
    groups = [group.device_group, group.cpu_group]
    for layer_tp in group.layer_tp.values():
        groups += [layer_tp.device_group, layer_tp.cpu_group]
    if dist.is_initialized():
        for process_group in {id(g): g for g in groups}.values():
            dist.destroy_process_group(process_group)


def _release_graphs(group: OtpGroup) -> None:
    """Reset the CUDA graphs that are younger than the group.

    NCCL 2.28.9 neither destroys nor aborts a communicator while a graph holds its collectives:
    it waits forever. Workers of vLLM destroy their groups with their graphs alive (read in 0.11.0
    to 0.32.0).
    """
    for graph in _graphs() - group.older_graphs:
        # The end of a process goes on, also where a replay failed: its peers may wait for that.
        with contextlib.suppress(RuntimeError):
            graph.reset()


def _graphs() -> weakref.WeakSet[Any]:
    """Return the CUDA graphs of this process, whoever captured them."""
    kind, frozen = torch.cuda.CUDAGraph, gc.get_freeze_count()
    gc.unfreeze()  # vLLM hides what is alive after its start from the collector
    found = weakref.WeakSet(each for each in gc.get_objects() if issubclass(type(each), kind))
    if frozen:
        gc.freeze()
    return found


def check_layers(group: OtpGroup, facts: Mapping[str, str]) -> None:
    """Compare the sharded layers of the group's ranks, before the first step of any of them.

    A digest goes over the group itself, because it notices the end of a peer at once. Only when
    digests differ do the ranks tell each other their layers. facts: as for `agreement.agree`.
    Raises OprojError when they differ, CollectiveError when a rank does not arrive.
    """
    names = {name: layer.oproj.description for name, layer in group.layers.items()}
    text = json.dumps(names | {"(step)": f"device graphs up to {group.graph_rows} rows"})
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digests = torch.empty(group.size, digest.numel(), dtype=torch.uint8)
    try:
        dist.all_gather(list(digests.unbind()), digest, group=group.cpu_group)
    except RuntimeError as error:
        raise CollectiveError(str(error)) from error
    if not torch.equal(digests, digest.expand_as(digests)):
        agreement.agree(
            store(), f"{group.store_key}/layers", dist.get_rank(), group.ranks,
            {report.WHERE: "before its first step", report.LAYERS: text},
            group.settings.handshake_seconds, agreement.same_layers, facts=facts,
        )  # fmt: skip


class LayerScope:
    """While it is open, `get_tp_group()` returns the layer's own group, on this thread alone.

    A class, because it surrounds every GEMM and a generator costs several microseconds.
    """

    __slots__ = ("layer_tp", "parallel_state", "view")

    def __init__(self, parallel_state: Any, layer_tp: LayerTPGroup) -> None:
        self.parallel_state = parallel_state
        self.layer_tp = layer_tp

    def __enter__(self) -> None:
        state = self.parallel_state
        with _exchanging:
            view = state._TP
            if type(view) is not _ByThread:
                view = state._TP = _ByThread(view)
            self.view = view
            view._own.setdefault(threading.get_ident(), []).append(self.layer_tp)

    def __exit__(self, *_: object) -> None:
        own, thread = self.view._own, threading.get_ident()
        with _exchanging:
            own[thread].pop()
            if not own[thread]:
                del own[thread]
            if not own and self.parallel_state._TP is self.view:
                self.parallel_state._TP = self.view._before


_exchanging = threading.Lock()


class _ByThread:
    """Stands in for vLLM's group: a thread in a scope sees the layer's, all others vLLM's."""

    __slots__ = ("_before", "_own")

    def __init__(self, before: Any) -> None:
        object.__setattr__(self, "_before", before)
        object.__setattr__(self, "_own", {})

    def _seen(self) -> Any:
        own = self._own.get(threading.get_ident())
        return own[-1] if own else self._before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._seen(), name, value)


def _new_groups(groups: Sequence[Sequence[int]], backend: str, like: Any) -> Any:
    """Create all groups on all ranks; return members, device group and CPU group of this rank."""
    mine = None
    device_timeout = timeout_of(getattr(like, "device_group", None))
    cpu_timeout = timeout_of(getattr(like, "cpu_group", None))
    for ranks in groups:
        cpu_group = device_group = dist.new_group(
            list(ranks), timeout=device_timeout, backend=backend
        )
        if backend != "gloo":
            cpu_group = dist.new_group(list(ranks), timeout=cpu_timeout, backend="gloo")
        if dist.get_rank() in ranks:
            mine = list(ranks), device_group, cpu_group
    assert mine is not None, "vLLM's data-parallel groups cover every rank"
    return mine


def timeout_of(process_group: Any) -> timedelta | None:
    """Return the timeout of a process group; None if unreadable (torch's default applies)."""
    with contextlib.suppress(AttributeError, IndexError, RuntimeError):
        device = process_group._device_types[0]
        timeout: timedelta = process_group._get_backend(device).options._timeout
        return timeout
    return None


MOST_GROUPS = 8
"""How many kinds of process groups vLLM creates in a start before its data-parallel group."""


def _end_unaware() -> None:
    """End ranks that run without the package, because they wait for us in vLLM's next groups.

    They would wait for minutes, or live on without their peers. This writes what is no address
    where those groups look for gloo's addresses, so gloo raises there. torch does not document the
    place of these records: if it uses another one, such a rank ends by its own time-out.
    """
    c10d = dist.distributed_c10d
    world = dist.get_world_size()
    following = c10d._world.group_count
    # One name for the device group and one for the CPU group of every group of every kind.
    for name in range(following, following + 2 * MOST_GROUPS * world):
        place = c10d.PrefixStore("cpu/", c10d.PrefixStore(f"{name}/", store()))
        keys = [f"0/{rank}" for rank in range(world)]
        with contextlib.suppress(RuntimeError):  # the store has ended with its rank
            place.multi_set(keys, ["\0" * 64] * world)


def store() -> Any:
    """Return the key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()
