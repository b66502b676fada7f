"""The sharded layer: which o_proj it is, how it is constructed, loaded and applied.

vLLM builds, loads, quantizes and applies the layer itself; while it does, it sees the layer's own
tensor-parallel group (`otp_group.LayerScope`). An o_proj gets a subclass made on the fly, so that
no other layer is touched.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._version import __version__
from ..errors import OprojError, OprojValueError
from ..settings import GRID, TOGGLE
from . import diagnosis, exchange, grid, otp_group, weight_gather, wire
from .otp_group import Counts, LayerScope, LayerTPGroup, OtpGroup
from .pair import Pair
from .rows import HostPass
from .topology import Grid
from .wire import Wire

# A decoder's self-attention output projection, by vLLM's naming of layers ("prefix"). Not matched:
# `self_attn.dense`, `out_proj`. Linear attentions use these names too (Bailing 2.5,
# MiniMax-Text-01). vLLM changes the number of rows inside those layers, and announces only that of
# the whole pass, so they cannot be sharded.
_O_PROJ = re.compile(
    r"(^|\.)((self_attn|self_attention|attn|attention|mixer)(\.\d+)?\.o_proj"
    r"|layers\.\d+\.o_proj|attention\.dense|(self_attn|attn)\.wo_b)$"
)
# An encoder runs only on the ranks that have an image or a sound to encode.
_NOT_A_DECODER = re.compile(
    r"vision|visual|image|audio|speech|encoder|tower|projector|resampler|expert|cross_attn"
    r"|(^|\.)(vit|vpm|apm)(\.|$)"
)
# Attention modules with a softmax attention and its KV cache whose only row-parallel layer is the
# output projection. Its name is no evidence: a linear attention has the same one
# (`self_attn.dense`, `self_attn.out_proj`), or vLLM gives it none (0.11 and before).
OWNERS = frozenset({
    "ArcticAttention", "BailingMoeV3MLAAttention", "DbrxAttention", "DeepseekAttention",
    "Dots1Attention", "InklingAttention", "JambaAttentionDecoderLayer", "Lfm2MoeAttention",
    "MiniCPM3Attention", "MiniCPMAttention", "Moondream3Attention", "OlmoeAttention",
    "PhiMoEAttention", "Qwen2MoeAttention",
})  # fmt: skip
_log = logging.getLogger("vllm.oproj_patch")  # only loggers below "vllm" have vLLM's handlers


def is_o_proj(prefix: str, owner: str = "") -> bool:
    """Tell whether `prefix` names the o_proj of a decoder's self-attention.

    owner: name of the class in whose constructor the layer is made.
    """
    named = owner in OWNERS or _O_PROJ.search(prefix)
    return bool(prefix and named) and not _NOT_A_DECODER.search(prefix)


@dataclass
class Shard:
    """What a sharded layer carries beside vLLM's own attributes.

    name: key of the layer in its group; label: the name, as the custom op takes it.
    traceable: a graph compiler traces the layer as plain collectives, see `HostPass`.
    grid: the layer's; hidden: its outputs on all ranks.
    whole: why the grid is not the group's, so the output is whole; empty where it is.
    tp: what the host sees as the tensor-parallel group of the layer.
    plan: see `exchange.Plan`; None before the first step.
    wire: how rows travel out, if not in the model's type.
    cut: parameter's name -> number of parts into which the group cuts it.
    kept, saved: bytes of the parameters on this rank, and what the unsharded layer had more.
    description: what must be equal on all ranks.
    leads: ranks that agree on row counts do it anew at this layer.
    gather_verified: a gather was seen to give what an exchange gives.
    mixes_rows: one row changes another's result in the quant method, which then gets the rows of
        one owner at a time.
    pair: for the second of two layers that are one step.
    alone: why the first of the two is not sharded; empty where it is, and for a single layer.
    """

    name: str
    label: Any
    traceable: bool
    layer: Any
    group: OtpGroup
    host: HostPass
    parallel_state: Any
    grid: Grid
    hidden: int
    whole: str
    tp: LayerTPGroup
    plan: exchange.Plan | None = None
    wire: Wire | None = None
    cut: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    saved: int = 0
    description: str = ""
    leads: bool = False
    gather_verified: bool = False
    mixes_rows: bool | None = None
    pair: Pair | None = None
    alone: str = ""

    def gemm(
        self, x: torch.Tensor, counts: Counts = (), open_: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        """Multiply x [sum(counts), K/a] by the local shard -> [sum(counts), hidden/b].

        Run both layers of a pair. open_: makes of rows what the layer takes in their place.
        """
        run = self.apply if self.pair is None else self.pair.run
        blocks = [x]
        if self.mixes_rows and len(counts) > 1:
            blocks = [rows for rows in x.split(list(counts)) if rows.shape[0]] or blocks
        outputs = [run(block if open_ is None else open_(block)) for block in blocks]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def apply(self, x: Any) -> torch.Tensor:
        """Run the layer's quant method; the bias is added on the first rank of `tp` only."""
        layer = self.layer
        bias = None if self.tp.rank_in_group > 0 or layer.skip_bias_add else layer.bias
        # Some quant methods decide by rank at this time what is added once (vllm-ascend's W8A8).
        with LayerScope(self.parallel_state, self.tp):
            output: torch.Tensor = layer.quant_method.apply(layer, x, bias)
        return output

    def gemm_traced(self, x: torch.Tensor) -> torch.Tensor:
        """Do what `gemm` does for a tracer, which cannot follow the scope of vLLM's group."""
        layer, rank = self.layer, self.tp.rank_in_group
        bias = None if rank > 0 or layer.skip_bias_add else layer.bias
        # vllm-ascend's wrapper would ask vLLM for the rank; it passes it on as last argument.
        wrapped = getattr(layer.quant_method, "quant_method", None)
        method = layer.quant_method if wrapped is None else wrapped
        output: torch.Tensor = method.apply(layer, x, bias, *(() if wrapped is None else (rank,)))
        return output


