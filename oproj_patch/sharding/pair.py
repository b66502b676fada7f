"""An output projection of two layers that are both sharded and run in one step.

The first layer is block-diagonal: each of its groups maps some heads to columns of the second. A
rank holds whole groups of the first and the same columns of the second. It gets the heads of its
groups, of all rows, runs both layers, and has partial results like those of one o_proj. DeepSeek
V4 calls the layers `wo_a` and `wo_b`.

    o_i [T_i, heads] --dispatch--> [sum(T), heads/N] --both layers--> [sum(T), H] --combine-->

The host computes what is between the two, and may need the position of a row for it: then the
position travels behind the heads of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .otp_group import OtpGroup

PLACE_BYTES = 16
"""What a row takes behind its heads: 8 bytes of its position, and 8 that align it for kernels."""

Project = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@dataclass
class Pair:
    """What the second of two sharded layers carries.

    first: the first layer, of which this rank holds whole groups too.
    heads, width: heads of one tensor-parallel rank, and values of one.
    positions: the host needs the position of each row.
    project: runs both shards: (o [rows, heads/N, width], positions [rows]) -> [rows, hidden].
    """

    first: Any
    heads: int = 0
    width: int = 0
    positions: bool = False
    project: Project | None = None

    def chunk(self, group: OtpGroup, element_bytes: int) -> int:
        """Return the elements that one row takes on its way to one rank."""
        return self.heads * self.width // group.size + self.tail(element_bytes)

    def tail(self, element_bytes: int) -> int:
        """Return how many elements of a chunk are behind its heads."""
        return PLACE_BYTES // element_bytes if self.positions else 0

    def run(self, rows: torch.Tensor) -> torch.Tensor:
        """Run both layers: rows [rows, chunk], as they arrive -> [rows, hidden]."""
        assert self.project is not None, "the host has told it before the first step"
        tail = self.tail(rows.element_size())
        o = rows[:, : rows.shape[1] - tail].unflatten(1, (-1, self.width))
        if not tail:
            return self.project(o, None)
        words = 8 // rows.element_size()
        places = rows[:, rows.shape[1] - tail :][:, :words].contiguous().view(torch.int64)
        return self.project(o, places.flatten())


def placed(positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return positions [rows] as they travel: the same bytes, [rows, 8 / element size]."""
    return positions.to(torch.int64).unsqueeze(-1).view(dtype)


def obstacle(heads: int, groups: int, group: OtpGroup, asked: str) -> str:
    """Return why the first layer cannot be sharded too; empty if it can.

    heads, groups: of all tensor-parallel ranks; asked: the user's grid, or `auto`.
    """
    ranks = group.tp_size * group.size
    if group.settings.wire not in ("auto", "off"):
        return f"only rows of the second layer can travel in {group.settings.wire}"
    if asked not in ("auto", "Nx1", f"{group.size}x1"):
        return f"the grid {asked} cuts the outputs"
    if groups % ranks or heads % groups:
        return f"{groups} groups over {ranks} ranks"
    return ""
