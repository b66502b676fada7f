"""`oproj-patch doctor` on released hosts: their own parser, configuration and symbols."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ..engines import tiny
from . import wheels
from .wheels import Host

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
HOSTS = [
    host for host in wheels.HOSTS if host.kind == "ascend" or host.version in ("0.9.1", "0.18.0")
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformers")
    return tiny.make(tmp_path_factory.mktemp("model"))


def doctor(
    host: Host, model: str, *options: str, env: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    command = ["vllm", "serve", model, "--data-parallel-size", "4", "--max-model-len", "256"]
    arguments = ["-m", "oproj_patch", "doctor", "--json", "--", f"{TOGGLE}=2", *command, *options]
    done = wheels.run(host, arguments, 300, {"HF_HUB_OFFLINE": "1", **(env or {})})
    return done.returncode, json.loads(done.stdout[done.stdout.index("{") :])


def of(report: dict[str, Any], check: str) -> list[tuple[str, str | None]]:
    return [(f["state"], f["code"]) for f in report["findings"] if f["check"] == check]


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_active(host: Host, model: str) -> None:
    # vllm-ascend 0.9.1 would start vLLM's first engine.
    env = {"VLLM_USE_V1": "1"} if str(host) == "ascend-0.9.1" else None
    code, report = doctor(host, model, "--enforce-eager", env=env)
    assert (code, report["size"]) == (0, 2), report["findings"]
    symbols = [f["text"] for f in report["findings"] if f["check"] == "seam"]
    assert any(symbol.startswith("vllm_ascend.") for symbol in symbols) == (host.kind == "ascend")
    assert of(report, "release") == [("ok", None)]
    assert report["versions"].get("vllm-ascend") == (
        host.version if host.kind == "ascend" else None
    )


@pytest.mark.parametrize("host", [Host("ascend", "0.9.1")], ids=str)
def test_the_first_engine_and_graph_modes_are_refused(host: Host, model: str) -> None:
    code, report = doctor(host, model)
    assert (code, of(report, "refusals")) == (1, [("problem", "OPROJ015")])
    told = next(f["text"] for f in report["findings"] if f["check"] == "refusals")
    assert "VLLM_USE_V1=1" in told
    # Graphs of DeepSeek are refused by vllm-ascend itself; its reason is told.
    code, report = doctor(host, model, env={"VLLM_USE_V1": "1"})
    assert (code, of(report, "command")) == (1, [("problem", None)])
    told = next(f["text"] for f in report["findings"] if f["check"] == "command")
    assert "enforce_eager=True" in told


@pytest.mark.parametrize("host", [Host("ascend", "0.23.0"), Host("ascend", "0.30.0rc2")], ids=str)
def test_the_built_in_feature_beside_a_number(host: Host, model: str) -> None:
    config = {
        "finegrained_tp_config": {"oproj_tensor_parallel_size": 2},
        "recompute_scheduler_enable": True,
    }
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_consumer"}
    code, report = doctor(
        host,
        model,
        *("--additional-config", json.dumps(config)),
        *("--kv-transfer-config", json.dumps(transfer)),
    )
    assert (code, of(report, "refusals")) == (1, [("problem", "OPROJ016")])
