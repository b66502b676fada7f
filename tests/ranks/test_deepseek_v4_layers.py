"""DeepSeek V4's attentions alone: quantized, tensor parallel, traced, captured.

The attentions for GPUs are vLLM's own too. On a CPU they run with stand-ins for two kernels: the
one that turns heads back and quantizes them, and the grouped product of wo_a. vLLM's own kernel for
fp8 blocks needs a processor with AMX, so the linear method has a stand-in for it as well.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.graphs import emulator
from tests.ranks import v4
from tests.ranks.launch import World
from tests.ranks.layers import join_world, model_groups, whole
from tests.ranks.models import engine_config, write
from tests.ranks.test_wire import compressed

# By step and data-parallel rank; negative: rows without metadata, as of an idle rank.
ROWS = [[3, 5], [40, 2], [4, -1], [-2, 3], [-1, -1], [0, 6], [0, 0]]
HIDDEN, GROUPS, RANK = 256, 8, 128
MOST = 63
"""Of an int8 weight. Without VNNI a processor adds products of int8 in 16 bits, which overflow."""
INPUT_SCALE = 0.01
GPUS = {
    f"{version}{suffix}": (f"{home}.nvidia.{module}", f"DeepseekV4{kind}Attention")
    for version, home in (("V4", "deepseek_v4"), ("V4.1", "deepseek_v41"))
    for suffix, module, kind in (
        ("", "flashmla", "FlashMLA"),
        (" FlashInfer", "flashinfer_sparse", "FlashInferMLA"),
    )
}
"""Attentions of GPUs: module below vllm.models, and class."""


@dataclass(frozen=True)
class Case:
    """An attention: `CPU`, or of GPUS.

    both: wo_a is sharded with wo_b; quantization: none, fp8, int8 token, int8 static.
    """

    attention: str = "CPU"
    both: bool = True
    quantization: str = ""
    tp: int = 1


CASES = {
    "fp8 blocks with a stand-in for the kernel, both": Case(quantization="fp8"),
    "fp8 blocks with a stand-in for the kernel, wo_b": Case(quantization="fp8", both=False),
    "int8, scale per token, both": Case(quantization="int8 token"),
    "int8, scale per token, wo_b": Case(quantization="int8 token", both=False),
    "int8, static scale, both": Case(quantization="int8 static"),
    "V4 of GPUs with stand-ins for its kernels, both": Case("V4"),
    "V4 of GPUs with stand-ins for its kernels, wo_b": Case("V4", both=False),
    "V4 of GPUs with stand-ins for its kernels, fp8 blocks": Case("V4", quantization="fp8"),
    "V4.1 of GPUs with stand-ins for its kernels, both": Case("V4.1"),
    "V4.1 of GPUs with stand-ins for its kernels, wo_b": Case("V4.1", both=False),
    "V4.1 of GPUs with stand-ins for its kernels, fp8 blocks": Case("V4.1", quantization="fp8"),
    "V4 FlashInfer with stand-ins for its kernels": Case("V4 FlashInfer", quantization="fp8"),
    "V4.1 FlashInfer with stand-ins for its kernels": Case("V4.1 FlashInfer", quantization="fp8"),
}
TP_CASES = {
    "both": Case(tp=2),
    "wo_b": Case(tp=2, both=False),
    "V4.1 of GPUs with stand-ins for its kernels": Case("V4.1", quantization="fp8", tp=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps(world: World, case: Case, tmp_path: Path) -> None:
    world.run(steps, _model(tmp_path), case)


@pytest.mark.parametrize("world", [4], indirect=True)
@pytest.mark.parametrize("case", TP_CASES.values(), ids=TP_CASES)
def test_two_tensor_parallel_ranks(world: World, case: Case, tmp_path: Path) -> None:
    world.run(steps, _model(tmp_path), case)


def steps(path: str, case: Case) -> None:
    """In a rank: each step gives what the whole layers give, in float64."""
    with _built(path, case) as (config, attention):
        layer = attention.wo_b
        assert (layer.oproj.pair is not None) == case.both
        for step, counts in enumerate(ROWS):
            _step(config, attention, case, counts, 10 * step, attention._o_proj)
        assert layer.oproj.group.steps == len(ROWS)
        layer.oproj.plan = layer.oproj.plan._replace(buffer_bytes=3 * layer.oproj.plan.row_bytes)
        _step(config, attention, case, [11, 7], 500, attention._o_proj)
        if hasattr(attention, "gemm_rs"):
            from vllm.models.deepseek_v41.nvidia.ops import o_proj

            assert o_proj._fused_wo_a_max_tokens(attention) == 0


@pytest.mark.long
@pytest.mark.parametrize("both", [True, False], ids=["both", "wo_b"])
@pytest.mark.parametrize("attention", ["V4", "V4.1"])
def test_traced_with_stand_ins_for_kernels(
    world: World, attention: str, both: bool, tmp_path: Path
) -> None:
    world.run(traced, _model(tmp_path), Case(attention, both, "fp8"))


def traced(path: str, case: Case) -> None:
    """In a rank: one graph, for all row counts of 2 or more; in it one operator of ours."""
    graphs: list[list[str]] = []

    def counting(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nodes = module.graph.nodes
        graphs.append([str(node.target) for node in nodes if node.op == "call_function"])
        return module.forward

    with _built(path, case) as (config, attention):
        for backend in (counting, "aot_eager"):
            torch._dynamo.reset()
            call = torch.compile(attention._o_proj, fullgraph=True, dynamic=True, backend=backend)
            for step, counts in enumerate([[3, 2], [5, 5], [2, 7]]):
                _step(config, attention, case, counts, 10 * step, call)
    (names,) = graphs
    ours = "oproj_patch.o_proj_pair.default" if case.both else "oproj_patch.o_proj.default"
    assert [name for name in names if "oproj" in name] == [ours]


@pytest.mark.parametrize("attention", ["V4", "V4.1"])
def test_captured_with_stand_ins_for_kernels(world: World, attention: str, tmp_path: Path) -> None:
    """In an emulated device graph, which raises when the CPU would have to wait."""
    world.run(captured, _model(tmp_path), Case(attention, quantization="fp8"))


def captured(path: str, case: Case) -> None:
    """In a rank: vLLM's breakable capture, which V4 has by default; attention is the eager break.

    Capture four rows, replay with other rows and positions.
    """
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture

    with _built(path, case) as (config, attention), emulator.installed():
        _step(config, attention, case, [4, 4], 1, attention._o_proj)
        heads, held = attention.n_local_heads, torch.zeros(4, dtype=torch.int64)
        memory = torch.zeros((4, attention.padded_heads, v4.HEAD_DIM), dtype=torch.bfloat16)
        given: list[torch.Tensor] = []

        def attend() -> None:
            for rows in given:
                memory[:, :heads].copy_(rows[:, :heads])

        capture = BreakableCUDAGraphCapture()
        with torch.inference_mode(), _context(config, [4, 4]), capture:
            capture.add_eager(attend)
            output = attention._o_proj(memory[:, :heads], held)
        exchanged = [name for graph in emulator.Graph.all for name in graph.calls]
        assert sum("alltoall" in name for name in exchanged) == 2, exchanged
        before = attention.wo_b.oproj.group.steps

        def replay(o: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            given[:] = [o]
            held.copy_(positions)
            capture.replay()
            return output

        for seed in (70, 80):
            _step(config, attention, case, [4, 4], seed, replay)
        assert attention.wo_b.oproj.group.steps == before
        emulator.Graph.all.clear()


def test_ranks_with_other_methods_of_wo_a_stop(world: World, tmp_path: Path) -> None:
    one, other = world.run(other_method, _model(tmp_path))
    told = "OPROJ012: layer model.layers.0.attn.wo_b is [UnquantizedLinearMethod "
    assert one.startswith(told) and other == one
    assert "[UnquantizedLinearMethod OtherMethod " in one, one
    assert "[UnquantizedLinearMethod UnquantizedLinearMethod " in one, one
    assert "start every rank with the same model, options, quantization and versions." in one


def other_method(path: str) -> str:
    """In a rank: rank 1's wo_a has another method, of a weight of the same shape and type."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    import oproj_patch

    class OtherMethod(UnquantizedLinearMethod):  # type: ignore[misc]
        pass

    class Config:
        def __getattr__(self, name: str) -> Any:
            return None  # nothing else that is asked for matters here

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            differs = prefix.endswith("wo_a") and os.environ["RANK"] == "1"
            return OtherMethod() if differs else UnquantizedLinearMethod()

    case = Case()
    with (
        _built(path, case, Config()) as (config, attention),
        pytest.raises(oproj_patch.OprojError) as raised,
    ):
        _step(config, attention, case, [3, 3], 1, attention._o_proj)
    return str(raised.value)


