"""The seams in vllm-ascend, on top of those in vLLM.

Three things differ from upstream vLLM. vllm-ascend has o_proj classes of its own, whose
constructors never call vLLM's. Its attention *implementation* calls o_proj, and returns early
when there is no attention metadata, so the dummy batch of an idle rank would leave the other
ranks waiting. And its data-parallel metadata may be made up, so the ranks agree on their rows
themselves, once a forward pass.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, cast

import torch

from .. import releases, row_parallel
from ..errors import OprojError
from ..otp_group import OtpGroup
from ..row_counts import Counts
from ..settings import TOGGLE, Settings
from . import vllm
from .registry import Seam

DISTRIBUTION = "vllm-ascend"
TORCHAIR = "vllm_ascend.torchair"
SPARSE = "vllm_ascend.models.deepseek_v3_2"

# Operators vllm-ascend may put in place of a row-parallel forward that change nothing
# without tensor parallelism: they reduce over the tensor-parallel group only.
_PLAIN_WITHOUT_TP = ("SequenceRowParallelOp", "MatmulAllreduceRowParallelOp")


class Forward(vllm.Forward):
    """What vllm-ascend tells about a forward pass."""

    def __init__(self) -> None:
        self._followers: frozenset[str] = frozenset()
        self._pass = _Pass()
        self._npu: Any = None

    def capturing(self) -> bool:
        if self._npu is None:
            npu = getattr(torch, "npu", None)
            self._npu = npu if npu is not None and npu.is_available() else False
        return bool(self._npu and self._npu.is_current_stream_capturing())

    def context(self, layer: str) -> Any:
        """Rows hold from the first layer of the model to its last; a drafter's hold once.

        vllm-ascend runs several steps of a drafter, with different rows, in one forward
        context. Which layer it is, is the same on every rank; contexts need not be.
        """
        if layer not in self._followers:
            self._pass = _Pass()
        return self._pass

    def announced(self, group: OtpGroup) -> Counts | None:
        # Where vllm-ascend skips its synchronisation, or pads some ranks only, its metadata
        # differs from rank to rank.
        return None

    def drafter_in_step(self) -> bool:
        return True

    def traceable(self) -> bool:
        return _torchair() is not None

    def seal(self, group: OtpGroup) -> None:
        super().seal(group)
        self._followers = frozenset(list(group.layers)[1 : group.main_layers])


class _Pass:
    """One agreement on rows."""


def seams(settings: Settings, versions: dict[str, str]) -> tuple[Seam, ...]:
    """The registry for the installed vllm-ascend, vLLM's own seams included."""
    host = Forward()
    version = versions[DISTRIBUTION]

    def refuse(vllm_config: Any) -> None:
        refuse_configuration(vllm_config, version)

    own = [entry for entry in registry(host) if _applies(entry, version)]
    if _torchair() is None:
        # vllm-ascend imports these modules, and torchair with them, only in that mode.
        own = [entry for entry in own if not entry.module.startswith(TORCHAIR)]
    # To import this one turns every DeepSeek into V3.2: its last line exchanges the constructor
    # of vLLM's decoder layer.
    own = [entry for entry in own if entry.module != SPARSE or _builds_sparse()]
    return (*vllm.seams(settings, versions, host, refuse), *own)


