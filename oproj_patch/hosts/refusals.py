"""Every configuration that is refused before any process group or layer of ours exists, and why.

`RULES` is the single list, for both hosts. The tables of the documents are made from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import releases
from ..errors import OprojError
from ..settings import TOGGLE, WEIGHT_GATHER_ROWS, Settings
from ..sharding import topology

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
"""Fields of a model's configuration that hold its number of experts."""


class Facts(NamedTuple):
    """What a rule looks at: vLLM's VllmConfig, and vllm-ascend's AscendConfig if it is there."""

    vllm: Any
    ascend: Any = None


@dataclass(frozen=True)
class Rule:
    """One feature that cannot be combined with a sharded o_proj.

    option: how the user asked for it; why: the reason, as the end of a sentence.
    found: facts -> the value that asks for the feature, or None when it is not in use.
        Attributes that a release does not have count as not in use.
    host: the host that has the feature; since, until: its first and last release with it, empty:
        no such end. remedy: what to do.
    """

    option: str
    why: str
    found: Callable[[Facts], object | None]
    host: str = "vllm"
    since: str = ""
    until: str = ""
    remedy: str = "remove the option, or unset the variable"


def of(config: Any, *path: str) -> Any:
    """Return the attribute at `path`, or None where a release lacks a part of it."""
    for name in path:
        config = getattr(config, name, None)
    return config


def _more_than_one(name: str) -> Callable[[Facts], object | None]:
    def found(facts: Facts) -> object | None:
        size = of(facts.vllm, "parallel_config", name) or 1
        return size if size > 1 else None

    return found


def _set(*path: str) -> Callable[[Facts], object | None]:
    return lambda facts: of(facts.vllm, *path) or None


def _given(*path: str) -> Callable[[Facts], object | None]:
    return lambda facts: "given" if of(facts.vllm, *path) is not None else None


def _loads_by(*formats: str) -> Callable[[Facts], object | None]:
    def found(facts: Facts) -> object | None:
        value = of(facts.vllm, "load_config", "load_format")
        name = str(getattr(value, "value", value)).lower()  # an enumeration before vLLM 0.10
        return name if name in formats else None

    return found


def _quantized_by(*names: str) -> Callable[[Facts], object | None]:
    def found(facts: Facts) -> object | None:
        name = of(facts.vllm, "model_config", "quantization")
        return name if name in names else None

    return found


def _architecture(*prefixes: str) -> Callable[[Facts], object | None]:
    def found(facts: Facts) -> object | None:
        names = of(facts.vllm, "model_config", "hf_config", "architectures") or []
        return next((name for name in names if name.startswith(prefixes)), None)

    return found


def _kimi_k3_with_tp(facts: Facts) -> object | None:
    if _more_than_one("tensor_parallel_size")(facts) is None:
        return None
    return _architecture("KimiK3")(facts)


def _first_engine(_: Facts) -> object | None:
    from vllm import envs

    try:
        return "0" if envs.VLLM_USE_V1 in (False, 0) else None
    except AttributeError:  # since the first engine is gone
        return None


def _async_eplb(facts: Facts) -> object | None:
    parallel = of(facts.vllm, "parallel_config")
    backend = str(of(parallel, "all2all_backend"))
    on = of(parallel, "enable_eplb") and of(parallel, "eplb_config", "use_async")
    return backend if on and backend.startswith("deepep") else None


def _variable(name: str) -> Callable[[Facts], object | None]:
    def found(_: Facts) -> object | None:
        value = os.environ.get(name, "0")
        return value if value not in ("", "0") else None

    return found


def torchair(ascend: Any) -> Any:
    """Return vllm-ascend's torchair configuration when its graph mode is on, else None."""
    graph = of(ascend, "torchair_graph_config")
    return graph if of(graph, "enabled") else None


def graph_mode(vllm: Any) -> str:
    """Return the name of vLLM's CUDA graph mode; empty where it has none or runs eagerly."""
    if vllm is None or of(vllm, "model_config", "enforce_eager"):
        return ""
    mode = of(vllm, "compilation_config", "cudagraph_mode")
    return str(getattr(mode, "name", mode or ""))


def _own_graphs(facts: Facts) -> object | None:
    model = of(facts.vllm, "model_config")
    eager = model is None or of(model, "enforce_eager") or torchair(facts.ascend)
    return None if eager else "on"


