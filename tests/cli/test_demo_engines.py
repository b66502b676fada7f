"""The harness itself: what it starts always ends, and failures carry their reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oproj_patch.cli import engines

pytestmark = pytest.mark.skipif(
    not Path("/proc").is_dir(), reason="looks for leftover processes in /proc"
)

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


def process(log: Path, then: str, deadline: float = 60) -> engines._Process:
    return engines._Process(
        [sys.executable, "-c", LINGER.format(then=then)], env=os.environ, log=log, deadline=deadline
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
    with engines._Process(command, env=os.environ, log=log, deadline=60):
        assert wait_for(lambda: "child" in log.read_text())
        memory = Path("/dev/shm") / log.read_text().split()[1]
        assert memory.exists()
    assert not memory.exists()


def test_children_end_with_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(log, "sys.exit(3)") as running:
        child = child_of(log)
        assert wait_for(running.ended)
        assert running._guard.returncode == 3
        assert not alive(child)


def test_the_deadline_ends_everything(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(log, "time.sleep(600)", deadline=3) as running:
        child = child_of(log)
        assert wait_for(running.ended)
        assert not alive(child)


def test_everything_ends_when_the_caller_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    caller = (
        "import sys, time, os\n"
        "from pathlib import Path\n"
        "from oproj_patch.cli import engines\n"
        f"code = {LINGER.format(then='time.sleep(600)')!r}\n"
        f"log = Path({str(log)!r})\n"
        "command = [sys.executable, '-c', code]\n"
        "engines._Process(command, env=os.environ, log=log, deadline=600)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", caller]) as running:
        try:
            child = child_of(log)
        finally:
            running.send_signal(signal.SIGKILL)
    assert wait_for(lambda: not alive(child))


def test_a_failing_rank_is_reported_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    config = engines.EngineConfig(tmp_path / "no-such-model", dp=1)
    with pytest.raises(engines.EngineError, match="rank 0 of 1 ended without a result") as caught:
        engines.run_offline(config, [engines.Round([["x"]], [1])], deadline=120)
    assert "no-such-model" in str(caught.value)
    assert "Traceback" in caught.value.logs[0]


def test_a_round_needs_an_entry_for_every_rank(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each of the 2 ranks"):
        engines.run_offline(engines.EngineConfig(tmp_path), [engines.Round([["x"]], [1, 1])])


def test_ports_are_free_and_neighbouring() -> None:
    import socket

    first = engines._free_port(run=10)
    for port in range(first, first + 10):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_engines_do_not_inherit_our_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPROJ_TENSOR_PARALLEL_SIZE", "8")
    monkeypatch.setenv("VLLM_DP_RANK", "5")
    env = engines._environment(engines.EngineConfig(tmp_path, env={"A": "1"}), tmp_path)
    assert env["A"] == "1"
    assert not {"OPROJ_TENSOR_PARALLEL_SIZE", "VLLM_DP_RANK"} & set(env)
