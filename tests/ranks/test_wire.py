"""Rows in 8 bits on real ranks: errors, bytes, kernels, refusals; vLLM's own quantized layers.

The quant methods and their kernels are those of the installed vLLM on a CPU.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from oproj_patch.sharding import topology
from tests.ranks import layers
from tests.ranks.launch import World
from tests.ranks.layers import finish, made, reference, sharding, whole

four_ranks = pytest.mark.parametrize("world", [4], indirect=True)
# Root mean square of the error, as part of the outputs', for rows of a normal distribution.
ERRORS = {"int8": 0.010, "fp8": 0.030}
COLUMNS, HIDDEN = 512, 64
STEPS = [[3, 3, 3, 3], [0, 0, 0, 0], [5, 0, 1, 9], [40, 2, 3, 0], [17, 17, 17, 17]]


@four_ranks
@pytest.mark.parametrize("wire", ["int8", pytest.param("fp8", marks=pytest.mark.long)])
def test_a_layer_that_does_not_quantize(world: World, wire: str) -> None:
    """Every grid: the error that the documents state, and bytes as the formula has them."""
    for grid in topology.grids(4):
        for buffer in (None, 64):
            found = world.run(plain, wire, str(grid), buffer)
            for errors, outputs, sent in found:
                assert ERRORS[wire] / 3 <= (errors / outputs) ** 0.5 <= ERRORS[wire]
                # Two data types travel: a byte, and a float32 for each chunk.
                chunk, part = COLUMNS // grid.inputs, HIDDEN // grid.outputs
                assert sent == 3 * topology.step_bytes(4, chunk, part, 2, 1, 4)


def plain(wire: str, grid: str, buffer: int | None) -> tuple[float, float, int]:
    """In a rank: sums of squares of errors and outputs, bytes sent in a step of 3 rows a rank."""
    from oproj_patch.sharding import layer as sharded
    from oproj_patch.sharding import otp_group

    rank, squares = int(os.environ["RANK"]), [0.0, 0.0]
    env = {"OPROJ_GRID": grid, "OPROJ_WIRE": wire, "OPROJ_WEIGHT_GATHER_ROWS": "16"}
    with sharding(4, 4, dtype=torch.bfloat16, **env) as config, layers.cut_up(buffer):
        layer, weight, offset = made(HIDDEN, COLUMNS, bias=True)
        layer._cpu_skip_gemm_dispatch = True  # not packed: it can be gathered
        finish(layer)
        for step, counts in enumerate(STEPS):
            x = whole(counts[rank], COLUMNS, torch.bfloat16, seed=100 * step + rank) * 20
            with (
                torch.inference_mode(),
                layers.forward_context(config, counts, step % 2 == 0),
                layers.bytes_sent(4) as sent,
            ):
                output = layer(x)[0]
            if step == 0:
                first = sum(sent)
            assert output.dtype == torch.bfloat16 and output.shape == (counts[rank], HIDDEN)
            if counts[rank] and step < 4:
                expected = reference(x, weight, offset)
                squares[0] += float((output.double() - expected).square().sum())
                squares[1] += float(expected.square().sum())
        group = otp_group.require("the test")
        assert group.gathers == 1 and layer.oproj.plan.gather_from == 16
        assert "; 1 layers send rows in 8 bits" in sharded.summary(group)
    return squares[0], squares[1], first


@contextlib.contextmanager
def bfloat16(given: Any = None, **env: str) -> Iterator[Any]:
    """`sharding` for four ranks of a bfloat16 model, whose kernels in Python are not compiled.

    given: vLLM's configuration, with a model's.
    """
    from vllm.model_executor.custom_op import CustomOp

    as_it_is = mock.patch.object(CustomOp, "maybe_compile", lambda _, function, **__: function)
    env["OPROJ_WEIGHT_GATHER_ROWS"] = "0"
    with sharding(4, 4, dtype=torch.bfloat16, config=given, **env) as config, as_it_is:
        if given is None:
            moe = vars(layers.moe_model_config())
            config.model_config = SimpleNamespace(**moe, dtype=torch.bfloat16)
        yield config


def compressed(kind: str, weights: str, inputs: str) -> Any:
    """Return a configuration; weights: scales by tensor or channel.

    inputs: static, token, or `zero point`, which is static.
    """
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    def numbers(strategy: str, dynamic: bool, symmetric: bool = True) -> dict[str, Any]:
        return {"num_bits": 8, "type": kind, "symmetric": symmetric, "strategy": strategy,
                "dynamic": dynamic}  # fmt: skip

    own = ("token", True) if inputs == "token" else ("tensor", False, inputs != "zero point")
    return compressed_tensors.CompressedTensorsConfig.from_config(
        {
            "format": f"{kind}-quantized",
            "ignore": [],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": numbers(weights, False),
                    "input_activations": numbers(*own),
                }
            },
        }
    )


def quantized(method: str | None, hidden: int = HIDDEN, columns: int = COLUMNS) -> Any:
    """Return a loaded o_proj of a method or of none, with random weights and scales."""
    from vllm import _custom_ops

    config = compressed(*METHODS[method]) if method else None
    options = {"quant_config": config, "params_dtype": torch.bfloat16, "bias": False}
    layer = layers.build(layers.O_PROJ, hidden, columns, **options)
    generator = torch.Generator().manual_seed(3)
    for name, param in layer.named_parameters():
        shape = list(param.shape)
        for dim, ways in zip(("input_dim", "output_dim"), layer.oproj.grid, strict=True):
            if getattr(param, dim, None) is not None:
                shape[getattr(param, dim)] *= ways
        data = torch.randint(-100, 100, shape, generator=generator).float()
        if "scale" in name:
            data = torch.full(shape, 0.05) if name == "input_scale" else data.abs() / 5000 + 0.01
        param.weight_loader(param, data.to(param.dtype))
    with mock.patch.object(_custom_ops, "scaled_fp8_quant", _scaled_fp8_quant):
        finish(layer)
    return layer


def _scaled_fp8_quant(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for the kernel with which vLLM joins weights of several scales; no CPU has it."""
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


