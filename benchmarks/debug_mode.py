"""Microseconds that OPROJ_PATCH_DEBUG=1 adds to an exchange.

    python benchmarks/debug_mode.py

Two ranks over gloo, DeepSeek-R1's hidden size, a narrow weight. With and without take turns.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 40
CALLS = 50


def measure(rows: int) -> dict[str, float]:
    """In a rank: median microseconds of a call with `rows` rows, by debug mode."""
    import torch
    from vllm.forward_context import set_forward_context

    import oproj_patch
    from oproj_patch.sharding import otp_group
    from tests.ranks.layers import build, groups

    torch.set_num_threads(1)
    oproj_patch.enable(2)
    with groups(2) as config, torch.inference_mode():
        layer: Any = build("model.layers.0.self_attn.o_proj", 7168, 64, bias=False)
        layer.weight.data.normal_()
        layer.quant_method.process_weights_after_loading(layer)
        group = otp_group.require("the benchmark")
        x = torch.randn(rows, 64)
        counts = torch.full((2,), rows, dtype=torch.int32)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with set_forward_context(None, config, num_tokens=rows, num_tokens_across_dp=counts):
            for _ in range(ROUNDS):
                for debug, times in seconds.items():
                    group.settings = dataclasses.replace(group.settings, debug=debug)
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        layer(x)
                    times.append((time.perf_counter() - start) / CALLS)
    told = {debug: statistics.median(times) * 1e6 for debug, times in seconds.items()}
    return {"off": told[False], "on": told[True]}


def main() -> int:
    """Print one line for each number of rows; return the exit code."""
    from benchmarks import debug_mode
    from tests.ranks import launch

    for rows in (1, 24):
        told = launch.run(2, debug_mode.measure, rows, fresh=True, seconds=240)[0]
        print(
            f"{rows} rows: {told['off']:.0f} us an exchange, {told['on']:.0f} us with the debug "
            f"mode, {told['on'] - told['off']:.0f} us more"
        )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
