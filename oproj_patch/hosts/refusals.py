"""Every configuration that is refused before any process group or layer of ours exists, and why.

`RULES` is the single list, for both hosts. The tables of the documents are made from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .. import releases
from ..errors import OprojError
from ..settings import TOGGLE, WEIGHT_GATHER_ROWS, Settings
from ..sharding import topology

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
"""Fields of a model's configuration that hold its number of experts."""

ARCHITECTURES = "model_config.hf_config.architectures"


class Facts(NamedTuple):
    """What a rule looks at: vLLM's VllmConfig, and vllm-ascend's AscendConfig if it is there."""

    vllm: Any
    ascend: Any = None


Found = Callable[[Facts], object]


class Rule(NamedTuple):
    """One feature that cannot be combined with a sharded o_proj.

    option: how the user asked for it; why: the reason, as the end of a sentence.
    found: facts -> the value that asks for the feature; false when it is not in use. Attributes
        that a release does not have count as not in use.
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


def of(config: Any, path: str) -> Any:
    """Return the attribute at the dotted `path`, or None where a release lacks a part of it."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def torchair(ascend: Any) -> bool:
    """Tell whether vllm-ascend's torchair graph mode is on."""
    return bool(of(ascend, "torchair_graph_config.enabled"))


def graph_mode(vllm: Any) -> str:
    """Return the name of vLLM's graph mode; NONE without graphs; `on` before there were names."""
    compilation = of(vllm, "compilation_config")
    mode = of(compilation, "cudagraph_mode")
    # Read from 0.9.1 to 0.10.0, where only level 3 captures.
    level, graphs = of(compilation, "level"), of(compilation, "use_cudagraph")
    off = mode is None and (level not in (None, 3) or graphs is False)
    none = off or of(vllm, "model_config.enforce_eager")
    return "NONE" if none else str(of(mode, "name") or mode or "on")


def _set(path: str) -> Found:
    return lambda facts: of(facts.vllm, path)


def _given(path: str) -> Found:
    return lambda facts: of(facts.vllm, path) is not None and "given"


def _additional(name: str) -> Found:
    def found(facts: Facts) -> object:
        given = of(facts.vllm, "additional_config")
        return isinstance(given, dict) and given.get(name)

    return found


def _more_than_one(name: str) -> Found:
    return lambda facts: (n := of(facts.vllm, f"parallel_config.{name}") or 1) > 1 and n


class _Named:
    """Finds, at `path`, the name (of a list: the first) that one of `patterns` matches."""

    def __init__(self, path: str, *patterns: str) -> None:
        self.path, self.patterns = path, patterns

    def __call__(self, facts: Facts) -> object:
        value = of(facts.vllm, self.path)
        value = getattr(value, "value", value)  # an enumeration before vLLM 0.10
        names, sought = value if isinstance(value, list) else [value], self.patterns
        return next((n for n in names for p in sought if fnmatchcase(str(n).lower(), p)), None)


class _Captured:
    """Finds the graph mode where it is one of `patterns`."""

    def __init__(self, *modes: str) -> None:
        self.patterns = modes

    def __call__(self, facts: Facts) -> object:
        return not torchair(facts.ascend) and (m := graph_mode(facts.vllm)) in self.patterns and m


class _All:
    """Finds the value of the last of `finders` when all find one."""

    def __init__(self, *finders: Found) -> None:
        self.finders = finders
        self.patterns = tuple(p for found in finders for p in getattr(found, "patterns", ()))

    def __call__(self, facts: Facts) -> object:
        return all(found(facts) for found in self.finders) and self.finders[-1](facts)


def _variable(name: str) -> Found:
    return lambda _: (value := os.environ.get(name, "")) != "0" and value


def _rocm(_: Facts) -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_rocm())


def _asynchronous_eplb(facts: Facts) -> object:
    # Before 0.23 EPLB has NCCL only. From 0.23 on vLLM itself names another communicator where EPLB
    # is on, and from 0.24 on it refuses NCCL.
    eplb = of(facts.vllm, "parallel_config.eplb_config")
    on = of(facts.vllm, "parallel_config.enable_eplb") and of(eplb, "use_async")
    return on and of(eplb, "communicator") in (None, "torch_nccl", "pynccl")


def _first_engine(_: Facts) -> object:
    from vllm import envs

    return not getattr(envs, "VLLM_USE_V1", True) and "0"  # gone with the first engine


