"""Every configuration that is refused before any process group or layer of ours exists, and why.

`RULES` is the single list, for both hosts. The tables of the documents are made from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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


Found = Callable[[Facts], "object | None"]


class Rule(NamedTuple):
    """One feature that cannot be combined with a sharded o_proj.

    option: how the user asked for it; why: the reason, as the end of a sentence.
    found: facts -> the value that asks for the feature, or None when it is not in use.
        Attributes that a release does not have count as not in use.
    host: the host that has the feature; since, until: its first and last release with it, empty:
        no such end. remedy: what to do.
    """

    option: str
    found: Found
    why: str
    host: str = "vllm"
    since: str = ""
    until: str = ""
    remedy: str = "remove the option, or unset the variable"


def of(config: Any, *path: str) -> Any:
    """Return the attribute at `path`, or None where a release lacks a part of it."""
    for name in path:
        config = getattr(config, name, None)
    return config


def _more_than_one(name: str) -> Found:
    return lambda facts: n if (n := of(facts.vllm, "parallel_config", name) or 1) > 1 else None


def _set(*path: str) -> Found:
    return lambda facts: of(facts.vllm, *path) or None


def _given(*path: str) -> Found:
    return lambda facts: "given" if of(facts.vllm, *path) is not None else None


def _loads_by(*formats: str) -> Found:
    def found(facts: Facts) -> object | None:
        value = of(facts.vllm, "load_config", "load_format")
        name = str(getattr(value, "value", value)).lower()  # an enumeration before vLLM 0.10
        return name if name in formats else None

    return found


def _architecture(*prefixes: str) -> Found:
    def found(facts: Facts) -> object | None:
        names = of(facts.vllm, "model_config", "hf_config", "architectures") or []
        return next((name for name in names if name.startswith(prefixes)), None)

    return found


def _variable(name: str) -> Found:
    return lambda _: value if (value := os.environ.get(name, "")) not in ("", "0") else None


def _kimi_k3_with_tp(facts: Facts) -> object | None:
    return _more_than_one("tensor_parallel_size")(facts) and _architecture("KimiK3")(facts)


def _quantized_outside(facts: Facts) -> object | None:
    name = of(facts.vllm, "model_config", "quantization")
    return name if name in ("bitsandbytes", "gguf") else None


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


def _full_decode_only(facts: Facts) -> object | None:
    mode = graph_mode(facts.vllm)
    return mode if mode == "FULL_DECODE_ONLY" else None


def _shared_experts(facts: Facts) -> object | None:
    eager = of(facts.vllm, "model_config", "enforce_eager")
    on = torchair(facts.ascend) and of(facts.ascend, "enable_shared_expert_dp")
    return "on" if on and not eager else None


def _o_proj_sharded(facts: Facts) -> object | None:
    sharded = of(facts.ascend, "layer_sharding") or ()
    return list(sharded) if "o_proj" in sharded else None


RULES: tuple[Rule, ...] = (
    Rule("--decode-context-parallel-size", _more_than_one("decode_context_parallel_size"),
         "its ranks share one request's cache inside the tensor-parallel group, and the o_proj "
         "input they produce has not been verified with a sharded o_proj"),
    Rule("--prefill-context-parallel-size", _more_than_one("prefill_context_parallel_size"),
         "it adds a dimension to the rank layout in which rows differ between ranks that the "
         "otp group takes for equal"),
    Rule("--enable-elastic-ep", _set("parallel_config", "enable_elastic_ep"),
         "its data-parallel ranks come and go in stateless groups, and a shard of the weight "
         "would go with them"),
    Rule("--enable-fault-tolerance", _set("parallel_config", "enable_fault_tolerance"),
         "its retry builds vLLM's process groups anew and not the otp group"),
    Rule("asynchronous EPLB with --all2all-backend", _async_eplb,
         "DeepEP then allows no other collective of the device in a forward pass"),
    Rule("--enable-dbo", _set("parallel_config", "enable_dbo"),
         "two halves of a batch run in two threads, whose steps could meet in either order"),
    Rule("--ubatch-size", _more_than_one("ubatch_size"),
         "the parts of a batch run in threads, whose steps could meet in either order"),
    Rule("--enable-lora", _given("lora_config"),
         "vLLM's LoRA layer bypasses the o_proj layer's own forward"),
    Rule("--load-format",
         _loads_by("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache"),
         "this loader names its files, or finds its tensors, by tensor-parallel rank only, so "
         "data-parallel ranks with different shards would share them"),
    Rule("--load-format", _loads_by("modelexpress"),
         "weights are handed over between instances by a package outside vLLM, which has not been "
         "verified with a sharded o_proj"),
    Rule("--load-format", _loads_by("bitsandbytes"),
         "this loader cuts weights by itself, by tensor-parallel rank only"),
    Rule("--quantization", _quantized_outside,
         "its weights are cut, or made, outside the layer's own weight loader"),
    Rule("the quantization's transform_config",
         lambda facts: "given" if of(facts.vllm, "quant_config", "transform_config") else None,
         "its transforms mix all input columns of a layer and cannot be cut"),
    Rule("the model architecture", _architecture("DeepseekV4", "DeepSeekV4"),
         "its output projection is wo_a and wo_b, not an o_proj",
         remedy="unset the variable for this model"),
    Rule("--tensor-parallel-size above 1 with the model architecture", _kimi_k3_with_tp,
         "a fused kernel of this model reads o_proj's weight past the layer's forward"),
    Rule("speculative_config.num_speculative_tokens_per_batch_size",
         _given("speculative_config", "num_speculative_tokens_per_batch_size"),
         "a rank drafts as many tokens as its own batch asks for, so ranks would run the drafter a "
         "different number of times",
         remedy="use num_speculative_tokens alone, or vLLM 0.26 or later, or unset the variable"),
    Rule("VLLM_USE_V1", _first_engine,
         "vLLM's first engine does not run data-parallel ranks in lock step",
         remedy="set VLLM_USE_V1=1, or unset the variable"),
    Rule("cudagraph_mode", _full_decode_only,
         "its runner asserts that no rank decodes while another prefills",
         since="0.12.0", until="0.12.0",
         remedy="use FULL_AND_PIECEWISE, which is the default, or vLLM 0.13 or later"),
    Rule("additional_config.xlite_graph_config.enabled",
         lambda facts: of(facts.ascend, "xlite_graph_config", "enabled") or None,
         "its kernels read the whole o_proj weight", host="vllm-ascend"),
    Rule("additional_config.layer_sharding", _o_proj_sharded,
         "both shard o_proj, or switch its weights", host="vllm-ascend",
         remedy="take o_proj out of the list, or unset the variable"),
    Rule("VLLM_USE_V2_MODEL_RUNNER", _variable("VLLM_USE_V2_MODEL_RUNNER"),
         "the second model runner of vllm-ascend does not synchronize its graphs across ranks",
         host="vllm-ascend", remedy="unset one of the two"),
    Rule("VLLM_ASCEND_ENABLE_DBO", _variable("VLLM_ASCEND_ENABLE_DBO"),
         "its two micro-batches run o_proj on two streams at once",
         host="vllm-ascend", remedy="unset one of the two"),
    Rule("its ACL graphs", _own_graphs,
         "each rank pads its rows and chooses its graph by itself there, so graphs of different "
         "sizes would meet", host="vllm-ascend", since="0.9.1", until="0.9.1",
         remedy="use --enforce-eager, torchair_graph_config.enabled for DeepSeek models, or "
         "vllm-ascend 0.11.0 or later"),
    Rule("cudagraph_mode", _full_graphs, "ranks do not agree on a full graph there",
         host="vllm-ascend", since="0.11.0", until="0.11.0",
         remedy="use PIECEWISE or NONE, or vllm-ascend 0.13.0 or later"),
    Rule("additional_config.enable_shared_expert_dp with torchair", _shared_experts,
         "ranks do not synchronize at all then", host="vllm-ascend", since="0.11.0",
         until="0.11.0", remedy="disable one of the two"),
)  # fmt: skip


def check(facts: Facts, settings: Settings, versions: Mapping[str, str], graph_rows: int) -> None:
    """Refuse a configuration that cannot be served.

    versions: of vllm, and of vllm-ascend if it is there.
    graph_rows: largest row count for which a device graph may be captured.
    Raises OprojError (OprojValueError where a value of ours is at fault).
    """
    model = of(facts.vllm, "model_config")
    if model is not None and not is_moe(model):
        raise OprojError(
            "OPROJ004",
            f"{TOGGLE} is set, but {getattr(model, 'model', 'the model')} is a dense model: its "
            "data-parallel ranks run independently of each other and cannot share an o_proj; "
            "accepted are mixture-of-experts models: unset the variable for this model.",
        )
    for rule in RULES:
        version = versions.get(rule.host)
        if version is None or not releases.applies(version, rule.since, rule.until):
            continue
        value = rule.found(facts)
        if value is not None:
            of_release = f" of {rule.host} {version}" if rule.until else ""
            raise OprojError(
                "OPROJ015",
                f"{TOGGLE} is {settings.size}, and {rule.option}{of_release} is {value}: "
                f"{rule.why}; {rule.remedy}.",
            )
    topology.check_size(settings.size, of(facts.vllm, "parallel_config", "data_parallel_size"))
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


def is_moe(model_config: Any) -> bool:
    """Tell whether vLLM runs the data-parallel ranks of this model in lock step."""
    known = getattr(model_config, "is_moe", None)
    if isinstance(known, bool):
        return known
    # Before ModelConfig.is_moe existed (vLLM < 0.18).
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    return any((getattr(text, name, 0) or 0) for name in EXPERT_COUNTS)
