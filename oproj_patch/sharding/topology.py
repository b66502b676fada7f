"""Rank and shard arithmetic. No torch, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import OprojValueError
from ..settings import GRID, TOGGLE

QUANTIZED_OUTPUTS = 128
"""`auto` cuts the outputs of a quantized layer in multiples of it: kernels' tiles, packed words."""


class Grid(NamedTuple):
    """How N ranks cut a weight: rank (i, j), number `i * outputs + j`, holds one block of it.

    inputs: a, in how many blocks the input columns are cut; outputs: b, the same of the outputs.
    """

    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.inputs}x{self.outputs}"


def check_size(size: int, dp_size: int) -> None:
    """Raise OprojValueError for a size that does not cut `dp_size` data-parallel ranks evenly."""
    accepted = [n for n in range(2, dp_size + 1) if dp_size % n == 0]
    if size in accepted:
        return
    remedy = f"the data-parallel size is {dp_size}, so there is nothing to shard over"
    if accepted:
        told = ", ".join(map(str, accepted))
        remedy = f"accepted are the divisors of the data-parallel size {dp_size} above 1 ({told})"
    raise OprojValueError(
        "OPROJ003",
        f"{TOGGLE} is {size}; {remedy}: change it, change the data-parallel size, or unset it.",
    )


def otp_groups(dp_groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Cut every data-parallel group into otp groups of `size` neighboring ranks.

    dp_groups: global ranks of each data-parallel group, in data-parallel order, for the
        whole world, as vLLM lists them for any layout of (external DP, DP, PP, TP).
    Returns the global ranks of each otp group, in an order every rank computes alike.
    """
    starts = range(0, len(dp_groups[0]), size)
    return [list(ranks[start : start + size]) for ranks in dp_groups for start in starts]


def layer_groups(
    otp: Sequence[Sequence[int]], tp_groups: Sequence[Sequence[int]], outputs: int = 1
) -> list[list[int]]:
    """Return the ranks that together hold the same outputs of one o_proj weight, in chunk order.

    The columns are cut into `tp * a` chunks; chunk `tp_rank * a + i` lives on the rank at that
    place of the returned list. outputs: b of the grid; with b = 1 and tp = 1 the lists are the
    otp groups themselves.
    """
    otp_of = {rank: group for group in otp for rank in group}
    # Tensor-parallel groups whose ranks share their otp groups give the same members.
    members = (
        tuple(rank for tp in group for rank in otp_of[tp][j::outputs])
        for group in tp_groups
        for j in range(outputs)
    )
    return [list(group) for group in dict.fromkeys(members)]


def grids(size: int) -> list[Grid]:
    """Return every grid of `size` ranks, the one that cuts only the input first."""
    return [Grid(a, size // a) for a in range(size, 0, -1) if size % a == 0]


def check_grid(text: str, size: int) -> Grid | None:
    """Return the grid that `text` (`AxB`, either number may be N; `auto`: None) names.

    Raises OprojValueError for one that is not of `size` ranks.
    """
    if text == "auto":
        return None
    grid = Grid(*(size if ways == "N" else int(ways) for ways in text.split("x")))
    if grid in grids(size):
        return grid
    accepted = ", ".join(map(str, grids(size)))
    raise OprojValueError(
        "OPROJ002",
        f"{GRID} is {text}, which is no grid of {size} ranks ({TOGGLE}); accepted are auto, Nx1, "
        f"{accepted}: change one of the two, or unset {GRID}.",
    )


def choose_grid(
    size: int, columns: int, hidden: int, element_bytes: int, wire_bytes: int | None = None,
    blocks: tuple[int, int] = (1, 1),
) -> Grid:  # fmt: skip
    """Return the grid on which a rank sends the fewest bytes; of equal ones the largest a.

    columns, hidden: K (of one tensor-parallel rank) and H, whole; blocks: the input columns and
    the outputs that cannot be cut further. The others are as for `step_bytes`.
    """
    fitting = [
        grid
        for grid in grids(size)
        if columns % (grid.inputs * blocks[0]) == 0 and hidden % (grid.outputs * blocks[1]) == 0
    ]

    def sent(grid: Grid) -> int:
        chunk, outputs = columns // grid.inputs, hidden // grid.outputs
        return step_bytes(size, chunk, outputs, element_bytes, wire_bytes)

    return min(fitting, key=sent, default=Grid(size, 1))


def check_divisible(name: str, input_size: int, tp_size: int, otp_size: int) -> None:
    """Raise OprojValueError for an o_proj whose input has no whole chunk for every rank."""
    if input_size % (tp_size * otp_size):
        raise OprojValueError(
            "OPROJ005",
            f"{TOGGLE} is {otp_size}, but the input dimension {input_size} of {name or 'o_proj'} "
            f"is not divisible by tensor-parallel size * group size = {tp_size} * {otp_size}; "
            f"accepted are sizes that divide {input_size // tp_size}: change the variable.",
        )


def check_cut(
    grid: Grid, name: str, columns: int, hidden: int, tp_size: int, why: str = ""
) -> None:
    """Raise OprojValueError for a grid that the user named and that does not cut an o_proj.

    columns, hidden: of the whole layer; why: what else keeps its outputs together.
    """
    if not why and (columns % (tp_size * grid.inputs) or hidden % grid.outputs):
        why = f"{columns} columns and {hidden} outputs"
    if grid.outputs == 1:
        check_divisible(name, columns, tp_size, grid.inputs)
    elif why:
        raise OprojValueError(
            "OPROJ005",
            f"{GRID} is {grid}, which does not cut {name} on {tp_size} tensor-parallel ranks "
            f"({why}); accepted are auto, Nx1 and grids that leave an equal part on every rank: "
            f"change or unset {GRID}.",
        )


def legal_sizes(dp_size: int, input_size: int, tp_size: int = 1, block: int = 1) -> list[int]:
    """Return the group sizes >= 2 that divide both the DP size and the o_proj input dimension.

    block: input columns of one quantization block; every chunk is a whole multiple of it.
    """
    sizes = (n for n in range(2, dp_size + 1) if dp_size % n == 0)
    return [n for n in sizes if input_size % (tp_size * n * block) == 0]


def step_bytes(
    size: int, columns: int, outputs: int, element_bytes: int, wire_bytes: int | None = None,
    scale_bytes: int = 0,
) -> int:  # fmt: skip
    """Return the bytes that a rank sends in one layer per row of its own: dispatch and combine.

    columns: input columns of one chunk, K/a; outputs: of one rank, H/b; element_bytes: of one
        activation; wire_bytes: of one on the way out, if another; scale_bytes: of the scales that
        a chunk of a row takes along.
    """
    out = columns * (element_bytes if wire_bytes is None else wire_bytes) + scale_bytes
    return (size - 1) * (out + outputs * element_bytes)


def gather_bytes(size: int, chunk_bytes: int) -> int:
    """Return the bytes that a rank sends while `size` ranks gather chunks of `chunk_bytes`."""
    return (size - 1) * chunk_bytes


def gather_threshold(gather: int, step: int) -> int:
    """Return T*, the least rows per rank at which a gather moves no more bytes than the step.

    gather, step: as from `gather_bytes` and `step_bytes`, both of the same layers. Where weights
    and activations have the same element size, T* is `K*H / (b*K + a*H)`, rounded up.
    """
    return max(1, -(-gather // step))