STAND_IN = "with a stand-in for scaled_fp8_quant"
METHODS = {
    "int8 static": ("int", "channel", "static"),
    "int8 per token": ("int", "channel", "token"),
    "fp8 static": ("float", "tensor", "static"),
    "fp8 per token": ("float", "channel", "token"),
}


@four_ranks
@pytest.mark.parametrize("method", METHODS, ids=lambda name: f"{name}, {STAND_IN}")
def test_a_layer_that_quantizes(world: World, method: str) -> None:
    """What the receiver's method finds is what it would quantize itself: the same results.

    A scale by token is rounded to bfloat16 on the way, no other value is.
    """
    for grid in topology.grids(4):
        for wires in world.run(same_values, method, str(grid)):
            assert wires["auto"] == ("moved" if method == "fp8 static" else "")
            assert wires["error"] <= (0 if "static" in method else 1.6e-2)


def same_values(method: str, grid: str) -> dict[str, Any]:
    """In a rank: the largest difference of outputs with and without the wire, of the largest."""
    outputs: dict[str, list[torch.Tensor]] = {}
    wire, rank, told = method.partition(" ")[0], int(os.environ["RANK"]), ""
    for chosen in ("off", "auto", wire):
        with bfloat16(OPROJ_GRID=grid, OPROJ_WIRE=chosen) as config:
            layer = quantized(method)
            outputs[chosen] = []
            for step, counts in enumerate(STEPS):
                x = whole(counts[rank], COLUMNS, torch.bfloat16, seed=100 * step + rank) * 40
                with torch.inference_mode(), layers.forward_context(config, counts, True):
                    outputs[chosen].append(layer(x)[0].float())
            found = layer.oproj.wire
            if chosen == "auto" and found is not None:
                told = "moved" if found.moved else "adds"
            assert chosen == "auto" or (found is None) == (chosen == "off")
    error = 0.0
    for chosen in ("auto", wire):
        for off, on in zip(outputs["off"], outputs[chosen], strict=True):
            if off.numel():
                error = max(error, float((on - off).abs().max() / off.abs().max()))
    return {"auto": told, "error": error}


@four_ranks
def test_a_quantization_that_moves_adds_no_kernel_with_a_stand_in_for_scaled_fp8_quant(
    world: World,
) -> None:
    """What `auto` takes: the bytes of the formula, and not one kernel or collective more."""
    for grid in topology.grids(4):
        for (wide, off), (narrow, auto) in world.run(moved, str(grid)):
            chunk, part = COLUMNS // grid.inputs, HIDDEN // grid.outputs
            assert wide == 6 * topology.step_bytes(4, chunk, part, 2)
            assert narrow == 6 * topology.step_bytes(4, chunk, part, 2, 1)
            for mine, before in zip(auto, off, strict=True):
                assert mine and not Counter(mine) - Counter(before)
            places = [index for index, name in enumerate(auto[1]) if name.startswith("c10d")]
            assert auto[1][places[0] - 1] == "aten::copy_" and len(places) == 2


