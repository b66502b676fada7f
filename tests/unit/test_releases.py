"""Release numbers and the list of releases."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from oproj_patch import releases
from oproj_patch.releases import ASCEND_RELEASES, VLLM_RELEASES, in_range, parse
from tests.hosts.wheels import OLDEST_WRAPT
from tests.ranks.launch import ROOT


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("0.9.1", (0, 9, 1)),
        ("0.10.1.1", (0, 10, 1, 1)),
        ("0.11.0", (0, 11)),
        ("0.11", (0, 11)),
        ("v0.11.0rc1", (0, 11)),
        ("0.32.0+cpu", (0, 32)),
        ("0.11.0.post2", (0, 11)),
        ("0.13.1.dev12+g0123abc.cpu", (0, 13, 1)),
        (" 0.18.0 ", (0, 18)),
        ("0", (0,)),
    ],
)
def test_parse(version: str, numbers: tuple[int, ...]) -> None:
    assert parse(version) == numbers


def test_a_build_tells_commits_of_one_version_apart(tmp_path: Path) -> None:
    def build() -> str:
        found: str = runpy.run_path(str(package / "_version.py"))["build"]()
        return found

    package = tmp_path / "oproj_patch"
    shutil.copytree(ROOT / "oproj_patch", package)
    before = build()
    assert before.startswith("0.1.0+") and before == build()
    with open(package / "sharding" / "grid.py", "a") as file:
        file.write("# another commit\n")
    assert build().startswith("0.1.0+") and build() != before


@pytest.mark.parametrize("version", ["", "dev", "unknown", "+cpu", "rc1"])
def test_parse_refuses(version: str) -> None:
    with pytest.raises(ValueError, match="does not begin with a release number"):
        parse(version)


def test_releases_are_in_order_and_distinct() -> None:
    for listed in (VLLM_RELEASES, tuple(ASCEND_RELEASES)):
        numbers = [parse(release) for release in listed]
        assert numbers == sorted(numbers) and len(listed) == len(set(listed))
    assert len({*map(parse, VLLM_RELEASES)}) == len(VLLM_RELEASES) == 29
    assert set(ASCEND_RELEASES.values()) <= set(VLLM_RELEASES)


def test_range_has_both_ends() -> None:
    assert in_range("0.11.0rc1", "0.11.0", "0.11.0")
    assert in_range("0.10.1.1", "0.10.1", "0.10.2")
    assert not in_range("0.9.2", "0.10.0")
    assert not in_range("0.10.2", "0.9.1", "0.10.1.1")
    assert in_range("1.0", "0.9.1")
    assert in_range("0.9.1", "") and in_range("dev", "0.12.0") and not in_range("dev", "", "0.12.0")


def test_untested() -> None:
    assert releases.untested("0.32.0+cpu") == ""
    assert releases.untested("0.34.0") == "requested vllm 0.9.1 to 0.33.0, found 0.34.0"
    told = "requested vllm-ascend 0.9.1, 0.11.0, 0.13.0, 0.18.0, 0.23.0, 0.23.0.post1, 0.26.0rc1, "
    assert releases.untested("0.31.0", "0.31.0") == f"{told}0.30.0rc2, found 0.31.0"
    assert releases.untested("0.23.0+cpu", "0.23.0.post1") == ""
    assert releases.untested("0.23.0", "0.22.1").endswith(", 0.30.0rc2, found 0.22.1")
    told = "requested vllm 0.23.0 for vllm-ascend 0.23.0.post1, found vllm 0.22.1"
    assert releases.untested("0.22.1", "0.23.0.post1") == told
    assert releases.untested("dev") == "requested vllm 0.9.1 to 0.33.0, found dev"
    assert releases.untested("0.23.0", "unknown").endswith(", 0.30.0rc2, found unknown")


def test_oldest_wrapt_that_is_run_is_the_one_promised() -> None:
    promised = f'"wrapt>={OLDEST_WRAPT.removesuffix(".0")},<3"'
    assert promised in (ROOT / "setup.py").read_text(encoding="utf-8")
