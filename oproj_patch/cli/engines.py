"""Start real vLLM engines with data parallelism on the CPU, use them, and leave nothing behind.

:func:`run_offline` starts one ``vllm.LLM`` script per data-parallel rank; :func:`serve` starts the
OpenAI-compatible server. The calling process imports the standard library only. Everything started
lives in sessions of its own under a small guard process that ends the whole session when the
deadline passes or the caller is gone: vLLM's engine processes do not end with their parent.

The settings are those under which vLLM's CPU backend is exact enough for equal tokens to mean
something: float32, no prefix cache and, in eager mode, no C++ custom operators (the rotary one is
wrong for multi-head latent attention).

Run as a script this file is also the guard (``guard``) and one rank (``rank``). It is run by file
name, so that a worker gets ``oproj_patch`` through vLLM's plugin entry point and in no other way.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBE = "oproj_patch.cli.probe.WorkerProbe"

Progress = Callable[[str, float], None]
"""Called several times a second with what is going on and the seconds since the start."""


class EngineError(RuntimeError):
    """An engine failed, or was not done by its deadline. ``logs`` has one full log per process."""

    def __init__(self, message: str, logs: Sequence[str]) -> None:
        self.logs = list(logs)
        shown = "\n".join(_explain(log) for log in logs if log.strip())
        super().__init__(f"{message}\n{shown}" if shown else message)


@dataclass(frozen=True)
class EngineConfig:
    """What to start.

    ``dp`` and ``tp`` are vLLM's data- and tensor-parallel sizes. ``compiled`` keeps vLLM's default
    ``torch.compile``; otherwise eager. ``env`` is added to the environment of every process, from
    which all ``OPROJ_*`` variables of the caller are removed first. ``options`` are further
    keyword arguments of ``vllm.LLM`` (or, as flags, of the server). ``extension`` is vLLM's
    ``worker_extension_cls``, None for none; without it nothing is reported about workers.
    ``python_path`` is added to the module search path. ``cache_root`` keeps compiled graphs from
    one run to the next; None means a directory of this run's own.
    """

    model: Path
    dp: int = 2
    tp: int = 1
    compiled: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    extension: str | None = PROBE
    python_path: tuple[Path, ...] = ()
    cache_root: Path | None = None

    def engine_options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``vllm.LLM``."""
        options: dict[str, Any] = {
            "model": str(self.model),
            "dtype": "float32",
            "seed": 0,
            "tensor_parallel_size": self.tp,
            "max_model_len": 256,
            "max_num_batched_tokens": 512,
            "max_num_seqs": 32,
            "kv_cache_memory_bytes": 128 << 20,
            "enable_prefix_caching": False,
            "enforce_eager": not self.compiled,
        }
        if not self.compiled:
            options["compilation_config"] = {"custom_ops": ["none"]}
        if self.extension is not None:
            options["worker_extension_cls"] = self.extension
        return options | dict(self.options)


@dataclass(frozen=True)
class Round:
    """One call of ``generate`` on every rank.

    ``prompts[rank]`` are that rank's prompts, possibly none; ``max_tokens[rank]`` is how many
    tokens each of them gets. The ranks enter a round together and leave it together.
    """

    prompts: Sequence[Sequence[str]]
    max_tokens: Sequence[int]


@dataclass(frozen=True)
class Completion:
    """Greedy continuation of one prompt."""

    prompt: str
    token_ids: list[int]
    text: str


@dataclass(frozen=True)
class RankResult:
    """What one data-parallel rank returned.

    ``rounds[i]`` are its completions of round i, in the order of the prompts. ``workers`` are the
    probe's reports, one a tensor-parallel rank. Seconds are wall time.
    """

    rounds: list[list[Completion]]
    workers: list[dict[str, Any]]
    seconds_to_start: float
    seconds_to_generate: float


@dataclass(frozen=True)
class OfflineRun:
    """Results and full logs of all ranks, by data-parallel rank, and total seconds of wall time."""

    ranks: list[RankResult]
    logs: list[str]
    seconds: float

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The probe's reports of all workers of all ranks."""
        return [worker for rank in self.ranks for worker in rank.workers]


