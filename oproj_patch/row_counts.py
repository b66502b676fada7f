"""Rows (tokens) on every rank of the group in this forward pass.

All ranks of a group must arrive at the same counts, or their collectives do not match.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .errors import OprojError
from .otp_group import OtpGroup

Counts = tuple[int, ...]
Announced = Callable[[OtpGroup], "Counts | None"]

_agreed: tuple[weakref.ref[Any], Counts] | None = None


def across_group(rows: int, group: OtpGroup, host: HostForward) -> Counts:
    """Rows of each rank, in group order, while this rank has `rows`.

    Equal rows while a graph is captured: replay pads every rank to the captured size.
    Otherwise what the host announced for this forward pass, where the host's announcement is
    true; otherwise one small all-gather on the CPU group a forward pass.
    Raises OprojError when `rows` is not what was announced or agreed.
    """
    if host.capturing():
        return (rows,) * group.size
    counts = host.announced(group)
    source = "the host's data-parallel metadata"
    if counts is None:
        source = "the ranks' agreement at the first exchange of this forward pass"
        counts = _agree_once(rows, group, host.context())
    if counts[group.rank] != rows:
        raise OprojError(
            "OPROJ014",
            f"o_proj got {rows} rows on rank {group.ranks[group.rank]}, but {source} says "
            f"{list(counts)} for ranks {group.ranks}: this forward pass changes its row count "
            "between layers or hides it, which is not supported; please report model and options.",
        )
    return counts


def _agree_once(rows: int, group: OtpGroup, context: Any) -> Counts:
    """`gather` once per forward pass: `context` is an object that lives as long as it."""
    global _agreed
    if context is None:
        return gather((rows,), group)[0]
    if _agreed is None or _agreed[0]() is not context:
        _agreed = weakref.ref(context), gather((rows,), group)[0]
    return _agreed[1]


def gather(values: tuple[int, ...], group: OtpGroup) -> list[Counts]:
    """All-gather of small integers on the CPU group: one tuple over ranks per value."""
    mine = torch.tensor(values, dtype=torch.int64)
    theirs = torch.empty(group.size * len(values), dtype=torch.int64)
    dist.all_gather(list(theirs.chunk(group.size)), mine, group=group.cpu_group)
    return [tuple(column) for column in theirs.view(group.size, -1).t().tolist()]


class HostForward:
    """What a host tells about the forward pass that is running; hosts override it."""

    def capturing(self) -> bool:
        """Whether a device graph is being captured on this rank (then on all ranks)."""
        return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def context(self) -> Any:
        """An object that lives exactly as long as this forward pass, or None."""
        return None

    def announced(self, group: OtpGroup) -> Counts | None:
        """Row counts the host has already synchronised, in group order, or None."""
        return None

    def seal(self, group: OtpGroup) -> None:
        """Called once, before the group's first exchange."""
