"""vllm-ascend: its seams, on top of those in vLLM, and what it tells of a pass.

vllm-ascend has o_proj classes of its own, whose constructors never call vLLM's. Its attention
*implementation* calls o_proj, and returns early without attention metadata, so the dummy batch of
an idle rank would leave the other ranks waiting. Its data-parallel metadata may differ from rank
to rank, so the ranks agree on their rows themselves, once a forward pass.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .. import releases
from ..errors import OprojError
from ..settings import TOGGLE
from ..sharding import diagnosis
from ..sharding import layer as sharded
from ..sharding.otp_group import Counts, OtpGroup, require
from ..sharding.wire import Wire
from . import refusals
from .seam import Seam, of_release
from .vllm import SAVES, Vllm, attention_built, refuse_to_save

TORCHAIR = "vllm_ascend.torchair"
TORCHAIR_MODEL = "torchair.models.torchair_deepseek_v2"
SPARSE = "vllm_ascend.models.deepseek_v3_2"
RUNNER = "worker.model_runner_v1"
PIECES = "compilation.piecewise_backend"

# Operators that vllm-ascend may put in place of a row-parallel forward and that change nothing
# without tensor parallelism: they reduce over the tensor-parallel group only.
_PLAIN_WITHOUT_TP = ("SequenceRowParallelOp", "MatmulAllreduceRowParallelOp")
# Classes that scatter their result over the tensor-parallel ranks.
_SCATTERING = ("RowParallelScatterLinear", "TorchairDeepseekV2RowParallelLinearReplaceAllreduce")

# (module below vllm_ascend, symbol, first release, last release; empty: no end)
LINEARS = (
    ("models.deepseek_v2", "RowParallelScatterLinear", "0.9.1", "0.9.1"),
    ("ops.linear", "AscendRowParallelLinear", "0.11.0", ""),
    ("models.deepseek_v3_2", "CustomDeepseekV2RowParallelLinear", "0.11.0", "0.11.0"),
    (TORCHAIR_MODEL, "TorchairDeepseekV2RowParallelLinear", "0.11.0", "0.11.0"),
    (TORCHAIR_MODEL, "TorchairDeepseekV2RowParallelLinearReplaceAllreduce", "0.11.0", "0.11.0"),
)
COLUMNS = (("ops.linear", "AscendColumnParallelLinear", "0.23.0", ""),)
ATTENTIONS = (
    ("models.deepseek_v2", "CustomDeepseekV2MLAAttention", "0.9.1", "0.9.1"),
    ("models.deepseek_v3_2", "CustomDeepseekV2SFAAttention", "0.11.0", "0.11.0"),
    (TORCHAIR_MODEL, "TorchairDeepseekV2MLAAttention", "0.11.0", "0.11.0"),
    (TORCHAIR_MODEL, "TorchairDeepseekV2SFAAttention", "0.11.0", "0.11.0"),
)
IMPLEMENTATIONS = (
    ("attention.mla_v1", "AscendMLAImpl", "", ""),  # no bounds: it is required in every version
    ("attention.sfa_v1", "AscendSFAImpl", "0.11.0", ""),
    ("attention.dsa_v1", "AscendDSAImpl", "0.23.0", ""),
    ("attention.dsa_v41", "AscendDSAV41Impl", "0.30.0rc2", ""),
    ("torchair.torchair_mla", "AscendMLATorchairImpl", "0.11.0", "0.11.0"),
    ("torchair.torchair_sfa", "AscendSFATorchairImpl", "0.11.0", "0.11.0"),
)
BACKENDS = ((PIECES, "NPUPiecewiseBackend", "0.9.1", "0.9.1"),)
SKIPS = (
    (RUNNER, "NPUModelRunner._skip_all_reduce_across_dp_group", "0.13.0", "0.13.0"),
    (RUNNER, "should_skip_allreduce_across_dp_group", "0.18.0", ""),
    ("ops.fused_moe.token_dispatcher", "should_skip_allreduce_across_dp_group", "0.18.0", ""),
)
SAVERS = (("_310p.sharded_state_loader_310p", "ShardedStateLoader310.save_model", "0.18.0", ""),)


class VllmAscend(Vllm):
    """vllm-ascend on top of vLLM."""

    name = "vllm-ascend"
    _npu: Any = None
    _agreed: Counts | None = None
    _pass: Callable[[], Any] = staticmethod(lambda: None)

    def seams(self, config: Any) -> tuple[Seam, ...]:
        version, names = self.versions[self.name], refusals.of(config, refusals.ARCHITECTURES)
        sparse = "DeepseekV32ForCausalLM" in (names or ()) and not self.traceable()
        if releases.in_range(version, "0.9.1", "0.9.1"):
            from vllm_ascend import ops

            ops.register_dummy_fusion_op()  # as its worker does; without it PIECES fails to import
        own = []
        for entry in of_release(registry(self), version, bool(self.untested())):
            if entry.module.startswith(TORCHAIR) and not self.traceable():
                continue  # vllm-ascend imports these modules, and torchair, only in that mode
            if entry.module == SPARSE and not sparse:
                continue  # importing it replaces DeepSeek's decoder constructor by V3.2's
            if entry.module.endswith(PIECES) and refusals.graph_mode(config) == "NONE":
                continue  # nothing is compiled
            own.append(entry)
        return (*super().seams(config), *own)

    def check_layer(self, layer: Any) -> None:
        """Refuse an operator, class or quantization of its own that does not work on a shard."""
        tp_size, operator = layer.oproj.group.tp_size, getattr(layer, "custom_op", None)
        name, chosen, problem = layer.oproj.name, type(operator).__name__, ""
        method = type(getattr(layer.quant_method, "quant_method", layer.quant_method)).__name__
        if operator is not None and (tp_size > 1 or chosen not in _PLAIN_WITHOUT_TP):
            problem = (
                f"vllm-ascend runs {name} through its own {chosen} (tensor-parallel size "
                f"{tp_size}): disable the option that asks for it (flashcomm, matmul_allreduce, "
                "layer_sharding)"
            )
        elif tp_size > 1 and any(c.__name__ in _SCATTERING for c in type(layer).__mro__):
            problem = (
                f"{name} is a {type(layer).__name__}, which scatters its result over {tp_size} "
                "tensor-parallel ranks: disable enable_prefill_optimizations, "
                "enable_shared_expert_dp and multistream_overlap_shared_expert"
            )
        elif "flatquant" in method.lower():
            problem = (
                f"{name} is quantized by {method}, whose transforms span the whole input "
                "dimension: leave o_proj out of that quantization"
            )
        if problem:
            raise OprojError("OPROJ015", f"{TOGGLE} is set, but {problem}, or unset the variable.")
        if operator is not None:
            layer.custom_op = None

    def ascend_config(self) -> Any:
        from vllm_ascend import ascend_config

        return ascend_config._ASCEND_CONFIG  # set by the worker before vLLM creates its groups

    def capturing(self) -> bool:
        if self._npu is None:
            self._npu = torch.npu.is_available() and torch.npu
        return bool(self._npu and self._npu.is_current_stream_capturing())

    def wire_bytes(self, config: Any) -> int | None:
        described = refusals.of(config, "quant_config.quant_description") or {}
        names = [name for name in described if name.endswith(".weight")]
        kinds = [described[n] for n in names if sharded.is_o_proj(n.removesuffix(".weight"))]
        # A group has one grid: most layers decide (a draft layer is often not quantized).
        most = 2 * kinds.count("W8A8") > len(kinds)
        return 1 if most and not self.traceable() else None

    def own_wire(self, layer: Any) -> Wire | None:
        """Return the wire of static W8A8, and of W8A8_DYNAMIC up to 0.11.0; None: another method.

        The method of static W8A8 takes int8 rows as they are; W8A8_DYNAMIC's takes them and scales.
        """
        method = type(getattr(layer.quant_method, "quant_method", None)).__name__
        chunk, int8 = layer.input_size_per_partition, torch.int8

        def static(rows: torch.Tensor) -> tuple[torch.Tensor, None]:
            import torch_npu

            scale, offset = layer.aclnn_input_scale_reciprocal, layer.aclnn_input_offset
            chunks = rows.reshape(-1, chunk)
            return torch_npu.npu_quantize(chunks, scale, offset, torch.qint8, -1, False), None

        def dynamic(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            import torch_npu

            values, scales = torch_npu.npu_dynamic_quant(rows)
            return values, scales.view(-1, 1)

        def pair(values: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            layer._ascend_quant_config = {"output_dtype": layer.params_dtype}
            return values.contiguous(), scales.flatten()

        if method == "AscendW8A8LinearMethod":
            return Wire(chunk, int8, static, lambda values, _: values, moved=True)
        takes_pairs = releases.in_range(self.versions[self.name], "0.9.1", "0.11.0")
        if method == "AscendW8A8DynamicLinearMethod" and takes_pairs:
            return Wire(chunk, int8, dynamic, pair, scales=1)
        return None

    def announced(self, group: OtpGroup) -> Counts | None:
        # Not vllm-ascend's metadata, which differs between ranks where it pads only some of them.
        from vllm import forward_context

        running = forward_context._forward_context
        if running is not None and running is not self._pass():
            # The first layer of this pass may be in a graph, which replays without Python.
            self._pass, group.counts = weakref.ref(running), None
        return self._agreed

    def piece_ran(self, wrapped: Any, piece: Any, args: Any, kwargs: Any) -> Any:
        """Wrap a call of one piece of a compiled model: 0.9.1 chooses its graph by own rows.

        The ranks agree on their rows before the first piece. Where rows differ, no rank replays.
        """
        if piece.is_first_graph:
            group, rows = require("the model"), args[piece.sym_shape_indices[0]]
            where = "the beginning of a pass"
            self._agreed = diagnosis.told_by_all(rows, where, group, str(rows))
        differ = len(set(self._agreed or ())) > 1
        output = (piece.compiled_graph_for_general_shape if differ else wrapped)(*args, **kwargs)
        if piece.is_last_graph:
            self._agreed = None
        return output

    def shards_drafter(self, config: Any) -> bool:
        """Tell whether a drafter's graphs and passes are alike on all ranks.

        Read from 0.9.1 to 0.30.0rc2. From 0.18 on a drafter takes its mode from the target's agreed
        one, as long as it has the target's rows. In 0.13.0 it chooses a graph by its own rows; in
        0.11.0 an idle rank runs an EAGLE drafter once, a working one once per token.
        """
        from vllm_ascend.worker import model_runner_v1

        drafter = getattr(config, "speculative_config", None)
        method = str(getattr(drafter, "method", "") or "")
        graphs = not self.traceable() and refusals.graph_mode(config) != "NONE"
        if hasattr(model_runner_v1, "should_skip_allreduce_across_dp_group"):
            padded = not getattr(drafter, "disable_padded_drafter_batch", False)
            return not graphs or (padded and ("mtp" in method or "eagle" in method))
        if hasattr(model_runner_v1.NPUModelRunner, "_skip_all_reduce_across_dp_group"):
            return not graphs or ("mtp" in method and refusals.graph_mode(config) == "PIECEWISE")
        return "eagle" not in method or getattr(drafter, "num_speculative_tokens", 1) == 1

    def traceable(self) -> bool:
        return refusals.torchair(self.ascend_config())


def registry(host: VllmAscend) -> tuple[Seam, ...]:
    """Return all seams in vllm-ascend, of every release."""
    kinds: tuple[tuple[Any, str, Callable[..., Any], str, tuple[str, ...]], ...] = (
        (LINEARS, ".__init__", host.linear_constructed,
         "make an o_proj of this class a sharded layer before its weights exist", ()),
        (COLUMNS, ".__init__", host.first_constructed,
         "shard DeepSeek V4's wo_a with its wo_b", ("input_size", "output_size", "prefix")),
        (ATTENTIONS, ".__init__", attention_built,
         "check that this attention got a sharded o_proj", ("prefix",)),
        (IMPLEMENTATIONS, ".forward", attention_ran,
         "let a rank without attention metadata (idle rank, profile run) take part in the step",
         ("output",)),
        (BACKENDS, ".__call__", host.piece_ran,
         "replay a graph only where all ranks have equal rows", ()),
        (SKIPS, "", lambda *_: False,  # never skip it
         "keep vllm-ascend's synchronization of rows and graph mode across ranks", ()),
        (SAVERS, "", refuse_to_save, SAVES, ()),
    )  # fmt: skip
    return tuple(
        Seam(f"vllm_ascend.{module}", f"{name}{method}", wrapper, why, parameters, since, until)
        for symbols, method, wrapper, why, parameters in kinds
        for module, name, since, until in symbols
    )


def attention_ran(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Wrap an attention implementation's forward, so that it always takes the step of its o_proj.

    Without attention metadata every release returns before o_proj. SFA without rotary dimensions
    (0.30.0rc2) also does with metadata of no token.
    """
    given = dict(zip(_names(wrapped.__func__), args, strict=False)) | kwargs
    owner = given.get("attn", instance)  # DeepSeek V4.1's gets the attention with each call
    layer: Any = getattr(owner, "o_proj", None) or getattr(owner, "wo_b", None)
    ours = isinstance(layer, sharded.ShardedMixin)
    if not ours:
        return wrapped(*args, **kwargs)
    group = layer.oproj.group
    before = group.steps
    result = wrapped(*args, **kwargs)
    if group.steps == before:
        sharded.step_of_no_request(layer, given["output"])
        # 0.9.1 returns uninitialized memory, whose NaNs would spread in the experts' all-to-all.
        given["output"].zero_()
    return result


@functools.cache
def _names(method: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]  # without `self`
