"""vLLM: its seams, the same in every supported release, and what it tells of a pass.

Nothing that torch.compile traces is wrapped, because Dynamo follows a wrapt wrapper into the
original and drops it silently. What is traced is the sharded class of `sharding.layer`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import releases
from ..errors import OprojError, OprojValueError
from ..settings import GRID, SKIP_VERSION_CHECK, TOGGLE, Settings
from ..sharding import diagnosis, grid, metrics, otp_group, topology, wire
from ..sharding import layer as sharded
from ..sharding.otp_group import Counts, OtpGroup
from ..sharding.pair import Pair
from ..sharding.rows import HostPass
from ..sharding.topology import Grid
from ..sharding.wire import Wire
from . import deepseek_v4, lora, refusals, warm_up
from .refusals import of
from .seam import Seam, of_release

LINEAR = "vllm.model_executor.layers.linear"
DEEPSEEK = "vllm.model_executor.models.deepseek_v2"
LOADERS = "vllm.model_executor.model_loader"
SAVERS = (
    ("sharded_state_loader", "ShardedStateLoader.save_model"),
    ("tensorizer_loader", "TensorizerLoader.save_model"),
    ("tensorizer", "serialize_vllm_model"),
)
SAVES = "refuse files that are named by tensor-parallel rank only"


class Vllm(HostPass):
    """Upstream vLLM.

    name: its distribution; versions: distribution -> version, this package's own included.
    settings: those of the current start.
    """

    name = "vllm"
    _metadata: Any = None
    _counts: Counts | None = None
    agreed_grid: Grid | None = None
    """What `agreed` told the other ranks, so it is not computed a second time."""

    def __init__(self, versions: Mapping[str, str]) -> None:
        self.versions, self.settings = dict(versions), Settings()
        # Prefix of a wo_b -> its wo_a that is sharded, or why that one is whole.
        self._firsts: dict[str, Pair | str] = {}

    def __str__(self) -> str:
        names = dict.fromkeys((self.name, "vllm"))
        return " on ".join(f"{name} {self.versions[name]}" for name in names)

    def untested(self) -> str:
        """Return what is untested about this host; empty if nothing is."""
        return releases.untested(self.versions["vllm"], self.versions.get("vllm-ascend"))

    def check_version(self, settings: Settings) -> None:
        """Raise OprojError for an untested release, unless the check is switched off."""
        if (problem := self.untested()) and not settings.skip_version_check:
            raise OprojError(
                "OPROJ009",
                f"{problem}; install a tested release, or set {SKIP_VERSION_CHECK}=1 to try this "
                f"one after its symbols have been checked, or unset {TOGGLE}.",
            )

    def seams(self, config: Any) -> tuple[Seam, ...]:
        """Return the seams for a VllmConfig (None: unknown); `activation` wraps group creation."""

        def model_built(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
            config = inspect.signature(wrapped).bind(*args, **kwargs).arguments["vllm_config"]
            group = otp_group.require("the model")
            attentions = config.compilation_config.static_forward_context
            before, known = set(group.layers), set(attentions)
            self._firsts.clear()  # of a model that was refused
            model = wrapped(*args, **kwargs)
            deepseek_v4.check_pairs(model, self._firsts)
            built = [name for name in group.layers if name not in before]
            sharded.check_model(model, group, built, attentions)
            if not group.main_layers:  # a drafter may name its attentions after other layers
                own = {name: layer for name, layer in attentions.items() if name not in known}
                sharded.check_attentions(model, built, own)
            group.main_layers = group.main_layers or len(group.layers)
            group.complete = not self.shards_drafter(config)
            deepseek_v4.join(model, self.name != "vllm")
            return model

        def config_hashed(wrapped: Any, _: Any, args: Any, kwargs: Any) -> str:
            # What is compiled, and the memory that was measured, depend on every setting.
            digest: str = wrapped(*args, **kwargs)
            ours = f"{self.versions['oproj_patch']}/{self.settings.shared()}"
            salted = f"{digest}/oproj_patch/{ours}"
            return hashlib.sha256(salted.encode()).hexdigest()[: len(digest)]

        adapters = lora.seams() if of(config, "lora_config") else ()
        attention = "check that DeepSeek's attention got a sharded o_proj", ("prefix",)
        every = (
            Seam(LINEAR, "RowParallelLinear.__init__", self.linear_constructed,
                 "make an o_proj a sharded layer before its weights exist",
                 ("input_size", "output_size", "quant_config", "prefix")),
            Seam(DEEPSEEK, "DeepseekV2MLAAttention.__init__", attention_built, *attention),
            Seam(DEEPSEEK, "DeepseekV2Attention.__init__", attention_built, *attention),
            Seam(f"{LOADERS}.base_loader", "initialize_model", model_built,
                 "refuse a model in which no o_proj was sharded; only this function is called by "
                 "every loader before loading", ("vllm_config",)),
            Seam("vllm.config", "VllmConfig.compute_hash", config_hashed,
                 "give compiled graphs and memory plans of each setting their own cache key",
                 ("self",)),
            *(Seam(f"{LOADERS}.{module}", saver, refuse_to_save, SAVES, required=False)
              for module, saver in SAVERS),
            *warm_up.seams(),
            *adapters,
            *(() if config is None else deepseek_v4.seams(self, config)),
        )  # fmt: skip
        return tuple(of_release(every, self.versions["vllm"], bool(self.untested())))

    def linear_constructed(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        """Wrap a linear layer's constructor: an o_proj becomes a sharded layer."""
        given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        prefix, replicated = given.get("prefix", ""), given.get("disable_tp", False)
        owner, owner_prefix = owner_of(instance)
        if not prefix and owner in sharded.OWNERS:
            prefix = f"{owner_prefix}.o_proj"
            kwargs = {**kwargs, "prefix": prefix}
        # Where the host asks for no tensor parallelism, every rank holds the whole layer.
        other = replicated or isinstance(instance, sharded.ShardedMixin)
        if other or not sharded.is_o_proj(prefix, owner) or left_whole(prefix):
            wrapped(*args, **kwargs)
            return
        from vllm.config import get_current_vllm_config
        from vllm.distributed import parallel_state

        group = otp_group.require(prefix)
        cls, before = type(instance), dict(vars(instance))
        first = self._firsts.pop(prefix, None)
        try:
            sharded.construct(wrapped, instance, args, kwargs, group, parallel_state, self, first)
        except OprojValueError as error:
            # A ValueError of the host occurs on every rank alike. Any other error of the host, such
            # as too little memory, may occur on this rank alone, so it is raised again.
            alike = isinstance(error.__cause__, ValueError | None)
            if not alike or not group.main_layers or isinstance(first, Pair):
                raise
            instance.__class__ = cls
            context = of(get_current_vllm_config(), "compilation_config.static_forward_context")
            if (context or {}).get(prefix) is instance:
                del context[prefix]  # vllm-ascend 0.11.0 registers it, and once only
            vars(instance).clear()
            vars(instance).update(before)
            wrapped(*args, **kwargs)
            # A drafter that does not divide stays whole, on every rank: the sizes are the same.
            group.complete = True
            told = "the draft model keeps its whole o_proj from %s on (%s)"
            logging.getLogger("vllm.oproj_patch").warning(told, prefix, error.sentence)
            return
        self.check_layer(instance)

    def first_constructed(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        """Wrap a column-parallel layer's constructor: a wo_a is sharded with its wo_b."""
        prefix = inspect.signature(wrapped).bind(*args, **kwargs).arguments.get("prefix", "")
        nested = isinstance(instance, sharded.ShardedMixin)
        if nested or not deepseek_v4.is_first(prefix) or left_whole(prefix):
            wrapped(*args, **kwargs)
            return
        from vllm.config import get_current_vllm_config
        from vllm.distributed import parallel_state

        group, second = otp_group.require(prefix), f"{prefix.removesuffix('wo_a')}wo_b"
        text = of(get_current_vllm_config(), "model_config.hf_text_config")
        if why := deepseek_v4.obstacle(owner_of(instance)[0], text, group):
            self._firsts[second] = why
            wrapped(*args, **kwargs)
            return
        self._firsts[second] = sharded.construct_first(
            wrapped, instance, args, kwargs, group, parallel_state, self
        )

    def check_layer(self, layer: Any) -> None:
        """Raise OprojError where the host chose for a layer what does not work on a shard."""

    def check(self, config: Any, settings: Settings) -> None:
        """Raise OprojError for a VllmConfig that cannot be served."""
        facts = refusals.Facts(config, self.ascend_config())
        refusals.check(facts, settings, self.versions, self.graph_rows(config))

    def ascend_config(self) -> Any:
        """Return vllm-ascend's AscendConfig; None without vllm-ascend."""
        return None

    def graph_rows(self, config: Any) -> int:
        """Return the largest row count for which a device graph may be captured; 0: none is."""
        # Read from 0.9.1 to 0.33.0. vLLM only lowers these sizes later.
        if refusals.graph_mode(config) == "NONE":
            return 0
        return max(_captured(config), default=0)

    def grid(self, config: Any) -> Grid:
        """Return the grid of every group: the one that was asked for, or of the fewest bytes.

        `Nx1` where the configuration does not tell the size of an o_proj.
        """
        size, text = self.settings.size, of(config, "model_config.hf_text_config")
        if asked := topology.check_grid(self.settings.grid, size):
            return asked
        try:
            columns, hidden = o_proj_columns(text), text.hidden_size
        except Exception:  # unknown, or as Transformers tells a size that differs between layers
            return Grid(size, 1)
        columns //= of(config, "parallel_config.tensor_parallel_size") or 1
        quant_config = of(config, "quant_config")
        wire_bytes = 1 if self.settings.wire in wire.DTYPES else None
        if self.settings.wire == "auto":
            wire_bytes = self.wire_bytes(config)
        return grid.fewest_bytes(size, columns, hidden, quant_config, wire_bytes)

    def wire_bytes(self, config: Any) -> int | None:
        """Return the bytes of an element on the way out where it is not the model's type.

        No layer exists yet, so this builds one unsharded o_proj on the meta device and looks at it.
        """
        text, quant_config = of(config, "model_config.hf_text_config"), of(config, "quant_config")
        if quant_config is None:
            return None
        from vllm.distributed import parallel_state
        from vllm.model_executor.layers.linear import RowParallelLinear

        alone = otp_group.LayerTPGroup(0, [0], None, None)
        try:
            # From 0.24 on; where it is absent no method takes quantized rows. Older releases also
            # keep a tensor of the first fp8 layer for all others, which would be without memory.
            importlib.import_module("vllm.model_executor.layers.fusion.quant_activation")
            with otp_group.LayerScope(parallel_state, alone), torch.device("meta"):
                layer = RowParallelLinear(
                    o_proj_columns(text), text.hidden_size, bias=False, disable_tp=True,
                    quant_config=quant_config, prefix="model.layers.0.self_attn.o_proj",
                    params_dtype=config.model_config.dtype,
                )  # fmt: skip
            own = self.own_wire(layer)
        except Exception:  # of a release or a method that needs more than that; ranks compare grids
            return None
        return 1 if own is not None and own.moved else None

    def own_wire(self, layer: Any) -> Wire | None:
        """Return the wire of a layer with a static scale, `input_scale`; None: another layer.

        From 0.24 on some kernels take quantized rows, and the layer then names their format.
        """
        chunk, dtype = layer.input_size_per_partition, wire.stored(layer)
        if getattr(layer, "input_scale", None) is None or dtype is None:
            return None
        if getattr(layer, "input_zero_point", None) is not None:
            return None  # its values lie around the zero point, so this scale would clip them
        from vllm.platforms import current_platform

        key = getattr(layer, "_input_quant_key", getattr(layer, "input_quant_key", None))
        # Some devices of ROCm have another fp8 than checkpoints. vLLM converts the weights to it.
        if key is None or current_platform.fp8_dtype() != dtype:
            return wire.static(layer, chunk)
        from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
        from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

        quant = QuantFP8(static=True, group_shape=key.scale.group_shape)

        def restore(values: torch.Tensor, _: Any) -> Any:
            return QuantizedActivation(
                values, layer.input_scale, layer.params_dtype, values.shape, key
            )

        def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, None]:
            return quant(rows, layer.input_scale)[0], None

        return Wire(chunk, dtype, quantize, restore, moved=True, parameter="input_scale")

    def agreed(self, config: Any) -> dict[str, str]:
        """Return what of the host's configuration must be equal on all ranks."""
        drafted = of(config, "speculative_config.num_speculative_tokens") or 0
        self.agreed_grid = self.grid(config)
        return {
            "enforce_eager": str(bool(of(config, "model_config.enforce_eager"))),
            "cudagraph_mode": refusals.graph_mode(config),
            "cudagraph_capture_sizes": str(_captured(config)) if self.graph_rows(config) else "",
            "num_speculative_tokens": str(drafted),
            f"the grid of this model (set {GRID})": str(self.agreed_grid),
        }

    def announced(self, group: OtpGroup) -> Counts | None:
        """Return the synchronized counts of `ForwardContext.dp_metadata`, one object a pass.

        Read from 0.9.1 to 0.33.0: `num_tokens_across_dp_cpu`, before 0.11.0 their running sum.
        """
        from vllm import forward_context

        metadata = getattr(forward_context._forward_context, "dp_metadata", None)
        if metadata is not None and metadata is self._metadata:
            return self._counts
        counts = getattr(metadata, "num_tokens_across_dp_cpu", None)
        totals = getattr(metadata, "cu_tokens_across_dp_cpu", None)
        if counts is not None:
            every = counts.tolist()
        elif totals is not None:
            every = [b - a for a, b in itertools.pairwise([0, *totals.tolist()])]
        else:
            return None
        self._counts = tuple(every[group.dp_start : group.dp_start + group.size])
        self._metadata = metadata
        return self._counts

    def shards_drafter(self, config: Any) -> bool:
        """Tell whether a drafter runs equally often on every rank, with announced counts.

        From 0.25 on vLLM runs the drafter also for a rank whose input exceeds its limit. Before,
        such a rank skips it, and up to 0.11 an idle rank runs it once, a busy one once for each
        drafted token.
        The counts of a `draft_model` are the target's (0.32.0, second runner).
        """
        if of(config, "speculative_config.method") == "draft_model":
            return False
        # Read, not imported: the runner needs kernels that a build may lack.
        spec = importlib.util.find_spec("vllm.v1.worker.gpu_model_runner")
        if spec is None or spec.origin is None:
            return False
        # Every release calls it in the dummy run. Those that draft on every rank call it once more.
        return Path(spec.origin).read_text(encoding="utf-8").count("drafter.dummy_run(") > 1

    def label_type(self) -> type:
        """Return vLLM's opaque type for layer names, where torch and the release have it (0.20)."""
        try:
            from vllm.utils import torch_utils
        except ImportError:
            return str
        label: type = torch_utils.LayerName if vars(torch_utils).get("_USE_LAYERNAME") else str
        return label

    def before_first_step(self, group: OtpGroup) -> None:
        from vllm.logger import init_logger

        diagnosis.check_layers(group)
        init_logger("vllm.oproj_patch").info(sharded.summary(group))
        metrics.publish(group)


