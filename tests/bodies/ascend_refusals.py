"""On vllm-ascend: what is refused, in one process and before any group exists."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from .ascend import configured, import_worker, stand_in


def alone(model: str, option: dict[str, Any]) -> dict[str, Any]:
    """What one process refuses before any group exists: the sentences, by what was asked for."""
    stand_in()
    from vllm.config import set_current_vllm_config

    told = {"both": refused(lambda: configured(model, 2, additional_config=option))}
    config = configured(model, 2)
    import_worker()
    from vllm_ascend import utils

    utils.adapt_patch()
    with set_current_vllm_config(config):
        told |= configurations_refused(config)
        told |= hosts_refused()
    return told


def refused(body: Callable[[], Any]) -> str:
    from oproj_patch.errors import OprojError

    try:
        body()
    except OprojError as error:
        return str(error)
    return ""


def configurations_refused(config: Any) -> dict[str, str]:
    """Each conflict put into the release's own configuration objects, alone."""
    from vllm import envs
    from vllm_ascend import ascend_config

    from oproj_patch import releases
    from oproj_patch.hosts import detect
    from oproj_patch.seams import vllm_ascend

    version = detect().versions["vllm-ascend"]
    theirs = ascend_config._ASCEND_CONFIG
    first, second = (releases.in_range(version, v, v) for v in ("0.9.1", "0.11.0"))
    enabled = SimpleNamespace(enabled=True)
    eagle = SimpleNamespace(method="eagle", num_speculative_tokens=2)
    drafter = SimpleNamespace(method="mtp", num_speculative_tokens=2)
    full = SimpleNamespace(name="FULL")
    graphs = (config.model_config, "enforce_eager", False)
    mode = (config.compilation_config, "cudagraph_mode", full)
    # What to set, and whether this release refuses it.
    cases: dict[str, tuple[list[tuple[Any, str, Any]], bool]] = {
        "nothing": ([], False),
        "xlite": ([(theirs, "xlite_graph_config", enabled)], True),
        "layer_sharding": ([(theirs, "layer_sharding", ["o_proj"])], True),
        "prefill": ([(config.parallel_config, "prefill_context_parallel_size", 2)], True),
        "decode": ([(config.parallel_config, "decode_context_parallel_size", 2)], True),
        "eagle": ([(config, "speculative_config", eagle)], second),
        "first engine": ([(envs, "VLLM_USE_V1", False)], first),
        "own graphs": ([graphs], first),
        "full graphs": ([graphs, mode], first or second),
        "full graphs, drafter": ([graphs, mode, (config, "speculative_config", drafter)], True),
        "shared experts": (
            [
                graphs,
                (theirs, "torchair_graph_config", enabled),
                (theirs, "enable_shared_expert_dp", True),
            ],
            second,
        ),
    }
    told = {}
    for name, (changes, expected) in cases.items():
        with contextlib.ExitStack() as stack:
            for target, attribute, value in changes:
                stack.enter_context(changed(target, attribute, value))
            sentence = refused(lambda: vllm_ascend.refuse_configuration(config, version))
        told[name] = sentence if expected else f"not expected: {sentence}" * bool(sentence)
    for variable in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_ASCEND_ENABLE_DBO"):
        os.environ[variable] = "1"
        told[variable] = refused(lambda: vllm_ascend.refuse_configuration(config, version))
        del os.environ[variable]
    return told


@contextlib.contextmanager
def changed(target: Any, name: str, value: Any) -> Iterator[None]:
    """`target.name` is `value`, past any checks the object makes on assignment."""
    absent = object()
    before = vars(target).get(name, absent)
    vars(target)[name] = value
    try:
        yield
    finally:
        if before is absent:
            del vars(target)[name]
        else:
            vars(target)[name] = before


def hosts_refused() -> dict[str, str]:
    """A host that is not as tested, when vLLM creates its groups; nothing may be patched then."""
    import vllm
    import wrapt
    from vllm_ascend.attention import mla_v1

    from oproj_patch import api
    from oproj_patch.hosts import detect
    from oproj_patch.settings import Settings

    seams = detect().seams(Settings(size=4))
    told = {}
    with changed(vllm, "__version__", "0.12.0"):
        told["pair"] = refused(api._install)
    implementation = mla_v1.AscendMLAImpl
    del mla_v1.AscendMLAImpl
    told["symbol"] = refused(api._install)
    mla_v1.AscendMLAImpl = implementation
    hook = "vllm.distributed.parallel_state.init_model_parallel_group"
    patched = [
        seam.symbol
        for seam in seams
        if seam.symbol != hook
        and isinstance(
            wrapt.resolve_path(importlib.import_module(seam.module), seam.path)[2],
            wrapt.FunctionWrapper,
        )
    ]
    return {**told, "patched": " ".join(patched), "host": str(detect())}
