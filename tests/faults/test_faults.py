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
from tests.warm import Warm

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
UNAWARE = rf"enforce fail at .*address\.cc|{GONE}"


@dataclass(frozen=True)
class Row:
    """One fault.

    says: by rank, a pattern its error must match; None for a rank that is killed or stuck; ANYHOW
        for one that must end, and not well.
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
CANNOT = rf"%s: rank %d \(host {HOST}\) cannot start: %s"
NOT_TESTED = CANNOT % ("OPROJ009", 1, "requested vllm 0.9.1 to 0.32.0, found 0.99.0")
NO_SYMBOL = CANNOT % ("OPROJ008", 1, r"vllm\.\S+DeepseekV2Attention.__init__ of .* cannot be found")
NOT_A_DIVISOR = CANNOT % ("OPROJ003", 2, f"{TOGGLE} is 3; accepted are")
NO_SIZE = CANNOT % ("OPROJ001", 2, f"{TOGGLE} is 'two'; accepted are")
VERSION = r"OPROJ011: the ranks do not agree on the version of %s: rank \d \(.*\) has .*; rank \d"
LAYERS = r"OPROJ012: layer model\.layers\.0\.self_attn\.o_proj is \[.*\] on rank 1 but \[.*\] on"
ORDER = (
    r"OPROJ013: rank %d is at exchange 2 of model\.layers\.%d\.self_attn\.o_proj while rank %d is "
    r"at exchange 2 of model\.layers\.%d\.self_attn\.o_proj"
)
TOLD = r"OPROJ013: at exchange 2 of .* have \[3, 3\] rows, but rank 1 was told \[4, 3\]"
ROWS = r"OPROJ014: o_proj got 5 rows on rank 1, but .* says \[3, 3\]"
ABSENT = (
    r"OPROJ013: rank 1 did not arrive within %s s, or has ended \(rank 0 was at exchange 2 of "
    r"model\.layers\.0\.self_attn\.o_proj: .*\): look for the error in the log of that rank"
)
ABSENT_OF_4 = r"OPROJ013: rank 1 did not arrive within 1800 s, or has ended \(rank 0 was at .*3 was"
NO_STORE = (
    r"OPROJ013: an exchange between the ranks \[0, 1\] failed \(.*[Tt]imed out.*\), and the "
    r"key-value store on rank 0 does not answer"
)

TABLE = {
    "variable missing on one rank": Row([UNSET % 1, UNAWARE], SECONDS + 2, rank_env=[ON, {}]),
    "variable missing on the rank with the store": Row(
        [UNAWARE, UNSET % 0], SECONDS + 2, rank_env=[{}, ON]
    ),
    "variable missing on one of four": Row(
        [UNSET % 3, UNSET % 3, UNSET % 3, UNAWARE], SECONDS + 2, rank_env=[ON, ON, ON, {}]
    ),
    "another size": Row([SIZES] * 4, 5, rank_env=[ON, ON, {TOGGLE: "4"}, ON]),
    "a size that one rank refuses": Row(
        [NOT_A_DIVISOR] * 4, 5, rank_env=[ON, ON, {TOGGLE: "3"}, ON]
    ),
    "a size that is no number on one rank": Row(
        [NO_SIZE] * 4, 5, rank_env=[ON, ON, {TOGGLE: "two"}, ON]
    ),
    "no number on one rank, missing on another": Row(
        [NO_SIZE] * 3 + [UNAWARE], SECONDS + 2, rank_env=[ON, ON, {TOGGLE: "two"}, {}]
    ),
    "another version of the package": Row([VERSION % "oproj_patch"] * 2, 5, "package"),
    "another version of vLLM": Row([VERSION % "vllm"] * 2, 5, "host"),
    "an untested release on one rank": Row([NOT_TESTED] * 2, 5, "untested"),
    "a patched symbol is missing on one rank": Row([NO_SYMBOL] * 2, 5, "symbol"),
    "other layers on one rank": Row([LAYERS] * 2, 5, "layers"),
    "layers in another order, debug": Row(
        [ORDER % (1, 1, 0, 0), ORDER % (0, 0, 1, 1)], 5, "order", env=DEBUG
    ),
    "row counts told wrongly, debug": Row([TOLD] * 2, 5, "told", env=DEBUG),
    # Without the debug mode gloo notices a longer message, and aborts.
    "row counts told wrongly": Row([ANYHOW, ANYHOW], 10, "told", timeout=SECONDS),
    "rows not as told": Row([ABSENT % 1800, ROWS], 10, "rows"),
    "a rank is killed before the hand-shake": Row([UNSET % 1, None], SECONDS + 2, "kill before"),
    "the rank with the store is killed before the hand-shake": Row(
        [None, STORE_GONE], 5, "kill before", odd=0
    ),
    "a rank is killed between two exchanges": Row([ABSENT % 1800, None], 10, "kill between"),
    "a rank is killed during an exchange": Row([ABSENT % 1800, None], 10, "kill during"),
    "one of four is killed during an exchange": Row(
        [ABSENT_OF_4, None, ABSENT_OF_4, ABSENT_OF_4], 10, "kill during", env={TOGGLE: "4"}
    ),
    "the rank with the store is killed during an exchange": Row(
        [None, STORE_GONE], 5, "kill during", odd=0
    ),
    "a rank is killed during an exchange, debug": Row(
        [ABSENT % SECONDS, None], 10, "kill during", env=DEBUG
    ),
    "a rank is stuck, debug": Row([ABSENT % SECONDS, None], SECONDS + 10, "stuck", env=DEBUG),
    "a rank is stuck": Row([ABSENT % SECONDS, None], SECONDS + 10, "stuck", timeout=SECONDS),
    "the rank with the store is stopped": Row(
        [None, NO_STORE], SECONDS + 17, "stop", odd=0, timeout=SECONDS
    ),
}


def ended(row: Row, warm: Warm) -> list[ranks.Outcome]:
    world = len(row.says)
    return warm.outcomes_of(
        world,
        "tests.faults.bodies:play",
        {"dp": world, "fault": row.fault, "odd": row.odd, "timeout": row.timeout},
        env={"OPROJ_PATCH_HANDSHAKE_SECONDS": str(SECONDS)}
        | (row.env if row.rank_env else ON | row.env),
        rank_env=row.rank_env or None,
        seconds=60,
        stop_at=[rank for rank, said in enumerate(row.says) if said is not None],
    )


@pytest.mark.parametrize("name", TABLE)
def test_fault(name: str, warm: Warm) -> None:
    row = TABLE[name]
    seconds = [0.0]
    for outcome, said in zip(ended(row, warm), row.says, strict=True):
        if said is None:
            continue
        if said == ANYHOW:
            assert outcome.error or outcome.result["text"], outcome.log[-3000:]
            assert "deadline" not in outcome.error
            seconds.append(outcome.seconds)
            continue
        assert outcome.error == "", f"rank {outcome.rank}: {outcome.error}\n{outcome.log[-3000:]}"
        result: dict[str, Any] = outcome.result
        print(f"rank {outcome.rank}: {result['text']}")
        assert re.search(said, result["text"]), (outcome.rank, result["text"])
        seconds.append(result["seconds"])
    print(f"{name}: {max(seconds):.1f} s")
    assert max(seconds) < row.within + SLACK


def test_every_fault_is_in_the_document() -> None:
    text = (ranks.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = text.partition("## Faults")[2].partition("| --- |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([^|]*) \|", table, re.M) == list(TABLE)


@pytest.mark.parametrize("debug", ["0", "1"])
def test_without_a_fault_all_ranks_finish(debug: str, warm: Warm) -> None:
    row = Row([""] * 4, 20, env={"OPROJ_PATCH_DEBUG": debug})
    for outcome in ended(row, warm):
        assert outcome.error == "", outcome.log[-3000:]
        assert outcome.result["text"] == "" and outcome.result["exchanges"] == 4