def run_offline(
    config: EngineConfig,
    rounds: Sequence[Round],
    *,
    deadline: float = 300.0,
    progress: Progress = lambda stage, seconds: None,
) -> OfflineRun:
    """Start ``config.dp`` ranks, run ``rounds`` on them, stop everything, return the results.

    Raises ``ValueError`` when a round does not have an entry for every rank and ``EngineError``
    when a rank fails or ``deadline`` (seconds) passes.
    """
    for entry in rounds:
        if len(entry.prompts) != config.dp or len(entry.max_tokens) != config.dp:
            raise ValueError(
                f"a round has prompts for {len(entry.prompts)} ranks and max_tokens for "
                f"{len(entry.max_tokens)}; give one entry to each of the {config.dp} ranks"
            )
    with _workspace() as work:
        spec = work / "spec.json"
        spec.write_text(
            json.dumps(
                {
                    "options": config.engine_options(),
                    "rounds": [
                        {
                            "prompts": [list(p) for p in r.prompts],
                            "max_tokens": list(r.max_tokens),
                        }
                        for r in rounds
                    ],
                }
            )
        )
        master = {
            "VLLM_DP_SIZE": str(config.dp),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            # vLLM takes this port and the ones after it, one for each of its DP groups.
            "VLLM_DP_MASTER_PORT": str(_free_port(run=10)),
        }
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(
                    _Process(
                        [sys.executable, str(_THIS), "rank", str(spec), str(rank)],
                        env=_environment(config, work)
                        | master
                        | {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)},
                        log=work / f"rank{rank}.log",
                        deadline=deadline + 30,  # in case this process cannot keep it
                    )
                )
                for rank in range(config.dp)
            ]
            _wait_for_ranks(work, processes, started, deadline, progress)
            seconds = time.monotonic() - started
        logs = [process.log_text() for process in processes]
        ranks = [_read_result(_result_path(work, rank)) for rank in range(config.dp)]
        return OfflineRun(ranks, logs, seconds)


def _wait_for_ranks(
    work: Path,
    processes: Sequence[_Process],
    started: float,
    deadline: float,
    progress: Progress,
) -> None:
    def fail(message: str) -> EngineError:
        # Let the other ranks say what they have to say before they are ended.
        _await(lambda: all(p.ended() for p in processes), seconds=10.0)
        return EngineError(message, [p.log_text() for p in processes])

    total = len(processes)
    while True:
        done = [_result_path(work, rank).exists() for rank in range(total)]
        if all(done):
            return
        ready = sum(_ready_path(work, rank).exists() for rank in range(total))
        elapsed = time.monotonic() - started
        if ready < total:
            progress(f"starting vLLM, {ready} of {total} ranks ready", elapsed)
        else:
            progress(f"generating, {sum(done)} of {total} ranks done", elapsed)
        for rank, process in enumerate(processes):
            if process.ended() and not _result_path(work, rank).exists():
                raise fail(f"data-parallel rank {rank} of {total} ended without a result")
        if elapsed > deadline:
            raise fail(f"{total - sum(done)} of {total} ranks were not done after {deadline:.0f} s")
        time.sleep(0.1)


def _read_result(path: Path) -> RankResult:
    data = json.loads(path.read_text())
    rounds = [[Completion(**completion) for completion in entry] for entry in data.pop("rounds")]
    return RankResult(rounds=rounds, **data)


