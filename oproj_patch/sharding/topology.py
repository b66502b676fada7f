"""Rank and shard arithmetic. No torch, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import OprojValueError
from ..settings import TOGGLE


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
    """Cut every data-parallel group into otp groups of `size` neighbouring ranks.

    dp_groups: global ranks of each data-parallel group, in data-parallel order, for the
        whole world, as vLLM lists them for any layout of (external DP, DP, PP, TP).
    Returns the global ranks of each otp group, in an order every rank computes alike.
    """
    starts = range(0, len(dp_groups[0]), size)
    return [list(ranks[start : start + size]) for ranks in dp_groups for start in starts]


def layer_groups(
    otp: Sequence[Sequence[int]], tp_groups: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Return the ranks that together hold one whole o_proj weight, in chunk order.

    The weight is cut into `tp * N` chunks; chunk `tp_rank * N + otp_rank` lives on the rank
    at that place of the returned list. With tp = 1 this is the otp group itself.
    """
    otp_of = {rank: group for group in otp for rank in group}
    # Tensor-parallel groups whose ranks share their otp groups give the same members.
    members = (tuple(rank for tp in group for rank in otp_of[tp]) for group in tp_groups)
    return [list(group) for group in dict.fromkeys(members)]


def check_divisible(name: str, input_size: int, tp_size: int, otp_size: int) -> None:
    """Raise OprojValueError for an o_proj whose input has no whole chunk for every rank."""
    if input_size % (tp_size * otp_size):
        raise OprojValueError(
            "OPROJ005",
            f"{TOGGLE} is {otp_size}, but the input dimension {input_size} of {name or 'o_proj'} "
            f"is not divisible by tensor-parallel size * group size = {tp_size} * {otp_size}; "
            f"accepted are sizes that divide {input_size // tp_size}: change the variable.",
        )


def legal_sizes(dp_size: int, input_size: int, tp_size: int = 1, block: int = 1) -> list[int]:
    """Return the group sizes >= 2 that divide both the DP size and the o_proj input dimension.

    block: input columns of one quantization block; every chunk is a whole multiple of it.
    """
    sizes = (n for n in range(2, dp_size + 1) if dp_size % n == 0)
    return [n for n in sizes if input_size % (tp_size * n * block) == 0]


def step_bytes(size: int, columns: int, outputs: int, element_bytes: int) -> int:
    """Return the bytes that a rank sends in one layer per row of its own: dispatch and combine.

    columns: input columns of one chunk, so that a row has `size * columns` of them; outputs: the
        hidden size; element_bytes: of one activation.
    """
    return (size - 1) * (columns + outputs) * element_bytes


def gather_bytes(size: int, chunk_bytes: int) -> int:
    """Return the bytes that a rank sends while `size` ranks gather chunks of `chunk_bytes`."""
    return (size - 1) * chunk_bytes


def gather_threshold(gather: int, step: int) -> int:
    """Return T*, the least rows per rank at which a gather moves no more bytes than the step.

    gather, step: as from `gather_bytes` and `step_bytes`, both of the same layers. Where weights
    and activations have the same element size, T* is `K*H / (K + N*H)`, rounded up.
    """
    return max(1, -(-gather // step))