class ShardedMixin:
    """Marks a sharded layer; every such layer is an instance of it and of the host's class."""

    oproj: Shard


def construct(
    init: Callable[..., None], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
    group: OtpGroup, parallel_state: Any, host: HostPass,
    first: Pair | str | None = None,
) -> None:  # fmt: skip
    """Run `init`, the host's bound constructor, so that `layer` becomes a sharded o_proj.

    first: for the second of two layers: the pair with the first, or why the first is whole.
    Raises OprojError when the weight cannot be divided or the host refuses.
    """
    signature = inspect.signature(init)
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    prefix, columns = given.arguments["prefix"], given.arguments["input_size"]
    hidden = given.arguments["output_size"]
    own, whole = grid.of_layer(given.arguments, group)
    pair = first if isinstance(first, Pair) else None
    alone = first if isinstance(first, str) else ""
    if pair is not None and own != (plain := Grid(group.size, 1)):
        own, whole = plain, f"{pair.first.oproj.name} is sharded with it"
    # To the host it is a row-parallel layer of these outputs alone. Other plugins' wrappers find
    # each argument as the caller gave it, by name or by place.
    outputs, place = hidden // own.outputs, [*signature.parameters].index("output_size")
    if "output_size" in kwargs:
        kwargs = {**kwargs, "output_size": outputs}
    else:
        args = (*args[:place], outputs, *args[place + 1 :])
    cls: type = type(layer)
    names = (getattr(init, "__module__", ""), parallel_state.__name__)
    _warn_of_bypassed(cls, tuple(name.partition(".")[0] for name in names))
    layer.__class__ = _sharded_class(cls, _forward)
    name, count = prefix, 1
    while name in group.layers:  # a drafter may name its layers as the model does
        count += 1
        name = f"{prefix}#{count}"
    label_type = host.label_type()
    # nn.Module.__setattr__ would look for tables that do not exist before its __init__.
    layer.__dict__["oproj"] = Shard(
        name, label_type(name), host.traceable(), layer, group, host, parallel_state,
        own, hidden, whole, group.layer_tp[own], pair=pair, alone=alone,
    )  # fmt: skip
    try:
        with LayerScope(parallel_state, layer.oproj.tp):
            init(*args, **kwargs)
    except OprojError:
        raise
    except Exception as error:
        parts = f"{group.tp_size * own.inputs} parts of {columns} input columns"
        remedy = "choose a smaller group size"
        if own.outputs > 1:
            parts += f" and {own.outputs} of {hidden} outputs"
            remedy = f"set {GRID}=Nx1"
        raise OprojValueError(
            "OPROJ006",
            f"{TOGGLE} is {group.size}, and vLLM cannot build {prefix} as one of {parts} "
            f"({type(error).__name__}: {error}): if vLLM builds this model with the variable "
            f"unset, {remedy} or report the model.",
        ) from error
    layer.output_size = hidden  # what the layer returns; its part is output_size_per_partition
    grid.check_blocks(layer)
    if pair is None:
        layer.oproj.wire = wire.of_layer(layer)
    _note_cuts(layer, own)
    _measure(layer)
    _see_own_group_after_loading(layer)
    group.layers[name] = layer
    _register_op(label_type)


