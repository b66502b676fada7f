"""Four Prometheus gauges of this worker, for vLLM's own `/metrics`; set once.

The API server is another process, which reads them from files of prometheus_client in the
directory `PROMETHEUS_MULTIPROC_DIR`. vLLM sets the variable when it starts several API servers
(`vllm serve` from 0.18 on: one per data-parallel rank by default); else the operator may set it.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from .otp_group import OtpGroup

_log = logging.getLogger("vllm.oproj_patch")


def publish(group: OtpGroup) -> None:
    """Set the gauges of this worker, if anybody could see them."""
    values = (group.size, len(group.layers), *group.totals())
    try:
        gauges = _gauges() if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else {}
        for gauge, value in zip(gauges.values(), values, strict=False):
            gauge.labels(str(group.ranks[group.rank]), str(group.grid)).set(value)
    except (OSError, ValueError) as error:  # the others would wait for a rank that ends for this
        _log.warning("oproj_patch publishes no metrics here: %s", error)


@functools.cache
def _gauges() -> dict[str, Any]:
    """Return the gauges by name; none without prometheus_client."""
    try:
        from prometheus_client import Gauge
    except ImportError:
        return {}
    # `rank` tells the workers apart, so the maximum over processes is each worker's own value.
    return {
        name: Gauge(f"oproj_patch_{name}", text, ["rank", "grid"], multiprocess_mode="max")
        for name, text in (
            ("group_size", "Ranks that share one o_proj weight."),
            ("layers", "Sharded o_proj layers."),
            ("kept_bytes", "Bytes of the sharded o_proj layers on this rank."),
            ("saved_bytes", "Bytes that the unsharded o_proj layers would take in addition."),
        )
    }
