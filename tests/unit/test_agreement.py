"""The agreement of ranks over a store: one verdict on every rank, whoever judges first."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from oproj_patch.errors import OprojError, OprojValueError
from oproj_patch.sharding import agreement


def agreed(layers: list[dict[str, str] | None], seconds: float = 20) -> list[tuple[type, str]]:
    """Return type and text of what each rank raised; None of `layers` is a rank that is absent."""
    store = torch.distributed.HashStore()

    def one(rank: int) -> tuple[type, str]:
        record = {"layers": json.dumps(layers[rank])}
        try:
            agreement.agree(
                store, "key", rank, range(len(layers)), record, seconds, agreement.same_layers
            )
        except OprojError as error:
            return type(error), str(error)
        return type(None), ""

    present = [rank for rank, own in enumerate(layers) if own is not None]
    with ThreadPoolExecutor(len(present)) as ranks:
        return list(ranks.map(one, present))


def test_all_go_on() -> None:
    assert agreed([{"a": "[2, 3]"}] * 4) == [(type(None), "")] * 4


def test_all_raise_the_same_sentence() -> None:
    told = agreed([{"a": "[2, 3]"}, {"a": "[2, 3]"}, {"a": "[2, 4]"}])
    sentence = (
        "OPROJ012: layer a is [[2, 4]] on rank 2 but [[2, 3]] on rank 0: start every rank with "
        "the same model, options, quantization and versions."
    )
    assert told == [(OprojError, sentence)] * 3


def test_a_rank_that_is_absent_is_named_by_the_others() -> None:
    told = agreed([{"a": "1"}, None, {"a": "1"}], seconds=0.5)
    sentence = (
        "OPROJ012: layer a is [absent] on rank 1 but [1] on rank 0: start every rank with "
        "the same model, options, quantization and versions."
    )
    assert told == [(OprojError, sentence)] * 2


def test_a_verdict_that_is_there_ends_the_wait() -> None:
    store: Any = torch.distributed.HashStore()
    store.set("key/verdict", json.dumps(["OPROJ003", "no."]))
    store.set("key/heard/1", "1")  # else this rank would keep the store for the other one
    with pytest.raises(OprojError, match=r"^OPROJ003: no\.$"):
        agreement.agree(store, "key", 0, [0, 1], {"layers": "{}"}, 3600, lambda _: None)


def test_a_refusal_ends_all_at_once() -> None:
    """The rank that refuses raises its own error, the others its sentence and its rank."""
    store = torch.distributed.HashStore()
    refusal = OprojValueError("OPROJ003", "size 3 does not fit.")
    ended: list[int] = []

    def one(rank: int) -> OprojError:
        try:
            agreement.agree(
                store, "key", rank, range(3), {"size": "3"}, 3600, lambda _: None,
                refusal if rank == 1 else None, lambda: ended.append(rank),
            )  # fmt: skip
        except OprojError as error:
            return error
        raise AssertionError("no rank may go on")

    started = time.monotonic()
    with ThreadPoolExecutor(3) as ranks:
        told = list(ranks.map(one, range(3)))
    assert time.monotonic() - started < 4
    assert told[1] is refusal and ended == []
    sentence = f"rank 1 (node {socket.gethostname()}) cannot start: size 3 does not fit."
    for rank in (0, 2):
        assert (told[rank].code, told[rank].sentence) == ("OPROJ003", sentence)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_rank_that_is_unaware_is_ended(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 does not come; it would wait in vLLM's next group for the others, which end."""
    monkeypatch.setattr(agreement, "HEARD_SECONDS", 0.3)
    store = torch.distributed.HashStore()
    refusal = OprojValueError("OPROJ003", "size 3 does not fit.") if refuses else None
    ended: list[int] = []

    def one(rank: int) -> str:
        try:
            agreement.agree(
                store, "key", rank, range(3), {"size": "3"}, 0.3,
                lambda found: OprojError("OPROJ011", "2 is absent") if None in found.values()
                else None, refusal if rank == 1 else None, lambda: ended.append(rank),
            )  # fmt: skip
        except OprojError as error:
            return error.code
        raise AssertionError("no rank may go on")

    with ThreadPoolExecutor(2) as ranks:
        told = list(ranks.map(one, range(2)))
    assert told == ["OPROJ003" if refuses else "OPROJ011"] * 2
    assert 1 in ended


def test_settings_that_differ_are_named_with_their_ranks() -> None:
    node = {"node": "n"}
    records = {0: {"A": "1", **node}, 1: {"A": "2", **node}, 2: {"A": "1", **node}}
    error = agreement.same_settings({"A": "1"}, 60, records)
    assert error is not None and error.sentence == (
        "the ranks do not agree on A: rank 0, 2 (node n) has 1; rank 1 (node n) has 2; accepted "
        "is one value on every rank: make them equal and start again."
    )
    assert agreement.same_settings({"A": "1"}, 60, {0: records[0], 1: records[2]}) is None