def construct_first(
    init: Callable[..., None], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
    group: OtpGroup, parallel_state: Any, host: HostPass,
) -> Pair:  # fmt: skip
    """Run `init` so that `layer`, the first of a pair, holds this rank's groups of its outputs.

    Raises OprojError when the host cannot build it.
    """
    given = inspect.signature(init).bind(*args, **kwargs).arguments
    prefix, plain = given["prefix"], Grid(group.size, 1)
    cls: type = type(layer)
    layer.__class__ = _sharded_class(cls, None)
    layer.__dict__["oproj"] = shard = Shard(
        prefix, prefix, False, layer, group, host, parallel_state,
        plain, given["output_size"], "", group.layer_tp[plain],
    )  # fmt: skip
    try:
        with LayerScope(parallel_state, shard.tp):
            init(*args, **kwargs)
    except Exception as error:
        raise OprojValueError(
            "OPROJ006",
            f"{TOGGLE} is {group.size}, and vLLM cannot build {prefix} as one of "
            f"{group.tp_size * group.size} parts of {given['output_size']} outputs "
            f"({type(error).__name__}: {error}): if vLLM builds this model with the variable "
            "unset, choose a smaller group size or report the model.",
        ) from error
    _note_cuts(layer, Grid(1, group.size))
    _see_own_group_after_loading(layer)
    return Pair(layer)


def _note_cuts(layer: Any, ways: Grid) -> None:
    """Note in how many parts each parameter is cut; ways: along the input, the output."""
    # vLLM marks along what a parameter is cut. A quant method may replace the parameter later.
    for key, param in layer.named_parameters(recurse=False):
        along = (getattr(param, dim, None) is not None for dim in ("input_dim", "output_dim"))
        layer.oproj.cut[key] = math.prod(n for n, cut in zip(ways, along, strict=True) if cut)


def require_sharded(owner: Any, prefix: str) -> None:
    """Raise OprojError unless the attention module `owner` got a sharded `o_proj`."""
    layer = getattr(owner, "o_proj", None)
    if not isinstance(layer, ShardedMixin):
        raise OprojError(
            "OPROJ007",
            f"{prefix}.o_proj is a {type(layer).__module__}.{type(layer).__qualname__}, which "
            f"did not become a sharded layer although {TOGGLE} is set: this class is not "
            "supported in this release; unset the variable, or report model and release.",
        )


