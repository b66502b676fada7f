"""The agreement of ranks over a store: one verdict on every rank, whoever judges first."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from oproj_patch.sharding import agreement
from oproj_patch.errors import OprojError


def agreed(layers: list[dict[str, str] | None], seconds: float = 20) -> list[tuple[type, str]]:
    """Return type and text of what each rank raised; None of `layers` is a rank that is absent."""
    store = torch.distributed.HashStore()

    def one(rank: int) -> tuple[type, str]:
        record = {"layers": json.dumps(layers[rank])}
        try:
            handshake.agree(
                store, "key", rank, range(len(layers)), record, seconds, handshake.same_layers()
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
        "the same model, quantization and versions."
    )
    assert told == [(OprojError, sentence)] * 3


def test_a_rank_that_is_absent_is_named_by_the_others() -> None:
    told = agreed([{"a": "1"}, None, {"a": "1"}], seconds=0.5)
    sentence = (
        "OPROJ012: rank 1 did not reach its first forward pass in time: look for its error in the "
        "log of that rank."
    )
    assert told == [(handshake.RankAbsentError, sentence)] * 2


def test_a_verdict_that_is_there_ends_the_wait() -> None:
    store: Any = torch.distributed.HashStore()
    store.set("key/verdict", json.dumps(["OPROJ003", "no.", ""]))
    with pytest.raises(OprojError, match=r"^OPROJ003: no\.$"):
        handshake.agree(store, "key", 0, [0, 1], {"layers": "{}"}, 3600, lambda _: None)
