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

Record = Mapping[str, str]

HEARD_SECONDS = 5.0


def agree(
    store: Any,
    key: str,
    rank: int,
    ranks: Sequence[int],
    record: Record,
    seconds: float,
    verdict: Callable[[Mapping[int, Record | None]], OprojError | None],
) -> None:
    """Publish `record` under `key`, wait for the records of `ranks`, and settle on one verdict.

    store: a torch.distributed store all of `ranks` reach; key: unique to this agreement.
    seconds: deadline for all records to arrive.
    verdict: records by rank (None: not arrived by then) -> the error to raise, or None.

    Every rank raises the same sentence: the first to judge writes its verdict to the store.
    """
    store.set(f"{key}/{rank}", json.dumps({**record, "host": socket.gethostname()}))
    records = _collect(store, key, ranks, seconds)
    error = verdict(records)
    mine = "ok" if error is None else f"{error.code}: {error.sentence}"
    settled = _text(store.compare_set(f"{key}/verdict", "", mine))
    if settled not in ("", "ok"):
        store.set(f"{key}/heard/{rank}", "1")
        # The store lives in one rank's process: let the others hear the verdict before it ends.
        heard = [other for other in ranks if records[other] is not None]
        _wait(store, [f"{key}/heard/{other}" for other in heard], HEARD_SECONDS)
        code, sentence = settled.split(": ", 1)
        raise OprojError(code, sentence)


def _collect(
    store: Any, key: str, ranks: Sequence[int], seconds: float
) -> dict[int, Record | None]:
    # A verdict that is already there means that nobody needs to wait any longer.
    missing = _wait(store, [f"{key}/{rank}" for rank in ranks], seconds, unless=f"{key}/verdict")
    return {
        rank: None if f"{key}/{rank}" in missing else json.loads(_text(store.get(f"{key}/{rank}")))
        for rank in ranks
    }


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


def same_settings(
    record: Record, toggle: str, seconds: float
) -> Callable[[Mapping[int, Record | None]], OprojError | None]:
    """Verdict of the first hand-shake: every rank is there with the settings of `record`."""

    def verdict(records: Mapping[int, Record | None]) -> OprojError | None:
        absent = [rank for rank, other in records.items() if other is None]
        if absent:
            present = sorted({other["host"] for other in records.values() if other is not None})
            return OprojError(
                "OPROJ011",
                f"rank {_join(absent)}: {toggle} is not set there, or oproj_patch is not "
                f"installed or not loaded there (no hand-shake within {seconds:g} s; the other "
                f"ranks are on {_join(present)}): set {toggle}={record['size']} for every process "
                "of the instance on every node.",
            )
        values = [other for other in records.values() if other is not None]
        for field in record:
            groups = {other[field] for other in values}
            if len(groups) > 1:
                told = "; ".join(
                    f"rank {_join([r for r, o in records.items() if o and o[field] == value])}"
                    f" (host {_join(sorted({o['host'] for o in values if o[field] == value}))})"
                    f" has {value or 'none'}"
                    for value in sorted(groups)
                )
                what = toggle if field == "size" else field
                return OprojError(
                    "OPROJ011",
                    f"the ranks do not agree on {what}: {told}; accepted is one value on every "
                    "rank: make them equal and start again.",
                )
        return None

    return verdict


def same_layers(
    names: Mapping[str, str],
) -> Callable[[Mapping[int, Record | None]], OprojError | None]:
    """Verdict after model construction: every rank of the group sharded the same layers.

    names: layer name -> its description (shapes, dtypes, quant method) on this rank.
    """

    def verdict(records: Mapping[int, Record | None]) -> OprojError | None:
        absent = [rank for rank, other in records.items() if other is None]
        if absent:
            return OprojError(
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


def _join(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
