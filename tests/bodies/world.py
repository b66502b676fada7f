"""In a rank: vLLM's real groups over gloo, without an engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch


def moe_model_config() -> Any:
    """What the shim reads of a ModelConfig: that the ranks run in lock step."""
    return SimpleNamespace(is_moe=True, model="a mixture-of-experts model")


@contextlib.contextmanager
def world() -> Iterator[None]:
    """torch.distributed and vLLM's world group for WORLD_SIZE ranks."""
    from vllm.distributed import parallel_state

    rank = int(os.environ["RANK"])
    # The CPU executor sets it; vLLM names its shared memory by it.
    os.environ.setdefault("VLLM_DIST_IDENT", os.environ["MASTER_PORT"])
    parallel_state.init_distributed_environment(
        world_size=int(os.environ["WORLD_SIZE"]),
        rank=rank,
        distributed_init_method="tcp://127.0.0.1:" + os.environ["MASTER_PORT"],
        local_rank=rank,
        backend="gloo",
    )
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment()


@contextlib.contextmanager
def model_groups(dp: int, tp: int = 1, pp: int = 1, config: Any = None) -> Iterator[Any]:
    """vLLM's configuration and parallel groups within `world`; destroyed on the way out."""
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    if config is None:
        config = VllmConfig()
        config.parallel_config = ParallelConfig()
        config.additional_config = {}
    parallel = config.parallel_config
    parallel.data_parallel_size = dp
    parallel.tensor_parallel_size = tp
    parallel.pipeline_parallel_size = pp
    parallel.data_parallel_rank = int(os.environ["RANK"]) // (tp * pp) % dp
    with set_current_vllm_config(config):
        try:
            parallel_state.initialize_model_parallel(tp, pp)
            yield config
        finally:
            parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def groups(dp: int, tp: int = 1, pp: int = 1) -> Iterator[Any]:
    """`world` and `model_groups` in one."""
    with world(), model_groups(dp, tp, pp) as config:
        yield config


def whole(out_features: int, in_features: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A full weight [out, in], the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float32)
    return (weight / in_features**0.5).to(dtype)
