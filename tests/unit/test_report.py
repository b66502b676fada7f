"""The block of the log after a failure: one, complete, and only for what ranks find together."""

from __future__ import annotations

import logging

import pytest
import torch

from oproj_patch.errors import OprojError
from oproj_patch.sharding import report

ABSENT = OprojError("OPROJ013", "rank 1 did not arrive.")
PLACES = {
    0: {"where": "step 2 at o_proj", "rows": "3 of [3, 3, 3]", "node": "a", "layers": "{}"},
    1: None,
    2: {"where": "its first step", "rows": "", "node": "b", "layers": "{}"},
}


def test_block() -> None:
    told = report.block(ABSENT, PLACES, {"grid": "3x1", "the version of vllm": "0.32.0"})
    assert told.splitlines()[:-1] == [
        "OPROJ013: rank 1 did not arrive.",
        "what to put into a report:",
        "  rank 0 (node a): step 2 at o_proj, rows 3 of [3, 3, 3]",
        "  rank 1: no answer",
        "  rank 2 (node b): its first step",
        f"  all: grid 3x1; the version of vllm 0.32.0; torch {torch.__version__}",
    ]
    assert "TORCH_FR_BUFFER_SIZE=2000" in told and "py-spy dump" in told


def test_what_differs_stands_with_its_rank() -> None:
    records = {0: {"SIZE": "2", "GRID": "auto", "node": "a"}, 1: {"SIZE": "4", "GRID": "auto"}}
    told = report.block(OprojError("OPROJ011", "no."), records, {})
    assert "  rank 0 (node a): SIZE 2\n  rank 1: SIZE 4\n  all: GRID auto; torch" in told


@pytest.mark.parametrize(
    ("code", "rank", "logged"),
    [
        ("OPROJ013", 0, True),
        ("OPROJ013", 2, True),  # the first one on its node
        ("OPROJ013", 3, False),
        ("OPROJ003", 0, False),  # a refusal of one rank
    ],
)
def test_one_block_on_a_node(
    code: str, rank: int, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        report.log(OprojError(code, "no."), rank, PLACES | {3: PLACES[2]}, {})
    assert len(caplog.records) == int(logged)