def registry(host: Forward) -> tuple[Seam, ...]:
    """All seams in vllm-ascend, of every release."""
    constructed = constructor(host)

    def linear(module: str, name: str, since: str, until: str = "") -> Seam:
        return Seam(
            module=f"vllm_ascend.{module}",
            path=f"{name}.__init__",
            wrapper=constructed,
            parameters=(),
            why="Make an o_proj of this class a sharded layer before its weights exist.",
            lower="The constructor chooses group, rank and size in one place, and does not call "
            "that of vLLM's RowParallelLinear in every release.",
            unpatched="Every rank keeps the whole weight.",
            upstream=f"vllm_ascend/{module.replace('.', '/')}.py",
            remove="The class takes its group as an argument.",
            since=since,
            until=until,
        )

    def attention(module: str, name: str, since: str, until: str = "") -> Seam:
        return Seam(
            module=f"vllm_ascend.{module}",
            path=f"{name}.__init__",
            wrapper=vllm.attention_constructed,
            parameters=("prefix",),
            why="Check that this attention got a sharded o_proj.",
            lower="Only the attention knows which of its layers is the o_proj, whatever class "
            "was chosen for it.",
            unpatched="An o_proj of an unknown class would silently keep the whole weight.",
            upstream=f"vllm_ascend/{module.replace('.', '/')}.py",
            remove="vllm-ascend shards o_proj in every mode itself.",
            since=since,
            until=until,
        )

    def implementation(module: str, name: str, since: str, until: str = "") -> Seam:
        return Seam(
            module=f"vllm_ascend.{module}",
            path=f"{name}.forward",
            wrapper=attention_ran,
            parameters=("attn_metadata", "output"),
            why="Let a rank without attention metadata (idle rank, profile run) take part in "
            "the exchange.",
            lower="The early return is in this method, before o_proj.",
            unpatched="The other ranks of the group wait for ever.",
            upstream=f"vllm_ascend/{module.replace('.', '/')}.py",
            remove="The implementation runs o_proj without metadata.",
            since=since,
            until=until,
        )

    def synchronised(module: str, path: str, since: str, until: str = "") -> Seam:
        return Seam(
            module=f"vllm_ascend.{module}",
            path=path,
            wrapper=never,
            parameters=(),
            why="Keep vllm-ascend's synchronisation of rows and graph mode across ranks.",
            lower="This is the function that decides to skip it; both the model runner and the "
            "MoE dispatcher follow it.",
            unpatched="Ranks replay graphs of different sizes or modes, and wait for ever.",
            upstream=f"vllm_ascend/{module.replace('.', '/')}.py",
            remove="The graph mode is synchronised on this path too.",
            since=since,
            until=until,
        )

    return (
        linear("models.deepseek_v2", "RowParallelScatterLinear", "0.9.1", "0.9.1"),
        linear("ops.linear", "AscendRowParallelLinear", "0.11.0"),
        linear("models.deepseek_v3_2", "CustomDeepseekV2RowParallelLinear", "0.11.0", "0.11.0"),
        linear(
            "torchair.models.torchair_deepseek_v2",
            "TorchairDeepseekV2RowParallelLinear",
            "0.11.0",
            "0.11.0",
        ),
        linear(
            "torchair.models.torchair_deepseek_v2",
            "TorchairDeepseekV2RowParallelLinearReplaceAllreduce",
            "0.11.0",
            "0.11.0",
        ),
        attention("models.deepseek_v2", "CustomDeepseekV2MLAAttention", "0.9.1", "0.9.1"),
        attention("models.deepseek_v3_2", "CustomDeepseekV2SFAAttention", "0.11.0", "0.11.0"),
        attention(
            "torchair.models.torchair_deepseek_v2",
            "TorchairDeepseekV2MLAAttention",
            "0.11.0",
            "0.11.0",
        ),
        attention(
            "torchair.models.torchair_deepseek_v2",
            "TorchairDeepseekV2SFAAttention",
            "0.11.0",
            "0.11.0",
        ),
        implementation("attention.mla_v1", "AscendMLAImpl", "0.9.1"),
        implementation("attention.sfa_v1", "AscendSFAImpl", "0.11.0"),
        implementation("torchair.torchair_mla", "AscendMLATorchairImpl", "0.11.0", "0.11.0"),
        implementation("torchair.torchair_sfa", "AscendSFATorchairImpl", "0.11.0", "0.11.0"),
        synchronised(
            "worker.model_runner_v1",
            "NPUModelRunner._skip_all_reduce_across_dp_group",
            "0.13.0",
            "0.13.0",
        ),
        synchronised("worker.model_runner_v1", "should_skip_allreduce_across_dp_group", "0.18.0"),
        synchronised(
            "ops.fused_moe.token_dispatcher", "should_skip_allreduce_across_dp_group", "0.18.0"
        ),
    )


