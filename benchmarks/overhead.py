"""Microseconds that the shim adds to a call of o_proj: look-up, custom op, contexts, row counts.

    python benchmarks/overhead.py

One rank, one row, a tiny weight: there is nobody to exchange with, and the GEMM takes next to
nothing, so what is left is the shim's own work.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def microseconds(call: Callable[[], Any], calls: int = 2000) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def main() -> int:
    import torch
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.linear import RowParallelLinear

    from oproj_patch.hosts.vllm import Vllm
    from oproj_patch.settings import Settings
    from oproj_patch.sharding import layer as sharded_layer
    from oproj_patch.sharding import otp_group
    from tests.ranks.layers import groups

    torch.set_num_threads(1)
    with groups(1) as config, torch.inference_mode():
        from vllm.distributed import parallel_state

        group = otp_group.create(
            [[0]], [[0]], "gloo", Settings(size=1, weight_gather_rows=0), "benchmark"
        )
        assert group is not None

        def build(sharded: bool) -> Any:
            layer = RowParallelLinear.__new__(RowParallelLinear)
            given: dict[str, Any] = {"bias": False, "prefix": "model.layers.0.self_attn.o_proj"}
            if sharded:
                sharded_layer.construct(
                    layer.__init__, layer, (32, 32), given, group, parallel_state, Vllm({})
                )
            else:
                layer.__init__(32, 32, **given)
            layer.weight.data.normal_()
            layer.quant_method.process_weights_after_loading(layer)
            return layer

        plain, ours = build(False), build(True)
        x = torch.randn(1, 32)
        config.parallel_config.data_parallel_size = 2  # so that vLLM makes row counts
        with set_forward_context(
            None, config, num_tokens=1, num_tokens_across_dp=torch.tensor([1, 1])
        ):
            calls = {"plain": lambda: plain(x), "oproj_patch": lambda: ours(x)}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(15):
                for name, call in calls.items():
                    times[name].append(microseconds(call))
            if "--profile" in sys.argv:
                import cProfile

                with cProfile.Profile() as profile:
                    microseconds(calls["oproj_patch"])
                profile.print_stats("tottime")
        otp_group.destroy()
    medians = {name: statistics.median(values) for name, values in times.items()}
    added = medians["oproj_patch"] - medians["plain"]
    print(
        f"plain call {medians['plain']:.1f} us, oproj_patch {medians['oproj_patch']:.1f} us, "
        f"added {added:.1f} us (best {min(times['oproj_patch']) - min(times['plain']):.1f} us)"
    )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.ranks.launch import free_port

    os.environ.update(
        RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    os.environ.pop("OPROJ_TENSOR_PARALLEL_SIZE", None)
    raise SystemExit(main())
