"""The cache of overlays: built once, whole or not at all; children end with their deadline."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import wheels
from .wheels import Host

_BUILD = """
import pathlib, sys, time
from tests.hosts import wheels

def build(new):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    new.mkdir()
    (new / "first").write_text("1")
    time.sleep(0.5)
    (new / "last").write_text("2")

stored = wheels.stored("thing", build)
assert {path.name for path in stored.iterdir()} == {"first", "last"}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPROJ_TEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_processes_that_ask_at_once_build_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def child(_: int) -> int:
        command = [sys.executable, "-c", _BUILD, str(log)]
        return subprocess.run(command, cwd=wheels._REPOSITORY, timeout=60).returncode

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(child, range(4))) == [0] * 4
    assert log.read_text() == "built\n"
    assert child(0) == 0
    assert log.read_text() == "built\n"


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def build(new: Path) -> None:
        new.mkdir()
        (new / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        wheels.stored("thing", build)
    assert [path.name for path in cache.iterdir()] == [".thing.lock"]


@pytest.mark.parametrize(
    ("requires", "load"),
    [
        ("numpy", True),
        (f"torch=={wheels.torch_version()}+cpu", True),
        (f"torch=={wheels.torch_version()}.*", True),
        ("torch==2.6.0+cpu", False),
        ("torch-npu==2.5.1.post1", False),
    ],
)
def test_libraries_are_kept_when_they_can_load(requires: str, load: bool) -> None:
    assert wheels._libraries_load(f"Name: x\nRequires-Dist: {requires}\n") is load


def test_a_child_and_its_children_end_at_the_deadline(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('started', flush=True)\n"
        "time.sleep(300)\n"
    )
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        wheels.run(Host("vllm", wheels.INSTALLED), ["-c", code], timeout=5)
    assert time.monotonic() - started < 30
    assert raised.value.output == "started\n"
    for pid in map(int, pids.read_text().split()):
        assert not _runs(pid)


def _runs(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_environment_keeps_the_callers_path_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    path = wheels.environment(Host("vllm", wheels.INSTALLED))["PYTHONPATH"].split(os.pathsep)
    assert path[-1] == "/somewhere"
