"""The sharded layer: which o_proj it is, how it is constructed, loaded and applied.

vLLM builds, loads, quantizes and applies the layer itself; while it does, it sees the
layer's own tensor-parallel group (`otp_group.layer_tp_group`). Here is only what turns an
instance into such a layer: a subclass made on the fly, so that layers that are not an
o_proj are not touched at all.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import exchange, otp_group, topology, weight_gather
from ._version import __version__
from .errors import OprojError, OprojValueError
from .otp_group import OtpGroup
from .row_counts import HostForward
from .settings import TOGGLE

# A decoder's self-attention output projection, by vLLM's naming of layers ("prefix"). Left out
# are `self_attn.dense` and `out_proj`: so are named linear attentions whose rows vLLM cuts
# inside the layer (Bailing 2.5, MiniMax-Text-01), and nobody announces those counts.
_O_PROJ = re.compile(
    r"(^|\.)((self_attn|self_attention|attn|attention|mixer)(\.\d+)?\.o_proj"
    r"|layers\.\d+\.o_proj|attention\.dense)$"
)
# An encoder runs only on the ranks that have an image or a sound to encode.
_NOT_A_DECODER = re.compile(
    r"vision|visual|image|audio|speech|encoder|tower|projector|resampler|expert|cross_attn"
    r"|(^|\.)(vit|vpm|apm)(\.|$)"
)


def is_o_proj(prefix: str) -> bool:
    """Whether `prefix` names the o_proj of a decoder's self-attention."""
    return bool(_O_PROJ.search(prefix)) and not _NOT_A_DECODER.search(prefix)


@dataclass
class Shard:
    """What a sharded layer carries beside vLLM's own attributes.

    name: key of the layer in its group, unique in this process; label: the type in which the
        custom op takes it.
    traceable: a graph compiler traces the layer as plain collectives, see `HostForward`.
    kept, saved: bytes of the parameters on this rank, and what the unsharded layer had more.
    shapes: parameter name -> shape on this rank, before the host re-packs it.
    gather_from: rows on every rank from which the weight is gathered (0: never), and whether
        that has been seen to give what the exchange gives; see `weight_gather`.
    """

    name: str
    label: type
    traceable: bool
    group: OtpGroup
    parallel_state: Any
    kept: int = 0
    saved: int = 0
    shapes: dict[str, tuple[int, ...]] | None = None
    description: str = ""
    gather_from: int = 0
    gather_verified: bool = False


class ShardedMixin:
    """Marks a sharded layer; every such layer is an instance of it and of the host's class."""

    oproj: Shard


def construct(
    init: Callable[..., None],
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    group: OtpGroup,
    parallel_state: Any,
    host: HostForward,
) -> None:
    """Run the host's `layer.__init__` so that `layer` becomes a sharded o_proj.

    init: the bound original constructor, called with args and kwargs as given.
    Raises OprojError when the input dimension cannot be divided or the host refuses.
    """
    given = inspect.signature(init).bind(*args, **kwargs)
    given.apply_defaults()
    prefix = given.arguments["prefix"]
    topology.check_divisible(prefix, given.arguments["input_size"], group.tp_size, group.size)
    cls: type = type(layer)
    layer.__class__ = _sharded_class(cls)
    # nn.Module.__setattr__ would look for tables that do not exist before its __init__.
    layer.__dict__["oproj"] = Shard(
        _unique(prefix, group), host.label_type(), host.traceable(), group, parallel_state
    )
    try:
        with otp_group.layer_tp_group(parallel_state, group):
            init(*args, **kwargs)
    except OprojError:
        raise
    except Exception as error:
        raise OprojValueError(
            "OPROJ006",
            f"{TOGGLE} is {group.size}, and vLLM cannot build {prefix} for a "
            f"{group.tp_size * group.size}-way split of its {given.arguments['input_size']} input "
            f"columns ({type(error).__name__}: {error}): choose a smaller group size.",
        ) from error
    _measure(layer)
    _see_own_group_after_loading(layer)
    group.layers[layer.oproj.name] = layer
    exchange.register_op(functools.partial(_run_by_name, host), host.label_type())


