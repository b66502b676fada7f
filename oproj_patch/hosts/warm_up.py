"""vLLM's warm-ups, for the rows of a whole group.

Before it serves, vLLM compiles some kernels for the rows of one rank. An o_proj multiplies the rows
of all ranks of its group, so without this its kernels would be compiled while vLLM serves.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from ..sharding import exchange, otp_group
from .seam import Seam

KERNELS = "vllm.model_executor.warmup.kernel_warmup"


def seams() -> tuple[Seam, ...]:
    """Return the seams; only processes that run kernels import their module."""
    why = "compile an o_proj's kernels for the rows of the whole group before it serves"
    return (
        Seam(KERNELS, "deep_gemm_warmup", deep_gemm, why, ("model", "max_tokens"),
             since="0.10.1.1", required=False, lazy=True),
        Seam(KERNELS, "b12x_warmup", b12x, why, ("worker", "cudagraph_capture_sizes"),
             since="0.28.0", required=False, lazy=True),
    )  # fmt: skip


def deep_gemm(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    """Wrap DeepGEMM's warm-up: o_proj layers come first, because it does each shape once."""
    rows = inspect.signature(wrapped).bind(*args, **kwargs).arguments["max_tokens"]
    for layer, most in most_rows(rows):
        if most > rows:
            wrapped(layer, most)
    return wrapped(*args, **kwargs)


def b12x(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    """Wrap B12X's warm-up, which compiles for given row counts: add those of the whole group."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    worker, sizes = given["worker"], list(given["cudagraph_capture_sizes"])
    group, rows = otp_group.current(), worker.scheduler_config.max_num_batched_tokens
    together = [size * group.size for size in sizes] if group else []
    most = [most for _, most in most_rows(rows)]
    return wrapped(worker, list(dict.fromkeys([*sizes, *together, *most])))


def most_rows(rows: int) -> Iterator[tuple[Any, int]]:
    """Yield every sharded layer whose plan is settled, with the most rows of one GEMM of it.

    rows: the most of one rank.
    """
    group = otp_group.current()
    for layer in group.layers.values() if group else ():
        shard = layer.oproj
        if shard.plan is not None:
            yield layer, rows if shard.mixes_rows else exchange.most_rows(shard.plan, rows)
