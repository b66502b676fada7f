"""Rows (tokens) on every rank of the group in this forward pass.

All ranks of a group must arrive at the same counts, or their collectives do not match.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import OprojError
from .otp_group import OtpGroup

Counts = tuple[int, ...]
Announced = Callable[[OtpGroup], "Counts | None"]

_agreed: tuple[weakref.ref[Any], Counts] | None = None


def across_group(rows: int, group: OtpGroup, host: HostForward, layer: str) -> Counts:
    """Rows of each rank, in group order, while this rank has `rows` at `layer`.

    Equal rows while a graph is captured: replay pads every rank to the captured size.
    Otherwise what the host announced for this forward pass, where the host's announcement is
    true; otherwise one small all-gather on the CPU group a forward pass.
    Raises OprojError when `rows` is not what was announced or agreed.
    """
    counts = told(rows, group, host)
    source = "the host's data-parallel metadata"
    if counts is None:
        source = "the ranks' agreement at the first exchange of this forward pass"
        counts = _agree_once(rows, group, host.context(layer))
    if counts[group.rank] != rows:
        raise OprojError(
            "OPROJ014",
            f"o_proj got {rows} rows on rank {group.ranks[group.rank]}, but {source} says "
            f"{list(counts)} for ranks {group.ranks}: this forward pass changes its row count "
            "between layers or hides it, which is not supported; please report model and options.",
        )
    return counts


def told(rows: int, group: OtpGroup, host: HostForward) -> Counts | None:
    """Row counts that are known on this rank without asking the others, or None."""
    return (rows,) * group.size if host.capturing() else host.announced(group)


def _agree_once(rows: int, group: OtpGroup, context: Any) -> Counts:
    """`gather` once per forward pass: `context` is an object that lives as long as it."""
    global _agreed
    if context is None:
        return gather((rows,), group)[0]
    if _agreed is None or _agreed[0]() is not context:
        _agreed = weakref.ref(context), gather((rows,), group)[0]
    return _agreed[1]


def gather(values: tuple[int, ...], group: OtpGroup, seconds: float | None = None) -> list[Counts]:
    """All-gather of small integers on the CPU group: one tuple over ranks per value.

    seconds: deadline, after which torch raises RuntimeError; default is the group's timeout.
    """
    mine = torch.tensor(values, dtype=torch.int64)
    theirs = torch.empty(group.size * len(values), dtype=torch.int64)
    work = dist.all_gather(
        list(theirs.chunk(group.size)), mine, group=group.cpu_group, async_op=True
    )
    # Seconds of 0 stand for the group's own timeout.
    work.wait(timedelta(seconds=seconds or 0))
    return [tuple(column) for column in theirs.view(group.size, -1).t().tolist()]


class HostForward:
    """What a host tells about the forward pass that is running; hosts override it."""

    def capturing(self) -> bool:
        """Whether a device graph is being captured on this rank (then on all ranks)."""
        return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def context(self, layer: str) -> Any:
        """An object that lives as long as the row counts at `layer` hold, or None: one exchange.

        Every rank must get a new one at the same exchange.
        """
        return None

    def announced(self, group: OtpGroup) -> Counts | None:
        """Row counts the host has already synchronised, in group order, or None."""
        return None

    def traceable(self) -> bool:
        """Whether the host's compiler needs a forward of plain collectives, without our op."""
        return False

    def drafter_in_step(self) -> bool:
        """Whether a drafter runs equally often on every rank, idle or near its length limit.

        If not, its layers are left alone: a rank that skips an exchange stops the others.
        """
        return True

    def label_type(self) -> type:
        """Type in which the custom op takes a layer's name."""
        return str

    def seal(self, group: OtpGroup) -> None:
        """Called once, before the group's first exchange."""
