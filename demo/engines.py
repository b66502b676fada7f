"""Start real vLLM engines with data parallelism on a CPU, use them, and leave nothing behind.

`run_offline` starts one `vllm.LLM` program per data-parallel rank; `serve` starts the
OpenAI-compatible server. The caller imports the standard library only. Linux only.

The settings make equal tokens a proof: float32, no prefix cache and, in eager mode, no C++ custom
operators, because the rotary one is wrong for multi-head latent attention.
"""

from __future__ import annotations

import contextlib
import importlib.util
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
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

PROBE = "demo.probe.WorkerProbe"
_THIS = Path(__file__).resolve()


class EngineError(RuntimeError):
    """An engine failed or missed its deadline.

    `logs` has one full log per process; the message quotes their exceptions and last lines.
    """

    def __init__(self, message: str, logs: Sequence[str]) -> None:
        self.logs = list(logs)
        quoted = [message]
        for log in logs:
            lines = [line for line in log.splitlines() if line.strip()]
            raised = [line for line in lines if re.search(r"(Error|Exception|Exit)\b: \S", line)]
            last = [line for line in lines if not re.search(r"\b(INFO|WARNING|DEBUG) \d\d-", line)]
            quoted += [*dict.fromkeys(raised[:10]), "last lines:", *(last or lines)[-25:]]
        super().__init__("\n".join(quoted))


class Leader(Protocol):
    """The first process of a session; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int:
        """Its number, which is also the session's."""
        ...

    def poll(self) -> int | None:
        """Return None while it runs."""
        ...

    def wait(self) -> object:
        """Wait until it has ended."""
        ...


Start = Callable[[Sequence[str], Mapping[str, str], Path, float], Leader]
"""Starts a guarded command: its words, environment, log, and deadline in seconds."""


def new_interpreter(
    command: Sequence[str], env: Mapping[str, str], log: Path, deadline: float
) -> subprocess.Popen[bytes]:
    """Start `command` under a guard that is a new interpreter."""
    # Isolated, because the guard must not import what `env` asks Python to import.
    guard = [sys.executable, "-I", str(_THIS), "guard", str(os.getpid()), str(deadline)]
    with open(log, "wb") as out:
        return subprocess.Popen(
            [*guard, *command],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            start_new_session=True,
        )


@dataclass(frozen=True)
class EngineConfig:
    """What to start.

    `dp` and `tp` are vLLM's data- and tensor-parallel sizes. `compiled` keeps vLLM's default
    `torch.compile`; otherwise eager. No process inherits the caller's `OPROJ_*` variables; `env`
    is added to the environment of each. `options` are further keyword arguments of `vllm.LLM`,
    or flags of the server. `extension` is vLLM's `worker_extension_cls`; with None no worker
    reports. `python_path` precedes the module search path. `cache_root` keeps compiled graphs from
    one run to the next; None means a directory of this run's own. `start` starts the programs.
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
    start: Start = new_interpreter

    def engine_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `vllm.LLM`."""
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


