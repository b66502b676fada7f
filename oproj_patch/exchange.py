"""The collectives around a sharded o_proj, and the custom op that runs them.

One forward of one layer on a group of N ranks, `T_i` rows on rank i, `K` input columns on
each rank before the exchange (all heads of this tensor-parallel rank):

    x_i [T_i, K] --exchange--> [sum(T), K/N] --GEMM--> [sum(T), hidden] --return--> [T_i, hidden]

Both ways are one all-to-all. The return sums the N partial results of a row locally in
float32: it sends what a reduce-scatter sends, in one hop, rounds once, and takes unequal rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import row_counts
from .errors import OprojError
from .otp_group import OtpGroup

Gemm = Callable[[torch.Tensor], torch.Tensor]


def rows_out(x: torch.Tensor, counts: row_counts.Counts, group: OtpGroup) -> torch.Tensor:
    """Exchange: x [T_i, K] -> [sum(T), K/N], rows ordered by owner; same dtype."""
    n = group.size
    rows, columns = x.shape
    chunk = columns // n
    send = x.view(rows, n, chunk).transpose(0, 1).contiguous().view(n * rows, chunk)
    received = x.new_empty((sum(counts), chunk))
    _all_to_all(received, send, counts, (rows,) * n, group)
    return received


def partials_back(
    partial: torch.Tensor, counts: row_counts.Counts, group: OtpGroup
) -> torch.Tensor:
    """Return: partial [sum(T), hidden] -> [T_i, hidden], each row summed over the group."""
    n = group.size
    rows = counts[group.rank]
    hidden = partial.shape[1]
    received = partial.new_empty((n * rows, hidden))
    _all_to_all(received, partial.contiguous(), (rows,) * n, counts, group)
    return received.view(n, rows, hidden).sum(0, dtype=torch.float32).to(partial.dtype)


def _all_to_all(
    output: torch.Tensor,
    input_: torch.Tensor,
    output_rows: row_counts.Counts,
    input_rows: row_counts.Counts,
    group: OtpGroup,
) -> None:
    if output_rows == input_rows and len(set(output_rows)) == 1:
        # The one form a device graph can capture and replay on padded, equal rows.
        dist.all_to_all_single(output, input_, group=group.device_group)
        return
    dist.all_to_all_single(
        output, input_, list(output_rows), list(input_rows), group=group.device_group
    )


def run(
    x: torch.Tensor,
    name: str,
    hidden: int,
    gemm: Gemm,
    group: OtpGroup,
    host: row_counts.HostForward,
) -> torch.Tensor:
    """One sharded o_proj: x [..., K] -> [..., hidden], as the unsharded layer would give it.

    name: the layer's name; gemm: the local GEMM, [sum(T), K/N] -> [sum(T), hidden].
    Raises OprojError when row counts or, in debug mode, the ranks' places differ.
    """
    rows = x.reshape(-1, x.shape[-1])
    counts = row_counts.across_group(rows.shape[0], group, host)
    if group.settings.debug:
        _compare_places(name, rows.shape[0], counts, group)
    group.exchanges += 1
    output = partials_back(gemm(rows_out(rows, counts, group)), counts, group)
    return output.view(*x.shape[:-1], hidden)


def _compare_places(name: str, rows: int, counts: row_counts.Counts, group: OtpGroup) -> None:
    """Debug mode: every rank stands before the same exchange of the same layer, or raise."""
    names = list(group.layers)
    layers, steps, their_rows = row_counts.gather((names.index(name), group.exchanges, rows), group)
    for rank in range(group.size):
        place = (layers[rank], steps[rank], their_rows[rank])
        if place != (layers[group.rank], steps[group.rank], counts[rank]):
            raise OprojError(
                "OPROJ013",
                f"before exchange {group.exchanges} of {name}, rank {group.ranks[rank]} is at "
                f"layer {names[place[0]]}, exchange {place[1]}, with {place[2]} rows, but rank "
                f"{group.ranks[group.rank]} expects {counts[rank]} rows there: the ranks run "
                "different forward passes; please report model, options and release.",
            )


# The op as torch.compile sees it: opaque, one call, named by the layer. wrapt wrappers and
# Python around a traced forward are inlined or fail under fullgraph; an op cannot be.
_library: torch.library.Library | None = None


def register_op(call: Callable[[torch.Tensor, str, int], torch.Tensor]) -> Any:
    """Define `torch.ops.oproj_patch.o_proj(x, layer, hidden)` once; returns the op.

    call: runs the layer of that name. Defined through a Library: a call costs 4 us, against
    11 us through torch.library.custom_op.
    """
    global _library
    if _library is None:
        _library = torch.library.Library("oproj_patch", "FRAGMENT")
        _library.define("o_proj(Tensor x, str layer, SymInt hidden) -> Tensor")
        _library.impl("o_proj", call, "CompositeExplicitAutograd")
        _library._register_fake(
            "o_proj", lambda x, layer, hidden: x.new_empty((*x.shape[:-1], hidden))
        )
    return torch.ops.oproj_patch.o_proj.default