def _model(directory: Path) -> str:
    # Experts in fp4 mean scales in powers of two, as V4-Flash and V4-Pro have.
    fields = {"o_lora_rank": RANK, "q_lora_rank": 128, "expert_dtype": "fp4"}
    return write(v4.config(HIDDEN, GROUPS, **fields), directory)


@contextlib.contextmanager
def _built(path: str, case: Case, quant_config: Any = None) -> Iterator[tuple[Any, Any]]:
    """Build, load and join an attention on this rank; yield vLLM's configuration and it."""
    from vllm.utils.torch_utils import set_default_torch_dtype

    import oproj_patch
    from oproj_patch.hosts import deepseek_v4
    from tests.engines import v4_kernels

    importlib.import_module("vllm.v1.worker.cpu.shm")  # gives a CPU torch.cuda.Event
    join_world()
    v4_kernels.stand_in()
    env = {"OPROJ_GRID": "auto" if case.both else "1x2"}
    with mock.patch.dict(os.environ, env), contextlib.ExitStack() as stack:
        oproj_patch.enable(2)
        stack.callback(oproj_patch.disable)
        config = engine_config(path, "bfloat16")
        stack.enter_context(model_groups(2, case.tp, config=config))
        stack.enter_context(set_default_torch_dtype(torch.bfloat16))
        stack.enter_context(_stand_ins())
        config.quant_config = quant_config or _quantization(case.quantization)
        attention = _class(case)(config, "model.layers.0.attn", torch.empty(128, 512).int())
        deepseek_v4.join(attention, False)
        for name in ("wo_a", "wo_b"):
            layer = getattr(attention, name)
            tensors, _ = _weight(name, case.quantization)
            for key, parameter in layer.named_parameters():
                parameter.weight_loader(parameter, tensors[key])
            parts = [case.tp * (2 if case.both else 1), 1]  # of the groups; of the outputs
            if name == "wo_b" and not case.both:
                parts[1] = 2
            rows, columns = tensors["weight"].shape
            across, along = (parts[0], 1) if name == "wo_a" else (parts[1], parts[0])
            assert layer.weight.shape == (rows // across, columns // along)
            layer.quant_method.process_weights_after_loading(layer)
        if case.attention == "CPU":
            attention.process_weights_after_loading(torch.bfloat16)
        yield config, attention


def _class(case: Case) -> Any:
    on_cpu = "deepseek_v4.cpu.cpu_sparse", "DeepseekV4CPUAttention"
    home, name = GPUS.get(case.attention, on_cpu)
    return getattr(importlib.import_module(f"vllm.models.{home}"), name)


def _quantization(kind: str) -> Any:
    from vllm.models.deepseek_v4.quant_config import DeepseekV4FP8Config

    if kind == "fp8":
        return DeepseekV4FP8Config(True, "dynamic", None, [128, 128])
    return compressed("int", "channel", kind.removeprefix("int8 ")) if kind else None


def _weight(name: str, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the tensors of a checkpoint, by name of the parameter, and what they stand for."""
    wide = v4.HEAD_DIM if name == "wo_a" else GROUPS * RANK
    dense = whole(GROUPS * RANK if name == "wo_a" else HIDDEN, wide, torch.float32, seed=len(name))
    if name == "wo_b":
        dense = dense.flip(0)
    if kind == "fp8":
        weight, scale, dense = v4.in_blocks(dense)
        return {"weight": weight, "weight_scale_inv": scale.to(torch.float8_e8m0fnu)}, dense
    if kind:
        scale = dense.abs().amax(1, True) / MOST
        weight = (dense / scale).round().to(torch.int8)
        told = {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor([INPUT_SCALE])}
        return told, weight.double() * scale.double()
    return {"weight": dense.bfloat16()}, dense.bfloat16().double()


def _context(config: Any, counts: list[int], idle: bool = False) -> Any:
    from vllm.forward_context import set_forward_context

    rows = abs(counts[config.parallel_config.data_parallel_rank])
    every = torch.tensor([abs(count) for count in counts], dtype=torch.int32)
    told = None if idle else {}
    return set_forward_context(told, config, num_tokens=rows, num_tokens_across_dp=every)


def _step(
    config: Any, attention: Any, case: Case, counts: list[int], seed: int, call: Callable[..., Any]
) -> None:
    """Run `call`, a step; rows that exist have the whole layers' results, an idle rank's are 0."""
    rank = config.parallel_config.data_parallel_rank
    rows, idle = abs(counts[rank]), counts[rank] < 0
    o = whole(max(rows, 1), GROUPS * v4.HEAD_DIM, torch.bfloat16, seed=seed + rank)[:rows]
    o = o.view(rows, GROUPS, v4.HEAD_DIM) * (0 if idle else 20)
    positions = (torch.arange(rows) * 7 + 13 * rank + seed) % 500
    given = o.chunk(case.tp, 1)[int(os.environ["RANK"]) % case.tp].contiguous()
    if case.attention in GPUS:  # the attention's memory has heads that nobody reads
        padded = torch.full((rows, attention.padded_heads, v4.HEAD_DIM), torch.nan).bfloat16()
        padded[:, : given.shape[1]] = given
        given = padded if case.attention.startswith("V4.1") else padded[:, : given.shape[1]]
    with torch.inference_mode(), _context(config, counts, idle):
        output = call(given, positions)
    assert output.shape == (rows, HIDDEN) and output.dtype == torch.bfloat16
    if idle or not rows:
        assert not output.any()
        return
    expected = _expected(case, o, positions, attention.rotary_emb.cos_sin_cache)
    error = float((output.double() - expected).abs().max() / expected.abs().max())
    # A value next to the middle of two steps of int8 may be rounded to the other one.
    assert error < (0.02 if case.quantization.startswith("int8") else 0.01), (counts, error)


def _expected(
    case: Case, o: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Return the result of the whole layers in float64, of what is quantized as it is."""
    in_fp8 = case.attention in GPUS and case.quantization == "fp8"
    x, scale = turned_back(o, positions, table, GROUPS, quantize=in_fp8)
    x = x.double()
    if in_fp8:
        x *= scale.double().repeat_interleave(128, -1)
    first, second = (_weight(name, case.quantization)[1] for name in ("wo_a", "wo_b"))
    z = torch.einsum("tgd,grd->tgr", x, first.view(GROUPS, RANK, -1)).flatten(1)
    if case.quantization.startswith("int8"):
        # A rank quantizes the columns that it holds.
        ranks = case.tp * (2 if case.both else 1)
        z = z.view(len(z), ranks, -1)
        steps = z.abs().amax(-1, True) / 127 if "token" in case.quantization else INPUT_SCALE
        z = ((z / steps).round().clamp(-128, 127) * steps).flatten(1)
    return z @ second.t()


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand in for the kernels that a CPU, or one without AMX, does not have."""
    from vllm.model_executor.kernels import linear
    from vllm.models.deepseek_v4.nvidia.ops import o_proj
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    class Blocks(linear.CPUFp8BlockScaledMMKernel):  # type: ignore[misc]
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            return torch.nn.functional.linear(x.float(), dequantized(layer)).to(x.dtype)

    kernels = {PlatformEnum.CPU: [Blocks]}
    capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    with (
        mock.patch.object(linear, "_POSSIBLE_FP8_BLOCK_KERNELS", kernels),
        mock.patch.object(type(current_platform), "get_device_capability", capability),
        mock.patch.object(o_proj, "fused_inv_rope_fp8_quant", turned_back),
        mock.patch.object(o_proj, "fp8_einsum", grouped),
    ):
        yield


def dequantized(layer: Any) -> torch.Tensor:
    """Return a weight of fp8 blocks, in float32."""
    scale = layer.weight_scale_inv.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    wide: torch.Tensor = layer.weight.float() * scale
    return wide


def turned_back(
    o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, n_groups: int,
    quantize: bool = True, quant_group_size: int = 128, **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Turn heads back; return them by group in bfloat16, or in fp8 and a scale for 128 values."""
    from tests.engines import v4_kernels

    turned = v4_kernels._turned(o, positions, cos_sin_cache, -1).flatten(1)
    turned = turned.unflatten(1, (n_groups, turned.shape[1] // n_groups))
    if not quantize:
        return turned.to(torch.bfloat16), turned[:, :, :0]
    blocks = turned.unflatten(-1, (-1, quant_group_size))
    scale = blocks.abs().amax(-1).clamp(min=1e-10) / 448
    return (blocks / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scale


def grouped(
    equation: str, left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...],
    out: torch.Tensor, **_: Any,
) -> None:  # fmt: skip
    """Multiply rows [rows, groups, D] by a weight [groups * rank, D], both in blocks of fp8."""
    assert equation == "bhr,hdr->bhd"
    x = left[0].float() * left[1].repeat_interleave(128, -1)
    scale = right[1].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    weight = (right[0].float() * scale).view(x.shape[1], -1, x.shape[2])
    out.copy_(torch.einsum("tgd,grd->tgr", x, weight))
