"""The collectives around a sharded o_proj, and the custom op that runs them.

One step of one layer on a group of N ranks, `T_i` rows on rank i, `K` input columns on each rank
(all heads of this tensor-parallel rank):

    x_i [T_i, K] --dispatch--> [sum(T), K/N] --GEMM--> [sum(T), hidden] --combine--> [T_i, hidden]

Dispatch and combine are one all-to-all each, on every backend. The combine's owner adds up the N
partial results of a row: that sends what a reduce-scatter sends, in one hop, rounds once, and
takes unequal rows.
"""

from __future__ import annotations

import logging
import math
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from . import handshake, otp_group, row_counts, weight_gather
from .errors import OprojError
from .otp_group import OtpGroup
from .row_counts import Counts
from .settings import DEBUG

Gemm = Callable[[torch.Tensor], torch.Tensor]

BUFFER_BYTES = 64 << 20
"""Of each of the three shared buffers; a step with more rows is cut into parts."""
MOST_VIEWS = 1024
"""Views of the buffers that are kept; a model that is served sees many row counts."""


def dispatch(x: torch.Tensor, counts: Counts, group: OtpGroup) -> torch.Tensor:
    """Send x [T_i, K] out: returns [sum(T), K/N], rows ordered by owner, same dtype.

    The result is valid until the group's next step.
    """
    n, rows = group.size, x.shape[0]
    chunk = x.shape[1] // n
    send = _buffer("dispatch send", (n, rows, chunk), x, group)
    send.copy_(x.view(rows, n, chunk).transpose(0, 1))
    received = _buffer("dispatch receive", (sum(counts), chunk), x, group)
    _all_to_all(received, send.view(n * rows, chunk), counts, (rows,) * n, group)
    return received


def combine(partial: torch.Tensor, counts: Counts, group: OtpGroup) -> torch.Tensor:
    """Send partial [sum(T), hidden] back: returns [T_i, hidden], each row summed over the group."""
    n, rows, hidden = group.size, counts[group.rank], partial.shape[1]
    received = _buffer("combine receive", (n, rows, hidden), partial, group)
    flat = received.view(n * rows, hidden)
    _all_to_all(flat, partial.contiguous(), (rows,) * n, counts, group)
    return add_up(received)


def add_up(parts: torch.Tensor) -> torch.Tensor:
    """Sum of parts [N, rows, hidden] over N: accumulated in float32, rounded once, one kernel."""
    if parts.shape[0] == 2:
        return torch.add(parts[0], parts[1])
    return parts.sum(0)  # torch accumulates 16-bit types in float32


def _all_to_all(
    output: torch.Tensor,
    input_: torch.Tensor,
    output_rows: Counts,
    input_rows: Counts,
    group: OtpGroup,
) -> None:
    if output_rows == input_rows and len(set(output_rows)) == 1:
        # The form without splits is the one that a device graph can capture.
        dist.all_to_all_single(output, input_, group=group.device_group)
        return
    dist.all_to_all_single(
        output, input_, list(output_rows), list(input_rows), group=group.device_group
    )


