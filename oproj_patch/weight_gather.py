"""For many rows: fetch the other ranks' shards of a weight instead of exchanging activations.

With T rows on each rank the exchange and the return send `T * ((N-1)/N * K + (N-1) * H)`
elements a rank, the gather `(N-1)/N * K * H`, whatever T is: it moves less from `T* =
K*H / (K + N*H)` rows on when weight and activation have the same element size.

The layer's quant method is applied shard by shard, each with the tensors of its rank in the
layer, and the results are summed in float32: right for every format, also those that cannot be
joined along the input dimension. The shards of all layers arrive in one buffer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from . import topology
from .otp_group import OtpGroup
from .row_counts import Counts

Gemm = Callable[[torch.Tensor], torch.Tensor]

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ALIGNMENT = 256
"""Bytes; what device kernels may ask of the address of a weight."""


def prepare(group: OtpGroup) -> None:
    """Settle for every layer of `group` from how many rows on it is gathered.

    Called when the weights have been loaded and processed, before ranks compare their layers.
    """
    for layer in group.layers.values():
        least = threshold(layer, group)
        layer.oproj.gather_from = least
        # Ranks that gather different things would wait for each other for ever.
        what = {name: tuple(tensor.shape) for name, tensor in pieces(layer).items()}
        layer.oproj.description += f" gather:{least}" + (f":{what}" if least else "")


def threshold(layer: Any, group: OtpGroup) -> int:
    """Rows on every rank from which `layer` is gathered; 0: never.

    The user's number if there is one, else the least row count at which a gather moves no more
    bytes than the exchange.
    """
    wanted = group.settings.weight_gather_rows
    if wanted == 0 or obstacle(layer, group):
        return 0
    if wanted is not None:
        return wanted
    shard_bytes = sum(_bytes(tensor) for tensor in pieces(layer).values())
    columns, outputs = layer.input_size_per_partition, layer.output_size
    return topology.gather_threshold(
        topology.gather_bytes(group.size, shard_bytes),
        topology.step_bytes(group.size, columns, outputs, layer.params_dtype.itemsize),
    )


def obstacle(layer: Any, group: OtpGroup) -> str:
    """Why `layer` cannot be gathered, after its weights were processed; empty when it can."""
    held = pieces(layer)
    cut = layer.oproj.saved // (group.size - 1)
    # Quantizing while loading may have made a weight up to 8 times smaller.
    if sum(_bytes(tensor) for tensor in held.values()) * 8 < cut:
        return "the host has packed the weights where they cannot be read"
    gaps = [name for name, tensor in held.items() if _ordered(tensor) is None]
    return f"{gaps[0]} has gaps in memory" if gaps else ""


def summary(group: OtpGroup) -> str:
    """What the worker's one line says about it; empty when nobody asked and nothing is gathered."""
    layers = list(group.layers.values())
    thresholds = [layer.oproj.gather_from for layer in layers if layer.oproj.gather_from]
    if thresholds:
        size = max(buffer_bytes(layer, group) for layer in layers if layer.oproj.gather_from)
        return (
            f"; weights gathered from {min(thresholds)} rows a rank on, through a buffer of "
            f"{size / (1 << 30):.3f} GiB"
        )
    if group.settings.weight_gather_rows and layers:
        return f"; weights not gathered: {obstacle(layers[0], group)}"
    return ""


def buffer_bytes(layer: Any, group: OtpGroup) -> int:
    """Size of the buffer that gathering `layer` takes on every rank."""
    return sum(_aligned(_bytes(tensor)) * group.size for tensor in pieces(layer).values())


def wins(least: int, counts: Counts) -> bool:
    """Whether to gather with these row counts of the group; `least` as from `threshold`.

    After a gather a rank multiplies its own rows only, so that one with many more than the others
    would keep them waiting, while an exchange spreads the rows evenly.
    """
    return least > 0 and min(counts) >= least and 4 * max(counts) <= 5 * min(counts)


def run(x: torch.Tensor, layer: Any, gemm: Gemm, group: OtpGroup) -> torch.Tensor:
    """One sharded o_proj with a gathered weight: x [T_i, K] -> [T_i, hidden]; same dtype.

    gemm: the local GEMM on the tensors that the layer has at that moment.
    """
    shards = _gather(layer, group)
    chunks = x.view(x.shape[0], group.size, -1).unbind(1)
    own = group.layer_tp
    total: torch.Tensor | None = None
    for index, (chunk, shard) in enumerate(zip(chunks, shards, strict=True)):
        # Some of what a quant method adds once depends on the rank that it sees.
        member = copy.copy(own)
        member.rank_in_group = group.tp_rank * group.size + index
        group.layer_tp = member
        try:
            with _holding(layer, shard):
                partial = gemm(chunk.contiguous())
        finally:
            group.layer_tp = own
        total = partial.to(torch.float32, copy=True) if total is None else total.add_(partial)
    assert total is not None, "a group has ranks"
    return total.to(x.dtype)


def pieces(layer: Any) -> dict[str, torch.Tensor]:
    """The tensors of a layer that belong to its shard, by attribute name: all but the bias."""
    held = {**layer._parameters, **layer._buffers, **vars(layer)}
    return {
        name: tensor.detach()
        for name, tensor in held.items()
        if isinstance(tensor, torch.Tensor) and name != "bias" and tensor.numel()
    }


def _gather(layer: Any, group: OtpGroup) -> list[dict[str, torch.Tensor]]:
    """The `pieces` of every rank of the group, in group order."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(group.size)]
    pending: list[Any] = []
    buffer = _buffer(layer, group)
    start = 0
    for name, tensor in pieces(layer).items():
        ordered = _ordered(tensor)
        assert ordered is not None, "`obstacle` looked at it"
        order, flat = ordered
        size = _aligned(flat.numel())
        region = buffer[start : start + size * group.size].view(group.size, size)
        start += size * group.size
        if group.pairwise:
            for peer in range(group.size):
                if peer != group.rank:
                    into = region[peer, : flat.numel()]
                    pending.append(dist.irecv(into, group=group.device_group, group_src=peer))
                    pending.append(dist.isend(flat, group=group.device_group, group_dst=peer))
        else:
            mine = region[group.rank]
            mine[: flat.numel()].copy_(flat)
            _all_gather(region.view(-1), mine, group=group.device_group)
        permuted = tensor.permute(order)
        back = [order.index(dim) for dim in range(len(order))]
        for rank, shard in enumerate(shards):
            theirs = region[rank, : flat.numel()].view(tensor.dtype)
            shard[name] = (
                tensor if rank == group.rank else theirs.view(permuted.shape).permute(back)
            )
    for work in pending:
        work.wait()
    return shards


def _buffer(layer: Any, group: OtpGroup) -> torch.Tensor:
    """Memory for the shards of one layer; all layers use the same."""
    size = buffer_bytes(layer, group)
    kept = group.scratch.get("weight")
    if kept is None or kept.numel() < size:
        device = next(iter(pieces(layer).values())).device
        # Written to in and out of inference mode, so not an inference tensor.
        with torch.inference_mode(False):
            kept = group.scratch["weight"] = torch.empty(size, dtype=torch.uint8, device=device)
    return kept


@contextmanager
def _holding(layer: Any, shard: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within it `layer` has the tensors of `shard`."""
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
    """A tensor's dimensions from the slowest, and its bytes as they lie in memory; None: gaps."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    permuted = tensor.permute(order)
    if not permuted.is_contiguous():
        return None
    return order, permuted.reshape(-1).view(torch.uint8)


def _bytes(tensor: torch.Tensor) -> int:
    size: int = tensor.numel() * tensor.element_size()
    return size


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
