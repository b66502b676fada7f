"""Start ranks: real processes, each with a deadline, which end with whoever started them.

    results = launch.run(2, function, argument, env={...})

`function` belongs to a module, usually the test's own: a rank imports that module and calls the
function with the same arguments. Results come back by rank, pickled.

- `run`, `outcomes_of`: start the ranks for one call. A start costs nothing, because the ranks are
  forks of one process that has imported vLLM; with `fresh=True` they are new interpreters.
- `World`: ranks that stay for many calls. A call that fails ends them, and the next starts others.
- `Server`: a process to fork ranks from, in another environment than this one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import wrapt

ROOT = Path(__file__).resolve().parents[2]
SIZE = "OPROJ_TENSOR_PARALLEL_SIZE"
IMPORTED = (
    "pytest",
    "vllm.distributed",
    "vllm.engine.arg_utils",
    "vllm.model_executor.model_loader.base_loader",
    "vllm.model_executor.models.deepseek_v2",
    "torch._dynamo",
)
SECONDS_TO_IMPORT = 180
_MESSAGE = 1 << 17
_PR_SET_PDEATHSIG = 1

Env = Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: its result, or the text of the exception that it raised.

    log: what the rank printed; seconds: from the call to its end.
    """

    rank: int
    result: Any = None
    error: str = ""
    log: str = ""
    seconds: float = 0.0


class RankFailed(AssertionError):
    """A rank raised, died or outlived the deadline."""


def run(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    seconds: float = 120,
    env: Env | None = None,
    fresh: bool = False,
    server: Server | None = None,
) -> list[Any]:
    """Call `function(*args)` on `world` ranks; return the results by rank.

    Raises:
        RankFailed: a rank did not return. The others have ten seconds to end then.
    """
    outcomes = outcomes_of(
        world, function, *args, seconds=seconds, env=env, fresh=fresh, server=server, grace=10
    )
    return results(outcomes)


def outcomes_of(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    seconds: float = 120,
    env: Env | None = None,
    rank_env: Sequence[Env] | None = None,
    fresh: bool = False,
    server: Server | None = None,
    stop_at: Sequence[int] | None = None,
    grace: float | None = None,
) -> list[Outcome]:
    """Call `function(*args)` on `world` ranks; return how every rank ended.

    stop_at: ranks whose end is waited for (default: all); the others are killed then.
    grace: seconds that the others have to end when one has failed; None: until the deadline.
    """
    with _started(world, env, rank_env, fresh, server) as ranks:
        return ranks.call(function, args, seconds, stop_at=stop_at, grace=grace, last=True)


def results(outcomes: Sequence[Outcome]) -> list[Any]:
    """Return the results by rank.

    Raises:
        RankFailed: with the error and the log of the rank that failed first.
    """
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        first = min(failed, key=lambda outcome: ("deadline" in outcome.error, outcome.seconds))
        raise RankFailed(f"rank {first.rank}: {first.error}\n{first.log[-6000:]}")
    return [outcome.result for outcome in outcomes]


