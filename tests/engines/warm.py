"""Engines without imports: their processes are forks of one process that has imported vLLM.

An engine of two ranks has six processes, and each takes ten seconds of CPU to import vLLM.

- `Zygote.start` is for `EngineConfig.start`: the programs that it starts are forks.
- `python -m tests.engines.warm run MODULE ...` is `python -m MODULE ...` after the imports.

What a program starts by the `spawn` method is forked too, from a process that has done nothing
but import. So it finds what a new interpreter would: the environment and the arguments of its
parent, no threads, no process group, no plugin loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import context, forkserver, resource_tracker, spawn
from pathlib import Path
from typing import Any

from demo import engines

from ..ranks import launch

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.deepseek_v2",
    "torch._dynamo",
)
_MESSAGE = 1 << 17
_SECONDS_TO_IMPORT = 300


@dataclass(frozen=True)
class Forked:
    """A process whose parent is the zygote: it runs as long as it holds the other end of `end`."""

    pid: int
    end: socket.socket

    def poll(self) -> int | None:
        """Return None while it runs, else 0: its exit code stays with the zygote."""
        return 0 if select.select([self.end], [], [], 0)[0] else None

    def wait(self) -> None:
        """Wait until it has ended."""
        self.end.recv(1)


class Zygote:
    """A process that has imported vLLM under an environment, and is forked for each program."""

    def __init__(self, python_path: tuple[Path, ...] = (), env: Mapping[str, str] | None = None):
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.settimeout(_SECONDS_TO_IMPORT)
        self._scratch = tempfile.TemporaryDirectory()
        config = engines.EngineConfig(Path(), python_path=python_path, env=env or {})
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, "serve", str(theirs.fileno())],
            env=engines.environment(config, Path(self._scratch.name)),
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def close(self) -> None:
        """End the process; the guards of its forks notice."""
        self._end.close()
        self._process.kill()
        self._process.wait()
        self._scratch.cleanup()

    def start(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, deadline: float | None
    ) -> Forked:
        """Start `python -m MODULE ...`, without a guard if `deadline` is None."""
        python, option, *words = command
        assert (python, option) == (sys.executable, "-m"), command
        ours, theirs = socket.socketpair()
        with theirs:
            message = pickle.dumps((words, dict(env), log, deadline))
            socket.send_fds(self._end, [message], [theirs.fileno()])
        answer = self._end.recv(_MESSAGE)
        assert answer, "the zygote has ended"
        return Forked(int(answer), ours)


@functools.cache
def zygote(*python_path: Path, **env: str) -> Zygote:
    """Return the session's zygote for engines with this search path and environment."""
    made = Zygote(python_path, env)
    atexit.register(made.close)
    return made


# -- in the zygote and its forks --------------------------------------------------------------


def _import() -> None:
    for name in MODULES:
        importlib.import_module(name)
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.model_executor.models import registry

    # A waiting process of vLLM spins for a second: more processes than cores starve each other.
    shm_broadcast.sched_yield = functools.partial(time.sleep, 0.001)
    launch.inspect_in_forks(registry)
    with contextlib.suppress(ImportError):
        # Its first call finds the memory of the title, which a fork with another environment loses.
        importlib.import_module("setproctitle").getproctitle()
    assert "oproj_patch" not in sys.modules
    assert threading.active_count() == 1
    gc.freeze()  # a collection in a fork would read, and copy, all that was imported


def _serve(end: socket.socket) -> None:
    """Fork programs until the other end is closed; return in those that run one."""
    _import()
    inherited = {str(ROOT), *os.environ["PYTHONPATH"].split(os.pathsep)}
    sys.path[:] = [entry for entry in sys.path if entry not in inherited]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries
    while True:
        message, descriptors, _, _ = socket.recv_fds(end, _MESSAGE, 1)
        if not message:
            os._exit(0)
        if not (pid := os.fork()):
            break
        os.close(descriptors[0])
        end.send(b"%d" % pid)
    end.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    words, env, log, deadline = pickle.loads(message)
    os.setsid()
    _adopt(env)
    os.chdir(log.parent)
    sys.path[:0] = [str(Path.cwd()), *env["PYTHONPATH"].split(os.pathsep)]
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    os.close(out)
    if deadline is not None:
        caller = os.getppid()
        if pid := os.fork():
            os._exit(engines.guard(caller, deadline, lambda: _exit_code(pid)))
        os.close(descriptors.pop())
    _run(words, *descriptors)


def _adopt(environ: Mapping[str, str]) -> None:
    """Take an environment; forget what modules read from another one when they were imported."""
    os.environ.clear()
    os.environ.update(environ)
    tempfile.tempdir = None
    values: Any = importlib.import_module("prometheus_client.values")
    values.ValueClass = values.get_value_class()


def _exit_code(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _run(words: Sequence[str], *own: int) -> None:
    """Be `python -m MODULE ...`; what it spawns are forks of this process as it is now.

    own: descriptors that those do not get.
    """
    prepare, preparation = spawn.prepare, spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**preparation(name), "environ": dict(os.environ)}

    def prepare_with_environment(data: Mapping[str, Any]) -> None:
        _adopt(data["environ"])
        prepare(data)

    spawn.get_preparation_data = get_preparation_data
    spawn.prepare = prepare_with_environment
    contexts: Any = context
    contexts._concrete_contexts["spawn"] = multiprocessing.get_context("forkserver")
    resource_tracker.ensure_running()
    server: Any = forkserver._forkserver
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    read_end, write_end = os.pipe()
    server._forkserver_address, server._forkserver_alive_fd = listener.getsockname(), write_end
    type(server).ensure_running = lambda self: None
    if not os.fork():
        for descriptor in (write_end, *own):
            os.close(descriptor)
        with contextlib.suppress(SystemExit):  # the way out when nobody is left to ask
            forkserver.main(listener.detach(), read_end, [])
        os._exit(0)
    listener.close()
    os.close(read_end)
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        _import()
        _run(sys.argv[2:])