def require_sharded(owner: Any, prefix: str) -> None:
    """Raise OprojError unless the attention module `owner` got a sharded `o_proj`."""
    if otp_group.require(prefix).complete:
        return
    layer = getattr(owner, "o_proj", None)
    if not isinstance(layer, ShardedMixin):
        raise OprojError(
            "OPROJ007",
            f"{prefix}.o_proj is a {type(layer).__module__}.{type(layer).__qualname__}, which "
            f"did not become a sharded layer although {TOGGLE} is set: this class is not "
            "supported in this release; unset the variable, or report model and release.",
        )


def check_model(model: Any, group: OtpGroup, built: Sequence[str], attentions: Any) -> None:
    """Check the layers that were sharded while `model` was built.

    built: their keys in the group; attentions: the host's layers with a KV cache by prefix
        (`static_forward_context`), other layers may be among them.
    Raises OprojError when neither `model` nor one built before it has a sharded layer, or when
    one of `built` does not belong to a decoder's attention.
    """
    if not group.layers:
        raise OprojError(
            "OPROJ007",
            f"{TOGGLE} is {group.size}, but {type(model).__name__} has no self-attention o_proj "
            "that can be sharded: unset the variable for this model.",
        )
    caches = [
        f"{prefix}."
        for prefix, layer in attentions.items()
        if hasattr(layer, "kv_cache")
        and getattr(layer, "attn_type", None) not in ("encoder", "encoder_only")
    ]
    for name in built:
        owner = name.partition("#")[0].rpartition(".")[0]
        if not any(prefix.startswith(f"{owner}.") for prefix in caches):
            raise OprojError(
                "OPROJ007",
                f"{name} of {type(model).__name__} was sharded, but {owner} has no KV cache, so "
                "it is no decoder's attention (an encoder runs only on the ranks that have an "
                f"image or a sound to encode): unset {TOGGLE}, and please report the model.",
            )


def summary(group: OtpGroup) -> str:
    """The one line a worker logs."""
    kept, saved = totals(group)
    gib = 1 << 30
    return (
        f"oproj_patch {__version__}: o_proj sharded {group.size}-way over ranks {group.ranks}: "
        f"{len(group.layers)} layers, {(kept + saved) / gib:.3f} GiB -> {kept / gib:.3f} GiB on "
        f"this rank (saved {saved / gib:.3f} GiB){weight_gather.summary(group)}"
    )


def totals(group: OtpGroup) -> tuple[int, int]:
    """Bytes of all sharded layers (kept on this rank, saved on this rank)."""
    shards = [layer.oproj for layer in group.layers.values()]
    return sum(s.kept for s in shards), sum(s.saved for s in shards)


@functools.cache
def _sharded_class(cls: type) -> type:
    """A subclass of `cls` whose instances are sharded; same names, for features keyed on them."""
    if issubclass(cls, ShardedMixin):
        return cls
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward": _forward,
    }
    for loader in ("weight_loader", "weight_loader_v2"):
        if hasattr(cls, loader):
            namespace[loader] = _seeing_own_group(getattr(cls, loader))
    return type(cls.__name__, (ShardedMixin, cls), namespace)


def _seeing_own_group(method: Callable[..., Any]) -> Callable[..., Any]:
    # vLLM <= 0.10 asks for the rank while it loads, not only while it constructs.
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with otp_group.layer_tp_group(self.oproj.parallel_state, self.oproj.group):
            return method(self, *args, **kwargs)

    return wrapper


