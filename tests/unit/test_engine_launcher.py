"""The launcher of engines: what it starts always ends, and its processes import the right code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from demo import engines

ROOT = Path(__file__).resolve().parents[2]

# A parent that ends or waits, with a child in the background that never ends by itself.
LINGER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
{then}
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def child_of(log: Path) -> int:
    assert wait_for(lambda: "child" in (log.read_text() if log.exists() else ""))
    return int(log.read_text().split()[1])


def process(log: Path, then: str, deadline: float = 60) -> AbstractContextManager[engines.Process]:
    return engines.process(
        [sys.executable, "-c", LINGER.format(then=then)], os.environ, log, deadline
    )


def test_leaving_ends_the_whole_session(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), process(log, "time.sleep(600)"):
        child = child_of(log)
        assert alive(child)
        raise KeyboardInterrupt
    assert not alive(child)


def test_no_shared_memory_is_left(tmp_path: Path) -> None:
    """A killed engine cannot remove its message queues; its resource tracker does."""
    log = tmp_path / "log"
    owner = (
        "import time; from multiprocessing.shared_memory import SharedMemory; "
        "print('child', SharedMemory(create=True, size=64).name, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", owner]
    with engines.process(command, os.environ, log, 60):
        assert wait_for(lambda: "child" in log.read_text())
        memory = Path("/dev/shm") / log.read_text().split()[1]
        assert memory.exists()
    assert not memory.exists()


def test_children_end_with_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(log, "sys.exit(3)") as running:
        child = child_of(log)
        assert wait_for(running.ended)
        assert running.guard.poll() == 3
        assert not alive(child)


def test_the_deadline_ends_everything(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(log, "time.sleep(600)", deadline=3) as running:
        child = child_of(log)
        assert wait_for(running.ended)
        assert not alive(child)


def test_everything_ends_when_the_caller_is_killed(tmp_path: Path) -> None:
    """Also the directory of the command is removed: nobody else is left to do so."""
    log = tmp_path / "scratch" / "log"
    log.parent.mkdir()
    caller = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from demo import engines\n"
        f"command = [sys.executable, '-c', {LINGER.format(then='time.sleep(600)')!r}]\n"
        f"with engines.process(command, os.environ, Path({str(log)!r}), 600):\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", caller], cwd=ROOT) as running:
        try:
            child = child_of(log)
        finally:
            running.send_signal(signal.SIGKILL)
    assert wait_for(lambda: not alive(child))
    assert wait_for(lambda: not log.parent.exists())


def test_ports_are_free_and_neighbouring() -> None:
    first = engines.free_port(run=10)
    for port in range(first, first + 10):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_engines_do_not_inherit_our_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPROJ_TENSOR_PARALLEL_SIZE", "8")
    monkeypatch.setenv("VLLM_DP_RANK", "5")
    env = engines.environment(engines.EngineConfig(tmp_path, env={"A": "1"}), tmp_path)
    assert env["A"] == "1"
    assert not {"OPROJ_TENSOR_PARALLEL_SIZE", "VLLM_DP_RANK"} & set(env)


@pytest.mark.parametrize("where", ["checkout", "beside it"])
def test_engines_import_the_callers_package(where: str, tmp_path: Path) -> None:
    """From the checkout, or another `oproj_patch` that the checkout must not hide."""
    package = ROOT / "oproj_patch"
    if where == "beside it":
        package = tmp_path / "site" / "oproj_patch"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(package.parent)!r}, {str(ROOT)!r}]\n"
        "from demo import engines\n"
        f"directory = Path({str(tmp_path)!r})\n"
        "print(json.dumps(engines.environment(engines.EngineConfig(directory), directory)))"
    )
    env = json.loads(python(code, {**os.environ, "PYTHONPATH": ""}, tmp_path))
    found = python(
        "from importlib.util import find_spec as find\n"
        "print(find('oproj_patch').origin, find('demo.probe').origin)",
        env,
        tmp_path,
    ).split()
    assert [Path(path).resolve() for path in found] == [
        package / "__init__.py",
        ROOT / "demo" / "probe.py",
    ]


def python(code: str, env: Mapping[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
