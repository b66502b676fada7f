"""A real server with two data-parallel ranks: crashes and signals leave nothing behind."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults import engine

pytestmark = pytest.mark.alone


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("VLLM::Worker", signal.SIGKILL),
        ("VLLM::EngineCore", signal.SIGKILL),
        ("", signal.SIGINT),
    ],
    ids=["worker killed", "engine core killed", "Ctrl-C"],
)
def test_nothing_is_left(what: str, number: signal.Signals) -> None:
    options = {"data_parallel_size": 2, "served_model_name": "demo"}
    with engine.node(options, engine.ON) as server:
        engine.until_healthy(server, 180)
        engine.complete(server.port, "demo")
        assert "o_proj sharded 2-way over ranks [0, 1]" in server.log()
        victim = server.named(what)[0] if what else server.process.pid
        used = server.shared_memory()
        os.kill(victim, number)
        engine.leaves_nothing(server, used)
