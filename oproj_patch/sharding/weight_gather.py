"""For many rows: fetch the other ranks' shards of a weight instead of exchanging rows.

With T rows on each rank of a grid a x b, dispatch and combine send `T * (N-1) * (K/a + H/b)`
elements a rank, a gather sends `(N-1)/N * K * H`, whatever T is: it moves less from
`T* = K*H / (b*K + a*H)` rows on when weight and activation have the same element size.

The layer's quant method runs shard by shard, each time with the tensors of one rank in the layer,
because some formats cannot be joined. The results are summed in float32. The shards of all layers
arrive in one buffer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from . import topology
from .otp_group import CollectiveError, Counts, OtpGroup

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ALIGNMENT = 256
"""Bytes; what device kernels may ask of the address of a weight."""
PLAIN_NPU_FORMATS = (-1, 0, 2)
"""torch_npu's formats whose bytes are those of the matrix: undefined, NCHW, ND."""


def threshold(layer: Any, group: OtpGroup) -> int:
    """Return the rows on every rank from which `layer` is gathered; 0: never.

    Without a number of the user's, a gather must move no more bytes than dispatch and combine.
    """
    wanted = group.settings.weight_gather_rows
    if wanted == 0 or obstacle(layer, group):
        return 0
    if wanted is not None:
        return wanted
    shard = sum(tensor.nbytes for tensor in pieces(layer).values())
    columns, element_bytes = layer.input_size_per_partition, layer.params_dtype.itemsize
    outputs = layer.oproj.hidden // layer.oproj.grid.outputs
    wire = layer.oproj.wire
    narrow = () if wire is None else (1, 4 * wire.scales)
    step = topology.step_bytes(group.size, columns, outputs, element_bytes, *narrow)
    return topology.gather_threshold(topology.gather_bytes(group.size, shard), step)


def obstacle(layer: Any, group: OtpGroup) -> str:
    """Return why `layer` cannot be gathered, after its weights were processed; empty if it can."""
    if layer.oproj.pair is not None:
        return "two layers are one step"
    held = pieces(layer)
    for name, tensor in held.items():
        kind = type(tensor)
        plain = kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        if not plain or tensor.layout is not torch.strided or tensor.is_quantized:
            return f"{name} is a {kind.__name__}, which cannot be read plainly"
        if _npu_format(tensor) not in PLAIN_NPU_FORMATS:
            return f"{name} is in a private device format"
        if _ordered(tensor.detach()) is None:
            return f"{name} has gaps in memory"
    cut = layer.oproj.saved // (group.size - 1)
    # Quantizing while loading may have made a weight up to 8 times smaller.
    if sum(tensor.nbytes for tensor in held.values()) * 8 < cut:
        return "the host has packed the weights where they cannot be read"
    return ""


def _npu_format(tensor: torch.Tensor) -> int:
    if tensor.device.type != "npu":
        return -1
    import torch_npu

    return int(torch_npu.get_npu_format(tensor))


def summary(group: OtpGroup) -> str:
    """Return the worker's log on gathers; empty when nobody asked and nothing is gathered."""
    layers = list(group.layers.values())
    gathered = [layer for layer in layers if layer.oproj.plan.gather_from]
    if gathered:
        least = min(layer.oproj.plan.gather_from for layer in gathered)
        size = max(buffer_bytes(layer, group) for layer in gathered)
        return (
            f"; weights gathered from {max(least, group.graph_rows + 1)} rows a rank on, through "
            f"a buffer of {size / (1 << 30):.3f} GiB"
        )
    if group.settings.weight_gather_rows and layers:
        return f"; weights not gathered: {obstacle(layers[0], group)}"
    return ""


def buffer_bytes(layer: Any, group: OtpGroup) -> int:
    """Return the size of the buffer that gathering `layer` takes on every rank."""
    return sum(_aligned(tensor.nbytes) * group.size for tensor in pieces(layer).values())


def wins(least: int, counts: Counts) -> bool:
    """Tell whether to gather with these row counts of the group; `least` as from `threshold`.

    Dispatch spreads the rows evenly. After a gather a rank multiplies its own rows only, so one
    with many more rows than the others would keep them waiting.
    """
    return least > 0 and min(counts) >= least and 4 * max(counts) <= 5 * min(counts)


def run(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """Run one sharded o_proj with a gathered weight: x [T_i, K] -> [T_i, hidden]; same dtype."""
    held, group = layer.oproj, layer.oproj.group
    shards, own, (a, b) = _gather(layer, group), held.tp, held.grid
    chunks = [chunk.contiguous() for chunk in x.view(x.shape[0], a, -1).unbind(1)]
    shape = x.shape[0], b, held.hidden // b
    total = torch.zeros(shape, dtype=torch.float32, device=x.device)
    for index, shard in enumerate(shards):
        i, j = divmod(index, b)
        # Some of what a quant method adds once depends on the rank that it sees.
        held.tp = copy.copy(own)
        held.tp.rank_in_group = group.tp_rank * a + i
        try:
            with _holding(layer, shard):
                total[:, j] += held.gemm(chunks[i])
        finally:
            held.tp = own
    return total.view(x.shape[0], held.hidden).to(x.dtype)


def pieces(layer: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that belong to a layer's shard, by name: no bias that all ranks have."""
    held = {**layer._parameters, **layer._buffers, **vars(layer)}
    if layer.oproj.grid.outputs == 1:
        held.pop("bias", None)
    return {
        name: tensor
        for name, tensor in held.items()
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    }


def _gather(layer: Any, group: OtpGroup) -> list[dict[str, torch.Tensor]]:
    """Return the `pieces` of every rank of the group, in group order."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(group.size)]
    held = pieces(layer)
    device = next(iter(held.values())).device
    buffer = group.memory("weight", buffer_bytes(layer, group), torch.uint8, device)
    start = 0
    for name, own in held.items():
        tensor = own.detach()
        ordered = _ordered(tensor)
        assert ordered is not None, "`obstacle` looked at it"
        order, flat = ordered
        size = _aligned(flat.numel())
        region = buffer[start : start + size * group.size].view(group.size, size)
        start += size * group.size
        mine = region[group.rank]
        mine[: flat.numel()].copy_(flat)
        try:
            _all_gather(region.view(-1), mine, group=group.device_group)
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        permuted = tensor.permute(order)
        back = [order.index(dim) for dim in range(len(order))]
        for rank, shard in enumerate(shards):
            theirs = region[rank, : flat.numel()].view(tensor.dtype)
            shard[name] = (
                tensor if rank == group.rank else theirs.view(permuted.shape).permute(back)
            )
    return shards


@contextmanager
def _holding(layer: Any, shard: dict[str, torch.Tensor]) -> Iterator[None]:
    """Give `layer` the tensors of `shard` for a while."""
    tables = [layer._parameters, layer._buffers, vars(layer)]
    before = [(table, name, table[name]) for name in shard for table in tables if name in table]
    try:
        for table, name, _ in before:
            table[name] = shard[name]
        yield
    finally:
        for table, name, tensor in before:
            table[name] = tensor


def _ordered(tensor: torch.Tensor) -> tuple[list[int], torch.Tensor] | None:
    """Return a tensor's dimensions from the slowest, and its bytes in memory; None: gaps."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    permuted = tensor.permute(order)
    if not permuted.is_contiguous():
        return None
    return order, permuted.reshape(-1).view(torch.uint8)


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
