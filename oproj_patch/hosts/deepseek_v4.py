"""DeepSeek V4's output projection: two layers, `wo_a` and `wo_b`, which can be one step.

`wo_b` is a row-parallel layer like an o_proj; `wo_a` is block-diagonal. In both hosts a method of
the attention runs the two, and reads `wo_a`'s weight without calling that layer. So both are built
in the layer's own group, and that method is run with the heads and groups of this rank's shard.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import OprojError
from ..settings import TOGGLE
from ..sharding import layer as sharded
from ..sharding import pair as pairs
from ..sharding.otp_group import OtpGroup
from . import refusals
from .seam import Seam

CPU = "vllm.models.deepseek_v4.cpu.cpu_sparse"
_FIRST = re.compile(r"(^|\.)(self_attn|attn)\.wo_a$")
# Attentions whose method takes unquantized heads, and reads the numbers of heads and groups at each
# call. They were read in every release that has them. vLLM's V4.1 has FlashMLA and SM120 classes of
# the same names.
_TAKES_HEADS = frozenset({
    "DeepseekV4CPUAttention", "DeepseekV4FlashMLAAttention", "DeepseekV4FlashInferMLAAttention",
    "DeepseekV4FlashInferSM120Attention",
    "DeepseekV4Attention", "DeepseekV41Attention",  # vllm-ascend's
})  # fmt: skip
_ROPE_QUANT_HEADS = 128


def is_first(prefix: str) -> bool:
    """Tell whether `prefix` names the first layer of an output projection in two."""
    return bool(_FIRST.search(prefix))


def seams(host: Any, config: Any) -> tuple[Seam, ...]:
    """Return the seams in vLLM that DeepSeek V4 needs; config None: all of them."""
    if config is not None and not refusals.deepseek_v4(refusals.Facts(config)):
        return ()
    linear = Seam(
        "vllm.model_executor.layers.linear", "ColumnParallelLinear.__init__",
        host.first_constructed, "shard DeepSeek V4's wo_a with its wo_b",
        ("input_size", "output_size", "prefix"), "0.23.0",
    )  # fmt: skip
    attention = Seam(
        CPU, "DeepseekV4CPUAttention._o_proj", _projected,
        "let a rank without attention metadata take part in the step of DeepSeek V4; vLLM's CPU "
        "attention returns zeros there", ("o", "positions"), "0.32.0",
    )  # fmt: skip
    if config is not None:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return (linear,)
    return linear, attention


def _projected(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Wrap the CPU attention's `_o_proj`, which skips wo_b without metadata: take the step then."""
    from vllm.forward_context import get_forward_context

    output = wrapped(*args, **kwargs)
    if get_forward_context().attn_metadata is None:
        sharded.step_of_no_request(instance.wo_b, output)
    return output


def obstacle(owner: str, text: Any, group: OtpGroup) -> str:
    """Return why wo_a cannot be sharded with wo_b; empty if it can.

    owner: class name of the attention; text: the model's text configuration.
    """
    heads, groups = text.num_attention_heads, text.o_groups
    if owner not in _TAKES_HEADS:
        return f"{owner} is none of the attentions that are known to pass unquantized heads on"
    if owner == "DeepseekV4FlashInferMLAAttention" and heads // group.tp_size == _ROPE_QUANT_HEADS:
        return f"RopeQuant of {owner} quantizes the heads at {_ROPE_QUANT_HEADS} local heads"
    return pairs.obstacle(heads, groups, group, group.settings.grid)


def check_pairs(model: Any, firsts: Mapping[str, pairs.Pair | str]) -> None:
    """Raise OprojError for a wo_a of `model` that is sharded without its wo_b.

    firsts: what waits for a second layer: prefix of that layer -> pair, or why the first is whole.
    """
    for second, first in firsts.items():
        if isinstance(first, pairs.Pair):
            raise OprojError(
                "OPROJ007",
                f"{type(model).__name__} is sharded in part: {first.first.oproj.name} was sharded, "
                f"but no row-parallel layer {second} was built, which is one step with it: this "
                f"model is not supported in this release; unset {TOGGLE}, and please report it.",
            )


def join(model: Any, ascend: bool) -> None:
    """Let the attentions of `model` run wo_a and wo_b as one step where both are sharded."""
    for attention, layer in _attentions(model, ascend):
        pair, group = layer.oproj.pair, layer.oproj.group
        # On SM100 a fused kernel of V4.1 gives wo_b quantized rows, up to this number of rows.
        if hasattr(attention, "gemm_rs"):
            attention._fused_wo_a_token_limit = 0
        if pair is None:
            continue
        attention.n_local_groups //= group.size
        pair.heads, pair.width = attention.n_local_heads, attention.head_dim
        if ascend:
            _join_ascend(attention, layer, pair)
            continue
        pair.positions, pair.first.bmm_batch_size = True, attention.n_local_groups
        cls: Any = type(attention)
        pair.project = functools.partial(_project, attention, cls._o_proj)
        attention.__class__ = _joined_class(cls)


def _attentions(model: Any, ascend: bool) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        attention: Any = getattr(module, "impl", None) if ascend else module
        layer: Any = getattr(attention, "wo_b", None)
        if isinstance(layer, sharded.ShardedMixin):
            yield attention, layer


@functools.cache
def _joined_class(cls: type) -> type:
    return sharded.subclass(cls, {"_o_proj": _o_proj})


def _o_proj(self: Any, attn_out: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    # Traced by torch.compile, as `sharding.layer._forward` is. V4.1 appends padding heads.
    layer = self.wo_b
    shard = layer.oproj
    heads = attn_out[:, : self.n_local_heads].flatten(1)
    op = torch.ops.oproj_patch.o_proj_pair.default
    return sharded.reduced(layer, op(heads, positions, shard.label, shard.hidden))


def _project(
    attention: Any, original: Any, o: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Run vLLM's own `_o_proj` on the heads of this rank's shard."""
    from vllm import forward_context

    context = forward_context._forward_context
    idle = context is not None and context.attn_metadata is None
    heads, attention.n_local_heads = attention.n_local_heads, o.shape[1]
    if idle:  # vLLM's method for CPUs would return zeros, but these are rows of other ranks
        context.attn_metadata = {}
    try:
        # The method for CPUs expects rows without gaps; on GPUs rows may have gaps.
        o = o.contiguous() if o.device.type == "cpu" else o
        output: torch.Tensor = original(attention, o, positions)
        return output
    finally:
        attention.n_local_heads = heads
        if idle:
            context.attn_metadata = None


def _join_ascend(impl: Any, layer: Any, pair: pairs.Pair) -> None:
    """Let vllm-ascend's implementation run both; it undoes the rotary embedding before."""
    original, hidden = impl._forward_o_proj, layer.oproj.hidden

    def project(o: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        output: torch.Tensor = original(o, o.new_empty((o.shape[0], hidden)))
        return output

    def step(o_proj_input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        found = sharded.run(o_proj_input.flatten(1), layer.oproj.name)
        output[...] = sharded.reduced(layer, found)
        return output

    pair.project, impl._forward_o_proj = project, step
    method = pair.first.quant_method
    schemes: tuple[Any, ...] = (method, getattr(method, "quant_method", None))
    for scheme in schemes:
        if hasattr(scheme, "n_local_groups"):  # counted from vLLM's own group
            scheme.n_local_groups = impl.n_local_groups
