"""Prometheus metrics of this worker, for vLLM's own `/metrics`.

The API server that answers `/metrics` is another process than the worker. prometheus_client
bridges that with files in the directory `PROMETHEUS_MULTIPROC_DIR`. vLLM sets the variable when
it starts several API servers (with `vllm serve` from 0.18 on: one per data-parallel rank unless
told otherwise), the operator may set it otherwise. Without it nobody could see a worker's values,
and nothing is started here.

Nothing is added to an exchange: a thread reads the group's counters every few seconds.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable

from . import otp_group, row_parallel
from .otp_group import OtpGroup

SECONDS = 5.0
"""How often the counters are read."""

Counted = defaultdict[tuple[str, str], int]
"""What has been added to the counters for a group, by (counter, scheme)."""
Publish = Callable[[OtpGroup, Counted], None]


def start(group: OtpGroup) -> None:
    """Publish now, and every few seconds until `group` is destroyed, if anybody could see it."""
    publish = _publisher()
    if publish is None:
        return
    counted: Counted = defaultdict(int)
    publish(group, counted)
    threading.Thread(
        target=_repeat,
        args=(publish, weakref.ref(group), counted),
        name="oproj_patch-metrics",
        daemon=True,
    ).start()


def _repeat(publish: Publish, group: weakref.ref[OtpGroup], counted: Counted) -> None:
    never = threading.Event()
    while not never.wait(SECONDS):
        alive = group()
        if alive is None or alive is not otp_group.current():
            return
        publish(alive, counted)
        del alive


@functools.cache
def _publisher() -> Publish | None:
    """What writes a group's values; None without prometheus_client or a directory to write to.

    Cached: a metric can be registered only once in a process.
    """
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return None
    try:
        from prometheus_client import Counter, Gauge
    except ImportError:
        return None
    # `rank` tells the workers apart, so the maximum over processes is each worker's own value.
    gauges = {
        name: Gauge(f"oproj_patch_{name}", text, ["rank"], multiprocess_mode="max")
        for name, text in (
            ("group_size", "Ranks that share one o_proj weight."),
            ("layers", "Sharded o_proj layers."),
            ("kept_bytes", "Bytes of the sharded o_proj layers on this rank."),
            ("saved_bytes", "Bytes that the unsharded o_proj layers would take in addition."),
        )
    }
    counters = {
        name: Counter(f"oproj_patch_{name}", text, ["rank", "scheme"])
        for name, text in (
            ("exchanges", "Times that a layer ran; a graph replay is not counted."),
            ("rows", "Rows of this rank in them."),
        )
    }

    def write(group: OtpGroup, counted: Counted) -> None:
        rank = str(group.ranks[group.rank])
        kept, saved = row_parallel.totals(group)
        for name, value in (
            ("group_size", group.size),
            ("layers", len(group.layers)),
            ("kept_bytes", kept),
            ("saved_bytes", saved),
        ):
            gauges[name].labels(rank).set(value)
        for name, scheme, now in (
            ("exchanges", "exchange", group.exchanges - group.gathers),
            ("exchanges", "gather", group.gathers),
            ("rows", "exchange", group.rows - group.gathered_rows),
            ("rows", "gather", group.gathered_rows),
        ):
            # The worker may be between two of its increments: never count backwards.
            new = max(0, now - counted[name, scheme])
            counted[name, scheme] += new
            counters[name].labels(rank, scheme).inc(new)

    return write
