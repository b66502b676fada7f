"""`benchmarks/links.py` without links: what it accepts, computes and complains about."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import links

ROOT = Path(__file__).resolve().parents[2]
LAYOUT, BUILTIN, GRID, INT8 = (
    links.Contender("rows", "8x1", "off"),
    links.Contender("builtin"),
    links.Contender("grid", "4x2", "off"),
    links.Contender("grid", "4x2", "int8"),
)


@pytest.mark.parametrize(
    ("rate", "expected"), [("200mbit", 25e6), ("1.5gbit", 187.5e6), ("8kbit", 1e3)]
)
def test_rates_are_read_as_tc_does(rate: str, expected: float) -> None:
    assert links.bytes_per_second(rate) == expected


@pytest.mark.parametrize("rate", ["200", "0mbit", "-1mbit", "200mbps", "200Mbit", "mbit", ""])
def test_other_rates_are_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        links.main([f"--rate={rate}"])
    assert caught.value.code == 2
    assert f"{rate!r} found, a number above 0 with one of kbit, mbit, gbit" in (
        capsys.readouterr().err
    )


def test_every_grid_takes_turns_with_the_rows_layout() -> None:
    first = ["rows 8x1 off", "builtin"]
    wide = ["grid 4x2 off", "grid 2x4 off", "grid 1x8 off"]
    narrow = ["grid 8x1 int8", "grid 4x2 int8", "grid 2x4 int8", "grid 1x8 int8"]
    without = [*first, "rows of int8 8x1 off", *wide, *narrow]
    assert list(map(str, links.contenders(8, gemm=False))) == without
    assert list(map(str, links.contenders(8, gemm=True))) == [*first, *wide, "sequential 8x1 off"]


def test_bytes_of_a_row() -> None:
    """By hand, for K = 8192 and 3584 outputs: to each of 7 others a chunk out, a slice back."""
    expected = {
        LAYOUT: 7 * 2 * (1024 + 3584),
        BUILTIN: 7 * 2 * (1024 + 3584),
        GRID: 7 * 2 * (2048 + 1792),
        INT8: 7 * (2048 + 2 * 1792),
    }
    assert {one: links.formula(one, 8, 8192, 3584, "bfloat16") for one in expected} == expected
    chosen = [one for one in expected if links.chosen_by_auto(one, 8, 8192, 3584)]
    assert chosen == [GRID, INT8]


def told(**seconds: list[float]) -> dict[str, Any]:
    """What one rank tells of 24 rows."""
    sent = {"rows 8x1 off": 1_548_288, "grid 4x2 off": 1_290_240}
    times = {"rows 8x1 off": seconds["rows"], "grid 4x2 off": seconds["grid"]}
    return {"rows": [{"sent": sent, "seconds": times, "gemm": {}}]}


@pytest.fixture
def results() -> list[dict[str, Any]]:
    ranks = [
        told(rows=[0.1, 0.2, 0.1], grid=[0.05, 0.08, 0.05]),
        told(rows=[0.1, 0.1, 0.2], grid=[0.04, 0.1, 0.09]),
    ]
    args = argparse.Namespace(
        rows=[24], ranks=8, columns=8192, hidden=3584, dtype="bfloat16", rate="200mbit"
    )
    return links.summarise(ranks, [LAYOUT, GRID], args)


def test_a_result_is_of_the_slowest_rank_and_beside_the_rows_layout(
    results: list[dict[str, Any]],
) -> None:
    layout, grid = results
    assert (layout["contender"], layout["grid"], layout["wire"]) == ("rows", "8x1", "off")
    assert [r["rows"] for r in results] == [24, 24]
    assert [r["dtype"] for r in results] == ["bfloat16", "bfloat16"]
    assert (layout["seconds"], grid["seconds"]) == (0.2, 0.09)  # of 0.1 0.2 0.2; 0.05 0.1 0.09
    assert (layout["to_rows"], grid["to_rows"]) == (1.0, 0.5)  # of 0.5, 0.5 and 0.45
    assert [r["bytes_sent"] for r in results] == [1_548_288, 1_290_240]
    assert [r["formula_bytes"] for r in results] == [1_548_288, 1_290_240]
    assert grid["bound_seconds"] == 1_290_240 / 25e6
    assert [r["auto"] for r in results] == [False, True]


def test_the_table_is_of_an_earlier_run_and_bytes_that_differ_fail(
    results: list[dict[str, Any]], tmp_path: Path
) -> None:
    saved = tmp_path / "links.json"
    saved.write_text(json.dumps({"results": results}))
    done = command(f"--saved={saved}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "| contender | bytes a row | ms at 24 | bound / time at 24 |",
        "| --- | --- | --- | --- |",
        "| rows 8x1 off | 64,512 (1.00) | 200.0 (1.00) | 0.31 |",
        "| grid 4x2 off | 53,760 (0.83) | 90.0 (0.50) | 0.57 |",
    ]
    results[1]["bytes_sent"] += 2
    saved.write_text(json.dumps({"results": results}))
    done = command(f"--saved={saved}")
    assert done.returncode == 1
    assert done.stderr == "24 rows, 4x2 off: 1290242 bytes counted, 1290240 computed.\n"


def test_without_the_tools_it_says_so_in_one_sentence() -> None:
    done = command("--ranks=2", PATH="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        "links.py needs Linux, root, ip and tc: ip and tc of iproute2 is not installed."
    )


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/links.py"), *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
