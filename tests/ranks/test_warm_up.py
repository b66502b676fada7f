"""vLLM's own warm-ups of kernels, with stand-ins for the kernels: they cover the group's rows."""

from __future__ import annotations

import os
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.ranks.launch import World
from tests.ranks.layers import build, finish, join_world, made, sharding, whole

COLUMNS, HIDDEN, MOST = 48, 20, 8
"""Of the o_proj, and the rows that vLLM lets one rank have."""


def test_deep_gemm_warms_up_for_the_rows_of_the_group(world: World) -> None:
    for rows, b12x, removed in world.run(warmed):
        assert rows == {
            (HIDDEN, COLUMNS // 2): list(range(1, 2 * MOST + 1)),
            (HIDDEN, COLUMNS): list(range(1, MOST + 1)),
        }
        assert b12x == [1, 4, 2, 8, 16] and removed


def warmed() -> tuple[dict[tuple[int, ...], list[int]], list[int], bool]:
    """In a rank: rows by weight for which DeepGEMM ran, B12X's sizes; the seams are gone after."""
    join_world()
    from vllm.model_executor.warmup import deep_gemm_warmup, kernel_warmup

    ran: Counter[tuple[tuple[int, ...], int]] = Counter()
    sizes: list[int] = []

    def kernel(x: Any, weight: Any, output: Any) -> None:
        ran[tuple(weight[0].shape), output.shape[0]] += 1

    def b12x_warmup(worker: Any, cudagraph_capture_sizes: list[int]) -> None:
        sizes.extend(cudagraph_capture_sizes)

    def data(module: Any) -> Any:
        return (module.weight, module.weight) if hasattr(module, "quant_method") else None

    with (
        mock.patch.dict(os.environ, VLLM_DEEP_GEMM_WARMUP="full"),
        mock.patch.object(deep_gemm_warmup, "fp8_gemm_nt", kernel),
        mock.patch.object(deep_gemm_warmup, "_deep_gemm_linear_data", data),
        mock.patch.object(
            deep_gemm_warmup, "get_mk_alignment_for_contiguous_layout", lambda: [COLUMNS // 2] * 2
        ),
        mock.patch.object(kernel_warmup, "b12x_warmup", b12x_warmup),
    ):
        before = kernel_warmup.deep_gemm_warmup, kernel_warmup.b12x_warmup
        with sharding(2, 2):
            model = torch.nn.Module()
            model.down_proj = build("model.layers.0.mlp.down_proj", HIDDEN, COLUMNS, bias=False)
            model.o_proj, _, _ = made(HIDDEN, COLUMNS)
            model.o_proj._cpu_skip_gemm_dispatch = True  # not packed: the weight keeps its shape
            finish(model.o_proj)
            model.o_proj(whole(MOST, COLUMNS, torch.float32))  # as the profile run does
            kernel_warmup.deep_gemm_warmup(model, MOST)
            scheduler = SimpleNamespace(max_num_batched_tokens=MOST)
            kernel_warmup.b12x_warmup(SimpleNamespace(scheduler_config=scheduler), [1, 4])
        removed = before == (kernel_warmup.deep_gemm_warmup, kernel_warmup.b12x_warmup)
    assert set(ran.values()) == {1}
    rows: dict[tuple[int, ...], list[int]] = {}
    for shape, count in sorted(ran):
        rows.setdefault(shape, []).append(count)
    return rows, sizes, removed
