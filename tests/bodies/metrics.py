"""In a rank: the worker's metrics after a few exchanges."""

from __future__ import annotations

import os
import time
from typing import Any

from .layer import build, load
from .world import groups, whole


def exchanged(times: int, columns: int = 48, hidden: int = 20) -> dict[str, Any]:
    """Run `times` exchanges of one layer; returns what the rank knows of itself."""
    import threading

    import torch

    from oproj_patch import metrics, status

    metrics.SECONDS = 0.05
    with groups(int(os.environ["WORLD_SIZE"])):
        layer = build("model.layers.0.self_attn.o_proj", hidden, columns, bias=False)
        load(layer, whole(hidden, columns, torch.float32), None)
        layer.quant_method.process_weights_after_loading(layer)
        for _ in range(times):
            layer(whole(3, columns, torch.float32))
        time.sleep(0.5)  # several periods of the publishing thread
        told = status()
        names = [thread.name for thread in threading.enumerate()]
    deadline = time.monotonic() + 10
    while "oproj_patch-metrics" in [t.name for t in threading.enumerate()]:
        assert time.monotonic() < deadline, "the publishing thread outlives its group"
        time.sleep(0.02)
    return {
        "kept": told.bytes_kept,
        "saved": told.bytes_saved,
        "exchanges": told.exchanges,
        "publishing": "oproj_patch-metrics" in names,
    }
