"""Rows (tokens) on every rank of the group in this forward pass, and what a host must tell.

All ranks of a group must arrive at the same counts, or their collectives do not match.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..errors import OprojError
from .otp_group import CollectiveError, Counts, OtpGroup

if TYPE_CHECKING:
    from .wire import Wire


class HostPass:
    """What a host tells about the forward pass that is running; hosts override it."""

    def capturing(self) -> bool:
        """Tell whether a device graph is being captured on this rank (then on all ranks)."""
        return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def announced(self, group: OtpGroup) -> Counts | None:
        """Return row counts that the host has synchronized, in group order, or None."""
        return None

    def traceable(self) -> bool:
        """Tell whether the host's compiler needs a forward of plain collectives, without our op."""
        return False

    def label_type(self) -> type:
        """Return the type in which the custom op takes a layer's name."""
        return str

    def own_wire(self, layer: Any) -> Wire | None:
        """Return the 8-bit format that gives a row's owner the values of the unsharded layer.

        The layer is built, and not loaded. None: the host knows no such format.
        """
        return None

    def before_first_step(self, group: OtpGroup) -> None:
        """Compare layers and report. Every rank calls it once, before the group's first step."""


def across_group(rows: int, group: OtpGroup, host: HostPass, name: str, leads: bool) -> Counts:
    """Return the rows of each rank, in group order, while this rank has `rows` at layer `name`.

    The counts are what the host announced for this forward pass, or else what the ranks agree on
    by one small all-gather on the CPU group.
    leads: whether the ranks agree anew at this layer (the model's first, and every layer of a
        drafter); at the others the counts of the pass hold.
    Raises OprojError when `rows` is more than was announced or agreed. Fewer rows are right: vLLM
    0.11.0 announces padded counts for an idle rank that runs one row.
    """
    counts = known(rows, group, host)
    source = "the host's data-parallel metadata"
    if counts is None:
        source = "the ranks' agreement at the first layer of this forward pass"
        if leads or group.counts is None:
            group.counts = gather((rows,), group)[0]
        counts = group.counts
    if counts[group.rank] < rows:
        raise OprojError(
            "OPROJ014",
            f"o_proj got {rows} rows on rank {group.ranks[group.rank]} at {name}, but {source} "
            f"says {list(counts)} for ranks {group.ranks}: this forward pass changes its row "
            "count between layers or hides it, which is not supported; please report model and "
            "options.",
        )
    return counts


def known(rows: int, group: OtpGroup, host: HostPass) -> Counts | None:
    """Return row counts that this rank knows without asking the others, or None."""
    counts = host.announced(group)
    if counts is None and host.capturing():
        # All ranks capture the same size at the same time, and a replay pads them to it.
        return (rows,) * group.size
    return counts


def gather(values: tuple[int, ...], group: OtpGroup, seconds: float | None = None) -> list[Counts]:
    """All-gather small integers on the CPU group: one tuple over ranks per value.

    seconds: deadline; default is the group's timeout. Raises CollectiveError after it.
    """
    mine = torch.tensor(values, dtype=torch.int64)
    theirs = torch.empty(group.size * len(values), dtype=torch.int64)
    try:
        work = dist.all_gather(
            list(theirs.chunk(group.size)), mine, group=group.cpu_group, async_op=True
        )
        # torch takes 0 s for the group's own timeout.
        work.wait(timedelta(seconds=seconds or 0))
    except RuntimeError as error:
        failure = CollectiveError(str(error))
        failure.seconds = seconds
        raise failure from error
    return [tuple(column) for column in theirs.view(group.size, -1).t().tolist()]
