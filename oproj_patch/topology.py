"""Pure rank and shard arithmetic. No torch, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import OprojValueError
from .settings import TOGGLE


def check_size(size: int, dp_size: int) -> None:
    """Refuse a group size that `dp_size` data-parallel ranks cannot be cut into.

    Raises OprojValueError naming the toggle, the value and the accepted sizes.
    """
    accepted = [n for n in range(2, dp_size + 1) if dp_size % n == 0]
    if size in accepted:
        return
    remedy = (
        f"accepted are the divisors of the data-parallel size {dp_size} above 1 "
        f"({', '.join(map(str, accepted))})"
        if accepted
        else f"the data-parallel size is {dp_size}, so there is nothing to shard over"
    )
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
    return [
        list(ranks[start : start + size])
        for ranks in dp_groups
        for start in range(0, len(ranks), size)
    ]


def layer_groups(
    otp: Sequence[Sequence[int]], tp_groups: Sequence[Sequence[int]]
) -> list[list[int]]:
    """The ranks that together hold one whole o_proj weight, in chunk order.

    The weight is cut into `tp * N` chunks; chunk `tp_rank * N + otp_rank` lives on the rank
    at that place of the returned list. With tp = 1 this is the otp group itself.
    """
    otp_of = {rank: tuple(group) for group in otp for rank in group}
    groups: list[list[int]] = []
    seen: set[int] = set()
    for tp_group in tp_groups:
        members = [rank for tp_rank in tp_group for rank in otp_of[tp_rank]]
        if seen.isdisjoint(members):
            groups.append(members)
            seen.update(members)
    return groups


def layer_rank(tp_rank: int, otp_rank: int, otp_size: int) -> int:
    """Index of this rank's chunk among the `tp * otp_size` chunks of one o_proj weight."""
    return tp_rank * otp_size + otp_rank


def check_divisible(name: str, input_size: int, tp_size: int, otp_size: int) -> None:
    """Refuse an o_proj whose input dimension has no whole chunk for every rank.

    Raises OprojValueError naming layer, dimension and toggle.
    """
    chunks = tp_size * otp_size
    if input_size % chunks:
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
    return [
        n
        for n in range(2, dp_size + 1)
        if dp_size % n == 0 and input_size % (tp_size * n * block) == 0
    ]


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
