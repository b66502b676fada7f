"""How rows travel out in 8 bits: the owner of a row closes it, the receiver of a chunk opens it.

A chunk of a row travels as its values and, behind them, its float32 scales. `static` and `scaled`
are the formats that every quant method takes, because the receiver restores the rows. The host
knows which methods take something else in place of rows (`HostPass.own_wire`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OprojError
from ..settings import WIRE
from . import grid

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What `OPROJ_WIRE` names."""
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}


@dataclass(frozen=True)
class Wire:
    """One format.

    chunk: input columns of a rank, K/a; dtype: of a value, of 8 bits.
    quantize: takes rows [T, K]; returns values [T, K] and their scales, float32: [T, a * scales],
        or [T, scales] of which every chunk takes a copy, or None.
    restore: takes values [rows, K/a] and scales [rows, scales], or None; returns what the layer's
        quant method takes.
    scales: that a chunk of a row takes along.
    moved: it is the layer's own quantization, moved to the owner, and adds no kernel.
    parameter: name of what it reads of the layer, which a kernel may remove after loading (Marlin).
    """

    chunk: int
    dtype: torch.dtype
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    restore: Callable[[torch.Tensor, Any], Any]
    scales: int = 0
    moved: bool = False
    parameter: str = ""

    @property
    def width(self) -> int:
        """Bytes of a chunk of a row."""
        return self.chunk + 4 * self.scales

    def close(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows x [T, K] as they travel: int8 [T, a * width]."""
        rows, ways = x.shape[0], x.shape[1] // self.chunk
        if not rows:
            return x.new_empty((0, ways * self.width), dtype=torch.int8)
        values, scales = self.quantize(x)
        closed = values.view(torch.int8).view(rows, ways, self.chunk)
        if scales is not None:
            told = scales.contiguous().view(torch.int8).view(rows, -1, 4 * self.scales)
            closed = torch.cat((closed, told.expand(-1, ways, -1)), -1)
        return closed.view(rows, ways * self.width)

    def open(self, arrived: torch.Tensor) -> Any:
        """Return what the quant method takes for chunks that `arrived`: int8 [rows, width]."""
        values = arrived[:, : self.chunk].view(self.dtype)
        scales = arrived[:, self.chunk :].view(torch.float32) if self.scales else None
        return self.restore(values, scales)


def static(layer: Any, chunk: int) -> Wire:
    """Return the wire of a layer with one scale for all rows, its parameter `input_scale`.

    The quant method finds the same values in the restored rows, because their rounding to the
    model's type is finer than 8 bits.
    """
    dtype, kind = layer.weight.dtype, layer.params_dtype

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _rounded(x.float() / layer.input_scale, dtype), None

    def restore(values: torch.Tensor, _: Any) -> torch.Tensor:
        return (values.float() * layer.input_scale).to(kind)

    return Wire(chunk, dtype, quantize, restore, parameter="input_scale")


def scaled(dtype: torch.dtype, chunk: int, block: int, kind: torch.dtype) -> Wire:
    """Return the wire with a scale for every `block` columns of a row; kind: the model's type.

    A quant method that scales the same columns of a row by their largest value finds the same
    values in the restored rows.
    """

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = x.unflatten(1, (-1, block)).float()
        scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / LARGEST[dtype]
        return _rounded(blocks / scales, dtype), scales

    def restore(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        blocks = values.float().unflatten(1, (-1, block)) * scales.unsqueeze(-1)
        return blocks.to(kind).view(values.shape)

    return Wire(chunk, dtype, quantize, restore, chunk // block)


def stored(layer: Any) -> torch.dtype | None:
    """Return the type of an 8-bit weight, to which the input is quantized too, or else None."""
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    return dtype if dtype in LARGEST else None


def of_layer(layer: Any) -> Wire | None:
    """Return the format in which a built layer's rows travel; None: the model's type.

    Raises OprojError for a format that the user named and the layer cannot take.
    """
    shard, asked = layer.oproj, layer.oproj.group.settings.wire
    own: Wire | None = None
    if asked != "off" and not shard.traceable:
        own = shard.host.own_wire(layer)
    if asked not in DTYPES:
        return own if own is not None and own.moved else None
    dtype, chunk = DTYPES[asked], layer.input_size_per_partition
    held = own.dtype if own is not None else stored(layer)
    problem, accepted = "", "auto and off"
    if shard.traceable:
        problem = "its graph compiler traces the step as plain collectives"
    elif held not in (None, dtype):
        other = next(name for name, known in DTYPES.items() if known == held)
        problem, accepted = f"it is quantized to {other}", f"auto, off and {other}"
    elif chunk % 4 and not (own is not None and own.moved):
        problem = f"its {chunk} input columns on a rank are no multiple of 4, which scales need"
    if problem:
        method = type(getattr(layer.quant_method, "quant_method", layer.quant_method)).__name__
        raise OprojError(
            "OPROJ015",
            f"{WIRE} is {asked}, which {shard.name} ({method}) cannot take: {problem}; accepted "
            f"are {accepted}: change or unset {WIRE}.",
        )
    return own if own is not None else _scaled_for(layer, dtype)


def as_loaded(layer: Any) -> Wire | None:
    """Return a layer's wire after loading: another one where a kernel removed what it reads.

    The other one is `scaled` where the user named a format. With `auto` there is none: rows travel
    in the model's type. Ranks whose kernels differ have different plans, which they compare before
    the first step.
    """
    own: Wire | None = layer.oproj.wire
    if own is None or not own.parameter or getattr(layer, own.parameter, None) is not None:
        return own
    return _scaled_for(layer, own.dtype) if layer.oproj.group.settings.wire in DTYPES else None


def _scaled_for(layer: Any, dtype: torch.dtype) -> Wire:
    chunk, block = layer.input_size_per_partition, grid.blocks_of(layer)[0]
    return scaled(dtype, chunk, block if block >= 128 else chunk, layer.params_dtype)


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:  # the hosts' kernels use -128 too
        return values.round().clamp(-128, 127).to(dtype)
    return values.clamp(-448, 448).to(dtype)
