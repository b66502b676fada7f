"""What is refused before any process group or layer of ours exists, and why.

`RULES` is the single list of features that exclude a sharded o_proj; the documentation
repeats it and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import topology
from .errors import OprojError
from .settings import TOGGLE, Settings

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
"""Fields of a model's configuration of which at least one is above 0 in a mixture of experts."""


@dataclass(frozen=True)
class Rule:
    """One feature that cannot be combined with a sharded o_proj.

    option: how the user asked for it; why: the reason, as the end of a sentence.
    found: VllmConfig -> the value that asks for the feature, or None when it is not in use.
        Attributes that a release does not have count as not in use.
    """

    option: str
    why: str
    found: Callable[[Any], object | None]


def _more_than_one(name: str) -> Callable[[Any], object | None]:
    def found(config: Any) -> object | None:
        size = _of(config, "parallel_config", name) or 1
        return size if size > 1 else None

    return found


def _loads_by(*formats: str) -> Callable[[Any], object | None]:
    def found(config: Any) -> object | None:
        value = _of(config, "load_config", "load_format")
        name = str(getattr(value, "value", value)).lower()  # an enumeration before vLLM 0.10
        return name if name in formats else None

    return found


def _quantized_by(*names: str) -> Callable[[Any], object | None]:
    def found(config: Any) -> object | None:
        name = _of(config, "model_config", "quantization")
        return name if name in names else None

    return found


def _architecture(*prefixes: str) -> Callable[[Any], object | None]:
    def found(config: Any) -> object | None:
        names = _of(config, "model_config", "hf_config", "architectures") or []
        return next((name for name in names if name.startswith(prefixes)), None)

    return found


def _kimi_k3_with_tp(config: Any) -> object | None:
    return (
        _architecture("KimiK3")(config) if _more_than_one("tensor_parallel_size")(config) else None
    )


ELASTIC = Rule(
    "--enable-elastic-ep",
    "its data-parallel ranks come and go in stateless groups, and a shard of the weight would go "
    "with them",
    lambda config: _of(config, "parallel_config", "enable_elastic_ep") or None,
)

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
    ELASTIC,
    Rule(
        "--enable-dbo",
        "two halves of a batch run in two threads, whose exchanges could meet in either order",
        lambda config: _of(config, "parallel_config", "enable_dbo") or None,
    ),
    Rule(
        "--ubatch-size",
        "the parts of a batch run in threads, whose exchanges could meet in either order",
        _more_than_one("ubatch_size"),
    ),
    Rule(
        "--enable-lora",
        "vLLM's LoRA layer bypasses the o_proj layer's own forward",
        lambda config: "given" if _of(config, "lora_config") is not None else None,
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
        lambda config: "given" if _of(config, "quant_config", "transform_config") else None,
    ),
    Rule(
        "the model architecture",
        "its output projection is wo_a and wo_b, not an o_proj",
        _architecture("DeepseekV4", "DeepSeekV4"),
    ),
    Rule(
        "--tensor-parallel-size above 1 with the model architecture",
        "a fused kernel of this model reads o_proj's weight past the layer's forward",
        _kimi_k3_with_tp,
    ),
)


def check(vllm_config: Any, settings: Settings, dp_groups: Sequence[Sequence[int]]) -> None:
    """Refuse a configuration the shim cannot serve.

    vllm_config: vLLM's VllmConfig; dp_groups: global ranks of vLLM's data-parallel groups.
    Raises OprojError (OprojValueError where a value of ours is at fault).
    """
    _dense(vllm_config)
    for rule in RULES:
        _apply(rule, vllm_config, settings)
    topology.check_size(settings.size, len(dp_groups[0]))


def check_stateless(vllm_config: Any, settings: Settings) -> None:
    """Refuse what never creates a data-parallel group in the usual way, so never gets to `check`.

    Raises OprojError.
    """
    _apply(ELASTIC, vllm_config, settings)


def elastic(vllm_config: Any) -> bool:
    """Whether vLLM creates no data-parallel group in the usual way."""
    return ELASTIC.found(vllm_config) is not None


def _apply(rule: Rule, vllm_config: Any, settings: Settings) -> None:
    value = rule.found(vllm_config)
    if value is not None:
        raise OprojError(
            "OPROJ015",
            f"{TOGGLE} is {settings.size}, and {rule.option} is {value}: {rule.why}; accepted is "
            "one without the other: remove the option, or unset the variable.",
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
    """Whether vLLM runs the data-parallel ranks of this model in lock step."""
    known = getattr(model_config, "is_moe", None)
    if isinstance(known, bool):
        return known
    # Before ModelConfig.is_moe existed (vLLM < 0.18).
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    return any((getattr(text, name, 0) or 0) for name in EXPERT_COUNTS)


def _of(config: Any, *path: str) -> Any:
    for name in path:
        config = getattr(config, name, None)
    return config
