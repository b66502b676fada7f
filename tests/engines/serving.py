"""Instances of `vllm serve` that the tests start themselves, several of one deployment or one."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import engines
from demo import model as demo_model
from demo.engines import Completion, EngineConfig, EngineError, Server

SECONDS_TO_START = 300


@contextlib.contextmanager
def instance(
    config: EngineConfig, *, workers: int, host: str = "127.0.0.1", **options: Any
) -> Iterator[Server]:
    """Start `vllm serve`, yield it before it is healthy, stop it; its model is `demo`.

    workers: how many there are in this instance; options: further ones of vLLM.
    """
    port = engines.free_port()
    named = {"served_model_name": "demo", "host": host, "port": port}
    words = config.engine_options() | named | {"disable_uvicorn_access_log": True} | options
    command = [sys.executable, "-m", "tests.faults.engine", "serve", str(words.pop("model"))]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        env = engines.environment(config, Path(scratch)) | {"VLLM_SERVER_DEV_MODE": "1"}
        log, command = Path(scratch, "server.log"), [*command, *engines.flags(words)]
        with engines.process(command, env, log, 900, config.start) as process:
            yield Server(f"http://{host}:{port}", process, workers)


def until_healthy(*servers: Server) -> None:
    """Wait for the health end points; raises `EngineError` when one ends or takes too long."""
    end = time.monotonic() + SECONDS_TO_START
    waiting = [*servers]
    while waiting := [server for server in waiting if not engines.healthy(server.base_url)]:
        if time.monotonic() > end or any(server.process.ended() for server in servers):
            raise EngineError("a server ended or did not get healthy", [s.log() for s in servers])
        time.sleep(0.1)


@dataclass(frozen=True)
class Request:
    """A greedy request of one prompt.

    rank: of the data-parallel ranks the one to answer it; more: further fields of the body.
    """

    prompt: str
    max_tokens: int
    rank: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def answers(server: Server, requests: Sequence[Request]) -> list[Completion]:
    """Send all requests at once; return the completions, of as many tokens as asked for."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: _answer(server, request), requests))


def _answer(server: Server, request: Request) -> Completion:
    with post(server, request) as got:
        [choice] = json.load(got)["choices"]
    assert len(choice["token_ids"]) == request.max_tokens
    return Completion(request.prompt, choice["token_ids"], choice["text"])


def post(server: Server, request: Request, timeout: float = 180.0) -> Any:
    """Send a request; return the open response.

    Raises `EngineError` with the server's log when it refuses, or is silent for `timeout` seconds.
    """
    body = {
        "model": "demo",
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **request.more,
    }
    headers = {"Content-Type": "application/json"}
    if request.rank is not None:
        headers["X-data-parallel-rank"] = str(request.rank)
    url, data = f"{server.base_url}/v1/completions", json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout)
    except OSError as error:
        raise EngineError(f"{url}: {error}", [server.log()]) from error


def samples(server: Server, start: str) -> dict[tuple[str, str], float]:
    """Return counters and gauges at `/metrics` whose names begin with `start`.

    By name and rank: the number of the engine, or for this package's gauges of the worker.
    """
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as got:
        page = got.read().decode()
    return {
        (sample.name, sample.labels.get("rank") or sample.labels["engine"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith(start) and not sample.name.endswith("_created")
    }


def assert_gauges(server: Server) -> None:
    """The metrics end point shows the four gauges of each of two workers that share a weight."""
    half = demo_model.O_PROJ_BYTES // 2
    of_each = {
        "group_size": 2,
        "layers": demo_model.NUM_LAYERS,
        "kept_bytes": half,
        "saved_bytes": half,
    }
    assert samples(server, "oproj_patch_") == {
        (f"oproj_patch_{name}", rank): value for name, value in of_each.items() for rank in "01"
    }
