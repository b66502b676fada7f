"""Agreement between ranks through the process group's key-value store, with a deadline.

A collective can wait 30 minutes; with a store we choose the deadline. Only short UTF-8 texts of
fixed form travel, never pickles.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import OprojError
from ..settings import HANDSHAKE_SECONDS, TOGGLE
from . import report
from .report import Record, Records

Answer = TypeVar("Answer")

Verdict = Callable[[Records], "OprojError | None"]

HEARD_SECONDS = 5.0
"""How long a rank waits for the others to hear a bad verdict before it ends."""


HOLDER = "rank 0, or torchrun's agent on the first node"
"""Which process holds the key-value store."""


def within(seconds: float, ask: Callable[[], Answer], silent: OprojError) -> Answer:
    """Return what `ask`, which uses a store, returns, or raise what it raises.

    Raises `silent` when that takes `seconds` and the time to hear a verdict. A thread asks, because
    a store on a node that is gone blocks its client forever.
    """
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def thread() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)

    asking = threading.Thread(target=thread, daemon=True)
    asking.start()
    asking.join(seconds + 2 * HEARD_SECONDS)
    if answers:
        return answers[0]
    raise errors[0] if errors else silent


def agree(
    store: Any, key: str, rank: int, ranks: Sequence[int], record: Record, seconds: float,
    verdict: Verdict, refusal: OprojError | None = None,
    end_others: Callable[[], None] = lambda: None, facts: Record | None = None,
) -> None:  # fmt: skip
    """Publish `record` under `key`, wait for the records of `ranks`, and settle on one verdict.

    store: a torch.distributed store that all of `ranks` reach; key: unique to this agreement.
    seconds: deadline for all records to arrive.
    verdict: judges the records; returns the error to raise, or None. Every rank raises the same,
        because the first rank to judge writes its verdict to the store.
    refusal: why this rank cannot take part; it is the verdict then, and nobody waits.
    end_others: called after a bad verdict that a rank has not read, because such a rank is unaware.
    facts: what is the same on all ranks, by name, for the report of a failure.
    """
    with store_errors(refusal):
        node = socket.gethostname()
        if refusal is not None:
            told = f"rank {rank} (node {node}) cannot start: {refusal.sentence}"
            _write(store, key, OprojError(refusal.code, told))
            if _hear(store, key, rank, ranks, seconds):
                end_others()
            raise refusal
        deadline = time.monotonic() + seconds
        store.set(f"{key}/{rank}", json.dumps({**record, "node": node}))
        # With a verdict already there, nobody needs to wait any longer.
        names = {other: f"{key}/{other}" for other in ranks}
        missing = _wait(store, list(names.values()), seconds, f"{key}/verdict")
        records = {
            other: None if name in missing else json.loads(store.get(name))
            for other, name in names.items()
        }
        code, sentence = _write(store, key, verdict(records))
        if code:
            report.log(OprojError(code, sentence), rank, records, facts or {})
            # A rank that is absent at the deadline will not come, so nobody waits for it. Before
            # the deadline, where a verdict ended the wait, it still may.
            left = deadline - time.monotonic()
            there = [other for other in ranks if left > 0 or records[other] is not None]
            if _hear(store, key, rank, there, max(HEARD_SECONDS, left)) or len(there) < len(ranks):
                end_others()
            raise OprojError(code, sentence)


@contextlib.contextmanager
def store_errors(refusal: OprojError | None) -> Iterator[None]:
    """Raise `refusal`, or else OprojError, where the store ends while it is used."""
    try:
        yield
    except OprojError:
        raise
    except RuntimeError as problem:  # torch's DistNetworkError
        raise refusal or OprojError(
            "OPROJ011",
            f"the process that holds the key-value store of the process group ({HOLDER}) ended "
            f"while the ranks agreed ({str(problem).splitlines()[0]}): look for its error in its "
            "log.",
        ) from problem


def _write(store: Any, key: str, error: OprojError | None) -> list[str]:
    """Write a verdict unless there is one; return [code, sentence] of the one that holds."""
    mine = ["", ""] if error is None else [error.code, error.sentence]
    settled: list[str] = json.loads(store.compare_set(f"{key}/verdict", "", json.dumps(mine)))
    return settled


def _hear(store: Any, key: str, rank: int, ranks: Sequence[int], seconds: float) -> list[str]:
    """Wait until `ranks` heard the verdict, because the store ends with the rank that holds it.

    Returns something where one did not.
    """
    with contextlib.suppress(RuntimeError):  # the store has ended; this rank knows the verdict
        store.set(f"{key}/heard/{rank}", "1")
        return _wait(store, [f"{key}/heard/{other}" for other in ranks], seconds)
    return []


def _wait(store: Any, keys: Sequence[str], seconds: float, unless: str | None = None) -> list[str]:
    """Wait until all `keys`, or the key `unless`, exist; return the keys missing by then."""
    deadline = time.monotonic() + seconds
    missing = list(keys)
    while True:
        missing = [key for key in missing if not store.check([key])]
        if not missing or time.monotonic() >= deadline or (unless and store.check([unless])):
            return missing
        time.sleep(0.02)


def same_settings(record: Record, seconds: float, records: Records) -> OprojError | None:
    """Judge a start: every rank is there, with the fields of `record`.

    record: what must be equal, by name; seconds: the deadline, for the sentence.
    """
    values = {rank: other for rank, other in records.items() if other is not None}
    absent = [str(rank) for rank in records if rank not in values]
    if absent:
        nodes = sorted({other["node"] for other in values.values()})
        return OprojError(
            "OPROJ011",
            f"rank {', '.join(absent)}: {TOGGLE} is not set there, or oproj_patch is not installed "
            f"or not loaded there, or that process has ended (no answer within {seconds:g} s; the "
            f"other ranks are on {', '.join(nodes)}): set {TOGGLE}={record[TOGGLE]} for every "
            f"process of the instance on every node; {HANDSHAKE_SECONDS} changes the deadline.",
        )
    for field in record:
        found = sorted({other.get(field, "") for other in values.values()})
        if len(found) > 1:
            told = "; ".join(
                f"{_ranks_with(field, value, values)} has {value or 'none'}" for value in found
            )
            return OprojError(
                "OPROJ011",
                f"the ranks do not agree on {field}: {told}; accepted is one value on every rank: "
                "make them equal and start again.",
            )
    return None


def _ranks_with(field: str, value: str, values: Mapping[int, Record]) -> str:
    having = {rank: other for rank, other in values.items() if other.get(field, "") == value}
    nodes = sorted({other["node"] for other in having.values()})
    return f"rank {', '.join(map(str, having))} (node {', '.join(nodes)})"


def same_layers(records: Records) -> OprojError | None:
    """Judge after loading: every rank of the group sharded the same layers.

    A record's `layers` is JSON: layer name -> its description (shapes, dtypes, quant method). Of a
    rank that ended meanwhile all layers are absent.
    """
    described = {
        rank: json.loads(other["layers"]) if other else {} for rank, other in records.items()
    }
    first_rank, first = next(iter(described.items()))
    for rank, layers in described.items():
        for name in sorted(first.keys() | layers.keys()):
            one, other = first.get(name, "absent"), layers.get(name, "absent")
            if one != other:
                return OprojError(
                    "OPROJ012",
                    f"layer {name} is [{other}] on rank {rank} but [{one}] on rank {first_rank}: "
                    "start every rank with the same model, options, quantization and versions.",
                )
    return None
