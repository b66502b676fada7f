"""Which grid a layer takes, and what of it cannot be cut.

A group of ranks has one grid. A layer that it does not divide into whole blocks is cut along the
input only, or refused where the user named the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import OprojValueError
from ..settings import GRID, TOGGLE
from . import topology
from .otp_group import OtpGroup
from .topology import QUANTIZED_OUTPUTS, Grid


def blocks(*owners: Any) -> tuple[int, int]:
    """Return the input columns and the outputs of one quantization block, as `owners` tell.

    owners: a quantization's configuration, its method, a scheme; others are not looked at.
    """
    inputs = outputs = 1
    for owner in owners:
        for attribute in ("group_size", "weight_block_size", "block_size"):
            found = getattr(owner, attribute, None)
            sizes = found if isinstance(found, (list, tuple)) else (1, found)
            if len(sizes) == 2 and all(isinstance(size, int) for size in sizes):
                outputs = math.lcm(outputs, max(1, sizes[0]))
                inputs = math.lcm(inputs, max(1, sizes[1]))
    return inputs, outputs


def fewest_bytes(
    size: int, columns: int, hidden: int, quant_config: Any, wire_bytes: int | None = None
) -> Grid:
    """Return what `auto` stands for: `topology.choose_grid` with the blocks of a quantization.

    columns: of one tensor-parallel rank; wire_bytes: of an element on the way out, if not 2.
    """
    inputs, outputs = blocks(quant_config)
    if quant_config is not None:
        outputs = math.lcm(outputs, QUANTIZED_OUTPUTS)
    return topology.choose_grid(size, columns, hidden, 2, wire_bytes, (inputs, outputs))


def of_layer(given: Mapping[str, Any], group: OtpGroup) -> tuple[Grid, str]:
    """Return the grid of a layer that is built from `given`, and why if not the group's.

    given: what the host passes to the layer's constructor, by name.
    Raises OprojValueError for a grid that the user named and that does not cut this layer.
    """
    grid, plain, tp_size = group.grid, Grid(group.size, 1), group.tp_size
    name, columns, hidden = given["prefix"], given["input_size"], given["output_size"]
    whole = given.get("bias") and given.get("skip_bias_add")
    why = "the host adds its whole bias itself" if whole else ""
    if group.settings.grid != "auto":  # `check_blocks` judges the blocks of the layer that is built
        topology.check_cut(grid, name, columns, hidden, tp_size, why)
        return grid, ""
    topology.check_divisible(name, columns, tp_size, group.size)
    inputs, outputs = blocks(given.get("quant_config"))
    if given.get("quant_config") is not None:
        outputs = math.lcm(outputs, QUANTIZED_OUTPUTS)
    wanted = grid
    if grid == plain:  # find out whether it would be another one without these blocks
        wanted = topology.choose_grid(group.size, columns // tp_size, hidden, 2)
    if wanted == plain:
        return plain, ""
    least = tp_size * wanted.inputs * inputs, wanted.outputs * outputs
    if not why and (columns % least[0] or hidden % least[1]):
        why = f"{columns} columns and {hidden} outputs in blocks of {inputs} and {outputs}"
    return (plain, why) if why else (grid, "")


def blocks_of(layer: Any) -> tuple[int, int]:
    """Return `blocks` of the quantization that a built layer has."""
    method = layer.quant_method
    inner = getattr(method, "quant_method", None)
    scheme, config = getattr(layer, "scheme", None), getattr(method, "quant_config", None)
    return blocks(method, inner, scheme, config, layer)


def check_blocks(layer: Any) -> None:
    """Refuse a shard that does not hold whole quantization blocks.

    Their sizes are what the method, the scheme or the layer tells. Where none does, they are powers
    of two.
    """
    shard, (inputs, outputs) = layer.oproj, blocks_of(layer)
    what = f"a block of {type(layer.quant_method).__name__} has"
    if layer.input_size_per_partition % inputs:
        raise _no_whole_blocks(shard, f"{what} {inputs} columns")
    for name, param in layer.named_parameters(recurse=False):
        along, columns = getattr(param, "input_dim", None), layer.input_size_per_partition
        if along is None or "scale" not in name:
            continue
        share = param.shape[along]
        block = columns // share if share and columns % share == 0 else 0
        if not block or (block & (block - 1) and inputs % block):
            raise _no_whole_blocks(shard, f"its {name} has {share} elements for them")
    if shard.grid.outputs > 1 and (shard.hidden // shard.grid.outputs) % outputs:
        raise _no_whole_blocks(shard, f"{what} {outputs} outputs")


def own_outputs(layer: Any, param: Any, loaded: Any) -> Any:
    """Return the part of a loaded tensor that belongs to this rank's block of the outputs.

    The host's own loader then takes the rank's part of the input.
    Raises OprojValueError for a tensor whose input the ranks cannot share out in whole elements.
    """
    if getattr(param, "is_sharded_weight", False):
        return loaded
    shard = layer.oproj
    # The host's marks of a parameter that is cut along the input, the output.
    along, across = getattr(param, "input_dim", None), getattr(param, "output_dim", None)
    if along is not None and loaded.dim() == param.dim():
        share = param.shape[along]
        if loaded.shape[along] > share * shard.tp.world_size:
            told = f"{loaded.shape[along]} elements of a loaded tensor along the input"
            raise _no_whole_blocks(shard, f"{told} are more than {share} a rank")
    ways, width = shard.grid.outputs, 0 if across is None else param.shape[across]
    if across is None or loaded.dim() <= across or loaded.shape[across] != ways * width:
        return loaded  # where the shapes do not fit now, the host's loader says so
    return loaded.narrow(across, shard.group.rank % ways * width, width)


def _no_whole_blocks(shard: Any, what: str) -> OprojValueError:
    return OprojValueError(
        "OPROJ006",
        f"{TOGGLE} is {shard.group.size}, which leaves {shard.layer.input_size_per_partition} "
        f"input columns of {shard.name} on a rank (grid {shard.grid}), but {what}; accepted are "
        f"sizes that leave whole blocks on every rank: choose a smaller group size, or change "
        f"{GRID}.",
    )