def constructor(host: Forward) -> Callable[..., None]:
    """Wrapper of a row-parallel layer's constructor: an o_proj becomes a sharded layer."""
    construct = vllm.constructor(host)

    def linear_constructed(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        nested = isinstance(instance, row_parallel.ShardedMixin)
        construct(wrapped, instance, args, kwargs)
        if not nested and isinstance(instance, row_parallel.ShardedMixin):
            _check_layer(instance)

    return linear_constructed


def attention_ran(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Wrapper of an attention implementation's forward: it always runs its o_proj."""
    result = wrapped(*args, **kwargs)
    if _argument(wrapped, "attn_metadata", args, kwargs) is not None:
        return result
    layer: Any = getattr(instance, "o_proj", None)
    if isinstance(layer, row_parallel.ShardedMixin):
        layer = cast(Any, layer)
        output = _argument(wrapped, "output", args, kwargs)
        columns = layer.input_size // layer.oproj.group.tp_size
        layer(output.new_zeros((output.shape[0], columns)))
        # 0.9.1 returns what happened to be in memory; an idle rank's numbers go nowhere, but
        # NaNs among them would spread through the experts' all-to-all.
        output.zero_()
    return result


def _argument(wrapped: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[_names(wrapped.__func__).index(name) - 1]


@functools.cache
def _names(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def never(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> bool:
    """Wrapper of a question whose answer must be no."""
    return False


def refuse_configuration(vllm_config: Any, version: str) -> None:
    """Refuse what vllm-ascend `version` cannot combine with a sharded o_proj.

    vllm_config: vLLM's VllmConfig. Raises OprojError naming the option.
    """
    config = _ascend_config()
    for told, why in _conflicts(vllm_config, config, version):
        raise OprojError("OPROJ015", f"{TOGGLE} is set together with {told}: {why}.")


def _conflicts(vllm_config: Any, config: Any, version: str) -> list[tuple[str, str]]:
    """(option as found, why not and what to do) of every conflict."""
    parallel = vllm_config.parallel_config
    found: list[tuple[str, str]] = []

    def when(condition: Any, told: str, why: str) -> None:
        if condition:
            found.append((told, why))

    xlite = getattr(config, "xlite_graph_config", None)
    when(
        getattr(xlite, "enabled", False),
        "additional_config.xlite_graph_config.enabled",
        "its kernels read the whole o_proj weight; disable one of the two",
    )
    sharded = getattr(config, "layer_sharding", None) or ()
    when(
        "o_proj" in sharded,
        f"additional_config.layer_sharding {list(sharded)}",
        "both shard o_proj; take it out of the list, or unset the variable",
    )
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        when(
            getattr(parallel, name, 1) > 1,
            f"{name} {getattr(parallel, name, 1)}",
            "context-parallel attention runs o_proj a different number of times on different "
            "ranks; set it to 1, or unset the variable",
        )
    when(
        os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("", "0"),
        "VLLM_USE_V2_MODEL_RUNNER",
        "the second model runner of vllm-ascend does not synchronise its graphs across ranks; "
        "unset one of the two",
    )
    when(
        os.environ.get("VLLM_ASCEND_ENABLE_DBO", "0") not in ("", "0"),
        "VLLM_ASCEND_ENABLE_DBO",
        "its two micro-batches run o_proj on two streams at once; unset one of the two",
    )
    drafter = getattr(vllm_config, "speculative_config", None)
    when(
        releases.in_range(version, "0.11.0", "0.11.0")
        and getattr(drafter, "method", "") in ("eagle", "eagle3")
        and getattr(drafter, "num_speculative_tokens", 0) > 1,
        f"speculative decoding by {getattr(drafter, 'method', '')} of vllm-ascend {version}",
        "an idle rank runs the drafter once there, a working one once a token; set "
        "num_speculative_tokens to 1, or unset the variable",
    )
    when(
        releases.in_range(version, "0.9.1", "0.9.1") and not _second_engine(),
        "VLLM_USE_V1=0, which is the default there",
        "vLLM's first engine is not supported; set VLLM_USE_V1=1, or unset the variable",
    )
    found += _graph_conflicts(vllm_config, config, version)
    return found


def _graph_conflicts(vllm_config: Any, config: Any, version: str) -> list[tuple[str, str]]:
    """Graph modes in which ranks would replay graphs of different sizes or modes."""
    model = vllm_config.model_config
    torchair = _torchair()
    found: list[tuple[str, str]] = []
    if model is None or getattr(model, "enforce_eager", False):
        return found
    if releases.in_range(version, "0.9.1", "0.9.1"):
        if torchair is None:
            found.append(
                (
                    f"ACL graphs of vllm-ascend {version}",
                    "each rank pads its rows by itself there, so graphs of different sizes would "
                    "meet; use --enforce-eager or torchair_graph_config.enabled",
                )
            )
        return found
    mode = getattr(getattr(vllm_config, "compilation_config", None), "cudagraph_mode", None)
    name = str(getattr(mode, "name", mode))
    if releases.in_range(version, "0.11.0", "0.11.0"):
        if torchair is None and name not in ("NONE", "PIECEWISE", "None"):
            found.append(
                (
                    f"cudagraph_mode {name} of vllm-ascend {version}",
                    "ranks do not agree on the graph mode there; accepted are PIECEWISE and NONE",
                )
            )
        if torchair is not None and getattr(config, "enable_shared_expert_dp", False):
            found.append(
                (
                    "additional_config.enable_shared_expert_dp with torchair",
                    "ranks do not synchronise at all then; disable one of the two",
                )
            )
        return found
    if getattr(vllm_config, "speculative_config", None) is not None and name == "FULL":
        found.append(
            (
                "speculative decoding with cudagraph_mode FULL",
                "ranks do not agree on the drafter's graph mode in a mixed batch; accepted are "
                "FULL_DECODE_ONLY, PIECEWISE and NONE",
            )
        )
    return found


def _check_layer(layer: Any) -> None:
    """Refuse what vllm-ascend chose for a sharded layer and would not survive sharding."""
    group = layer.oproj.group
    operator = getattr(layer, "custom_op", None)
    if operator is not None:
        name = type(operator).__name__
        if group.tp_size > 1 or name not in _PLAIN_WITHOUT_TP:
            raise OprojError(
                "OPROJ015",
                f"{TOGGLE} is set, but vllm-ascend runs {layer.oproj.name} through its own "
                f"{name} (tensor-parallel size {group.tp_size}): disable the option that asks "
                "for it (flashcomm, matmul_allreduce, layer_sharding), or unset the variable.",
            )
        layer.custom_op = None
    if group.tp_size > 1 and _scatters(type(layer)):
        raise OprojError(
            "OPROJ015",
            f"{TOGGLE} is set, but {layer.oproj.name} is a {type(layer).__name__}, which "
            f"scatters its result over {group.tp_size} tensor-parallel ranks: disable "
            "enable_prefill_optimizations, enable_shared_expert_dp and "
            "multistream_overlap_shared_expert, or unset the variable.",
        )
    method = getattr(layer.quant_method, "quant_method", layer.quant_method)
    unit = getattr(method, "group_size", None) or 1
    if layer.input_size_per_partition % unit:
        raise OprojError(
            "OPROJ005",
            f"{TOGGLE} is {group.size}, which leaves {layer.input_size_per_partition} input "
            f"columns of {layer.oproj.name} on a rank; {type(method).__name__} needs a multiple "
            f"of its group size {unit}: choose a smaller group size.",
        )
    if "flatquant" in type(method).__name__.lower():
        raise OprojError(
            "OPROJ015",
            f"{TOGGLE} is set, but {layer.oproj.name} is quantized by {type(method).__name__}, "
            "whose transforms span the whole input dimension: leave o_proj out of that "
            "quantization, or unset the variable.",
        )


def _scatters(cls: type) -> bool:
    return any(
        base.__name__
        in ("RowParallelScatterLinear", "TorchairDeepseekV2RowParallelLinearReplaceAllreduce")
        for base in cls.__mro__
    )


def _applies(entry: Seam, version: str) -> bool:
    return releases.in_range(version, entry.since or "0", entry.until or None)


def _ascend_config() -> Any:
    from vllm_ascend import ascend_config

    # The worker has initialised it by the time vLLM creates its groups.
    return ascend_config._ASCEND_CONFIG


def _second_engine() -> bool:
    from vllm import envs

    return bool(envs.VLLM_USE_V1)


def _builds_sparse() -> bool:
    """Whether vllm-ascend builds the model from its own module for V3.2 (without torchair)."""
    from vllm.config import get_current_vllm_config

    model = get_current_vllm_config().model_config
    architectures = getattr(getattr(model, "hf_config", None), "architectures", None) or ()
    return _torchair() is None and "DeepseekV32ForCausalLM" in architectures


def _torchair() -> Any:
    """vllm-ascend's torchair configuration when its graph mode is on, else None."""
    graph = getattr(_ascend_config(), "torchair_graph_config", None)
    return graph if getattr(graph, "enabled", False) else None
