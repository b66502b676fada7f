"""The fault table: real processes over gloo, one fault each, and how every rank ends.

Each row states what the ranks say and within how many seconds of their start all have ended.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests import ranks

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
SECONDS = 5
"""Deadline of the hand-shake, and vLLM's timeout for its groups where a row sets one."""
SLACK = 15
"""Allowed beyond a row's own time: on a busy machine of two cores most of it is start-up."""
ON = {TOGGLE: "2"}
DEBUG = {"OPROJ_PATCH_DEBUG": "1"}
HOST = re.escape(socket.gethostname())
GONE = r"Connection (closed|reset)|Failed to (recv|send)|likely closed|[Rr]ead error|Broken pipe"
ANYHOW = "anyhow"


@dataclass(frozen=True)
class Row:
    """One fault.

    says: by rank, a pattern its error must match; None for a rank that is killed; ANYHOW for
        one that must end, and not well.
    within: seconds from the creation of groups on a rank to its end, SLACK not counted.
    """

    says: Sequence[str | None]
    within: float
    fault: str = ""
    odd: int = 1
    env: dict[str, str] = field(default_factory=dict)
    rank_env: Sequence[dict[str, str]] = ()
    timeout: int = 0


UNSET = (
    rf"OPROJ011: rank %d \(host {HOST}\): {TOGGLE} is not set there, or .* \(no hand-shake within "
    rf"{SECONDS} s; the other ranks are on {HOST}\): set {TOGGLE}=2 for every process"
)
STORE_GONE = r"OPROJ011: the rank that holds the key-value store .* \(rank 0\) ended|" + GONE
SIZES = (
    rf"OPROJ011: the ranks do not agree on {TOGGLE}: rank 0, 1, 3 \(host {HOST}\) has 2; "
    rf"rank 2 \(host {HOST}\) has 4"
)
NOT_A_DIVISOR = rf"OPROJ003: rank 2 \(host {HOST}\) cannot start: {TOGGLE} is 3; accepted are"
VERSION = r"OPROJ011: the ranks do not agree on the version of %s: rank \d \(.*\) has .*; rank \d"
LAYERS = r"OPROJ012: layer model\.layers\.0\.self_attn\.o_proj is \[.*\] on rank 1 but \[.*\] on"
ORDER = (
    r"OPROJ013: rank %d is at exchange 2 of model\.layers\.%d\.self_attn\.o_proj while rank %d is "
    r"at exchange 2 of model\.layers\.%d\.self_attn\.o_proj"
)
TOLD = r"OPROJ013: at exchange 2 of .* have \[3, 3\] rows, but rank 1 was told \[4, 3\]"
ROWS = r"OPROJ014: o_proj got 5 rows on rank 1, but .* says \[3, 3\]"
ABSENT = rf"OPROJ013: rank 1 did not arrive within {SECONDS} s, or has ended \(rank 0 waits at"

TABLE = {
    "variable missing on one rank": Row([UNSET % 1, GONE], SECONDS + 5, rank_env=[ON, {}]),
    "variable missing on the rank with the store": Row(
        [GONE, UNSET % 0], SECONDS + 5, rank_env=[{}, ON]
    ),
    "variable missing on one of four": Row(
        [UNSET % 3, UNSET % 3, UNSET % 3, GONE], SECONDS + 10, rank_env=[ON, ON, ON, {}]
    ),
    "another size": Row([SIZES] * 4, 10, rank_env=[ON, ON, {TOGGLE: "4"}, ON]),
    "a size that one rank refuses": Row(
        [NOT_A_DIVISOR] * 4, 10, rank_env=[ON, ON, {TOGGLE: "3"}, ON]
    ),
    "another version of the package": Row([VERSION % "oproj_patch"] * 2, 5, "package"),
    "another version of vLLM": Row([VERSION % "vllm"] * 2, 5, "host"),
    "other layers on one rank": Row([LAYERS] * 2, 5, "layers"),
    "layers in another order, debug": Row(
        [ORDER % (1, 1, 0, 0), ORDER % (0, 0, 1, 1)], 5, "order", env=DEBUG
    ),
    "row counts told wrongly, debug": Row([TOLD] * 2, 5, "told", env=DEBUG),
    # Without the debug mode it is gloo that notices a message of another length.
    "row counts told wrongly": Row([ANYHOW, ANYHOW], 10, "told", timeout=SECONDS),
    "rows not as told": Row([GONE, ROWS], 5, "rows"),
    "a rank is killed before the hand-shake": Row(
        [UNSET % 1, None], 2 * SECONDS + 5, "kill before"
    ),
    "the rank with the store is killed before the hand-shake": Row(
        [None, STORE_GONE], 5, "kill before", odd=0
    ),
    "a rank is killed between two exchanges": Row([GONE, None], 5, "kill between"),
    "a rank is killed during an exchange": Row([GONE, None], 7, "kill during"),
    "a rank is killed during an exchange, debug": Row([ABSENT, None], 15, "kill during", env=DEBUG),
    "a rank is stuck, debug": Row([ABSENT, None], 2 * SECONDS + 5, "stuck", env=DEBUG),
    "a rank is stuck, the group's timeout": Row(
        [r"[Tt]imed out", None], SECONDS + 5, "stuck", timeout=SECONDS
    ),
}


def ended(row: Row) -> list[ranks.Outcome]:
    world = len(row.says)
    return ranks.outcomes_of(
        world,
        "tests.faults.bodies:play",
        {"dp": world, "fault": row.fault, "odd": row.odd, "timeout": row.timeout},
        env={"OPROJ_PATCH_HANDSHAKE_SECONDS": str(SECONDS)}
        | (row.env if row.rank_env else ON | row.env),
        rank_env=row.rank_env or None,
        seconds=75,
        stop_at=[rank for rank, said in enumerate(row.says) if said is not None],
    )


@pytest.mark.parametrize("name", TABLE)
def test_fault(name: str) -> None:
    row = TABLE[name]
    for outcome, said in zip(ended(row), row.says, strict=True):
        if said is None:
            continue
        if said == ANYHOW:
            assert outcome.error or outcome.result["text"], outcome.log[-3000:]
            assert "deadline" not in outcome.error
            continue
        assert outcome.error == "", f"rank {outcome.rank}: {outcome.error}\n{outcome.log[-3000:]}"
        result: dict[str, Any] = outcome.result
        print(f"rank {outcome.rank}: {result['seconds']:.1f} s {result['text'][:200]}")
        assert re.search(said, result["text"]), (outcome.rank, result["text"])
        assert result["seconds"] < row.within + SLACK, (outcome.rank, result["seconds"])


@pytest.mark.parametrize("debug", ["0", "1"])
def test_without_a_fault_all_ranks_finish(debug: str) -> None:
    row = Row([""] * 4, 20, env={"OPROJ_PATCH_DEBUG": debug})
    for outcome in ended(row):
        assert outcome.error == "", outcome.log[-3000:]
        assert outcome.result["text"] == "" and outcome.result["exchanges"] == 4
