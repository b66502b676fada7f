"""Who was absent when a step failed, and the comparison of places in debug mode."""

from __future__ import annotations

import functools

from ..errors import OprojError
from ..settings import DEBUG
from . import agreement, otp_group, report, rows
from .otp_group import CollectiveError, Counts, OtpGroup
from .rows import HostPass


def compare_places(name: str, mine: int, group: OtpGroup, host: HostPass) -> None:
    """Check, in debug mode, that every rank stands before the same step of the same layer.

    mine: rows of this rank. Raises OprojError on every rank when they do not.
    """
    names = list(group.layers)
    step = group.steps
    announced = rows.known(mine, group, host) or (-1,) * group.size
    here = (names.index(name), step, mine, *announced)
    layers, steps, counts, *views = rows.gather(here, group, group.settings.handshake_seconds)
    told = list(zip(*views, strict=True))

    def wrong(sentence: str) -> OprojError:
        error = OprojError("OPROJ013", sentence)
        places = {
            rank: {
                report.WHERE: f"step {steps[i]} of {names[layers[i]]}",
                report.ROWS: f"{counts[i]} of announced {list(told[i])}",
            }
            for i, rank in enumerate(group.ranks)
        }
        report.log(error, group.ranks[group.rank], places, _facts(group))
        return error

    for rank, (layer, their_step) in enumerate(zip(layers, steps, strict=True)):
        if (names[layer], their_step) != (name, step):
            raise wrong(
                f"rank {group.ranks[rank]} is at step {their_step} of {names[layer]} while "
                f"rank {group.ranks[group.rank]} is at step {step} of {name}: the ranks run "
                "different forward passes; please report model, options and release."
            )
    seen = [view for view in told if -1 not in view]
    other = next((view for view in seen if view != counts), None)
    if other is not None and len(set(seen)) > 1:
        raise wrong(
            f"at step {step} of {name} the ranks {group.ranks} have {list(counts)} rows, but the "
            f"host of rank {group.ranks[told.index(other)]} announced {list(other)}: its "
            "data-parallel metadata is wrong; please report model, options and release."
        )


def told_by_all(mine: int, where: str, group: OtpGroup, counts: str = "") -> Counts:
    """Return the number that each rank of the group tells at one place, in group order.

    where, counts: as for `failed`. Raises OprojError when a rank does not come to that place.
    """
    try:
        return rows.gather((mine,), group)[0]
    except CollectiveError as error:
        raise failed(where, counts, error, group) from error


def check_layers(group: OtpGroup) -> None:
    """Compare the sharded layers of the group's ranks, before the first step of any of them.

    Raises OprojError when they differ or a rank does not arrive.
    """
    try:
        otp_group.check_layers(group, _facts(group))
    except CollectiveError as error:
        raise failed("the comparison of layers before its first step", "", error, group) from error


def failed(where: str, counts: str, error: CollectiveError, group: OtpGroup) -> OprojError:
    """Return what to raise for a step that failed, naming the ranks that did not come to it.

    where: this rank's place; counts: its rows and, where it knows them, those of all ranks.
    """
    problem, rank = str(error).splitlines()[0].partition(". ")[0], group.ranks[group.rank]
    timeout, seconds = otp_group.timeout_of(group.device_group), error.seconds
    if seconds is None and timeout is not None:
        seconds = timeout.total_seconds()
    silent = OprojError(
        "OPROJ013",
        f"a step of the ranks {group.ranks} failed ({problem}), and the key-value store on rank 0 "
        "does not answer: look at the node and the log of rank 0 first.",
    )
    place, facts = {report.WHERE: where, report.ROWS: counts}, _facts(group)
    ask = functools.partial(
        agreement.agree, otp_group.store(), f"{group.store_key}/failed", rank, group.ranks, place,
        agreement.HEARD_SECONDS, functools.partial(_absent, problem, seconds, group), facts=facts,
    )  # fmt: skip
    found = silent
    try:
        agreement.within(agreement.HEARD_SECONDS, ask, silent)
    except OprojError as verdict:
        found = verdict
    if found is silent or found.code == "OPROJ011":  # the store is gone: nobody else has answered
        report.log(found, rank, {**dict.fromkeys(group.ranks), rank: place}, facts)
    return found


def _facts(group: OtpGroup) -> dict[str, str]:
    """Return what is the same on all ranks of the group, by name."""
    return {
        **group.facts,
        "ranks of the group": str(group.ranks),
        "grid": str(group.grid),
        "tensor-parallel size": str(group.tp_size),
        "largest captured row count": str(group.graph_rows),
        "sharded layers": str(len(group.layers)),
    }


def _absent(
    problem: str, seconds: float | None, group: OtpGroup, records: report.Records
) -> OprojError:
    """Judge a failed step: the ranks without a record were not in it.

    seconds: the deadline of what failed; None: unknown.
    """
    absent = [str(rank) for rank, record in records.items() if record is None]
    waiting = "; ".join(
        f"rank {rank} was at {record['where']}" for rank, record in records.items() if record
    )
    if not absent:
        return OprojError(
            "OPROJ013",
            f"a step of the ranks {group.ranks} failed on all of them ({waiting}: {problem}): the "
            f"ranks ran different forward passes, or the network failed; set {DEBUG}=1 to see "
            "which, and report model, options and release.",
        )
    return OprojError(
        "OPROJ013",
        f"rank {', '.join(absent)} did not arrive within "
        f"{'the deadline' if seconds is None else f'{seconds:g} s'}, or has ended ({waiting}: "
        f"{problem}): look for the error in the log of that rank, or for what it is busy with.",
    )