@dataclass
class Server:
    """A running OpenAI-compatible server; its model is called ``demo``.

    ``base_url`` is like ``http://127.0.0.1:PORT``; ``seconds_to_start`` is wall time.
    """

    base_url: str
    seconds_to_start: float
    _config: EngineConfig
    _process: _Process
    _work: Path

    def log(self) -> str:
        """Return everything that all processes of the server have printed so far."""
        return self._process.log_text()

    def workers(self, timeout: float = 60.0) -> list[dict[str, Any]]:
        """Return the probe's reports, sorted by data- and tensor-parallel rank.

        Raises ``EngineError`` when some worker has not answered after ``timeout`` seconds.
        """
        directory = self._work / f"probe-{time.monotonic_ns()}"
        directory.mkdir()
        request = urllib.request.Request(
            f"{self.base_url}/collective_rpc",
            data=json.dumps({"method": "oproj_probe", "args": [str(directory)]}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            response.read()
        count = self._config.dp * self._config.tp
        if not _await(lambda: len(list(directory.glob("*.json"))) == count, seconds=timeout):
            raise EngineError(f"not all {count} workers answered the probe", [self.log()])
        reports = [json.loads(path.read_text()) for path in directory.glob("*.json")]
        return sorted(reports, key=lambda report: (report["dp_rank"], report["tp_rank"]))


@contextlib.contextmanager
def serve(
    config: EngineConfig,
    *,
    deadline: float = 300.0,
    lifetime: float = 900.0,
    progress: Progress = lambda stage, seconds: None,
) -> Iterator[Server]:
    """Start vLLM's OpenAI-compatible server, yield it when it is healthy, stop it.

    Raises ``EngineError`` when it ends early or is not healthy after ``deadline`` seconds. It is
    ended after ``lifetime`` seconds whatever happens.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = config.engine_options() | {
        "data_parallel_size": config.dp,
        "served_model_name": "demo",
        "host": "127.0.0.1",
        "port": port,
        "disable_uvicorn_access_log": True,
    }
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command += [f"--{flag}"] if value else ([f"--no-{flag}"] if _has_no(name) else [])
        else:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            command += [f"--{flag}", text]
    with _workspace() as work:
        # The development mode adds the RPC end point through which the probe is asked.
        env = {"VLLM_SERVER_DEV_MODE": "1"} if config.extension else {}
        env = _environment(config, work) | env
        started = time.monotonic()
        with _Process(command, env=env, log=work / "server.log", deadline=lifetime) as process:
            url = f"http://127.0.0.1:{port}"
            while not _healthy(url):
                elapsed = time.monotonic() - started
                progress("starting the server", elapsed)
                if process.ended():
                    raise EngineError(
                        "the server ended before it was healthy", [process.log_text()]
                    )
                if elapsed > deadline:
                    raise EngineError(
                        f"the server was not healthy after {deadline:.0f} s", [process.log_text()]
                    )
                time.sleep(0.2)
            yield Server(url, time.monotonic() - started, config, process, work)


def _has_no(name: str) -> bool:
    return not name.startswith("disable_")


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


_THIS = Path(__file__).resolve()


def _environment(config: EngineConfig, work: Path) -> dict[str, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPROJ_", "VLLM_DP_", "VLLM_CPU_"))
    }
    cache = config.cache_root or work / "cache"
    path = [str(p) for p in config.python_path]
    root = str(_THIS.parents[2])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        path.append(root)  # a source tree that is not installed, or not this one
    if env.get("PYTHONPATH"):
        path.append(env["PYTHONPATH"])
    env |= {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env | dict(config.env)


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix="oproj_patch-"))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _free_port(run: int = 1) -> int:
    """Return the first of ``run`` neighbouring free ports, below the range used for clients."""
    for _ in range(200):
        base = random.randrange(15000, 32000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + run):
                    sock = stack.enter_context(socket.socket())
                    sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise RuntimeError(f"no {run} neighbouring free TCP ports found on 127.0.0.1; free some")


def _await(condition: Callable[[], bool], *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


_NOISE = re.compile(r"^\s*$|\b(WARNING|INFO|DEBUG) \d\d-\d\d ")
_EXCEPTION = re.compile(r"\b[\w.]*(?:Error|Exception|Exit)\b: \S")


def _explain(log: str) -> str:
    """Return the lines of a log that say why it failed: exceptions, then the last lines."""
    lines = log.splitlines()
    causes = list(dict.fromkeys(line for line in lines if _EXCEPTION.search(line)))
    tail = [line for line in lines if not _NOISE.search(line)][-25:] or lines[-25:]
    return "\n".join([*causes[:10], "last lines:", *tail])


class _Process:
    """A command in a session of its own, with a guard, logging to a file. A context manager."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], log: Path, deadline: float
    ) -> None:
        self._log = log
        self._text = ""
        guarded = [
            # Isolated: the guard must not import what the environment asks Python to import.
            *(sys.executable, "-I", str(_THIS), "guard", str(os.getpid()), str(deadline)),
            *command,
        ]
        with open(log, "wb") as out:
            self._guard = subprocess.Popen(
                guarded,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                start_new_session=True,
            )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        _end_session(self._guard.pid)
        self._guard.wait()
        self._text = self.log_text()

    def ended(self) -> bool:
        """True once the command itself has ended (the guard then ends the rest)."""
        return self._guard.poll() is not None

    def log_text(self) -> str:
        with contextlib.suppress(OSError):
            self._text = self._log.read_text(errors="replace")
        return self._text


def _session_members(session: int) -> list[int]:
    """Return the processes of a session, where the system can say (Linux)."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; the session is the fourth field after.
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(int(entry.parent.name))
    return members


def _end_session(session: int, spare: int = -1) -> None:
    """Kill every process of ``session`` but ``spare``; repeat for those just being forked.

    Python's resource trackers end by themselves when the processes they watch are gone, after they
    have removed the shared memory of these; they are killed only when they take too long.
    """
    end = time.monotonic() + 3.0
    while members := [pid for pid in _session_members(session) if pid != spare]:
        late = time.monotonic() > end
        for pid in members:
            if late or not _is_resource_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end + 1:
            break
        time.sleep(0.02)
    if spare < 0 and not Path("/proc").is_dir():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _guard_main(caller: int, seconds: float, command: Sequence[str]) -> int:
    """Run ``command`` until it ends, ``seconds`` pass or ``caller`` is gone; end the session."""
    process = subprocess.Popen(command)
    end = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > end or os.getppid() != caller:
            break
        time.sleep(0.2)
    code = process.poll()
    _end_session(os.getpid(), spare=os.getpid())
    return 1 if code is None else code & 0xFF


def _ready_path(work: Path, rank: int) -> Path:
    return work / f"rank{rank}.ready"


def _result_path(work: Path, rank: int) -> Path:
    return work / f"rank{rank}.json"


def _rank_main(spec_path: Path, rank: int) -> None:
    """Be one data-parallel rank: build the engine, run the rounds, write the result, wait."""
    started = time.monotonic()
    from vllm import LLM, SamplingParams

    spec = json.loads(spec_path.read_text())
    work = spec_path.parent
    llm = LLM(**spec["options"])
    _ready_path(work, rank).touch()
    ready = time.monotonic()
    rounds = []
    for number, entry in enumerate(spec["rounds"]):
        prompts = entry["prompts"][rank]
        params = SamplingParams(
            temperature=0.0, max_tokens=entry["max_tokens"][rank], ignore_eos=True
        )
        if not prompts:
            _wake_idle_engine(llm, number)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        rounds.append(
            [
                {
                    "prompt": prompt,
                    "token_ids": list(output.outputs[0].token_ids),
                    "text": output.outputs[0].text,
                }
                for prompt, output in zip(prompts, outputs, strict=True)
            ]
        )
    generated = time.monotonic()
    probed = bool(spec["options"].get("worker_extension_cls"))
    result = {
        "rounds": rounds,
        "workers": llm.collective_rpc("oproj_probe") if probed else [],
        "seconds_to_start": ready - started,
        "seconds_to_generate": generated - ready,
    }
    path = _result_path(work, rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(path)
    # The other ranks may still need this one's engine; whoever started us ends us.
    time.sleep(3600)


def _wake_idle_engine(llm: Any, wave: int) -> None:
    """Make a rank without a request take part in a round.

    vLLM's offline client does nothing at all for an empty list, and the other ranks would wait in
    their first collective. A server's coordinator sends the engine this message instead.
    """
    from vllm.v1.engine import EngineCoreRequestType

    client = llm.llm_engine.engine_core
    client.engines_running = True
    client._send_input(EngineCoreRequestType.START_DP_WAVE, (wave, -1))


def _main(arguments: Sequence[str]) -> int:
    role, *rest = arguments
    if role == "guard":
        return _guard_main(int(rest[0]), float(rest[1]), rest[2:])
    # Not the directory of this file: its modules have names like any other program's.
    sys.path[:] = [p for p in sys.path if not p or Path(p).resolve() != _THIS.parent]
    _rank_main(Path(rest[0]), int(rest[1]))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
