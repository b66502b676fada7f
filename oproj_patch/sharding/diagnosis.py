"""Who was absent when a step failed, and the comparison of places in debug mode."""

from __future__ import annotations

import functools
import threading

from ..errors import OprojError
from ..settings import DEBUG
from . import agreement, otp_group, rows
from .otp_group import CollectiveError, OtpGroup
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
    for rank, (layer, their_step) in enumerate(zip(layers, steps, strict=True)):
        if (names[layer], their_step) != (name, step):
            raise OprojError(
                "OPROJ013",
                f"rank {group.ranks[rank]} is at step {their_step} of {names[layer]} while "
                f"rank {group.ranks[group.rank]} is at step {step} of {name}: the ranks run "
                "different forward passes; please report model, options and release.",
            )
    seen = [view for view in zip(*views, strict=True) if -1 not in view]
    wrong = next((view for view in seen if view != counts), None)
    if wrong is not None and len(set(seen)) > 1:
        rank = list(zip(*views, strict=True)).index(wrong)
        raise OprojError(
            "OPROJ013",
            f"at step {step} of {name} the ranks {group.ranks} have {list(counts)} rows, but the "
            f"host of rank {group.ranks[rank]} announced {list(wrong)}: its data-parallel "
            "metadata is wrong; please report model, options and release.",
        )


def failed(where: str, error: CollectiveError, group: OtpGroup) -> OprojError:
    """Return what to raise for a step that failed, naming the ranks that did not come to it."""
    problem = str(error).splitlines()[0].partition(". ")[0]
    found: list[OprojError] = []

    def ask() -> None:
        try:
            agreement.agree(
                otp_group.store(), f"{group.store_key}/failed", group.ranks[group.rank],
                group.ranks, {"where": where}, agreement.HEARD_SECONDS,
                functools.partial(_absent, problem, group),
            )  # fmt: skip
        except OprojError as verdict:
            found.append(verdict)

    # If rank 0's node is gone, the store client blocks for ever; so a thread asks.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(3 * agreement.HEARD_SECONDS)
    if found:
        return found[0]
    return OprojError(
        "OPROJ013",
        f"a step of the ranks {group.ranks} failed ({problem}), and the key-value store on rank 0 "
        "does not answer: look at the node and the log of rank 0 first.",
    )


def _absent(problem: str, group: OtpGroup, records: agreement.Records) -> OprojError:
    """Judge a failed step: the ranks without a record were not in it."""
    timeout = otp_group.timeout_of(group.device_group)
    seconds = group.settings.handshake_seconds
    if not group.settings.debug and timeout is not None:
        seconds = timeout.total_seconds()
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
        f"rank {', '.join(absent)} did not arrive within {seconds:g} s, or has ended ({waiting}: "
        f"{problem}): look for the error in the log of that rank, or for what it is busy with.",
    )