def check_model(model: Any, group: OtpGroup, built: Sequence[str], attentions: Any) -> None:
    """Check the layers `built` (keys in the group) that were sharded while `model` was built.

    attentions: the host's layers by prefix, those with a KV cache among them.
    Raises OprojError when the process has no sharded layer, or when one of `built` does not
    belong to a decoder's attention.
    """
    if not group.layers:
        raise OprojError(
            "OPROJ007",
            f"{TOGGLE} is {group.size}, but {type(model).__name__} has no self-attention o_proj "
            "that can be sharded: unset the variable for this model.",
        )
    encoders = ("encoder", "encoder_only")
    for name in built:
        owner = name.partition("#")[0].rpartition(".")[0]
        inner = [layer for prefix, layer in attentions.items() if _is_below(prefix, owner)]
        # A linear attention (Bailing 3) may get its cache only when memory is planned.
        states = ("kv_cache", "get_state_shape")
        cached = [layer for layer in inner if any(hasattr(layer, name) for name in states)]
        if all(getattr(layer, "attn_type", None) in encoders for layer in cached):
            raise OprojError(
                "OPROJ007",
                f"{name} of {type(model).__name__} was sharded, but {owner} has no KV cache, so "
                "it is no decoder's attention (an encoder runs only on the ranks that have an "
                f"image or a sound to encode): unset {TOGGLE}, and please report the model.",
            )


def check_attentions(model: Any, built: Sequence[str], attentions: Mapping[str, Any]) -> None:
    """Check that every softmax attention of `model` has one sharded o_proj, or that none has.

    built: keys, in the group, of the layers that were sharded while `model` was built;
    attentions: the host's layers by prefix that were registered meanwhile.
    Raises OprojError that names an attention without one, or with two.
    """
    owners = {name: name.partition("#")[0].rpartition(".")[0] for name in built}
    for prefix, layer in attentions.items():
        # A softmax attention has an `impl`, or does its work itself (DeepSeek V4); a linear
        # attention has neither.
        softmax = hasattr(layer, "impl") or hasattr(layer, "forward_mqa")
        softmax = softmax and hasattr(layer, "kv_cache")
        if not built or not softmax or getattr(layer, "attn_type", "decoder") != "decoder":
            continue
        own = [name for name, owner in owners.items() if _is_below(prefix, owner)]
        if len(own) != 1:
            told = f"it has none, while {built[0]} was sharded"
            if own:
                told = f"{' and '.join(own)} were sharded"
            raise OprojError(
                "OPROJ007",
                f"{type(model).__name__} is sharded in part: the attention {prefix} must have one "
                f"sharded output projection, but {told}: this model is not supported in this "
                f"release; unset {TOGGLE}, and please report the model.",
            )


def _is_below(prefix: str, owner: str) -> bool:
    """Tell whether the host's attention `prefix` belongs to the module `owner`."""
    # vLLM's Transformers backend names the attention of layer 3 `3.attn` up to 0.28.
    numbered = re.fullmatch(r"(\d+)\.attn", prefix)
    if numbered:
        return f".layers.{numbered[1]}." in f".{owner}."
    return f"{prefix}.".startswith(f"{owner}.")


def settle(group: OtpGroup) -> None:
    """Settle the plan of every layer that has none, when the weights are as they are served.

    Bytes are measured anew, because a quant method may replace weights while it loads.
    """
    group.main_layers = group.main_layers or len(group.layers)
    for index, layer in enumerate(group.layers.values()):
        shard = layer.oproj
        if shard.plan is not None:
            continue
        # A CPU build empties or removes a weight that it packs where nobody can measure it.
        gone = any(layer._parameters.get(name, name) is None for name in shard.cut)
        if not gone and all(p.numel() for p in _parameters(layer).values()):
            _measure(layer)
        element, pair = layer.params_dtype.itemsize, shard.pair
        shard.wire = wire.as_loaded(layer)
        least = weight_gather.threshold(layer, group)
        chunk = layer.input_size_per_partition if pair is None else pair.chunk(group, element)
        shard.plan = exchange.Plan(
            group.size, chunk * shard.grid.inputs, shard.hidden,
            element, group.graph_rows, least, exchange.BUFFER_BYTES,
            shard.grid.outputs, shard.wire.width if shard.wire else 0,
            0 if pair is None else pair.tail(element),
        )  # fmt: skip
        # Ranks that gather different things would wait for each other forever.
        pieces = weight_gather.pieces(layer) if least else {}
        shapes = {name: tuple(tensor.shape) for name, tensor in pieces.items()}
        shard.description += f" gather:{least}:{shapes} {shard.plan}" + " traced" * shard.traceable
        shard.leads = index == 0 or index >= group.main_layers


