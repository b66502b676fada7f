"""The seams in vLLM, the same five in every supported release.

Nothing that torch.compile traces is wrapped: Dynamo follows a wrapt wrapper into the
original and drops it without a word. What is traced is the sharded class of `row_parallel`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from .. import metrics, otp_group, refusals, releases, row_parallel
from .._version import __version__
from ..errors import OprojError
from ..otp_group import OtpGroup
from ..row_counts import Counts, HostForward
from ..settings import Settings
from .registry import Seam

LINEAR = "vllm.model_executor.layers.linear"
STATE = "vllm.distributed.parallel_state"
DEEPSEEK = "vllm.model_executor.models.deepseek_v2"
LOADER = "vllm.model_executor.model_loader.base_loader"


class Forward(HostForward):
    """What upstream vLLM tells about a forward pass."""

    _metadata: Any = None
    _counts: Counts | None = None

    def context(self, layer: str) -> Any:
        from vllm import forward_context

        return forward_context._forward_context

    def announced(self, group: OtpGroup) -> Counts | None:
        """Synchronised counts of `ForwardContext.dp_metadata`, read from vLLM 0.11 to 0.32."""
        metadata = getattr(self.context(""), "dp_metadata", None)
        if metadata is not None and metadata is self._metadata:
            return self._counts
        counts = getattr(metadata, "num_tokens_across_dp_cpu", None)
        if counts is None:
            return None
        # vLLM makes one such object for each forward pass; all layers of it read the same.
        self._counts = tuple(counts[group.dp_start : group.dp_start + group.size].tolist())
        self._metadata = metadata
        return self._counts

    def drafter_in_step(self) -> bool:
        """Since vLLM 0.25. Before, a rank whose input does not fit its drafter skips it.

        And up to 0.11 an idle rank runs it once, the others once a speculative token.
        """
        from ..hosts import vllm_version

        return releases.in_range(vllm_version(), "0.25")

    def label_type(self) -> type:
        """vLLM's opaque type for layer names, where torch and the release have it (from 0.20)."""
        try:
            from vllm.utils import torch_utils
        except ImportError:
            return str
        label: type = torch_utils.LayerName if vars(torch_utils).get("_USE_LAYERNAME") else str
        return label

    def seal(self, group: OtpGroup) -> None:
        from vllm.logger import init_logger

        otp_group.seal(group)
        # Only loggers below "vllm" have vLLM's handlers and format.
        init_logger("vllm.oproj_patch").info(row_parallel.summary(group))
        metrics.start(group)