def moved(grid: str) -> list[tuple[int, Any]]:
    """In a rank, with `off` and with `auto`: bytes sent, and `layers.kernels` of a step."""
    from oproj_patch.sharding import exchange

    rank, told = int(os.environ["RANK"]), []
    for chosen in ("off", "auto"):
        with bfloat16(OPROJ_GRID=grid, OPROJ_WIRE=chosen):
            layer = quantized("fp8 static")
            x = whole(6, COLUMNS, torch.bfloat16, seed=rank)
            with torch.inference_mode():
                layer(x)
                with layers.bytes_sent(4) as sent:
                    exchange.exchange(layer, x, (6,) * 4)
                ran = layers.kernels(lambda: exchange.exchange(layer, x, (6,) * 4))  # noqa: B023
            told.append((sum(sent), ran))
    return told


@four_ranks
def test_groups_of_fp8_blocks(world: World) -> None:
    """vLLM's own kernel finds the values that it finds in the rows as they were.

    No CPU has the GEMM of this method.
    """
    assert all(world.run(groups))


def groups() -> bool:
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    from oproj_patch.sharding import wire

    with sharding(4, 4):
        quant = QuantFP8(static=False, group_shape=GroupShape(1, 128), use_ue8m0=False)
        x = whole(64, COLUMNS, torch.bfloat16, seed=5) * 30
        x[:, ::7] *= 1e-3
        one = wire.scaled(torch.float8_e4m3fn, 256, 128, torch.bfloat16)
        assert one.width == 256 + 8
        arrived = one.open(one.close(x).view(-1, one.width)).view(x.shape)
        (values, scales), (again, scaled) = quant.forward_native(x), quant.forward_native(arrived)
    assert float((scales / scaled - 1).abs().max()) <= 2**-8
    return torch.equal(values.view(torch.uint8), again.view(torch.uint8))


@four_ranks
def test_a_static_scale_beside_a_zero_point_does_not_clip_rows(world: World) -> None:
    """Values lie around the zero point, so the scale would not reach those far from it."""
    assert all(error <= 2**-7 for error in world.run(beside_a_zero_point))


def beside_a_zero_point() -> float:
    """In a rank: the largest error of restored rows, of their largest value, all of one sign."""
    with bfloat16(OPROJ_WIRE="int8"):
        layer = layers.build(
            layers.O_PROJ, HIDDEN, COLUMNS, bias=False, params_dtype=torch.bfloat16,
            quant_config=compressed("int", "channel", "zero point"),
        )  # fmt: skip
        layer.input_scale.data.fill_(0.01)
        layer.input_zero_point.data.fill_(-128)
        x = torch.linspace(0, 2.5, COLUMNS).to(torch.bfloat16).expand(3, -1)
        wire = layer.oproj.wire
        found = wire.open(wire.close(x).view(-1, wire.width)).view(x.shape)
    return float((found - x).abs().max()) / 2.5


@four_ranks
def test_a_kernel_removes_the_scale_after_loading_with_a_stand_in_for_marlin(world: World) -> None:
    """Rows then travel with scales of their own, or with `auto` in the model's type."""
    for grid in topology.grids(4):
        for told in world.run(scale_removed, str(grid)):
            chunk, part = COLUMNS // grid.inputs, HIDDEN // grid.outputs
            for chosen, narrow in (("auto", ()), ("fp8", (1, 4))):
                error, sent = told[chosen]
                assert sent == 17 * topology.step_bytes(4, chunk, part, 2, *narrow)
                assert error <= (ERRORS["fp8"] if narrow else 0)


def scale_removed(grid: str) -> dict[str, tuple[float, int]]:
    """In a rank, by wire: the error beside `off`, as part of the outputs'; bytes sent in a step."""
    outputs, told = {}, {}
    for chosen in ("off", "auto", "fp8"):
        with bfloat16(OPROJ_GRID=grid, OPROJ_WIRE=chosen):
            layer = quantized("fp8 static")
            weight_only(layer)
            x = whole(17, COLUMNS, torch.bfloat16, seed=int(os.environ["RANK"])) * 20
            with torch.inference_mode(), layers.bytes_sent(4) as sent:
                outputs[chosen] = layer(x)[0].float()
        error = (outputs[chosen] - outputs["off"]).square().sum() / outputs["off"].square().sum()
        told[chosen] = float(error) ** 0.5, sum(sent)
    return told