def _buffer(
    role: str, shape: tuple[int, ...], like: torch.Tensor, group: OtpGroup
) -> torch.Tensor:
    """Uninitialized memory of `like`'s dtype and device, shared by all layers of the group."""
    key = (role, shape, like.dtype)
    found = group.views.get(key)
    if found is not None:
        return found
    size = math.prod(shape)
    memory = group.scratch.get((role, like.dtype))
    if memory is None or memory.numel() < size:
        # The model writes to it in and out of inference mode: no inference tensor.
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=like.dtype, device=like.device)
        group.scratch[role, like.dtype] = memory
        group.views.clear()
    if len(group.views) >= MOST_VIEWS:
        group.views.clear()
    with torch.inference_mode(False):
        view = group.views[key] = memory[:size].view(shape)
    return view


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
    Raises OprojError when row counts or, in debug mode, the ranks' places differ, and when a rank
    does not take part within the group's timeout.
    """
    rows = x.reshape(-1, x.shape[-1])
    step = group.exchanges
    try:
        if group.settings.debug:
            _compare_places(name, rows.shape[0], group, host)
        counts = row_counts.across_group(rows.shape[0], group, host, name)
        group.exchanges += 1
        group.rows += counts[group.rank]
        layer = group.layers[name]
        if (
            weight_gather.wins(layer.oproj.gather_from, counts)
            and not host.capturing()
            and _gather_verified(layer, rows, gemm, group)
        ):
            group.gathers += 1
            group.gathered_rows += counts[group.rank]
            output = weight_gather.run(rows, layer, gemm, group)
        else:
            output = _exchanged(rows, counts, hidden, gemm, group)
    except RuntimeError as error:
        if not _between_ranks(error):
            raise
        raise _failed(f"exchange {step} of {name}", error, group) from error
    return output.view(*x.shape[:-1], hidden)


def _exchanged(
    x: torch.Tensor, counts: Counts, hidden: int, gemm: Gemm, group: OtpGroup
) -> torch.Tensor:
    parts = _parts(x, counts, hidden, group)
    if parts == 1:
        return combine(gemm(dispatch(x, counts, group)), counts, group)
    output = x.new_empty((x.shape[0], hidden))
    for part in range(parts):
        # Every rank cuts every rank's rows in the same places.
        starts = [count * part // parts for count in counts]
        ends = [count * (part + 1) // parts for count in counts]
        some = tuple(end - start for start, end in zip(starts, ends, strict=True))
        mine = slice(starts[group.rank], ends[group.rank])
        output[mine] = combine(gemm(dispatch(x[mine], some, group)), some, group)
    return output


def _parts(x: torch.Tensor, counts: Counts, hidden: int, group: OtpGroup) -> int:
    """In how many parts to cut a step so that no rank's buffer is larger than `BUFFER_BYTES`."""
    out = max(group.size * max(counts), sum(counts)) * (x.shape[1] // group.size)
    back = group.size * max(counts) * hidden
    most: int = max(out, back) * x.element_size()
    return max(1, -(-most // BUFFER_BYTES))


def _gather_verified(layer: Any, like: torch.Tensor, gemm: Gemm, group: OtpGroup) -> bool:
    """Before the first gather of a layer: does it give what the exchange gives?

    A quant method may keep what belongs to its shard where `weight_gather` does not look. Then
    the layer is never gathered, on any rank.
    """
    if not layer.oproj.gather_verified:
        columns = like.shape[1]
        x = torch.arange(8 * columns, device=like.device).sin().view(8, columns).to(like.dtype)
        expected = _exchanged(x, (8,) * group.size, layer.output_size, gemm, group).float()
        error = (weight_gather.run(x, layer, gemm, group).float() - expected).abs().max()
        same = bool(error <= 0.02 * expected.abs().max())
        if not all(row_counts.gather((int(same),), group)[0]):
            layer.oproj.gather_from = 0
            logging.getLogger("vllm.oproj_patch").warning(
                "%s: a gathered weight gives another result with %s; activations are exchanged "
                "for all row counts instead.",
                layer.oproj.name,
                type(layer.quant_method).__name__,
            )
            return False
        layer.oproj.gather_verified = True
    return True


def run_traced(x: torch.Tensor, hidden: int, gemm: Gemm, group: OtpGroup) -> torch.Tensor:
    """`run` for a graph compiler that has no use for our op: equal rows, plain collectives.

    x [T, K] -> [T, hidden]; every rank of the group has T rows.
    """
    n = group.size
    rows, columns = x.shape
    send = x.view(rows, n, columns // n).transpose(0, 1).reshape(n * rows, columns // n)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group.device_group)
    partial = gemm(received)
    back = torch.empty_like(partial)
    dist.all_to_all_single(back, partial, group=group.device_group)
    return back.view(n, rows, hidden).sum(0, dtype=torch.float32).to(partial.dtype)


def _compare_places(name: str, rows: int, group: OtpGroup, host: row_counts.HostForward) -> None:
    """Debug mode: every rank stands before the same exchange of the same layer, or all raise."""
    names = list(group.layers)
    step = group.exchanges
    told = row_counts.told(rows, group, host) or (-1,) * group.size
    seconds = group.settings.handshake_seconds
    layers, steps, their_rows, *views = row_counts.gather(
        (names.index(name), step, rows, *told), group, seconds
    )
    for rank, (layer, their_step) in enumerate(zip(layers, steps, strict=True)):
        if (names[layer], their_step) != (name, step):
            raise OprojError(
                "OPROJ013",
                f"rank {group.ranks[rank]} is at exchange {their_step} of {names[layer]} while "
                f"rank {group.ranks[group.rank]} is at exchange {step} of {name}: the ranks run "
                "different forward passes; please report model, options and release.",
            )
    for rank, view in enumerate(zip(*views, strict=True)):
        if view not in (their_rows, (-1,) * group.size):
            raise OprojError(
                "OPROJ013",
                f"at exchange {step} of {name} the ranks {group.ranks} have {list(their_rows)} "
                f"rows, but rank {group.ranks[rank]} was told {list(view)}: its host's "
                "data-parallel metadata is wrong; please report model, options and release.",
            )


def _between_ranks(error: RuntimeError) -> bool:
    """Whether a collective raised `error`, and not the GEMM or a refusal of ours."""
    waiting = (_all_to_all, weight_gather._gather, row_counts.gather)
    raised_in = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return not raised_in.isdisjoint(function.__code__ for function in waiting)


def _failed(where: str, error: RuntimeError, group: OtpGroup) -> OprojError:
    """What to raise for an exchange that failed, naming the ranks that did not come to it."""
    problem = str(error).splitlines()[0].partition(". ")[0]
    found: list[OprojError] = []

    def ask() -> None:
        try:
            handshake.agree(
                otp_group.store(),
                f"{group.store_key}/failed",
                group.ranks[group.rank],
                group.ranks,
                {"where": where},
                handshake.HEARD_SECONDS,
                _absent(problem, group),
            )
        except OprojError as verdict:
            found.append(verdict)

    # A store whose machine is gone does not answer, and its client has no deadline.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(3 * handshake.HEARD_SECONDS)
    if found:
        return found[0]
    return OprojError(
        "OPROJ013",
        f"an exchange between the ranks {group.ranks} failed ({problem}), and the key-value store "
        "on rank 0 does not answer: look at the machine and the log of rank 0 first.",
    )


def _absent(problem: str, group: OtpGroup) -> handshake.Verdict:
    """Verdict on a failed exchange: the ranks without a record were not in it."""
    timeout = otp_group.timeout_of(group.device_group)
    seconds = group.settings.handshake_seconds
    if not group.settings.debug and timeout is not None:
        seconds = timeout.total_seconds()

    def verdict(records: Mapping[int, handshake.Record | None]) -> OprojError:
        absent = [rank for rank, record in records.items() if record is None]
        places = {rank: record["where"] for rank, record in records.items() if record}
        waiting = "; ".join(f"rank {rank} was at {where}" for rank, where in places.items())
        if not absent:
            return OprojError(
                "OPROJ013",
                f"an exchange between the ranks {group.ranks} failed on all of them ({waiting}: "
                f"{problem}): the ranks ran different forward passes, or the network failed; set "
                f"{DEBUG}=1 to see which, and report model, options and release.",
            )
        return OprojError(
            "OPROJ013",
            f"rank {', '.join(map(str, absent))} did not arrive within {seconds:g} s, or has "
            f"ended ({waiting}: {problem}): look for the error in the log of that rank, or for "
            "what it is busy with.",
        )

    return verdict


# The op as torch.compile sees it: opaque, one call, named by the layer. wrapt wrappers and
# Python around a traced forward are inlined or fail under fullgraph; an op cannot be.
_library: torch.library.Library | None = None


def register_op(call: Callable[[torch.Tensor, str, int], torch.Tensor], label: type) -> Any:
    """Define `torch.ops.oproj_patch.o_proj(x, layer, hidden)` once; returns the op.

    call: runs the layer of that name. Defined through a Library: a call costs 4 us, against
    11 us through torch.library.custom_op.
    label: type of the argument `layer`: `str`, or the host's opaque type for layer names with
    the name in its `value`, which keeps the graphs of equal layers equal (one compilation).
    """
    global _library
    if _library is None:

        def o_proj(x: torch.Tensor, layer: Any, hidden: int) -> torch.Tensor:
            return call(x, layer if isinstance(layer, str) else layer.value, hidden)

        o_proj.__annotations__["layer"] = label
        o_proj.__annotations__.update(x=torch.Tensor, hidden=int)
        o_proj.__annotations__["return"] = torch.Tensor
        _library = torch.library.Library("oproj_patch", "FRAGMENT")
        _library.define("o_proj" + torch.library.infer_schema(o_proj, mutates_args=()))
        _library.impl("o_proj", o_proj, "CompositeExplicitAutograd")
        _library._register_fake(
            "o_proj", lambda x, layer, hidden: x.new_empty((*x.shape[:-1], hidden))
        )
    return torch.ops.oproj_patch.o_proj.default