def seams(
    settings: Settings,
    versions: dict[str, str],
    host: HostForward | None = None,
    refuse: Callable[[Any], None] | None = None,
) -> tuple[Seam, ...]:
    """The registry for upstream vLLM under `settings`; `versions` go into the hand-shake.

    host, refuse: what a host on top of vLLM tells and refuses (given the VllmConfig).
    """
    host = host or Forward()
    linear_constructed = constructor(host)

    def group_created(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        if given.get("group_name") != "dp":
            if given.get("group_name") == "tp":
                refusals.check_stateless(_vllm_config(), settings)
                tp_groups[:] = given["group_ranks"]
            return wrapped(*args, **kwargs)
        dp_groups = given["group_ranks"]
        refusal: OprojError | None = None
        try:
            refusals.check(_vllm_config(), settings, dp_groups)
            if refuse is not None:
                refuse(_vllm_config())
        except OprojError as error:
            refusal = error
        dp_group = wrapped(*args, **kwargs)
        otp_group.create(
            dp_groups, tp_groups, given["backend"], settings, versions, dp_group, refusal
        )
        _destroy_together(dp_group)
        return dp_group

    tp_groups: list[list[int]] = []

    def model_built(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        config = inspect.signature(wrapped).bind(*args, **kwargs).arguments["vllm_config"]
        group = otp_group.require("the model")
        before = set(group.layers)
        model = wrapped(*args, **kwargs)
        built = [name for name in group.layers if name not in before]
        attentions = config.compilation_config.static_forward_context
        row_parallel.check_model(model, group, built, attentions)
        group.main_layers = group.main_layers or len(group.layers)
        group.complete = not host.drafter_in_step()
        return model

    def config_hashed(wrapped: Any, _: Any, args: Any, kwargs: Any) -> str:
        digest: str = wrapped(*args, **kwargs)
        salted = f"{digest}/oproj_patch/{__version__}/{settings.size}"
        return hashlib.sha256(salted.encode()).hexdigest()[: len(digest)]

    def attention(name: str, optional: bool = False) -> Seam:
        return Seam(
            module=DEEPSEEK,
            path=f"{name}.__init__",
            wrapper=attention_constructed,
            parameters=("prefix",),
            why="Check that DeepSeek's attention got a sharded o_proj.",
            lower="Only the attention knows which of its layers is the o_proj, whatever class "
            "the host chose for it.",
            unpatched="A host's own o_proj class would silently keep the whole weight.",
            upstream="model_executor/models/deepseek_v2.py, 0.9.1 to 0.32.0",
            remove="vLLM offers o_proj tensor parallelism itself.",
            optional=optional,
        )

    return (
        Seam(
            module=STATE,
            path="init_model_parallel_group",
            wrapper=group_created,
            parameters=("group_ranks", "backend", "group_name"),
            why="Create the otp group where vLLM creates its data-parallel group.",
            lower="Every caller of initialize_model_parallel comes through it, and it is given "
            "the rank lists of the whole world for whatever layout the release has.",
            unpatched="There is no otp group: the first o_proj raises.",
            upstream="distributed/parallel_state.py, 0.9.1 to 0.32.0",
            remove="vLLM has a hook for additional groups.",
        ),
        Seam(
            module=LINEAR,
            path="RowParallelLinear.__init__",
            wrapper=linear_constructed,
            parameters=("input_size", "output_size", "quant_config", "prefix"),
            why="Make an o_proj a sharded layer before its weights exist.",
            lower="weight_loader and forward are looked up on the instance's class, so the class "
            "is exchanged; wrapping them on RowParallelLinear would touch every layer and would "
            "be traced through by torch.compile.",
            unpatched="Every rank keeps the whole weight.",
            upstream="model_executor/layers/linear.py, 0.9.1 to 0.32.0",
            remove="vLLM offers o_proj tensor parallelism itself.",
        ),
        attention("DeepseekV2MLAAttention"),
        attention("DeepseekV2Attention"),
        Seam(
            module=LOADER,
            path="initialize_model",
            wrapper=model_built,
            parameters=("vllm_config",),
            why="Refuse a model in which no o_proj was sharded.",
            lower="Between construction and loading no other call is made by every loader.",
            unpatched="A model without a matching layer would run unsharded without a word.",
            upstream="model_executor/model_loader/base_loader.py, 0.9.1 to 0.32.0",
            remove="Never while layers are recognised by name.",
        ),
        Seam(
            module="vllm.config",
            path="VllmConfig.compute_hash",
            wrapper=config_hashed,
            parameters=("self",),
            why="Give compiled graphs of each toggle setting their own cache key.",
            lower="Every cache (torch.compile, AOT) takes its key from it; environment variables "
            "of ours do not enter it.",
            unpatched="A warm cache of the other setting is loaded: wrong tokens, no error.",
            upstream="config.py (VllmConfig), 0.9.1 to 0.32.0",
            remove="vLLM lets plugins contribute to the hash.",
        ),
    )


def constructor(host: HostForward) -> Callable[..., None]:
    """Wrapper of a linear layer's constructor: an o_proj becomes a sharded layer."""

    def linear_constructed(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        prefix = inspect.signature(wrapped).bind(*args, **kwargs).arguments.get("prefix", "")
        if isinstance(instance, row_parallel.ShardedMixin) or not row_parallel.is_o_proj(prefix):
            wrapped(*args, **kwargs)
            return
        from vllm.distributed import parallel_state

        group = otp_group.require(prefix)
        if group.complete:
            wrapped(*args, **kwargs)
            return
        row_parallel.construct(wrapped, instance, args, kwargs, group, parallel_state, host)

    return linear_constructed


def attention_constructed(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """Wrapper of an attention module's constructor: its o_proj must be a sharded layer."""
    wrapped(*args, **kwargs)
    prefix = inspect.signature(wrapped).bind(*args, **kwargs).arguments.get("prefix", "")
    row_parallel.require_sharded(instance, prefix)


def _vllm_config() -> Any:
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def _destroy_together(dp_group: Any) -> None:
    """Destroy the otp group with vLLM's own: whoever destroys groups calls this object."""
    original = dp_group.destroy

    def destroy() -> None:
        otp_group.destroy()
        original()

    dp_group.destroy = destroy
