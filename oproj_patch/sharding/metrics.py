"""Four Prometheus gauges of this worker, for vLLM's own `/metrics`; set once.

The API server is another process, which reads them from files of prometheus_client in the
directory `PROMETHEUS_MULTIPROC_DIR`; docs/operating.md says who sets the variable.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from .otp_group import OtpGroup


def publish(group: OtpGroup) -> None:
    """Set the gauges of this worker, if anybody could see them."""
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return
    values = (group.size, len(group.layers), *group.totals())
    try:
        for gauge, value in zip(_gauges(), values, strict=True):
            gauge.labels(str(group.ranks[group.rank]), str(group.grid)).set(value)
    except (OSError, ValueError) as error:  # the others would wait for a rank that ends for this
        told = "oproj_patch publishes no metrics here: %s"
        logging.getLogger("vllm.oproj_patch").warning(told, error)


@functools.cache
def _gauges() -> list[Any]:
    from prometheus_client import Gauge  # vLLM requires it

    # `rank` tells the workers apart, so the maximum over processes is each worker's own value.
    return [
        Gauge(f"oproj_patch_{name}", text, ["rank", "grid"], multiprocess_mode="max")
        for name, text in (
            ("group_size", "Ranks that share one o_proj weight."),
            ("layers", "Sharded o_proj layers."),
            ("kept_bytes", "Bytes of the sharded o_proj layers on this rank."),
            ("saved_bytes", "Bytes that the unsharded o_proj layers would take in addition."),
        )
    ]