def _full_graphs(facts: Facts) -> object | None:
    mode = graph_mode(facts.vllm)
    return mode if mode not in ("", "NONE", "PIECEWISE") and not torchair(facts.ascend) else None


def _shared_experts(facts: Facts) -> object | None:
    eager = of(facts.vllm, "model_config", "enforce_eager")
    on = torchair(facts.ascend) and of(facts.ascend, "enable_shared_expert_dp")
    return "on" if on and not eager else None


def _o_proj_sharded(facts: Facts) -> object | None:
    sharded = of(facts.ascend, "layer_sharding") or ()
    return list(sharded) if "o_proj" in sharded else None


RULES: tuple[Rule, ...] = (
    Rule(
        "--decode-context-parallel-size",
        "its ranks share one request's cache inside the tensor-parallel group, and the o_proj "
        "input they produce has not been verified with a sharded o_proj",
        _more_than_one("decode_context_parallel_size"),
    ),
    Rule(
        "--prefill-context-parallel-size",
        "it adds a dimension to the rank layout in which rows differ between ranks that the "
        "otp group takes for equal",
        _more_than_one("prefill_context_parallel_size"),
    ),
    Rule(
        "--enable-elastic-ep",
        "its data-parallel ranks come and go in stateless groups, and a shard of the weight "
        "would go with them",
        _set("parallel_config", "enable_elastic_ep"),
    ),
    Rule(
        "--enable-fault-tolerance",
        "its retry builds vLLM's process groups anew and not the otp group",
        _set("parallel_config", "enable_fault_tolerance"),
    ),
    Rule(
        "asynchronous EPLB with --all2all-backend",
        "DeepEP then allows no other collective of the device in a forward pass",
        _async_eplb,
    ),
    Rule(
        "--enable-dbo",
        "two halves of a batch run in two threads, whose steps could meet in either order",
        _set("parallel_config", "enable_dbo"),
    ),
    Rule(
        "--ubatch-size",
        "the parts of a batch run in threads, whose steps could meet in either order",
        _more_than_one("ubatch_size"),
    ),
    Rule(
        "--enable-lora",
        "vLLM's LoRA layer bypasses the o_proj layer's own forward",
        _given("lora_config"),
    ),
    Rule(
        "--load-format",
        "this loader names its files, or finds its tensors, by tensor-parallel rank only, so "
        "data-parallel ranks with different shards would share them",
        _loads_by("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache"),
    ),
    Rule(
        "--load-format",
        "weights are handed over between instances by a package outside vLLM, which has not been "
        "verified with a sharded o_proj",
        _loads_by("modelexpress"),
    ),
    Rule(
        "--load-format",
        "this loader cuts weights by itself, by tensor-parallel rank only",
        _loads_by("bitsandbytes"),
    ),
    Rule(
        "--quantization",
        "its weights are cut, or made, outside the layer's own weight loader",
        _quantized_by("bitsandbytes", "gguf"),
    ),
    Rule(
        "the quantization's transform_config",
        "its transforms mix all input columns of a layer and cannot be cut",
        lambda facts: "given" if of(facts.vllm, "quant_config", "transform_config") else None,
    ),
    Rule(
        "the model architecture",
        "its output projection is wo_a and wo_b, not an o_proj",
        _architecture("DeepseekV4", "DeepSeekV4"),
        remedy="unset the variable for this model",
    ),
    Rule(
        "--tensor-parallel-size above 1 with the model architecture",
        "a fused kernel of this model reads o_proj's weight past the layer's forward",
        _kimi_k3_with_tp,
    ),
    Rule(
        "speculative_config.num_speculative_tokens_per_batch_size",
        "a rank drafts as many tokens as its own batch asks for, so ranks would run the drafter a "
        "different number of times",
        _given("speculative_config", "num_speculative_tokens_per_batch_size"),
        since="0.24.0",
        until="0.25.1",
        remedy="use num_speculative_tokens alone, or vLLM 0.26 or later",
    ),
    Rule(
        "VLLM_USE_V1",
        "vLLM's first engine does not run data-parallel ranks in lock step",
        _first_engine,
        until="0.10.2",
        remedy="set VLLM_USE_V1=1, or unset the variable",
    ),
    Rule(
        "additional_config.xlite_graph_config.enabled",
        "its kernels read the whole o_proj weight",
        lambda facts: of(facts.ascend, "xlite_graph_config", "enabled") or None,
        host="vllm-ascend",
    ),
    Rule(
        "additional_config.layer_sharding",
        "both shard o_proj, or switch its weights",
        _o_proj_sharded,
        host="vllm-ascend",
        remedy="take o_proj out of the list, or unset the variable",
    ),
    Rule(
        "VLLM_USE_V2_MODEL_RUNNER",
        "the second model runner of vllm-ascend does not synchronize its graphs across ranks",
        _variable("VLLM_USE_V2_MODEL_RUNNER"),
        host="vllm-ascend",
        remedy="unset one of the two",
    ),
    Rule(
        "VLLM_ASCEND_ENABLE_DBO",
        "its two micro-batches run o_proj on two streams at once",
        _variable("VLLM_ASCEND_ENABLE_DBO"),
        host="vllm-ascend",
        remedy="unset one of the two",
    ),
    Rule(
        "its ACL graphs",
        "each rank pads its rows and chooses its graph by itself there, so graphs of different "
        "sizes would meet",
        _own_graphs,
        host="vllm-ascend",
        since="0.9.1",
        until="0.9.1",
        remedy="use --enforce-eager, torchair_graph_config.enabled for DeepSeek models, or "
        "vllm-ascend 0.11.0 or later",
    ),
    Rule(
        "cudagraph_mode",
        "ranks do not agree on a full graph there",
        _full_graphs,
        host="vllm-ascend",
        since="0.11.0",
        until="0.11.0",
        remedy="use PIECEWISE or NONE, or vllm-ascend 0.13.0 or later",
    ),
    Rule(
        "additional_config.enable_shared_expert_dp with torchair",
        "ranks do not synchronize at all then",
        _shared_experts,
        host="vllm-ascend",
        since="0.11.0",
        until="0.11.0",
        remedy="disable one of the two",
    ),
)