def _see_own_group_after_loading(layer: Any) -> None:
    """Post-load processing of the layer's quant method sees the layer's own group, each time."""
    method = layer.quant_method
    if "process_weights_after_loading" in vars(method):  # shared with a layer seen before
        return
    original = method.process_weights_after_loading

    @functools.wraps(original)
    def process_weights_after_loading(module: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(module, ShardedMixin):
            return original(module, *args, **kwargs)
        with otp_group.layer_tp_group(module.oproj.parallel_state, module.oproj.group):
            return original(module, *args, **kwargs)

    method.process_weights_after_loading = process_weights_after_loading


def _forward(self: Any, input_: torch.Tensor, *_: Any, **__: Any) -> Any:
    # Traced by torch.compile: plain attribute reads, one opaque op, vLLM's own all-reduce.
    group = self.oproj.group
    if not self.input_is_parallel and group.tp_size > 1:
        input_ = input_.chunk(group.tp_size, dim=-1)[group.tp_rank]
    if self.oproj.traceable and torch.compiler.is_compiling():
        gemm = functools.partial(_apply_traced, self)
        output = exchange.run_traced(input_, self.output_size, gemm, group)
    else:
        output = torch.ops.oproj_patch.o_proj.default(
            input_, self.oproj.label(self.oproj.name), self.output_size
        )
    if self.reduce_results and group.tp_size > 1:
        output = self.oproj.parallel_state.get_tp_group().all_reduce(output)
    if not self.return_bias:
        return output
    return output, (self.bias if self.skip_bias_add else None)


def _run_by_name(host: HostForward, x: torch.Tensor, name: str, hidden: int) -> torch.Tensor:
    """Implementation of the custom op."""
    group = otp_group.require(name)
    layer = group.layers[name]
    if not group.sealed:
        weight_gather.prepare(group)
        host.seal(group)
    return exchange.run(x, name, hidden, functools.partial(_apply, layer), group, host)


def _apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The local GEMM through the layer's quant method; bias on the layer's first rank only."""
    group = layer.oproj.group
    bias = None if group.layer_tp.rank_in_group > 0 or layer.skip_bias_add else layer.bias
    # Some quant methods decide by rank at this time what is added once (vllm-ascend's W8A8).
    with otp_group.layer_tp_group(layer.oproj.parallel_state, group):
        output: torch.Tensor = layer.quant_method.apply(layer, x, bias)
    return output


def _apply_traced(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`_apply` for a tracer, which cannot follow the exchange of vLLM's group."""
    rank = layer.oproj.group.layer_tp.rank_in_group
    bias = None if rank > 0 or layer.skip_bias_add else layer.bias
    # A wrapper that would ask vLLM for the rank passes it on as the last argument.
    wrapped = getattr(layer.quant_method, "quant_method", None)
    output: torch.Tensor = (
        layer.quant_method.apply(layer, x, bias)
        if wrapped is None
        else wrapped.apply(layer, x, bias, rank)
    )
    return output


def _measure(layer: Any) -> None:
    """Record shapes and bytes before the host re-packs the weights (a CPU leaves them empty)."""
    shard = layer.oproj
    ways = shard.group.layer_tp.world_size // shard.group.tp_size
    shard.shapes = {}
    for name, param in layer.named_parameters(recurse=False):
        size = param.numel() * param.element_size()
        shard.shapes[name] = tuple(param.shape)
        shard.kept += size
        # vLLM marks a parameter that is cut along the input dimension by `input_dim`.
        if getattr(param, "input_dim", None) is not None:
            shard.saved += size * (ways - 1)
    shard.description = " ".join(
        [type(layer.quant_method).__name__]
        + [
            f"{name}:{tuple(param.shape)}:{param.dtype}"
            for name, param in layer.named_parameters(recurse=False)
        ]
    )


def _unique(prefix: str, group: OtpGroup) -> str:
    # A drafter may name its layers as the model does.
    name, count = prefix, 1
    while name in group.layers:
        count += 1
        name = f"{prefix}#{count}"
    return name
