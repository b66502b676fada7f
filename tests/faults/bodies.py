"""In a rank: two sharded layers, two forward passes, and one fault on one rank."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from tests.bodies.layer import build
from tests.bodies.world import model_groups, world

_open = contextlib.ExitStack()

NAMES = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")


def play(dp: int, fault: str = "", odd: int = 1, timeout: int = 0) -> dict[str, Any]:
    """What ended this rank, and seconds from the creation of groups to its end.

    fault: what goes wrong on rank `odd`; timeout: vLLM's timeout for its groups, in seconds.
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # The seams import it when the first group is created; seconds are counted without that.
    importlib.import_module("vllm.model_executor.models.deepseek_v2")
    mine = int(os.environ["RANK"]) == odd
    if mine and fault:
        _before_groups(fault)
    started = time.monotonic()
    try:
        _open.enter_context(world())
        config = _open.enter_context(model_groups(dp, config=_config(timeout)))
        exchanges = _forwards(dp, fault if mine else "", config)
        _open.close()
    except RuntimeError as error:
        # Without tearing down, like a worker of vLLM that failed: its executor ends it.
        return {
            "kind": type(error).__name__,
            "text": str(error),
            "seconds": time.monotonic() - started,
        }
    return {"kind": "", "text": "", "seconds": time.monotonic() - started, "exchanges": exchanges}


def _config(timeout: int) -> Any:
    from vllm.config import ParallelConfig, VllmConfig

    config = VllmConfig()
    config.parallel_config = ParallelConfig(
        distributed_timeout_seconds=timeout or None,
        cpu_distributed_timeout_seconds=timeout or None,
    )
    config.additional_config = {}
    return config


def _before_groups(fault: str) -> None:
    if fault == "package":
        from oproj_patch import hosts

        hosts.__version__ = "9.9.9"
    elif fault == "host":
        import vllm

        vllm.__version__ = "0.31.0"
    elif fault == "kill before":
        from oproj_patch import otp_group

        otp_group.create = _kill  # type: ignore[assignment]


def _forwards(dp: int, fault: str, config: Any) -> int:
    import oproj_patch

    hidden = 24 if fault == "layers" else 20
    layers = [build(name, hidden, 48, bias=False) for name in NAMES]
    for layer in layers:
        layer.weight.data.fill_(1.0)
        layer.quant_method.process_weights_after_loading(layer)
    if not oproj_patch.status().enabled:
        # What vLLM does next in a rank that knows nothing of the others' wish.
        from vllm.distributed import get_dp_group

        torch.distributed.all_reduce(torch.ones(1), group=get_dp_group().cpu_group)
    for step in range(2):
        if step == 1:
            _between_steps(fault)
        rows = 5 if fault == "rows" and step == 1 else 3
        with _told(dp, fault if step == 1 else "", config), torch.inference_mode():
            for layer in reversed(layers) if fault == "order" and step == 1 else layers:
                output, _ = layer(torch.ones(rows, 48))
                assert output.shape == (rows, hidden) and bool((output == 48.0).all())
    return oproj_patch.status().exchanges


def _between_steps(fault: str) -> None:
    if fault == "kill between":
        _kill()
    elif fault == "kill during":
        time.sleep(1.5)  # the others are inside their exchange by then
        _kill()
    elif fault == "stuck":
        time.sleep(300)


@contextlib.contextmanager
def _told(dp: int, fault: str, config: Any) -> Iterator[None]:
    """vLLM's own forward context, with the row counts it announces."""
    from vllm.forward_context import set_forward_context

    counts = torch.full((dp,), 3, dtype=torch.int32)
    if fault == "told":
        counts[0] = 4
    with set_forward_context(None, config, num_tokens=3, num_tokens_across_dp=counts):
        yield


def _kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def restart(ports: list[int]) -> dict[str, list[float]]:
    """Create groups and layers, run them, destroy all; once a port. What is left each time.

    groups: torch process groups; objects: otp groups alive; rss: resident bytes.
    """
    import gc
    import resource
    from pathlib import Path

    from vllm.plugins import load_general_plugins

    import oproj_patch
    from oproj_patch import otp_group

    load_general_plugins()
    left: dict[str, list[float]] = {"groups": [], "objects": [], "rss": []}
    for port in ports:
        os.environ["MASTER_PORT"] = str(port)
        with world(), model_groups(2, config=_config(0)) as config:
            assert _forwards(2, "", config) == 4
            assert oproj_patch.status().layers == 2
        assert oproj_patch.status().otp_ranks == ()
        gc.collect()
        left["groups"].append(len(torch.distributed.distributed_c10d._world.pg_map))
        alive = [thing for thing in gc.get_objects() if type(thing) is otp_group.OtpGroup]
        left["objects"].append(len(alive))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        left["rss"].append(pages * resource.getpagesize())
    return left