def check(facts: Facts, settings: Settings, host: str, version: str, graph_rows: int) -> None:
    """Refuse a configuration that cannot be served.

    host: `vllm`, or `vllm-ascend` for the rules of both; version: of vllm-ascend there.
    graph_rows: largest row count for which a device graph may be captured.
    Raises OprojError (OprojValueError where a value of ours is at fault).
    """
    _dense(facts.vllm)
    for rule in RULES:
        if rule.host == "vllm-ascend" and (
            host != rule.host or not releases.applies(version, rule.since, rule.until)
        ):
            continue
        value = rule.found(facts)
        if value is not None:
            of_release = f" of vllm-ascend {version}" if rule.until and rule.host == host else ""
            raise OprojError(
                "OPROJ015",
                f"{TOGGLE} is {settings.size}, and {rule.option}{of_release} is {value}: "
                f"{rule.why}; {rule.remedy}.",
            )
    topology.check_size(settings.size, of(facts.vllm, "parallel_config", "data_parallel_size"))
    _graphs(settings, graph_rows)


def _graphs(settings: Settings, graph_rows: int) -> None:
    rows = settings.weight_gather_rows
    if rows and rows <= graph_rows:
        raise OprojError(
            "OPROJ002",
            f"{WEIGHT_GATHER_ROWS} is {rows}, but device graphs are captured for up to "
            f"{graph_rows} rows, which exchange rows; accepted are 0 (never gather weights) and "
            f"numbers above {graph_rows}: change it or unset it.",
        )
    if settings.debug and graph_rows:
        raise OprojError(
            "OPROJ015",
            f"OPROJ_PATCH_DEBUG is 1, and device graphs are captured for up to {graph_rows} "
            "rows: a rank that replays a graph cannot compare its place with the others; use "
            "--enforce-eager, or unset OPROJ_PATCH_DEBUG.",
        )


def _dense(vllm_config: Any) -> None:
    model = getattr(vllm_config, "model_config", None)
    if model is None or is_moe(model):
        return
    raise OprojError(
        "OPROJ004",
        f"{TOGGLE} is set, but {getattr(model, 'model', 'the model')} is a dense model: its "
        "data-parallel ranks run independently of each other and cannot share an o_proj; "
        "accepted are mixture-of-experts models: unset the variable for this model.",
    )


def is_moe(model_config: Any) -> bool:
    """Tell whether vLLM runs the data-parallel ranks of this model in lock step."""
    known = getattr(model_config, "is_moe", None)
    if isinstance(known, bool):
        return known
    # Before ModelConfig.is_moe existed (vLLM < 0.18).
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    return any((getattr(text, name, 0) or 0) for name in EXPERT_COUNTS)