def flags(options: Mapping[str, Any]) -> list[str]:
    """Return engine options as flags of vLLM's command line."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


@dataclass(frozen=True)
class Round:
    """One call of `generate` on every rank; the ranks enter and leave a round together.

    `prompts[rank]` are the rank's prompts, possibly none. Each gets `max_tokens[rank]` tokens.
    """

    prompts: Sequence[Sequence[str]]
    max_tokens: Sequence[int]


@dataclass(frozen=True)
class Completion:
    """The greedy continuation of one prompt."""

    prompt: str
    token_ids: list[int]
    text: str


@dataclass(frozen=True)
class OfflineRun:
    """What all ranks returned, by data-parallel rank.

    `completions[rank][i]` are those of round i, in the order of the prompts. `workers` are the
    probe's reports, `logs` has one full log per rank, `seconds` is wall time, start to end.
    """

    completions: list[list[list[Completion]]]
    workers: list[dict[str, Any]]
    logs: list[str]
    seconds: float


def run_offline(
    config: EngineConfig,
    rounds: Sequence[Round],
    *,
    deadline: float = 300.0,
    progress: Callable[[str], None] = lambda stage: None,
) -> OfflineRun:
    """Start `config.dp` ranks, run `rounds` on them, stop everything, return the results.

    `progress` receives the current stage several times a second. Raises `EngineError` when a rank
    fails or `deadline` (seconds) passes.
    """
    with _scratch() as scratch, contextlib.ExitStack() as stack:
        work = {"options": config.engine_options(), "rounds": [asdict(entry) for entry in rounds]}
        (scratch / "work.json").write_text(json.dumps(work))
        env = environment(config, scratch) | {
            "VLLM_DP_SIZE": str(config.dp),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            # vLLM takes this port and the next ones, one for each of its groups.
            "VLLM_DP_MASTER_PORT": str(free_port(run=10)),
        }
        started = time.monotonic()
        ranks = []
        for rank in range(config.dp):
            command = [sys.executable, "-m", "demo.engines", "rank", str(rank)]
            own = {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)}
            # The guard's deadline is for a caller that is stopped.
            log = scratch / f"rank{rank}.log"
            guarded = process(command, env | own, log, deadline + 30, config.start)
            ranks.append(stack.enter_context(guarded))
        problem = _wait_for_results(ranks, started + deadline, progress)
        seconds = time.monotonic() - started
        logs = [rank.log() for rank in ranks]
        if problem:
            raise EngineError(problem, logs)
        results = [json.loads(rank.log_path.with_suffix(".json").read_text()) for rank in ranks]
    return OfflineRun(
        [
            [[Completion(**each) for each in entry] for entry in result["completions"]]
            for result in results
        ],
        [worker for result in results for worker in result["workers"]],
        logs,
        seconds,
    )


def _wait_for_results(
    ranks: Sequence[Process], end: float, progress: Callable[[str], None]
) -> str | None:
    """Return None when every rank has written its result, or what went wrong."""
    total = len(ranks)
    while True:
        over = [rank.ended() for rank in ranks]
        done = [rank.log_path.with_suffix(".json").exists() for rank in ranks]
        if all(done):
            return None
        ready = sum(rank.log_path.with_suffix(".ready").exists() for rank in ranks)
        progress(f"vLLM ready on {ready} of {total} ranks, done on {sum(done)}")
        failed = [rank for rank in range(total) if over[rank] and not done[rank]]
        if failed or time.monotonic() > end:
            # The other ranks get time to log why they fail too.
            _wait_until(lambda: all(rank.ended() for rank in ranks), seconds=10)
            if failed:
                return f"data-parallel rank {failed[0]} of {total} ended without a result"
            return f"{total - sum(done)} of {total} ranks were not done by the deadline"
        time.sleep(0.1)


@dataclass(frozen=True)
class Server:
    """A running OpenAI-compatible server at `http://127.0.0.1:PORT`; its model is `demo`."""

    base_url: str
    process: Process
    _workers: int

    def log(self) -> str:
        """Return what all processes of the server have printed so far."""
        return self.process.log()

    def workers(self, timeout: float = 60.0) -> list[dict[str, Any]]:
        """Return the probe's reports, sorted by data- and tensor-parallel rank.

        Raises `EngineError` when a worker has not answered after `timeout` seconds.
        """
        directory = Path(tempfile.mkdtemp(dir=self.process.log_path.parent))
        request = urllib.request.Request(
            f"{self.base_url}/collective_rpc",
            data=json.dumps({"method": "oproj_probe", "args": [str(directory)]}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            response.read()
        if not _wait_until(lambda: len([*directory.glob("*.json")]) == self._workers, timeout):
            raise EngineError(f"not all {self._workers} workers answered the probe", [self.log()])
        reports = [json.loads(path.read_text()) for path in directory.iterdir()]
        return sorted(reports, key=lambda report: (report["dp_rank"], report["tp_rank"]))


@contextlib.contextmanager
def serve(config: EngineConfig, *, lifetime: float = 900.0) -> Iterator[Server]:
    """Start vLLM's OpenAI-compatible server, yield it when it is healthy, stop it.

    The server ends after `lifetime` seconds in any case. Raises `EngineError` when it ends early
    or is not healthy after 300 seconds.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = config.engine_options() | {
        "data_parallel_size": config.dp,
        "served_model_name": "demo",
        "host": "127.0.0.1",
        "port": port,
        "disable_uvicorn_access_log": True,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags(options)]
    with _scratch() as scratch:
        # The development mode adds the RPC end point through which the probe is asked.
        env = environment(config, scratch) | {"VLLM_SERVER_DEV_MODE": "1"}
        with process(command, env, scratch / "server.log", lifetime, config.start) as server:
            if not _wait_until(lambda: server.ended() or healthy(url), 300) or server.ended():
                raise EngineError("the server ended or did not get healthy", [server.log()])
            yield Server(url, server, config.dp * config.tp)


