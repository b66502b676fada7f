"""In a rank: two sharded layers, two forward passes, and one fault on one rank."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
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
    elif fault == "untested":
        import vllm

        vllm.__version__ = "0.99.0"
    elif fault == "symbol":
        from vllm.model_executor.models import deepseek_v2

        del deepseek_v2.DeepseekV2Attention
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
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


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


def audited() -> dict[str, Any]:
    """Two forward passes, and each file written, program started or pickle read by the package."""
    events: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.mkdir")
        if writes and _is_ours(sys._getframe(1)):
            events.append(f"{event} {args}")

    sys.addaudithook(hook)
    told = play(2)
    found = list(events)
    # As if a module of the package wrote a file.
    exec("import os; os.close(os.open(os.devnull, os.O_WRONLY))", {"__name__": "oproj_patch.x"})
    noticed = len(events) == len(found) + 1
    return {"exchanges": told["exchanges"], "events": found, "would notice": noticed}


def _is_ours(frame: Any) -> bool:
    """Whether the package, rather than vLLM or this test, comes first on the way out."""
    while frame is not None:
        owner = frame.f_globals.get("__name__", "").partition(".")[0]
        if owner in ("oproj_patch", "vllm", "tests"):
            return bool(owner == "oproj_patch")
        frame = frame.f_back
    return False


def engines(options: dict[str, Any], dp_ports: list[int]) -> list[dict[str, Any]]:
    """Start an engine in this process, use it, shut it down; once for each entry of `dp_ports`.

    options: of `vllm.LLM`; dp_ports: where the data-parallel ranks meet. Each time: its tokens,
    seconds, layers and exchanges; and what is left of it: `ranks` of the otp group, torch process
    `groups`, `objects` that are otp groups, `rss` in resident bytes, open `files`, `threads`.
    """
    import ctypes
    import gc
    import resource
    from pathlib import Path

    from vllm import LLM, SamplingParams

    import oproj_patch
    from oproj_patch import otp_group

    rank = os.environ["RANK"]
    # vLLM has a world of its own for the engines of each time.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(
        VLLM_DP_RANK=rank, VLLM_DP_RANK_LOCAL=rank, VLLM_DP_SIZE="2", VLLM_DP_MASTER_IP="127.0.0.1"
    )
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    told = []
    for port in dp_ports:
        os.environ["VLLM_DP_MASTER_PORT"] = str(port)
        started = time.monotonic()
        llm = LLM(**options, distributed_executor_backend="uni")
        output = llm.generate(["At dusk"], greedy, use_tqdm=False)[0].outputs[0]
        status = oproj_patch.status()
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        # What the C library keeps of freed memory depends on how its threads came to run.
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        told.append(
            {
                "seconds": time.monotonic() - started,
                "tokens": list(output.token_ids),
                "layers": status.layers,
                "exchanges": status.exchanges,
                "ranks": oproj_patch.status().otp_ranks,
                "groups": len(torch.distributed.distributed_c10d._world.pg_map),
                "objects": sum(type(x) is otp_group.OtpGroup for x in gc.get_objects()),
                "rss": pages * resource.getpagesize(),
                "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
                "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
            }
        )
    return told
