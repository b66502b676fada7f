"""One step of one layer: decide, dispatch, GEMM, combine.

On a grid of a x b = N ranks with `T_o` rows on rank o and `K` input columns on each rank (all
heads of this tensor-parallel rank):

    x_o [T_o, K] --dispatch--> [sum(T), K/a] --GEMM--> [sum(T), H/b] --combine--> [T_o, H]

Dispatch and combine are one all-to-all each, on every backend. Rank (i, j) of the grid gets chunk i
of all rows. The owner of a row adds up `a` partial results for each of `b` slices of its outputs:
that is one hop, rounds once, and takes unequal rows.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import diagnosis, rows, weight_gather
from .otp_group import CollectiveError, Counts, OtpGroup
from .pair import placed

BUFFER_BYTES = 8 << 20
"""Size of one shared buffer, in bytes. A step that needs a larger one is cut into parts.

Each of two lanes has three. Two or three parts are under way at once, so a part is small.
"""

MOST_VIEWS = 1024
"""How many views of buffers are kept: a model meets many row counts, and a view costs time."""


class Plan(NamedTuple):
    """What is settled about a layer before its first step; equal on all ranks of the group.

    size: N; columns: K; hidden: H, outputs of all ranks; element_bytes: of an activation;
        buffer_bytes: of one shared buffer.
    graph_rows: row count up to which a device graph may be captured (0: no graphs).
    gather_from: rows on every rank from which the weight is gathered; 0: never.
    outputs: b of the grid; wire_bytes: of a chunk of a row on the way out, if it travels in 8 bits.
    tail: how many of a chunk's elements are behind its columns, see `pair.Pair`.
    """

    size: int
    columns: int
    hidden: int
    element_bytes: int
    graph_rows: int
    gather_from: int
    buffer_bytes: int
    outputs: int = 1
    wire_bytes: int = 0
    tail: int = 0

    @property
    def chunk(self) -> int:
        """Input columns of one rank, K/a, and the tail."""
        return self.columns * self.outputs // self.size

    @property
    def width(self) -> int:
        """Elements of a chunk of a row on the way out: of the model's type, or int8."""
        return self.wire_bytes or self.chunk

    @property
    def row_bytes(self) -> int:
        """Bytes that one row on every rank takes in the largest of the buffers."""
        out = self.wire_bytes or self.chunk * self.element_bytes
        return self.size * max(out, self.hidden // self.outputs * self.element_bytes)


class Pattern(NamedTuple):
    """How a step communicates: by gathering the weight, else in `parts` dispatches and combines."""

    gather: bool
    parts: int


@functools.lru_cache(maxsize=1024)
def decide(counts: Counts, plan: Plan) -> Pattern:
    """Decide how a step communicates, from facts that are equal on all ranks of the group.

    Nothing that one rank knows alone (capturing, replaying, eager, idle, profiling) may enter,
    because a replaying rank runs no Python. Up to `graph_rows` there is one pattern: one
    all-to-all out, one back.
    """
    if max(counts) <= plan.graph_rows:
        return Pattern(False, 1)
    parts = max(1, -(-max(counts) * plan.row_bytes // plan.buffer_bytes))
    return Pattern(weight_gather.wins(plan.gather_from, counts), min(parts, max(counts)))


def most_rows(plan: Plan, rows: int) -> int:
    """Return the most rows of one GEMM, where no rank has more than `rows` in a step."""
    # What `decide` does not cut, and the largest part of what it does.
    uncut = max(plan.graph_rows, plan.buffer_bytes // plan.row_bytes + 1)
    return max(rows, plan.size * min(rows, uncut))


def run(layer: Any, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Run one step of a sharded o_proj: x [..., K] -> [..., hidden], same dtype.

    positions: of the rows, [...], where they travel with them.
    Raises OprojError when row counts or, in debug mode, the ranks' places differ, and when a rank
    does not take part within the group's timeout.
    """
    shard = layer.oproj
    group, plan = shard.group, shard.plan
    mine = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    step = group.steps
    counts: Counts = ()
    try:
        if group.settings.debug:
            diagnosis.compare_places(shard.name, mine.shape[0], group, shard.host)
        counts = rows.across_group(mine.shape[0], group, shard.host, shard.name, shard.leads)
        group.steps += 1
        pattern = decide(counts, plan)
        if pattern.gather and _gather_is_right(layer, mine, counts, pattern.parts):
            group.gathers += 1
            output = weight_gather.run(mine, layer)
        else:
            tail = None if positions is None else placed(positions.reshape(-1), x.dtype)
            output = exchange(layer, mine, counts, pattern.parts, tail)
    except CollectiveError as error:
        told = f"{mine.shape[0]} of {list(counts) or 'unknown counts'}"
        where = f"step {step} at {shard.name}"
        raise diagnosis.failed(where, told, error, group) from error
    return output if x.dim() == 2 else output.view(*x.shape[:-1], plan.hidden)


def exchange(
    layer: Any, x: torch.Tensor, counts: Counts, parts: int = 1, tail: torch.Tensor | None = None
) -> torch.Tensor:
    """Dispatch, multiply, combine: x [rows, K] -> [rows, hidden], in `parts` parts.

    tail: what travels behind each chunk of a row, [rows, elements]. rows may be fewer than this
    rank's count: the rest travels as zeros. While a part is multiplied, the next one is on its way
    out and the last one on its way back.
    """
    shard, group, plan = layer.oproj, layer.oproj.group, layer.oproj.plan
    # `open_` turns chunks of 8 bits into what the quant method accepts as rows.
    close, open_ = (shard.wire.close, shard.wire.open) if shard.wire else (_as_it_is, None)
    if parts == 1:
        arrived = dispatch(close(x), counts, group, plan, tail=tail).wait()
        partial = shard.gemm(arrived, counts, open_)
        mine = add_up(combine(partial, counts, group).wait(), plan.outputs)
        return mine if len(mine) == len(x) else mine[: len(x)]
    # Every rank cuts every rank's rows in the same places.
    cuts = [tuple(count * part // parts for count in counts) for part in range(parts + 1)]
    some = [tuple(e - s for s, e in zip(*ends, strict=True)) for ends in itertools.pairwise(cuts)]
    own = [slice(*ends) for ends in itertools.pairwise(cut[group.rank] for cut in cuts)]
    output = x.new_empty((x.shape[0], plan.hidden))

    def leave(part: int) -> Arriving:
        behind = None if tail is None else tail[own[part]]
        return dispatch(close(x[own[part]]), some[part], group, plan, part % 2, behind)

    def finish(part: int, back: Arriving) -> None:
        mine = output[own[part]]
        mine.copy_(add_up(back.wait(), plan.outputs)[: mine.shape[0]])

    # The collectives of all ranks begin in this order: out 0, out 1, back 0, out 2, back 1, ...
    out, back = leave(0), None
    for part in range(parts):
        arrived = out.wait()
        if part + 1 < parts:
            out = leave(part + 1)
        partial = shard.gemm(arrived, some[part], open_)
        before, back = back, combine(partial, some[part], group, part % 2)
        if before is not None:
            finish(part - 1, before)
    assert back is not None
    finish(parts - 1, back)
    return output


class Arriving(NamedTuple):
    """Rows on their way, and torch's handle of the collective; None: they are there."""

    rows: torch.Tensor
    sent: torch.Tensor
    work: Any

    def wait(self) -> torch.Tensor:
        """Return the rows when they have arrived. Raises CollectiveError."""
        try:
            if self.work is not None:
                self.work.wait()
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        return self.rows


def dispatch(
    x: torch.Tensor, counts: Counts, group: OtpGroup, plan: Plan, lane: int | None = None,
    tail: torch.Tensor | None = None,
) -> Arriving:  # fmt: skip
    """Send x [rows, a * width] out: [sum(counts), width] arrives, by owner, same dtype.

    width: as in the plan, K/a where rows travel in the model's type.
    lane: the buffers of one part of a step, which goes on meanwhile. None: the step is whole, and
        waits for the rows.
    tail: [rows, at most plan.tail], what goes to every rank behind its chunk.
    The result is valid until the lane's next part, or the group's next step.
    """
    n, mine, given = group.size, counts[group.rank], x.shape[0]
    ways, width = n // plan.outputs, plan.width
    send = buffer("dispatch send", (ways, plan.outputs, mine, width), x, group, lane)
    own = send
    if given < mine:
        own = send[:, :, :given]
        send[:, :, given:].zero_()
    columns = width - plan.tail
    if tail is not None:
        own[..., columns : columns + tail.shape[1]].copy_(tail)
        own = own[..., :columns]
    own.copy_(x.view(given, ways, 1, columns).permute(1, 2, 0, 3))
    received = buffer("dispatch receive", (sum(counts), width), x, group, lane)
    flat = send.view(n * mine, width)
    work = _all_to_all(received, flat, counts, (mine,) * n, group, lane is not None)
    return Arriving(received, flat, work)


def combine(
    partial: torch.Tensor, counts: Counts, group: OtpGroup, lane: int | None = None
) -> Arriving:
    """Send partial [sum(counts), H/b] back: [N, T_o, H/b] arrives; see `dispatch`."""
    n, mine, width = group.size, counts[group.rank], partial.shape[1]
    received = buffer("combine receive", (n, mine, width), partial, group, lane)
    flat, partial = received.view(n * mine, width), partial.contiguous()
    work = _all_to_all(flat, partial, (mine,) * n, counts, group, lane is not None)
    return Arriving(received, partial, work)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def add_up(parts: torch.Tensor, outputs: int = 1) -> torch.Tensor:
    """Sum parts [a*b, rows, H/b] over a in one kernel that rounds once: returns [rows, H].

    outputs: b.
    """
    n, rows, width = parts.shape
    if outputs > 1:
        parts = parts.view(n // outputs, outputs, rows, width).transpose(1, 2)
    if n != 2 * outputs:
        total = parts.sum(0)  # torch accumulates 16-bit types in float32
    else:
        to = parts.new_empty(parts.shape[1:]) if outputs > 1 else None
        total = torch.add(parts[0], parts[1], out=to)
    return total.view(rows, outputs * width) if outputs > 1 else total


def buffer(
    role: str, shape: tuple[int, ...], like: torch.Tensor, group: OtpGroup, lane: int | None = None
) -> torch.Tensor:
    """Return uninitialized memory of `like`'s dtype and device, shared by all layers.

    A graph replays on the same addresses; `reserve` makes it large enough before the first capture.
    """
    key = role, shape, like.dtype, lane or 0
    view = group.views.get(key)
    if view is None:
        if len(group.views) >= MOST_VIEWS:
            group.views.clear()
        size = math.prod(shape)
        memory = group.memory((role, *key[2:]), size, like.dtype, like.device)
        view = group.views[key] = memory[:size].view(shape)
    return view


def reserve(group: OtpGroup, like: torch.Tensor) -> None:
    """Allocate the buffers, typed `like` the activations, for the largest step.

    The largest is a captured step, in lane 0, or two parts of a step that is cut, in lanes 0 and 1.
    """
    if not group.graph_rows:
        return
    n = group.size
    for layer in group.layers.values():
        plan = layer.oproj.plan
        # Rows cannot be cut, so a part may have one row more than its share.
        part = plan.buffer_bytes // plan.row_bytes + 1
        sent = like[:0].to(torch.int8) if plan.wire_bytes else like
        for lane, most in enumerate((max(plan.graph_rows, part), part)):
            buffer("dispatch send", (n, most, plan.width), sent, group, lane)
            buffer("dispatch receive", (n * most, plan.width), sent, group, lane)
            buffer("combine receive", (n, most, plan.hidden // plan.outputs), like, group, lane)


def run_traced(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Do what `run` does for a graph compiler that cannot handle our op (torchair).

    x [T, K] -> [T, hidden]; every rank of the group has T rows.
    """
    group, (a, b) = layer.oproj.group, layer.oproj.grid
    count, hidden = x.shape[0], layer.oproj.hidden
    chunk = x.shape[1] // a
    send = x.view(count, a, chunk).transpose(0, 1)
    send = send.unsqueeze(1).expand(a, b, count, chunk) if b > 1 else send
    send = send.reshape(a * b * count, chunk)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group.device_group)
    partial = layer.oproj.gemm_traced(received)
    back = torch.empty_like(partial)
    dist.all_to_all_single(back, partial, group=group.device_group)
    parts = back.view(a, b, count, hidden // b)
    parts = parts.transpose(1, 2) if b > 1 else parts
    return parts.sum(0, dtype=torch.float32).to(partial.dtype).view(count, hidden)


def _all_to_all(
    output: torch.Tensor, input_: torch.Tensor, output_rows: Counts, input_rows: Counts,
    group: OtpGroup, later: bool,
) -> Any:  # fmt: skip
    """Exchange rows; later: begin only, and return what to wait for."""
    equal = output_rows == input_rows and len(set(output_rows)) == 1
    # The form without splits is the one that a device graph can capture.
    splits = () if equal else (list(output_rows), list(input_rows))
    try:
        return dist.all_to_all_single(
            output, input_, *splits, group=group.device_group, async_op=later
        )
    except RuntimeError as error:
        raise CollectiveError(str(error)) from error


def _gather_is_right(layer: Any, x: torch.Tensor, counts: Counts, parts: int) -> bool:
    """Before the first gather of a layer: does it give what an exchange gives?

    A quant method may keep what belongs to its shard where `weight_gather` does not look. Then
    the layer is never gathered, on any rank.
    """
    shard = layer.oproj
    group = shard.group
    if shard.gather_verified:
        return True
    if not group.gathers:
        # The profile run gathers, and a later step with unequal rows exchanges: vLLM must measure
        # the memory of both.
        exchange(layer, x, counts, parts)
    columns = x.shape[1]
    probe = torch.arange(8 * columns, device=x.device).sin().view(8, columns).to(x.dtype)
    expected = exchange(layer, probe, (8,) * group.size).float()
    error = (weight_gather.run(probe, layer).float() - expected).abs().max()
    limit = 0.02 if shard.wire is None else 0.1  # a gather does not round rows to 8 bits
    same = bool(error <= limit * expected.abs().max())
    if all(rows.gather((int(same),), group)[0]):
        shard.gather_verified = True
        return True
    shard.plan = shard.plan._replace(gather_from=0)
    told = "a gathered weight gives another result with"
    then = f"{type(layer.quant_method).__name__}; rows are exchanged for all row counts instead"
    logging.getLogger("vllm.oproj_patch").warning("%s: %s %s.", shard.name, told, then)
    return False