def _shared_experts(facts: Facts) -> object:
    on = torchair(facts.ascend) and of(facts.ascend, "enable_shared_expert_dp")
    return on and not of(facts.vllm, "model_config.enforce_eager") and "on"


deepseek_v4 = _Named(ARCHITECTURES, "deepseekv4*")
"""Finds a DeepSeek V4 or V4.1."""

RULES: tuple[Rule, ...] = (
    Rule("--enable-elastic-ep", _set("parallel_config.enable_elastic_ep"),
         "its data-parallel ranks come and go in stateless groups, and a shard of the weight "
         "would go with them"),
    Rule("--enable-fault-tolerance", _set("parallel_config.enable_fault_tolerance"),
         "its retry builds vLLM's process groups anew and not the otp group"),
    Rule("eplb_config.use_async over NCCL", _asynchronous_eplb,
         "its thread moves experts over NCCL, beside which no forward pass may use NCCL, or ranks "
         "wait for each other",
         remedy="set eplb_config.use_async to false, or eplb_config.communicator to nixl or "
         "torch_gloo (vLLM 0.23 or later), or unset the variable"),
    Rule("--enable-dbo with device graphs",
         _All(_set("parallel_config.enable_dbo"),
              _Captured("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")),
         "a rank that replays a graph and one that does not announce different rows for the halves "
         "of a batch", since="0.11.0", until="0.12.0",
         remedy="use PIECEWISE or NONE, or vLLM 0.13 or later"),
    Rule("--load-format", _Named("load_config.load_format", "sharded_state", "tensorizer",
                                 "runai_streamer_sharded", "ipc_cache", "rfork", "bitsandbytes"),
         "this loader names its files, or finds or cuts its tensors, by tensor-parallel rank only"),
    Rule("--load-format", _Named("load_config.load_format", "modelexpress", "netloader"),
         "weights come from another instance, which has not been verified"),
    Rule("--quantization", _Named("model_config.quantization", "bitsandbytes", "gguf"),
         "its weights are cut, or made, outside the layer's own weight loader"),
    Rule("the quantization's transform_config",
         lambda facts: of(facts.vllm, "quant_config.transform_config") and "given",
         "its transforms mix all input columns of a layer and cannot be cut"),
    Rule("on ROCm the model architecture", _All(_rocm, deepseek_v4),
         "its kernels there (_bpre_attn_gemm, the mono kernels) read wo_b's weight without calling "
         "the layer", remedy="unset the variable for this model"),
    Rule("VLLM_ENABLE_GEMM_RS with tensor parallelism and the model architecture",
         _All(_variable("VLLM_ENABLE_GEMM_RS"), _more_than_one("tensor_parallel_size"),
              _Named(ARCHITECTURES, "deepseekv41*")),
         "its fused GEMM and reduce-scatter reads wo_b's weight without calling the layer",
         remedy="unset one of the two variables"),
    Rule("--enable-lora with the model architecture",
         _All(_given("lora_config"), deepseek_v4),
         "its two output projections have not been run below a LoRA layer"),
    Rule("--tensor-parallel-size above 1 with the model architecture",
         _All(_more_than_one("tensor_parallel_size"), _Named(ARCHITECTURES, "kimik3*")),
         "a fused kernel of this model reads o_proj's weight without calling the layer"),
    Rule("--tensor-parallel-size above 1 with the model architecture",
         _All(_more_than_one("tensor_parallel_size"), _Named(ARCHITECTURES, "musespark*")),
         "a fused kernel of this model reads o_proj's weight without calling the layer",
         since="0.33.0"),
    Rule("additional_config.decode_backend",
         lambda facts: (told := _additional("decode_backend")(facts)) != "auto" and told,
         "its kernels read o_proj's weight without calling the layer", since="0.33.0"),
    Rule("speculative_config.num_speculative_tokens_per_batch_size",
         _given("speculative_config.num_speculative_tokens_per_batch_size"),
         "a rank drafts as many tokens as its own batch asks for, so ranks would run the drafter a "
         "different number of times",
         remedy="use num_speculative_tokens alone, or vLLM 0.26 or later, which ignores this, "
         "or unset the variable"),
    Rule("VLLM_USE_V1", _first_engine,
         "vLLM's first engine does not run data-parallel ranks in lock step",
         remedy="set VLLM_USE_V1=1, or unset the variable"),
    Rule("cudagraph_mode", _Captured("FULL_DECODE_ONLY"),
         "its runner asserts that no rank decodes while another prefills",
         since="0.12.0", until="0.12.0",
         remedy="use FULL_AND_PIECEWISE, which is the default, or vLLM 0.13 or later"),
    Rule("additional_config.xlite_graph_config.enabled",
         lambda facts: of(facts.ascend, "xlite_graph_config.enabled"),
         "its kernels read the whole o_proj weight", host="vllm-ascend"),
    Rule("additional_config.layer_sharding",
         lambda facts: "o_proj" in (named := of(facts.ascend, "layer_sharding") or ()) and named,
         "both shard o_proj, or switch its weights", host="vllm-ascend",
         remedy="take o_proj out of the list, or unset the variable"),
    Rule("additional_config.sparse_kv_offload_config.enabled",
         lambda facts: of(facts.ascend, "sparse_kv_offload_config.enabled"),
         "its attention has a class of its own, in which an idle rank does not reach o_proj",
         host="vllm-ascend", since="0.26.0rc1"),
    Rule("additional_config.enable_dsa_cp", _additional("enable_dsa_cp"),
         "its attention multiplies rows by a whole o_proj weight, which it gathers itself",
         host="vllm-ascend", since="0.23.0"),
    Rule("--prefill-context-parallel-size", _more_than_one("prefill_context_parallel_size"),
         "its attention shards o_proj over the ranks of a prefill, or switches its weight",
         host="vllm-ascend", since="0.30.0rc2"),
    Rule("--enable-lora", _given("lora_config"),
         "its MLA runs the o_proj that it was built with, not the LoRA layer in its place, and its "
         "other LoRA layers have not been run with a sharded o_proj", host="vllm-ascend"),
    Rule("VLLM_USE_V2_MODEL_RUNNER", _variable("VLLM_USE_V2_MODEL_RUNNER"),
         "the second model runner of vllm-ascend does not synchronize its graphs across ranks",
         host="vllm-ascend", until="0.26.0rc1", remedy="unset one of the two"),
    Rule("VLLM_USE_V2_MODEL_RUNNER", _variable("VLLM_USE_V2_MODEL_RUNNER"),
         "the second model runner of vllm-ascend leaves out vLLM's agreement on rows and graphs "
         "where it transfers caches, and has not been run with a sharded o_proj",
         host="vllm-ascend", since="0.30.0rc2", remedy="unset one of the two"),
    Rule("VLLM_ASCEND_ENABLE_DBO", _variable("VLLM_ASCEND_ENABLE_DBO"),
         "its two micro-batches take turns in a layer, and ranks agree on rows once a forward pass",
         host="vllm-ascend", until="0.11.0", remedy="unset one of the two"),
    Rule("cudagraph_mode", _Captured("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"),
         "ranks do not agree on a full graph there",
         host="vllm-ascend", since="0.11.0", until="0.11.0",
         remedy="use PIECEWISE or NONE, or vllm-ascend 0.13.0 or later"),
    Rule("additional_config.enable_shared_expert_dp with torchair", _shared_experts,
         "ranks do not synchronize at all then", host="vllm-ascend", since="0.11.0",
         until="0.11.0", remedy="disable one of the two"),
)  # fmt: skip


def check(facts: Facts, settings: Settings, versions: Mapping[str, str], graph_rows: int) -> None:
    """Refuse a configuration that cannot be served.

    versions: of vllm, and of vllm-ascend if it is there; graph_rows: as `Vllm.graph_rows` tells.
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
        here = version is not None and releases.in_range(version, rule.since, rule.until)
        if here and (value := rule.found(facts)):
            of_release = f" of {rule.host} {version}" if rule.until else ""
            raise OprojError(
                "OPROJ015",
                f"{TOGGLE} is {settings.size}, and {rule.option}{of_release} is {value}: "
                f"{rule.why}; {rule.remedy}.",
            )
    topology.check_size(settings.size, of(facts.vllm, "parallel_config.data_parallel_size"))
    topology.check_grid(settings.grid, settings.size)
    if 0 < (rows := settings.weight_gather_rows or 0) <= graph_rows:
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
    known = of(model_config, "is_moe")  # since vLLM 0.18
    if isinstance(known, bool):
        return known
    return any(of(model_config.hf_text_config, name) for name in EXPERT_COUNTS)