class World:
    """Ranks that stay for many calls; a context manager.

    What a rank keeps between calls (process groups) are globals of its modules.
    """

    def __init__(self, size: int, env: Env | None = None) -> None:
        self.size = size
        self.env = env
        self._stack = contextlib.ExitStack()
        self._ranks: _Ranks | None = None

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
        """Call `function(*args)` on every rank; return the results by rank.

        Raises:
            RankFailed: a rank did not return; all of them are killed.
        """
        if self._ranks is None:
            self._ranks = self._stack.enter_context(_started(self.size, self.env))
        outcomes = self._ranks.call(function, args, seconds, grace=5)
        if any(outcome.error for outcome in outcomes):
            self.close()
        return results(outcomes)

    def close(self) -> None:
        """End the ranks."""
        self._ranks = None
        self._stack.close()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """A process that has imported modules and is forked for each rank; a context manager.

    env: its environment beside this process's; imported: modules, left out where absent.
    """

    def __init__(self, env: Env | None = None, imported: Sequence[str] = IMPORTED) -> None:
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.settimeout(SECONDS_TO_IMPORT)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, "server", str(theirs.fileno()), *imported],
            env=_environment(env),
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and every rank of it."""
        self._end.close()
        self._process.kill()
        self._process.wait()

    def wait(self) -> None:
        """Wait until everything is imported."""
        self._end.send(pickle.dumps(("wait",)))
        self._answer()

    def fork(self, env: Env, log: Path, end: int) -> _Forked:
        """Start a rank which talks through the descriptor `end`."""
        request = pickle.dumps(("fork", dict(env), str(log)))
        socket.send_fds(self._end, [request], [end])
        return _Forked(self, self._answer())

    def end(self, pid: int) -> int:
        """Kill a rank and what it started; return its exit code."""
        self._end.send(pickle.dumps(("end", pid)))
        return self._answer()

    def _answer(self) -> int:
        try:
            answer = self._end.recv(_MESSAGE)
        except TimeoutError:
            answer = b""
        if not answer:
            raise RankFailed("the process to fork ranks from has ended or does not answer")
        return int(answer)


@dataclass(frozen=True)
class _Forked:
    server: Server
    pid: int

    def end(self) -> int:
        return self.server.end(self.pid)


class _Fresh:
    """A new interpreter as a rank."""

    def __init__(self, env: Env, log: Path, end: int) -> None:
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, "rank", str(end), str(os.getpid())],
                env=env,
                cwd=ROOT,
                pass_fds=[end],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self) -> int:
        _kill_session(self.process.pid)
        return self.process.wait()


class _Ranks:
    """Processes that wait for calls."""

    def __init__(self, logs: Sequence[Path]) -> None:
        self.logs = logs
        self.processes: list[_Forked | _Fresh] = []
        self.ends: list[Connection] = []
        self.codes: list[int] = []

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        seconds: float,
        *,
        stop_at: Sequence[int] | None = None,
        grace: float | None = None,
        last: bool = False,
    ) -> list[Outcome]:
        """See `outcomes_of`; last: the ranks exit after it."""
        started = time.monotonic()
        deadline = started + seconds
        message = pickle.dumps((last, pickle.dumps((function, args))))
        for end in self.ends:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                end.send_bytes(message)
        waiting = {end: rank for rank, end in enumerate(self.ends)}
        awaited = set(waiting.values() if stop_at is None else stop_at)
        told: dict[int, Outcome] = {}
        while awaited - told.keys() and (left := deadline - time.monotonic()) > 0:
            for ready in connection.wait(list(waiting), left):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                outcome = Outcome(rank, seconds=time.monotonic() - started)
                try:
                    told[rank] = replace(outcome, **pickle.loads(ready.recv_bytes()))
                except (EOFError, ConnectionResetError):
                    told[rank] = replace(outcome, error="died")
                if told[rank].error and grace is not None:
                    deadline = min(deadline, time.monotonic() + grace)
        if last or waiting or any(outcome.error for outcome in told.values()):
            self.end()
        now = time.monotonic() - started
        late = Outcome(0, error="outlived its deadline", seconds=now)
        return [
            self._finished(told.get(rank) or replace(late, rank=rank))
            for rank in range(len(self.ends))
        ]

    def _finished(self, outcome: Outcome) -> Outcome:
        error = outcome.error
        if error == "died":
            error = f"died with code {self.codes[outcome.rank]}"
        log = self.logs[outcome.rank].read_text(errors="replace") if error else ""
        return replace(outcome, error=error, log=log)

    def end(self) -> None:
        if not self.codes:
            self.codes = [process.end() for process in self.processes]


@contextlib.contextmanager
def _started(
    world: int,
    env: Env | None = None,
    rank_env: Sequence[Env] | None = None,
    fresh: bool = False,
    server: Server | None = None,
) -> Iterator[_Ranks]:
    """Start `world` ranks; they have ended afterwards."""
    forking = None if fresh else server or _server()
    if forking:
        forking.wait()  # so that the port is still free when the ranks begin
    shared = {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), **(env or {})}
    with tempfile.TemporaryDirectory() as scratch:
        ranks = _Ranks([Path(scratch, f"{rank}.log") for rank in range(world)])
        try:
            for rank, log in enumerate(ranks.logs):
                numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                full = _environment(shared | numbers | dict(rank_env[rank] if rank_env else {}))
                mine, theirs = connection.Pipe()
                with theirs:
                    ranks.ends.append(mine)
                    start = forking.fork if forking else _Fresh
                    ranks.processes.append(start(full, log, theirs.fileno()))
            yield ranks
        finally:
            ranks.end()
            for end in ranks.ends:
                end.close()


def free_port() -> int:
    """Return a TCP port that nobody listens on; none that the system gives to a client."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _environment(env: Env | None) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OPROJ_") or name.startswith("OPROJ_TEST_")
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    kept.pop("VLLM_PLUGINS", None)
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    own["HF_HUB_OFFLINE"] = "1"
    return kept | own | {"PYTHONPATH": path} | dict(env or {})