def weight_only(layer: Any) -> None:
    """Stand in for vLLM's Marlin: pack the weight, quantize no rows, drop their scale."""
    wide = layer.weight.to(torch.bfloat16) * layer.weight_scale.to(torch.bfloat16)
    del layer.weight, layer.input_scale
    layer.weight = torch.nn.Parameter(wide.contiguous().view(torch.int32), requires_grad=False)
    layer.quant_method.apply = lambda layer, x, bias: x @ layer.weight.view(torch.bfloat16)


@four_ranks
@pytest.mark.parametrize(
    ("method", "wire", "grid", "out"),
    [
        (None, "auto", "4x1", 2),
        ("fp8 static", "auto", "2x2", 1),
        ("fp8 per token", "auto", "4x1", 2),
        ("fp8 static", "off", "4x1", 2),
    ],
)
def test_the_grid_has_the_fewest_bytes_of_what_travels(
    world: World, method: str | None, wire: str, grid: str, out: int
) -> None:
    columns, hidden = 512, 256
    ways = {str(ways): (columns // ways[0], hidden // ways[1]) for ways in topology.grids(4)}
    least = min(topology.step_bytes(4, *parts, 2, out) for parts in ways.values())
    assert least == topology.step_bytes(4, *ways[grid], 2, out)
    other = topology.step_bytes(4, *ways["4x1" if grid == "2x2" else "1x4"], 2, out)
    for found, sent in world.run(chosen, method, wire, columns, hidden):
        assert (found, sent) == (grid, 5 * least) and least < other


def chosen(method: str | None, wire: str, columns: int, hidden: int) -> tuple[str, int]:
    """In a rank: the grid of an o_proj [hidden, columns], and the bytes it sends in 5 rows."""
    text = SimpleNamespace(num_attention_heads=4, head_dim=columns // 4, hidden_size=hidden)
    model = {**vars(layers.moe_model_config()), "dtype": torch.bfloat16, "hf_text_config": text}
    config = layers.configuration()
    config.model_config = SimpleNamespace(**model)
    config.quant_config = compressed(*METHODS[method]) if method else None
    with bfloat16(config, OPROJ_WIRE=wire):
        layer = quantized(method, hidden, columns)
        with torch.inference_mode(), layers.bytes_sent(4) as sent:
            layer(whole(5, columns, torch.bfloat16))
        return str(layer.oproj.grid), sum(sent)


# Method, or None: not quantized; OPROJ_WIRE; columns; what the sentence says.
REFUSED: list[tuple[str | None, str, int, str]] = [
    ("int8 per token", "fp8", 512, "it is quantized to int8; accepted are auto, off and int8:"),
    ("int8 static", "fp8", 512, "it is quantized to int8; accepted are auto, off and int8:"),
    ("fp8 static", "int8", 512, "it is quantized to fp8; accepted are auto, off and fp8:"),
    (None, "int8", 24, "its 6 input columns on a rank are no multiple of 4, which scales need;"),
    ("int8 static", "int8", 24, "its 6 input columns on a rank are no multiple of 4,"),
]


@pytest.mark.quick
@four_ranks
@pytest.mark.parametrize(("method", "wire", "columns", "told"), REFUSED)
def test_refused_before_loading(
    world: World, method: str | None, wire: str, columns: int, told: str
) -> None:
    for sentence in world.run(refused, method, wire, columns):
        assert sentence.startswith(f"OPROJ015: OPROJ_WIRE is {wire}, which {layers.O_PROJ} (")
        assert told in sentence and sentence.endswith(": change or unset OPROJ_WIRE.")


def refused(method: str | None, wire: str, columns: int) -> str:
    import oproj_patch

    options = {"bias": False, "params_dtype": torch.bfloat16}
    with bfloat16(OPROJ_WIRE=wire):
        if method is not None:
            options["quant_config"] = compressed(*METHODS[method])
        with pytest.raises(oproj_patch.OprojError) as raised:
            layers.build(layers.O_PROJ, HIDDEN, columns, **options)
    return str(raised.value)
