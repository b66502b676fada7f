"""The OpenAI-compatible server with two data-parallel ranks: 64 requests at once, and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demo import model as demo_model
from demo.engines import Server, serve

from .runs import STORY_TELLER, EngineRuns, assert_sharded, assert_unpatched
from .serving import Request, assert_gauges, post

REQUESTS = 64


def requests() -> list[Request]:
    prompts = demo_model.prompts(REQUESTS)
    return [
        Request(prompt, max_tokens=4 + (7 * index) % 29, more={"stream": index % 2 == 0})
        for index, prompt in enumerate(prompts)
    ]


@pytest.mark.deployment("internal load balancer", "DP=2, N=2; 64 requests at once")
def test_64_concurrent_requests(runs: EngineRuns, tmp_path: Path) -> None:
    with serve(runs.config(STORY_TELLER, otp=None)) as server:
        off = answer_all(server)
        assert_unpatched(server.workers(), [server.log()])
    sharded = runs.config(STORY_TELLER, otp=2)
    env = {**sharded.env, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    with serve(replace(sharded, env=env)) as server:
        on = answer_all(server)
        assert_gauges(server)
        workers = server.workers()
        assert_sharded(workers, [server.log()], dp=2, otp=2)
    assert off == on
    # The checkpoint knows the story by heart, so an error on both sides cannot hide.
    story = demo_model.STORY * 2
    for request, text in zip(requests(), on, strict=True):
        start = story.index(request.prompt) + len(request.prompt)
        assert text == story[start : start + request.max_tokens]


def answer_all(server: Server) -> list[str]:
    """Send all requests at once; return the texts in order."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(lambda request: answer(server, request), requests()))


def answer(server: Server, request: Request) -> str:
    with post(server, request) as response:
        if not request.more["stream"]:
            return str(json.load(response)["choices"][0]["text"])
        return "".join(chunk["choices"][0]["text"] for chunk in events(response))


def events(response: Any) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a server-sent event stream; it must end with ``[DONE]``."""
    for line in response:
        if not line.startswith(b"data: "):
            continue
        data = line[len(b"data: ") :].strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)
    raise AssertionError("the stream ended without [DONE]")