@functools.cache
def _server() -> Server:
    """The process that the ranks of this session are forked from."""
    server = Server()
    atexit.register(server.close)
    return server


def _kill_session(pid: int) -> None:
    for kill in (os.kill, os.killpg):  # a rank that has just been forked has no session yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


# -- in the processes -------------------------------------------------------------------------


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when `parent` has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(end: socket.socket, imported: Sequence[str]) -> None:
    """Fork ranks until the other end is closed."""
    for name in imported:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    pid = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(end, _MESSAGE, 1)
        if not message:
            os._exit(0)  # vLLM's own way out takes seconds
        kind, *given = pickle.loads(message)
        if kind == "wait":
            end.send(b"0")
            continue
        if kind == "end":
            _kill_session(given[0])
            end.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(given[0], 0)[1]))
            continue
        child = os.fork()
        if not child:
            end.close()
            os.setsid()
            env, log = given
            os.environ.clear()
            os.environ.update(env)
            out = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
            for descriptor in (1, 2):
                os.dup2(out, descriptor)
            _answer_calls(descriptors[0], pid)
        os.close(descriptors[0])
        end.send(b"%d" % child)


def _answer_calls(descriptor: int, parent: int) -> None:
    """Be a rank: answer calls until the other end is closed; does not return."""
    code = 1
    try:
        _end_with(parent)
        wrapt.register_post_import_hook(inspect_in_forks, "vllm.model_executor.models.registry")
        end = Connection(descriptor)
        last = False
        while not last:
            last, call = pickle.loads(end.recv_bytes())
            told = _told(call)
            sys.stdout.flush()
            sys.stderr.flush()
            end.send_bytes(told)
        code = 0
    except EOFError:
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def inspect_in_forks(registry: Any) -> None:
    """Let vLLM ask a model class in a fork of the rank instead of in a new interpreter.

    That would import vLLM anew for each architecture in each rank.
    """

    def in_fork(function: Callable[[], Any]) -> Any:
        start, end = os.pipe()
        pid = os.fork()
        if not pid:
            gc.disable()  # it would destroy process groups, and join threads that a fork lacks
            try:
                with open(end, "wb") as answer:
                    answer.write(pickle.dumps(function()))
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(0)
        os.close(end)
        with open(start, "rb") as answer:
            told = answer.read()
        os.waitpid(pid, 0)
        if not told:
            raise RuntimeError("vLLM cannot inspect the model class; see the traceback above")
        return pickle.loads(told)

    registry._run_in_subprocess = in_fork


def _told(call: bytes) -> bytes:
    try:
        function, args = pickle.loads(call)
        return pickle.dumps({"result": function(*args)})
    except BaseException as error:
        _print(error)
        return pickle.dumps({"error": f"{type(error).__name__}: {error}"})


def _print(error: BaseException) -> None:
    """Print the traceback, with the values of the function in which an assertion failed."""
    traceback.print_exception(error)
    innermost: TracebackType | None = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if isinstance(error, AssertionError) and innermost is not None:
        for name, value in innermost.tb_frame.f_locals.items():
            with contextlib.suppress(Exception):  # whatever the value's own text raises
                print(f"    {name} = {' '.join(str(value).split())[:100]}", file=sys.stderr)


def _main() -> None:
    what, descriptor, *rest = sys.argv[1:]
    if what == "server":
        _serve(socket.socket(fileno=int(descriptor)), rest)
    _answer_calls(int(descriptor), int(rest[0]))


if __name__ == "__main__":
    _main()
