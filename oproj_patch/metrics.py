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
from collections.abc import Callable

from . import otp_group, row_parallel
from .otp_group import OtpGroup

SECONDS = 5.0
"""How often the counters are read."""

Publish = Callable[[OtpGroup], None]


def start(group: OtpGroup) -> None:
    """Publish now, and every few seconds until `group` is destroyed, if anybody could see it."""
    publish = _publisher()
    if publish is None:
        return
    publish(group)
    threading.Thread(
        target=_repeat, args=(publish, weakref.ref(group)), name="oproj_patch-metrics", daemon=True
    ).start()


def _repeat(publish: Publish, group: weakref.ref[OtpGroup]) -> None:
    never = threading.Event()
    while not never.wait(SECONDS):
        alive = group()
        if alive is None or alive is not otp_group.current():
            return
        publish(alive)
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
    exchanges = Counter(
        "oproj_patch_exchanges", "Exchanges run; a graph replay is not counted.", ["rank"]
    )
    counted = 0

    def write(group: OtpGroup) -> None:
        nonlocal counted
        rank = str(group.ranks[group.rank])
        kept, saved = row_parallel.totals(group)
        for name, value in (
            ("group_size", group.size),
            ("layers", len(group.layers)),
            ("kept_bytes", kept),
            ("saved_bytes", saved),
        ):
            gauges[name].labels(rank).set(value)
        now = group.exchanges
        # A new group in this process starts at 0 again.
        exchanges.labels(rank).inc(now - counted if now >= counted else now)
        counted = now

    return write