def healthy(url: str) -> bool:
    """Return whether the server at `url` says that it is healthy."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
        return bool(reply.status == 200)
    return False


def environment(config: EngineConfig, scratch: Path) -> dict[str, str]:
    """Return the environment of engines whose files all lie in `scratch`, an empty directory.

    Their processes import the caller's `oproj_patch`. Of a checkout that the caller does not
    import it from, they find `demo` only.
    """
    visible = scratch / "modules"
    visible.mkdir()
    (visible / "demo").symlink_to(_THIS.parent)
    path = [*map(str, config.python_path), str(visible)]
    package = importlib.util.find_spec("oproj_patch")
    root = str(Path(package.origin).parents[1]) if package and package.origin else ""
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        path.append(root)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPROJ_", "VLLM_DP_", "VLLM_CPU_"))
    }
    cache = config.cache_root or scratch / "cache"
    _share_model_infos(cache / "vllm")
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, [*path, kept.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **config.env,
    }


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/oproj_patch`, or `~/.cache/oproj_patch`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oproj_patch"


def _share_model_infos(cache: Path) -> None:
    """Let all runs share what vLLM asks a model class, because each rank starts Python to ask it.

    vLLM keeps the answers by a hash of the class's source.
    """
    shared = default_cache_dir() / "modelinfos"
    for directory in (shared, cache):
        directory.mkdir(parents=True, exist_ok=True)
    if not (cache / "modelinfos").exists():
        (cache / "modelinfos").symlink_to(shared)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="oproj_patch-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def free_port(run: int = 1) -> int:
    """Return the first of `run` neighboring free ports, below the range used for clients."""
    for _ in range(200):
        base = random.randrange(15000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + run):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return base
    raise RuntimeError(f"no {run} neighboring free TCP ports found on 127.0.0.1; free some")


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether `condition` came true within `seconds`."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return met


@dataclass(frozen=True)
class Process:
    """A command under its guard, which leads a session."""

    guard: Leader
    log_path: Path

    def ended(self) -> bool:
        """Return whether the command and all that it started have ended."""
        return self.guard.poll() is not None

    def log(self) -> str:
        """Return what the processes of the session have printed so far."""
        return self.log_path.read_text(errors="replace")


@contextlib.contextmanager
def process(
    command: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    deadline: float,
    start: Start = new_interpreter,
) -> Iterator[Process]:
    """Run `command` in the directory of `log`; end it and all that it started on leaving.

    A guard process ends them earlier when the command ends, when `deadline` (seconds) passes, or
    when the caller is gone; in the last case it also removes the directory. The kernel's signal at
    a parent's death reaches children only, and vLLM's engine cores are grandchildren.
    """
    leader = start(command, env, log, deadline)
    try:
        yield Process(leader, log)
    finally:
        end_session(leader.pid)
        leader.wait()


def guard(caller: int, seconds: float, poll: Callable[[], int | None]) -> int:
    """Guard a command of this session; return its exit code, 1 when it had to be ended.

    `caller` is this process's parent; `poll` returns None while the command runs.
    """
    end = time.monotonic() + seconds
    while (code := poll()) is None and time.monotonic() < end and os.getppid() == caller:
        time.sleep(0.1)
    end_session(os.getpid())
    if os.getppid() != caller:
        shutil.rmtree(Path.cwd(), ignore_errors=True)
    return 1 if code is None else code & 0xFF


def session_members(session: int) -> list[int]:
    """Return the living processes of a session but the calling one."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything; the fourth field after is the session.
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.parent.name))
    return [pid for pid in members if pid != os.getpid()]


def end_session(session: int) -> None:
    """Kill every process of `session` but the calling one; repeat for those just being forked.

    Python's resource trackers get three seconds, in which they remove the shared memory of the
    killed processes and end by themselves.
    """
    end = time.monotonic() + 3.0
    while (members := session_members(session)) and time.monotonic() < end + 1:
        for pid in members:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"multiprocessing.resource_tracker" not in command or time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _rank(rank: int) -> None:
    """Be one data-parallel rank: build the engine, run the rounds, write the result, wait."""
    from vllm import LLM, SamplingParams
    from vllm.v1.engine import EngineCoreRequestType

    work = json.loads(Path("work.json").read_text())
    llm: Any = LLM(**work["options"])
    Path(f"rank{rank}.ready").touch()
    completions = []
    for number, entry in enumerate(work["rounds"]):
        prompts, tokens = entry["prompts"][rank], entry["max_tokens"][rank]
        client = llm.llm_engine.engine_core
        if not prompts and hasattr(client, "engines_running"):
            # The client of an engine in another process does nothing for an empty list, and the
            # other ranks would wait in a collective. A server's coordinator wakes an idle engine by
            # this message.
            client.engines_running = True
            client._send_input(EngineCoreRequestType.START_DP_WAVE, (number, -1))
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        completions.append(
            [
                asdict(Completion(prompt, list(answer.token_ids), answer.text))
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        )
    probed = "worker_extension_cls" in work["options"]
    workers = llm.collective_rpc("oproj_probe") if probed else []
    partial = Path(f"rank{rank}.partial")
    partial.write_text(json.dumps({"completions": completions, "workers": workers}))
    partial.rename(f"rank{rank}.json")
    # The other ranks may still need this one's engine; the caller ends all ranks together.
    time.sleep(3600)


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        sys.exit(guard(int(sys.argv[2]), float(sys.argv[3]), subprocess.Popen(sys.argv[4:]).poll))
    _rank(int(sys.argv[2]))