def summary(group: OtpGroup) -> str:
    """Return the one line that a worker logs."""
    kept, saved = group.totals()
    gib = 1 << 30
    shards = [layer.oproj for layer in group.layers.values()]
    others = [shard for shard in shards if shard.whole]
    told = f" ({len(others)} layers {others[0].grid}: {others[0].whole})" if others else ""
    if narrow := sum(shard.wire is not None for shard in shards):
        told += f"; {narrow} layers send rows in 8 bits"
    if pairs := sum(shard.pair is not None for shard in shards):
        told += f"; {pairs} layers with their wo_a"
    if alone := [shard.alone for shard in shards if shard.alone]:
        told += f"; wo_a of {len(alone)} layers is whole ({alone[0]})"
    return (
        f"oproj_patch {__version__}: o_proj sharded {group.size}-way over ranks {group.ranks}: "
        f"{len(group.layers)} layers, {(kept + saved) / gib:.3f} GiB -> {kept / gib:.3f} GiB on "
        f"this rank (saved {saved / gib:.3f} GiB); grid {group.grid}{told}"
        f"{weight_gather.summary(group)}"
    )


def subclass(cls: type, namespace: dict[str, Any], *mixins: type) -> type:
    """Return a new subclass of `cls` under its name, because some features look at names."""
    told = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (*mixins, cls), told | namespace)


@functools.cache
def _sharded_class(cls: type, forward: Callable[..., Any] | None) -> type:
    """Return a subclass of `cls` whose instances are sharded; forward None: they keep theirs."""
    if issubclass(cls, ShardedMixin):
        return cls
    namespace = {} if forward is None else {"forward": forward}
    for loader in ("weight_loader", "weight_loader_v2"):
        if hasattr(cls, loader):
            namespace[loader] = _seeing_own_group(cls, loader)
    return subclass(cls, namespace, ShardedMixin)


def _seeing_own_group(cls: type, name: str) -> Callable[..., Any]:
    # vLLM <= 0.10 asks for the rank while it loads, not only while it constructs.
    @functools.wraps(getattr(cls, name))
    def wrapper(self: Any, param: Any, loaded_weight: Any, *args: Any, **kwargs: Any) -> Any:
        loaded_weight = grid.own_outputs(self, param, loaded_weight)
        with LayerScope(self.oproj.parallel_state, self.oproj.tp):
            # Looked up at each call, because others patch it on the class after the build.
            return getattr(cls, name)(self, param, loaded_weight, *args, **kwargs)

    return wrapper


def _see_own_group_after_loading(layer: Any) -> None:
    """Let post-load processing of the layer's quant method see the layer's own group."""
    method = layer.quant_method
    theirs = vars(method).get("process_weights_after_loading")
    if hasattr(theirs, "sees_own_group"):  # shared with a layer seen before
        return

    @functools.wraps(method.process_weights_after_loading)
    def process_weights_after_loading(module: Any, *args: Any, **kwargs: Any) -> Any:
        # Looked up at each call, because frameworks patch it on the class after the build.
        process = theirs or functools.partial(type(method).process_weights_after_loading, method)
        if not isinstance(module, ShardedMixin):
            return process(module, *args, **kwargs)
        with LayerScope(module.oproj.parallel_state, module.oproj.tp):
            return process(module, *args, **kwargs)

    process_weights_after_loading.sees_own_group = True  # type: ignore[attr-defined]
    method.process_weights_after_loading = process_weights_after_loading


def reduced(layer: Any, output: torch.Tensor) -> torch.Tensor:
    """Sum `output` over the tensor-parallel ranks where the host's own forward would."""
    shard = layer.oproj
    if layer.reduce_results and shard.group.tp_size > 1:
        output = shard.parallel_state.get_tp_group().all_reduce(output)
    return output


