"""Agreement between ranks through the process group's key-value store, with a deadline.

A collective that one rank never reaches has no deadline worth the name; a store has. Only
short UTF-8 texts of fixed form travel, never pickles.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import OprojError
from .settings import HANDSHAKE_SECONDS, TOGGLE

Record = Mapping[str, str]
Verdict = Callable[[Mapping[int, "Record | None"]], "OprojError | None"]

HEARD_SECONDS = 5.0
REFUSAL = "refusal"


class RankAbsentError(OprojError):
    """A rank gave no answer; it may be inside vLLM, knowing nothing of the other ranks' wish."""


def agree(
    store: Any,
    key: str,
    rank: int,
    ranks: Sequence[int],
    record: Record,
    seconds: float,
    verdict: Verdict,
) -> None:
    """Publish `record` under `key`, wait for the records of `ranks`, and settle on one verdict.

    store: a torch.distributed store all of `ranks` reach; key: unique to this agreement.
    seconds: deadline for all records to arrive.
    verdict: records by rank (None: not arrived by then) -> the error to raise, or None.

    Every rank raises the same sentence: the first to judge writes its verdict to the store.
    """
    try:
        settled = _settle(store, key, rank, ranks, record, seconds, verdict)
    except OprojError:
        raise
    except RuntimeError as error:  # torch's DistNetworkError
        raise OprojError(
            "OPROJ011",
            "the rank that holds the key-value store of the process group (rank 0) ended while "
            f"the ranks compared notes ({str(error).splitlines()[0]}): look for its error in its "
            "log.",
        ) from error
    if settled:
        raise settled


def _settle(
    store: Any,
    key: str,
    rank: int,
    ranks: Sequence[int],
    record: Record,
    seconds: float,
    verdict: Verdict,
) -> OprojError | None:
    store.set(f"{key}/{rank}", json.dumps({**record, "host": socket.gethostname()}))
    # A verdict that is already there means that nobody needs to wait any longer.
    missing = _wait(store, [f"{key}/{rank}" for rank in ranks], seconds, unless=f"{key}/verdict")
    records = {
        rank: None if f"{key}/{rank}" in missing else json.loads(_text(store.get(f"{key}/{rank}")))
        for rank in ranks
    }
    error = verdict(records)
    mine = ["", ""] if error is None else [error.code, error.sentence]
    mine.append("absent" if isinstance(error, RankAbsentError) else "")
    code, sentence, absent = json.loads(
        _text(store.compare_set(f"{key}/verdict", "", json.dumps(mine)))
    )
    if not code:
        return None
    try:
        store.set(f"{key}/heard/{rank}", "1")
        # The store lives in one rank's process: let the others hear the verdict before it ends.
        heard = [f"{key}/heard/{other}" for other in ranks if records[other] is not None]
        _wait(store, heard, HEARD_SECONDS)
    except RuntimeError:
        pass  # That rank has ended; the verdict is known here.
    return (RankAbsentError if absent else OprojError)(code, sentence)


def _wait(store: Any, keys: Sequence[str], seconds: float, unless: str | None = None) -> list[str]:
    """Wait until all `keys` or the key `unless` exist; returns the keys that are missing then."""
    deadline = time.monotonic() + seconds
    missing = list(keys)
    while True:
        missing = [key for key in missing if not store.check([key])]
        if not missing or time.monotonic() >= deadline or (unless and store.check([unless])):
            return missing
        time.sleep(0.02)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def same_settings(record: Record, seconds: float, host_of: Callable[[int], str | None]) -> Verdict:
    """Verdict of the first hand-shake: every rank is there, with the settings of `record`.

    A record may carry a `refusal`, the text of the error for which its rank will not start.
    host_of: host of a rank that did not answer, or None when it is not known.
    """

    def verdict(records: Mapping[int, Record | None]) -> OprojError | None:
        values = {rank: other for rank, other in records.items() if other is not None}
        refusals = {rank: other[REFUSAL] for rank, other in values.items() if other.get(REFUSAL)}
        absent = [rank for rank in records if rank not in values]
        if refusals:
            error = _refused(refusals, values)
            return RankAbsentError(error.code, error.sentence) if absent else error
        if absent:
            present = sorted({other["host"] for other in values.values()})
            told = "; ".join(
                f"rank {rank}{_named(host_of(rank))}: {TOGGLE} is not set there" for rank in absent
            )
            return RankAbsentError(
                "OPROJ011",
                f"{told}, or oproj_patch is not installed or not loaded there, or that process "
                f"has ended (no hand-shake within {seconds:g} s; the other ranks are on "
                f"{_join(present)}): set {TOGGLE}={record['size']} for every process of the "
                f"instance on every node; {HANDSHAKE_SECONDS} changes the deadline.",
            )
        for field in record:
            groups = {other.get(field, "") for other in values.values()}
            if len(groups) > 1:
                told = "; ".join(
                    _ranks_with(field, value, values) + f" has {value or 'none'}"
                    for value in sorted(groups)
                )
                what = TOGGLE if field == "size" else f"the version of {field}"
                return OprojError(
                    "OPROJ011",
                    f"the ranks do not agree on {what}: {told}; accepted is one value on every "
                    "rank: make them equal and start again.",
                )
        return None

    return verdict


def _refused(refusals: Mapping[int, str], values: Mapping[int, Record]) -> OprojError:
    rank, text = min(refusals.items())
    code, sentence = text.split(": ", 1)
    if set(refusals) == set(values) and len(set(refusals.values())) == 1:
        return OprojError(code, sentence)
    return OprojError(code, f"rank {rank} (host {values[rank]['host']}) cannot start: {sentence}")


def _ranks_with(field: str, value: str, values: Mapping[int, Record]) -> str:
    ranks = [rank for rank, other in values.items() if other.get(field, "") == value]
    return f"rank {_join(ranks)} (host {_join(sorted({values[r]['host'] for r in ranks}))})"


def same_layers() -> Verdict:
    """Verdict after model construction: every rank of the group sharded the same layers.

    A record's `layers` is JSON: layer name -> its description (shapes, dtypes, quant method).
    """

    def verdict(records: Mapping[int, Record | None]) -> OprojError | None:
        absent = [rank for rank, other in records.items() if other is None]
        if absent:
            return RankAbsentError(
                "OPROJ012",
                f"rank {_join(absent)} did not reach its first forward pass in time: look for "
                "its error in the log of that rank.",
            )
        described = {rank: json.loads(other["layers"]) for rank, other in records.items() if other}
        first_rank, first = next(iter(described.items()))
        for rank, layers in described.items():
            for name in sorted(set(first) | set(layers)):
                if first.get(name) != layers.get(name):
                    return OprojError(
                        "OPROJ012",
                        f"layer {name} is [{layers.get(name, 'absent')}] on rank {rank} but "
                        f"[{first.get(name, 'absent')}] on rank {first_rank}: start every rank "
                        "with the same model, quantization and versions.",
                    )
        return None

    return verdict


def _named(host: str | None) -> str:
    return f" (host {host})" if host else ""


def _join(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