def _captured(config: Any) -> list[int]:
    """Return the row counts of graphs, smallest first; DeepSeek V4.1 (0.32.0) has a second kind."""
    names = "cudagraph_capture_sizes", "decoder_replay_cudagraph_capture_sizes"
    return sorted(n for name in names for n in of(config, f"compilation_config.{name}") or ())


def o_proj_columns(text: Any) -> int:
    """Return the input columns of a whole o_proj, from a model's text configuration."""
    if of(text, "o_lora_rank"):  # DeepSeek V4's wo_b
        return int(text.o_groups * text.o_lora_rank)
    heads: int = text.num_attention_heads
    width = of(text, "v_head_dim") or of(text, "head_dim") or text.hidden_size // heads
    return int(heads * width)


def owner_of(layer: Any) -> tuple[str, str]:
    """Return class name and prefix of the module whose constructor makes `layer`, or empty ones.

    The class says what the name of the layer does not: what kind of attention it belongs to.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "__init__" and owner is not layer:
            return type(owner).__name__, str(frame.f_locals.get("prefix") or "")
        frame = frame.f_back
    return "", ""


def attention_built(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """Wrap an attention module's constructor: its o_proj must be a sharded layer."""
    wrapped(*args, **kwargs)
    prefix = inspect.signature(wrapped).bind(*args, **kwargs).arguments.get("prefix", "")
    if not left_whole(prefix):
        sharded.require_sharded(instance, prefix)


def left_whole(prefix: str) -> bool:
    """Tell whether the layers that are built now stay whole; all ranks answer alike.

    They do in a drafter that ranks do not run in step, and in one that vLLM builds in a
    tensor-parallel group of its own, because our groups follow the model's.
    """
    from vllm.distributed import parallel_state

    group = otp_group.require(prefix)
    return group.complete or list(parallel_state.get_tp_group().ranks) != group.tp_ranks


def refuse_to_save(wrapped: Any, _: Any, args: Any, kwargs: Any) -> None:
    """Wrap a saver whose files are named by tensor-parallel rank only."""
    raise OprojError(
        "OPROJ015",
        f"{TOGGLE} is set, and {wrapped.__qualname__} was called: it names its files by "
        "tensor-parallel rank only, so data-parallel ranks with different shards of o_proj would "
        "overwrite each other's; save with the variable unset.",
    )