def _forward(self: Any, input_: torch.Tensor, *_: Any, **__: Any) -> Any:
    # Traced by torch.compile: plain attribute reads, one opaque op, vLLM's own all-reduce.
    shard = self.oproj
    group = shard.group
    if shard.pair is not None:  # the host's method calls it within the step of both layers
        output = shard.apply(input_)
        return (output, None) if self.return_bias else output
    if not self.input_is_parallel and group.tp_size > 1:
        input_ = input_.chunk(group.tp_size, dim=-1)[group.tp_rank]
    output = step(self, input_)
    output = reduced(self, output)
    if not self.return_bias:
        return output
    return output, (self.bias if self.skip_bias_add else None)


def step(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Run one step of a sharded layer, traced or not: x [..., K] -> [..., hidden]."""
    shard = layer.oproj
    if shard.traceable and torch.compiler.is_compiling():
        return exchange.run_traced(layer, x)
    output: torch.Tensor = torch.ops.oproj_patch.o_proj.default(x, shard.label, shard.hidden)
    return output


def step_of_no_request(layer: Any, output: torch.Tensor) -> None:
    """Take part in a step of `layer` with rows of zeros, as many as `output` [rows, hidden] has.

    For a pass in which the host returns before it calls the layer. A whole layer has no steps.
    """
    if not isinstance(layer, ShardedMixin):
        return
    shard, rows = layer.oproj, output.shape[0]
    if shard.pair is None:
        host: Any = layer
        host(output.new_zeros((rows, host.input_size // shard.group.tp_size)))
    else:
        run(output.new_zeros((rows, shard.pair.heads * shard.pair.width)), shard.name)


# The op as torch.compile sees it: opaque, one call, named by the layer. Dynamo inlines wrapt
# wrappers and Python around a traced forward, or fails on it under fullgraph.
_library: torch.library.Library | None = None


def _register_op(label: type) -> None:
    """Define `torch.ops.oproj_patch.o_proj(x, layer, hidden)` once, and `o_proj_pair`.

    The latter is for two layers that are one step; it takes the rows' positions after x.
    A Library's op costs 4 us a call, one of torch.library.custom_op 11.
    label: type of the argument `layer`: `str`, or the host's opaque type with the name in its
        `value`, which keeps the graphs of equal layers equal (one compilation).
    """
    global _library
    if _library is not None:
        return

    def o_proj(x: torch.Tensor, layer: Any, hidden: int) -> torch.Tensor:
        return run(x, layer if isinstance(layer, str) else layer.value)

    def o_proj_pair(
        x: torch.Tensor, positions: torch.Tensor, layer: Any, hidden: int
    ) -> torch.Tensor:
        return run(x, layer if isinstance(layer, str) else layer.value, positions)

    def fake(x: torch.Tensor, *given: Any) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], given[-1]))

    tensor = torch.Tensor
    types = {"x": tensor, "positions": tensor, "layer": label, "hidden": int, "return": tensor}
    _library = torch.library.Library("oproj_patch", "FRAGMENT")
    for op in (o_proj, o_proj_pair):
        op.__annotations__.update({name: types[name] for name in op.__annotations__})
        _library.define(op.__name__ + torch.library.infer_schema(op, mutates_args=()))
        _library.impl(op.__name__, op, "CompositeExplicitAutograd")
        _library._register_fake(op.__name__, fake)


def run(x: torch.Tensor, name: str, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Implement the custom op: x [..., K] -> [..., hidden].

    positions: [...], of the rows, for a pair that needs them.
    """
    group = otp_group.require(name)
    layer = group.layers[name]
    if group.checked < len(group.layers):
        # Loaders share no call that runs on every rank after loading. A forward pass does.
        settle(group)
        layer.oproj.host.before_first_step(group)
        exchange.reserve(group, x)
        group.checked = len(group.layers)
    if layer.oproj.mixes_rows is None:
        layer.oproj.mixes_rows = _mixes_rows(layer, x)
    return exchange.run(layer, x, positions)


def _mixes_rows(layer: Any, like: torch.Tensor) -> bool:
    """Tell whether one row changes another row's result in the layer's quant method.

    A dynamic scale per tensor does: rows of another rank would then change this rank's result.
    Raises OprojError, on every rank of the group, for a method that remembers rows on one of them,
    because rows of one owner at a time do not help there.
    """
    if type(layer.quant_method).__name__.startswith("Unquantized"):
        return False
    shard = layer.oproj
    columns = layer.input_size_per_partition
    rows = torch.arange(16 * columns, device=like.device).sin().view(16, columns).to(like.dtype)
    even, odd = rows.clone(), rows.clone()
    even[0::2] *= 1000  # a method may look at the first row, the last one, or neighbors
    odd[1::2] *= 1000
    quiet, by_even, by_odd, again = (shard.apply(x).float() for x in (rows, even, odd, rows))
    largest, group = quiet.abs().max(), shard.group
    # Far above what the order of a sum changes.
    remembers = bool((again - quiet).abs().max() > 0.05 * largest)
    told = diagnosis.told_by_all(int(remembers), f"the first step of {shard.name}", group)
    if any(told):
        ranks = ", ".join(str(rank) for rank, own in zip(group.ranks, told, strict=True) if own)
        raise OprojError(
            "OPROJ015",
            f"{TOGGLE} is {group.size}, and {type(layer.quant_method).__name__} of {shard.name} "
            f"gave two results for the same rows on rank {ranks}: it remembers rows of earlier "
            "steps, and those of other ranks would change this rank's results; leave o_proj out of "
            "that quantization, or unset the variable.",
        )
    changed = torch.cat([(by_even - quiet)[1::2], (by_odd - quiet)[0::2]])
    return not bool(changed.abs().max() <= 1e-3 * largest)  # NaN is a change too


def _measure(layer: Any) -> None:
    """Record bytes and shapes of the parameters, of both layers of a pair."""
    shard, params = layer.oproj, _parameters(layer)
    sizes = {name: param.numel() * param.element_size() for name, param in params.items()}
    cut = dict(shard.cut)
    if shard.pair is not None:
        cut |= {f"first {name}": ways for name, ways in shard.pair.first.oproj.cut.items()}
    shard.kept = sum(sizes.values())
    # A parameter that a quant method makes under another name is cut as the weight is.
    shard.saved = sum(size * (cut.get(name, shard.group.size) - 1) for name, size in sizes.items())
    both = [layer] if shard.pair is None else [layer, shard.pair.first]
    shard.description = " ".join(
        [type(one.quant_method).__name__ for one in both]
        + [f"{name}:{tuple(param.shape)}:{param.dtype}" for name, param in params.items()]
    )


def _parameters(layer: Any) -> dict[str, torch.Tensor]:
    """Return a layer's own parameters by name, and those of the first of two."""
    params = dict(layer.named_parameters(recurse=False))
    if layer.oproj.pair is not None:
        own = layer.oproj.pair.first.named_parameters(recurse=False)
        params |= {f"first {name}": param for name, param in own}
    return params


@functools.cache
def _warn_of_bypassed(cls: type, hosts: tuple[str, ...]) -> None:
    """Warn once of another plugin's `forward` of `cls`, because a sharded layer does not call it.

    The plugin has replaced the method, or registered `cls` in place of the host's class.
    hosts: packages whose classes are the host's own.
    """
    base = next(base for base in cls.__mro__ if "forward" in vars(base))
    forward = vars(base)["forward"]
    module = getattr(forward, "__module__", type(forward).__module__)
    ours = base.__module__.partition(".")[0] in hosts
    if hasattr(forward, "__wrapped__") or module != base.__module__ or not ours:
        told = "%s.%s.forward%s; oproj_patch does not call it for o_proj layers."
        by = f" was replaced by {module}" if ours else " is another plugin's"
        _log.warning(told, base.__module__, base.__qualname__, by)
