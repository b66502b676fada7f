"""A worker extension that counts what a worker of a prefill/decode pair does. Test support only.

Loaded in worker processes as `worker_extension_cls="tests.engines.disaggregation.Probe"`.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import traceback
from collections import Counter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.distributed.nixl_utils import NixlWrapper
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.gpu_worker import Worker

from demo.probe import WorkerProbe

_SECONDS_BETWEEN_SAMPLES = 0.01
_MICROSECONDS_BETWEEN_POLLS = 1000
"""Of NIXL's thread, whose default is none: on two cores four of them leave nothing for vLLM."""
_counts: Counter[str] = Counter({"transfers": 0, "dummy batches": 0})
_watched: dict[str, Any] = {}
_record_transfer = NixlKVConnectorStats.record_transfer
_nixl = sys.modules[NixlWrapper.__module__].nixlBind
_agent = _nixl.nixlAgent
_execute_dummy_batch = Worker.execute_dummy_batch


class Probe(WorkerProbe):
    """The probe; it reports besides: caches received, dummy batches, and what was watched."""

    def oproj_counts(self) -> dict[str, Any]:
        return {"counts": dict(_counts), "watched": _watched}

    def oproj_watch(self, seconds: float) -> None:
        """Look at the stacks of all threads for `seconds`, and report.

        samples: how often; ours: the lines of the package that a thread was at; host: of vLLM.
        """
        threading.Thread(target=_watch, args=(seconds,), daemon=True).start()


def _watch(seconds: float) -> None:
    at: dict[str, set[str]] = {"oproj_patch": set(), "vllm": set()}
    samples, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(_SECONDS_BETWEEN_SAMPLES)
        samples += 1
        for thread, frame in sys._current_frames().items():
            if thread == threading.get_ident():
                continue
            for here, line in traceback.walk_stack(frame):
                package = str(here.f_globals.get("__name__")).partition(".")[0]
                if package in at:
                    at[package].add(f"{here.f_code.co_qualname}:{line}")
    _watched.update(samples=samples, ours=sorted(at["oproj_patch"]), host=sorted(at["vllm"]))


@functools.wraps(_record_transfer)
def _counting(self: Any, result: Any) -> None:
    _counts["transfers"] += 1
    _record_transfer(self, result)


@functools.wraps(_execute_dummy_batch)
def _noting(self: Any) -> None:
    _counts["dummy batches"] += 1
    _execute_dummy_batch(self)


def _patient_agent(name: str, config: Any) -> Any:
    config.pthrDelay = _MICROSECONDS_BETWEEN_POLLS
    return _agent(name, config)


NixlKVConnectorStats.record_transfer = _counting
Worker.execute_dummy_batch = _noting
# vLLM pins the main thread of every worker to the machine's last core, for NIXL.
CpuPlatform.discover_numa_topology = classmethod(lambda cls: [])
_nixl.nixlAgent = _patient_agent
