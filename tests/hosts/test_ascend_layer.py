"""vllm-ascend's real packages on a CPU: sharded layers, idle ranks, quantization, drafters.

One start of two real ranks over gloo for each release runs the parts that are tests here. What of
the NPU is stood in for is in `ascend.py` and `ascend_kernels.py`; names of tests that stand in for
arithmetic kernels say so.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oproj_patch.releases import ASCEND_RELEASES, in_range
from oproj_patch.sharding import topology
from tests.graphs import emulator
from tests.ranks import launch, v4
from tests.ranks.layers import bytes_sent, on_grid, whole

from . import ascend, ascend_v4
from .ascend import changed, check_attention, check_steps, forward_context, refused
from .ascend_drafter import draft_checkpoint, proposer_of
from .ascend_kernels import kernels, kernels_stood_in, quantization_kernels
from .parts import Parts, Ran
from .wheels import Host

RELEASES = [Host("ascend", release) for release in ASCEND_RELEASES]
NEWEST = RELEASES[-1]
STABLE = Host("ascend", "0.23.0")  # the newest that is no candidate
SPARSE = [host for host in RELEASES if in_range(host.version, "0.13.0")]
MODELS = {
    "deepseek": ascend.DEEPSEEK,
    "sparse": {**ascend.DEEPSEEK, **ascend.SPARSE},
    "qwen": ascend.QWEN,
    "v4": v4.config(64, 8, layers=6),
    "v4 in blocks": ascend_v4.CONFIG,
}
SECONDS = 400
# Rows by step and rank: a profile run, both working, one idle, the other idle, both idle.
PLAN = [[-6, -6], [3, 5], [4, 0], [0, 2], [0, 0]]

part = Parts(RELEASES)


@dataclass
class Here:
    """Where a part runs: the release, models by name; vLLM's configuration, the first model."""

    host: Host
    models: dict[str, str]
    config: Any = None
    built: Any = None


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Host:
    found: Host = request.param
    return found


@pytest.fixture(scope="module")
def ran(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The parts of a release, with the toggle `auto` and vllm-ascend's own option."""
    directory = tmp_path_factory.mktemp(str(host))
    models = {name: ascend.write_model(directory / name, MODELS[name]) for name in MODELS}
    started = time.monotonic()
    told = launch.run(
        2,
        all_parts,
        Here(host, models),
        env=ascend.variables(host, "auto"),
        fresh=True,
        seconds=SECONDS,
    )
    return Ran(told, time.monotonic() - started)


def all_parts(here: Here) -> dict[str, str]:
    """In a rank: build the first model, run every part."""
    option = ascend.option(here.host.version)
    with ascend.worker(here.models["deepseek"], 2, additional_config=option) as here.config:
        kernels()
        quantization_kernels()
        here.built = ascend.build(here.config)
        return part.run(here.host, here)


@part()
def test_auto_serves_the_built_in_option_and_hides_it(here: Here) -> None:
    from vllm_ascend.ascend_config import get_ascend_config

    import oproj_patch

    theirs = get_ascend_config()
    theirs = getattr(theirs, "finegrained_tp_config", theirs)
    assert getattr(theirs, "oproj_tensor_parallel_size", None) in (None, 0)
    kept = here.config.additional_config
    assert kept == ascend.option(here.host.version) | kept
    status = oproj_patch.status()
    assert (status.size, list(status.otp_ranks), status.layers) == (2, [0, 1], 2)


@part()
def test_model_with_idle_ranks_and_profile_run(here: Here) -> None:
    """vllm-ascend's DeepSeek: constructed, loaded, run; the kernels inside attention stood in."""
    import oproj_patch

    # To import the V3.2 of 0.11.0 would exchange the attention of this DeepSeek too.
    assert not [symbol for symbol in oproj_patch.status().seams if "deepseek_v3_2" in symbol]
    # Without metadata 0.9.1 itself returns what happened to be in memory.
    idle = here.host.version != "0.9.1"
    check_steps(here.config, here.built, "AscendMLAImpl", PLAN, idle)


@part()
def test_mla_runs_the_o_proj_that_it_was_built_with(here: Here) -> None:
    """What keeps LoRA refused: vLLM puts its LoRA layer into the module, not into what runs."""
    caches = here.config.compilation_config.static_forward_context.values()
    impls = [getattr(layer, "impl", None) for layer in caches]
    built = [impl.o_proj for impl in impls if hasattr(impl, "o_proj")]
    assert len(built) == 2
    for owner in list(here.built.modules()):
        if getattr(owner, "o_proj", None) in built:
            original, owner.o_proj = owner.o_proj, torch.nn.Identity()
            assert original in [impl.o_proj for impl in impls if hasattr(impl, "o_proj")]
            owner.o_proj = original


@part()
def test_w8a8_static_with_a_stand_in_for_npu_quant_matmul(here: Here) -> None:
    for outputs, shape in ((1, [32, 128]), (2, [16, 256])):
        layer, error, scale = _quantized(here.config, "W8A8", 10, shape, outputs)
        # Integers are exact; what differs is the rounding of two bfloat16 partial results.
        assert error <= (8e-3 * scale if outputs == 1 else 0)
        _same_in_both_wires(layer, here.config)
    assert type(layer.quant_method.quant_method).__name__ == "AscendW8A8LinearMethod"


def _same_in_both_wires(layer: Any, config: Any) -> None:
    """The owner's int8 rows give the same bits as rows that the receiver quantizes: also no rows.

    Bytes are counted at the collectives, the kernel that quantizes by its calls.
    """
    import torch_npu

    from oproj_patch.sharding import exchange

    shard, mine = layer.oproj, config.parallel_config.data_parallel_rank
    sent: list[int] = []
    quantized: list[int] = []
    send, quantize = exchange._all_to_all, torch_npu.npu_quantize

    def counted(output: Any, input_: torch.Tensor, *given: Any) -> None:
        sent.append(input_.nbytes)
        send(output, input_, *given)

    def told(rows: torch.Tensor, *given: Any) -> torch.Tensor:
        quantized.append(rows.numel())
        return quantize(rows, *given)

    (a, b), plan = shard.grid, shard.plan
    assert (plan.wire_bytes, plan.element_bytes) == (256 // a, 2) and shard.wire.moved
    with changed(exchange, "_all_to_all", counted), changed(torch_npu, "npu_quantize", told):
        for counts in ([3, 5], [0, 4], [2, 2]):
            x = whole(counts[mine], 256, torch.bfloat16, seed=80 + mine) * 4
            with torch.inference_mode():
                narrow = exchange.exchange(layer, x, tuple(counts))
                without = plan._replace(wire_bytes=0)
                with changed(shard, "wire", None), changed(shard, "plan", without):
                    wide = exchange.exchange(layer, x, tuple(counts))
            assert torch.equal(narrow, wide) and narrow.dtype == torch.bfloat16
            rows, chunk, back = counts[mine], 256 // a, sum(counts) * 32 // b * 2
            assert sent == [2 * rows * chunk, back, 2 * rows * chunk * 2, back]
            assert quantized == [rows * 256] * bool(rows) + [sum(counts) * chunk]
            sent.clear()
            quantized.clear()
    graph: Any = emulator.Graph()
    with contextlib.ExitStack() as stack:
        for name in ("npu_quantize", "npu_quant_matmul"):
            kernel = emulator.as_kernel(getattr(torch_npu, name), name)
            stack.enter_context(changed(torch_npu, name, kernel))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(emulator.capture(graph))
        exchange.exchange(layer, x, (2, 2))
    both, total = "c10d::alltoall_base_", "aten::add.Tensor" if a == 2 else "aten::sum.dim_IntList"
    assert graph.calls == ["npu_quantize", "aten::copy_", both, "npu_quant_matmul", both, total]


@part()
def test_w8a8_dynamic_in_int8_with_stand_ins_for_npu_dynamic_quant_and_npu_quant_matmul(
    here: Here,
) -> None:
    """By the user's word. Up to 0.11.0 the method takes the owner's scale over the whole row."""
    from oproj_patch.sharding import exchange

    handed = here.host.version in ("0.9.1", "0.11.0")
    for outputs, shape in ((1, [32, 128]), (2, [16, 256])):
        layer, error, scale = _quantized(
            here.config, "W8A8_DYNAMIC", 13, shape, outputs, wire="int8"
        )
        plan = layer.oproj.plan
        assert plan.wire_bytes == 256 * outputs // 2 + 4 and not layer.oproj.wire.moved
        # Integers are those of the unsharded layer, or of the part of the row.
        exact = 8e-3 if outputs == 1 else 0
        assert error <= (exact if handed else 2e-2) * scale
        mine = here.config.parallel_config.data_parallel_rank
        with bytes_sent(2) as sent, torch.inference_mode():
            exchange.exchange(layer, whole(4, 256, torch.bfloat16, seed=mine), (4, 4))
        parts = 256 * outputs // 2, 32 // outputs
        assert sum(sent) == 4 * topology.step_bytes(2, *parts, 2, 1, 4)


@part()
def test_fp8_is_refused_for_int8(here: Here) -> None:
    for place, kind in ((14, "W8A8"), (15, "W8A8_DYNAMIC")):
        given = here.config, kind, place, [32, 128]
        told = refused(lambda given=given: _quantized(*given, wire="fp8"))
        name = f"model.layers.{place}.self_attn.o_proj"
        assert told.startswith(f"OPROJ015: OPROJ_WIRE is fp8, which {name} (Ascend")
        assert "it is quantized to int8; accepted are auto, off and int8:" in told


@part()
def test_w8a8_dynamic_with_stand_ins_for_npu_dynamic_quant_and_npu_quant_matmul(
    here: Here,
) -> None:
    for outputs, shape in ((1, [32, 128]), (2, [16, 256])):
        layer, error, scale = _quantized(here.config, "W8A8_DYNAMIC", 11, shape, outputs)
        # Each rank scales its own part of a row, as under ordinary tensor parallelism.
        assert error <= (2e-2 * scale if outputs == 1 else 0)
    assert type(layer.quant_method.quant_method).__name__ == "AscendW8A8DynamicLinearMethod"


@part(*(host for host in RELEASES if host != NEWEST))  # where it is for experts only
def test_w4a8_with_a_stand_in_for_npu_weight_quant_batchmatmul(here: Here) -> None:
    for outputs, shape, groups in ((1, [32, 128], [32, 4]), (2, [16, 256], [16, 8])):
        layer, error, scale = _quantized(
            here.config, "W4A8_DYNAMIC", 12, shape, outputs, weight_scale_second=groups
        )
        assert error <= (8e-3 * scale if outputs == 1 else 0)
    assert type(layer.quant_method.quant_method).__name__ == "AscendW4A8DynamicLinearMethod"


def _quant_config(description: dict[str, Any]) -> Any:
    modules = ("configs.modelslim_config", "modelslim_config", "quant_config")
    found = ascend.first_of(f"vllm_ascend.quantization.{name}" for name in modules)
    config = getattr(found, "AscendModelSlimConfig", None) or found.AscendQuantConfig
    made = config(description)
    # As vLLM's loader does from the model's class.
    made.packed_modules_mapping = {}
    return made


def _quantized(
    config: Any, kind: str, place: int, weight: list[int], outputs: int = 1, wire: str = "auto",
    **shapes: list[int],
) -> tuple[Any, float, float]:  # fmt: skip
    """Return the sharded layer; its largest error from, and the scale of, the unsharded one.

    outputs: into how many parts its outputs are cut; the others of the group's ranks cut the input.
    wire: as OPROJ_WIRE.

    Both are of vllm-ascend's quant method. The unsharded one has a name that is no o_proj's.
    Tensors go through each parameter's own weight loader, and are checked bit for bit; `weight`
    and `shapes` are shapes of the sharded layer's parameters, before processing.
    """
    from vllm.model_executor.layers.linear import RowParallelLinear

    columns, hidden = 256, 32
    place += 100 * (outputs - 1)  # vllm-ascend 0.11.0 builds each name once
    names = [f"model.layers.{place}.self_attn.o_proj", f"model.layers.{place}.mlp.down_proj"]
    description = {f"{name}.weight": kind for name in names}
    config.quant_config = _quant_config({**description, "group_size": 32})
    mine = config.parallel_config.data_parallel_rank
    tp = config.parallel_config.tensor_parallel_size
    inputs = config.parallel_config.data_parallel_size // outputs
    with on_grid(inputs, outputs, wire=wire):
        layer, unsharded = (
            RowParallelLinear(
                columns,
                hidden,
                bias=False,
                quant_config=config.quant_config,
                prefix=name,
                params_dtype=torch.bfloat16,
            )
            for name in names
        )
    assert layer.oproj.grid == (inputs, outputs)
    for seed, (name, parameter) in enumerate(unsharded.named_parameters()):
        cut = getattr(parameter, "input_dim", None) is not None
        own = dict(layer.named_parameters())[name]
        full = _drawn(
            name,
            (parameter.shape[0], *[n * tp if cut else n for n in parameter.shape[1:]]),
            parameter.dtype,
            seed,
        )
        own.weight_loader(own, full)
        parameter.weight_loader(parameter, full)
        part = full
        if cut:
            tp_rank = int(os.environ["RANK"]) % tp
            part = part.chunk(tp * inputs, 1)[tp_rank * inputs + mine // outputs]
        if getattr(parameter, "output_dim", None) is not None:
            part = part.chunk(outputs)[mine % outputs]
        assert torch.equal(own.data, part.view_as(own.data)), name
    found = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    assert found == found | {"weight": weight} | shapes
    for target in (layer, unsharded):
        target.quant_method.process_weights_after_loading(target)
    x = whole(3 + 2 * mine, columns, torch.bfloat16, seed=50 + mine) * 4
    x = x.chunk(tp, 1)[int(os.environ["RANK"]) % tp].contiguous()
    with torch.inference_mode():
        output = layer(x)[0]
        expected = unsharded(x)[0]
    return layer, float((output - expected).abs().max()), float(expected.abs().max())


def _drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return a full tensor for a quantized layer's parameter, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    if name == "weight":
        return torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    if name == "quant_bias":
        # Large: added once too often or not at all, it could not be missed.
        return torch.randint(2000, 4000, shape, generator=generator).to(torch.int32)
    if "offset" in name:
        return torch.zeros(shape, dtype=dtype)
    return (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(dtype)


@part()
def test_rows_are_agreed_anew_where_a_graph_replays_the_first_layer(here: Here) -> None:
    """No Python runs at that layer then, so a later one must not use the counts of another pass."""
    from oproj_patch.sharding import otp_group, rows

    group, mine = otp_group.require("it"), here.config.parallel_config.data_parallel_rank
    host = next(iter(group.layers.values())).oproj.host
    for own, leads in ((2 + mine, True), (7 - mine, False)):
        with forward_context(here.config, own, None):
            counts = rows.across_group(own, group, host, "the first here", leads)
            assert counts == ((2, 3) if leads else (7, 6))
            assert rows.across_group(1, group, host, "the next", False) is counts


@part()
def test_steps_of_a_drafter_with_other_rows_in_one_forward_context(here: Here) -> None:
    """The layer alone: vllm-ascend's proposers are not run."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    import oproj_patch

    rows = [[3, 5], [2, 1], [1, 4]]
    layer = RowParallelLinear(256, 64, bias=False, prefix="model.layers.40.self_attn.o_proj")
    weight = whole(64, 256, torch.float32, seed=3)
    layer.weight.weight_loader(layer.weight, weight)
    mine = here.config.parallel_config.data_parallel_rank
    before = oproj_patch.status().exchanges
    with torch.inference_mode(), forward_context(here.config, rows[0][mine], None):
        for step, counts in enumerate(rows):
            x = whole(counts[mine], 256, torch.float32, seed=10 * step + mine)
            assert float((layer(x)[0] - x @ weight.t()).abs().max()) <= 5e-6
    assert oproj_patch.status().exchanges - before == 3


@part(*RELEASES[1:-1])  # the newest has no method of this kind with groups on a linear layer
def test_layers_are_refused_by_name_with_a_remedy(here: Here) -> None:
    """The check of a new layer, when the release had chosen otherwise for it."""
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm_ascend.ops import linear_op

    from oproj_patch.hosts import vllm_ascend
    from oproj_patch.sharding import grid

    config = here.config
    name = "model.layers.30.self_attn.o_proj"
    config.quant_config = _quant_config({f"{name}.weight": "W4A8_DYNAMIC", "group_size": 32})
    layer = RowParallelLinear(256, 32, bias=False, quant_config=config.quant_config, prefix=name)

    check_layer = vllm_ascend.VllmAscend({}).check_layer

    def told(wanted: str, check: Any = check_layer, code: str = "OPROJ015") -> None:
        sentence = refused(lambda: check(layer))
        if not wanted:
            assert sentence == ""
        assert sentence.startswith(f"{code}: OPROJ_TENSOR_PARALLEL_SIZE is " if wanted else "")
        assert wanted in sentence, sentence

    def chosen(operator: str, tp: int, wanted: str) -> None:
        kind = getattr(linear_op, operator)
        layer.custom_op = kind.__new__(kind)
        with changed(layer.oproj.group, "tp_size", tp):
            told(wanted)

    told("")
    chosen("OProjRowParallelOp", 1, f"runs {name} through its own OProjRowParallelOp")
    chosen("SequenceRowParallelOp", 2, "its own SequenceRowParallelOp (tensor-parallel siz")
    chosen("SequenceRowParallelOp", 1, "")
    assert layer.custom_op is None
    layer.input_size_per_partition = 40
    told(f"leaves 40 input columns of {name} on a rank", grid.check_blocks, "OPROJ006")
    layer.input_size_per_partition = 128
    modules = ("methods.w4a4.w4a4_flatquant", "methods.w4a4_flatquant", "w4a4_flatquant_dynamic")
    flat = ascend.first_of(f"vllm_ascend.quantization.{name}" for name in modules)
    kind = flat.AscendW4A4FlatQuantDynamicLinearMethod
    layer.quant_method.quant_method = kind.__new__(kind)
    told("AscendW4A4FlatQuantDynamicLinearMethod, whose transforms")


@part(STABLE)
def test_proposer_drafts_as_often_on_an_idle_rank(here: Here) -> None:
    """The real MTP model under vllm-ascend's own loop over three drafted tokens.

    An idle rank's proposer runs its own dummy pass. The unsharded model drafts the same.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader

    import oproj_patch

    steps = 3
    # Rows of one request by pass and rank, drafted for; 0 is an idle rank.
    plan = [[4, 4], [4, 0], [0, 4], [4, 8]]
    config = ascend.configured(
        here.models["deepseek"],
        2,
        speculative_config={"method": "mtp", "num_speculative_tokens": steps},
        additional_config=ascend.option(here.host.version),
    )
    with set_current_vllm_config(config):
        draft = config.speculative_config.draft_model_config
        built = base_loader.initialize_model(config, model_config=draft)
        built.load_weights(draft_checkpoint(draft.hf_config))
        block = built.model.layers[str(draft.hf_config.num_hidden_layers)].mtp_block
        attentions = [module for module in built.modules() if hasattr(module, "impl")]
        for module in attentions:
            kernels_stood_in(module)
        proposer = proposer_of(config, built)
        mine = config.parallel_config.data_parallel_rank

        def run(rows: int) -> Any:
            """Return the drafted tokens and what the last step was given; None on an idle rank."""
            proposer.input_ids.copy_(torch.arange(16) % 8)
            proposer.positions.copy_(torch.arange(16))
            proposer.hidden_states.copy_(whole(16, 64, torch.float32, seed=5))
            with torch.inference_mode():
                if not rows:
                    proposer.dummy_run(1)
                    return None
                layers = {module.layer_name: ascend.metadata(rows) for module in attentions}
                with forward_context(config, rows, layers):
                    drafted = proposer._run_merged_draft(
                        num_input_tokens=rows,
                        batch_size=1,
                        token_indices_to_sample=torch.tensor([rows - 1]),
                        target_positions=None,
                        inputs_embeds=None,
                        multi_steps_attn_metadata=[layers] * steps,
                        num_tokens=rows,
                    )
            return drafted.tolist(), proposer.hidden_states[0].clone()

        outputs = []
        for counts in plan:
            before = oproj_patch.status().exchanges
            outputs.append(run(counts[mine]))
            assert oproj_patch.status().exchanges - before == steps
        layer = block.self_attn.o_proj
        assert layer.weight.shape == (64, 128)
        full = dict(draft_checkpoint(draft.hf_config))
        weight = next(full[name] for name in full if name.endswith("o_proj.weight"))
        ascend.unsharded(layer, weight)
        before = oproj_patch.status().exchanges
        for counts, output in zip(plan, outputs, strict=True):
            expected = run(counts[mine])
            if counts[mine]:
                assert output[0] == expected[0] and len(output[0][0]) == steps, output[0]
                assert float((output[1] - expected[1]).abs().max()) <= 5e-6
        assert oproj_patch.status().exchanges == before


def _another(here: Here, name: str, attention: str) -> None:
    """Check one more model in the same processes and groups."""
    from vllm.config import set_current_vllm_config

    option = ascend.option(here.host.version)
    config = ascend.configured(here.models[name], 2, additional_config=option)
    with set_current_vllm_config(config):
        check_steps(config, ascend.build(config), attention, PLAN)


@part(*SPARSE)
def test_sparse_attention_with_idle_ranks_and_profile_run(here: Here) -> None:
    """DeepSeek V3.2; the kernels inside attention stood in."""
    _another(here, "sparse", "AscendSFAImpl")


@part(NEWEST)
def test_attention_whose_metadata_have_no_token(here: Here) -> None:
    """Without rotary dimensions SFA returns before o_proj then; the other rank has rows."""
    from vllm.config import set_current_vllm_config

    import oproj_patch

    option = ascend.option(here.host.version)
    config = ascend.configured(here.models["sparse"], 2, additional_config=option)
    with set_current_vllm_config(config):
        built = ascend.build(config)
        attentions = ascend.attentions(built)
        for module in attentions:
            kernels_stood_in(module)
        mine = config.parallel_config.data_parallel_rank
        told = ascend.metadata((1, 3)[mine])
        if mine == 0:
            told.num_actual_tokens = 0
            for module in attentions:
                module.impl.qk_rope_head_dim = 0
        tokens = torch.arange((1, 3)[mine])
        layers = {module.layer_name: told for module in attentions}
        before = oproj_patch.status().exchanges
        with torch.inference_mode(), forward_context(config, len(tokens), layers):
            output = built(tokens, tokens, None)
        assert oproj_patch.status().exchanges - before == len(attentions) == 2
        if mine == 1:
            weights = dict(ascend.checkpoint(config.model_config.hf_config))
            for index, layer in enumerate(built.model.layers):
                name = f"model.layers.{index}.self_attn.o_proj"
                ascend.unsharded(layer.self_attn.o_proj, weights[f"{name}.weight"])
            expected = ascend.forward(built, config, 3, idle=False)
            assert float((output - expected).abs().max()) <= 5e-6 * float(expected.abs().max())


@part()
def test_a_draft_layer_in_blocks_stays_whole(here: Here) -> None:
    """The host's constructor runs twice; that of 0.11.0 takes a name once only."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

    from oproj_patch.sharding import otp_group

    class InBlocks(UnquantizedLinearMethod):  # type: ignore[misc]
        def create_weights(
            self, layer: Any, input_size_per_partition: int, *args: Any, **given: Any
        ) -> None:
            if input_size_per_partition % 256:
                raise ValueError("no whole blocks of 256 columns")
            super().create_weights(layer, input_size_per_partition, *args, **given)

    config, group = here.config, otp_group.require("the test")
    name, sharded = "model.layers.90.self_attn.o_proj", len(group.layers)
    method = SimpleNamespace(get_quant_method=lambda *_, **__: InBlocks())
    with set_current_vllm_config(config), changed(group, "complete", False):
        layer = RowParallelLinear(
            256, 32, bias=False, params_dtype=torch.float32, quant_config=method, prefix=name
        )
    assert not hasattr(layer, "oproj") and len(group.layers) == sharded
    assert layer.weight.shape == (32, 256)
    assert config.compilation_config.static_forward_context.pop(name, layer) is layer


@part(*RELEASES[1:])
def test_grouped_query_attention(here: Here) -> None:
    """Qwen3-MoE, whose o_proj is called by the model and not by the attention."""
    _another(here, "qwen", "AscendAttentionBackendImpl")


@part(RELEASES[0])  # the last: it changes the release's configuration
def test_scattering_linear(here: Here) -> None:
    """o_proj under enable_prefill_optimizations: sharded without tensor parallelism only."""
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.models.deepseek_v2 import CustomDeepseekV2MLAAttention as attention

    get_ascend_config().enable_prefill_optimizations = True
    check_attention(here.config, attention, 20, "RowParallelScatterLinear", scatters=True)


# -- starts of their own ----------------------------------------------------------------------


@pytest.mark.parametrize("host", [Host("ascend", "0.11.0")], indirect=True, ids=str)
def test_sparse_attention_of_its_own_class(host: Host, tmp_path: Path) -> None:
    """The same in 0.11.0, whose V3.2 has o_proj and attention classes of its own."""
    model = ascend.write_model(tmp_path, MODELS["sparse"])
    env = ascend.variables(host, 2)
    launch.run(2, sparse_of_its_own, model, env=env, fresh=True, seconds=SECONDS)


def sparse_of_its_own(model: str) -> None:
    import oproj_patch

    with ascend.worker(model, 2) as config:
        kernels()
        quantization_kernels()
        built = ascend.build(config)
        assert {symbol.split(".")[-2] for symbol in oproj_patch.status().seams} >= {
            "CustomDeepseekV2RowParallelLinear",
            "CustomDeepseekV2SFAAttention",
        }
        check_steps(config, built, "AscendSFAImpl", PLAN)


@pytest.mark.parametrize("host", [STABLE], indirect=True, ids=str)
def test_two_tensor_parallel_ranks_and_quant_bias_once(host: Host, tmp_path: Path) -> None:
    """Four ranks: each weight is split four ways, and the static method adds its bias once.

    Two tensor-parallel by two data-parallel ranks, which cut the input or the output.
    """
    models = [ascend.write_model(tmp_path / name, MODELS[name]) for name in ("deepseek", "v4")]
    env = ascend.variables(host, 2)
    launch.run(4, two_tensor_parallel, *models, env=env, fresh=True, seconds=SECONDS)


def two_tensor_parallel(model: str, with_two_layers: str) -> None:
    import oproj_patch

    tp_rank = int(os.environ["RANK"]) % 2
    with ascend.worker(model, 2, 2) as config:
        kernels()
        quantization_kernels()
        check_steps(config, ascend.build(config), "AscendMLAImpl", PLAN)
        assert list(oproj_patch.status().otp_ranks) == [tp_rank, tp_rank + 2]
        for outputs, shape in ((1, [32, 64]), (2, [16, 128])):
            layer, error, scale = _quantized(config, "W8A8", 10, shape, outputs)
            # What the bias is worth in the result.
            bias = float((layer.quant_bias.float() * layer.deq_scale.float()).abs().min())
            assert error <= 8e-3 * scale < bias / 4
        deepseek_v4(with_two_layers, 2)


@pytest.mark.parametrize("host", [STABLE], indirect=True, ids=str)
def test_grid_and_quant_bias_once(host: Host, tmp_path: Path) -> None:
    """Four data-parallel ranks on a real grid of 2 x 2."""
    model = ascend.write_model(tmp_path, ascend.DEEPSEEK)
    env = {**ascend.variables(host, 4), "OPROJ_GRID": "2x2"}
    launch.run(4, two_by_two, model, env=env, fresh=True, seconds=SECONDS)


def two_by_two(model: str) -> None:
    with ascend.worker(model, 4) as config:
        kernels()
        quantization_kernels()
        layer, error, scale = _quantized(config, "W8A8", 10, [16, 128], 2)
        bias = float((layer.quant_bias.float() * layer.deq_scale.float()).abs().min())
        assert error <= 8e-3 * scale < bias / 4


@part(STABLE, NEWEST)
def test_deepseek_v4_with_a_stand_in_for_npu_transpose_batchmatmul(here: Here) -> None:
    """wo_a and wo_b in one step, and wo_b alone, with idle ranks; the static bias once."""
    deepseek_v4(here.models["v4"], 1)


def deepseek_v4(path: str, tp: int) -> None:
    import torch_npu

    from oproj_patch.hosts import deepseek_v4 as v4_host

    torch_npu.npu_transpose_batchmatmul = lambda x, weight, **_: torch.einsum(
        "tgk,gkr->tgr", x, weight
    )
    with _bfloat16(path, tp) as config:
        kinds = (("FLOAT", 8e-3), ("W8A8", 8e-3), ("W8A8_DYNAMIC", 2e-2))
        for place, (outputs, (kind, limit)) in enumerate((b, k) for b in (1, 2) for k in kinds):
            with on_grid(2 // outputs, outputs):
                attention, unsharded = _v4_attention(config, place, kind)
            v4_host.join(attention, ascend=True)
            layer = attention.wo_b
            assert layer.oproj.grid == (2 // outputs, outputs)
            assert (layer.oproj.pair is not None) == (outputs == 1)
            _v4_steps(config, attention, unsharded, limit)


@contextlib.contextmanager
def _bfloat16(path: str, tp: int = 1) -> Iterator[Any]:
    """Configure one more model, of bfloat16, in the same processes and groups."""
    from vllm.config import set_current_vllm_config

    config = ascend.configured(path, 2, tp, "bfloat16")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config):
            yield config
    finally:
        torch.set_default_dtype(before)


@part(NEWEST)
def test_deepseek_v4_in_fp8_blocks_with_stand_ins_for_kernels(here: Here) -> None:
    """V4 and V4.1, as on an Ascend 950; a rank whose metadata have no token takes part."""
    with _bfloat16(here.models["v4 in blocks"]) as config:
        ascend_v4.check_blocks(config)


def _v4_attention(config: Any, place: int, kind: str) -> tuple[Any, Any]:
    """Return vllm-ascend's attention, and wo_b whole with the same weights; `kind` is wo_b's."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    home = "vllm_ascend.models.deepseek_v4"
    text, prefix = config.model_config.hf_config, f"model.layers.{place}.self_attn"
    whole_name = f"model.layers.{place}.mlp.down_proj"
    names = [f"{prefix}.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a")]
    description = {f"{name}.weight": "FLOAT" for name in names}
    description |= {f"{prefix}.wo_b.weight": kind, f"{whole_name}.weight": kind}
    quant_config = config.quant_config = _quant_config(description)
    attention = ascend.first_of([f"{home}.model", home]).DeepseekV4Attention(
        config, text, 512, config.cache_config, quant_config, prefix=prefix
    )
    unsharded = RowParallelLinear(
        text.o_groups * v4.RANK, text.hidden_size, bias=False, quant_config=quant_config,
        prefix=whole_name, return_bias=False,
    )  # fmt: skip
    own = dict(attention.wo_b.named_parameters())
    for seed, (name, parameter) in enumerate(unsharded.named_parameters()):
        shape = list(parameter.shape)
        if (dim := getattr(parameter, "input_dim", None)) is not None:
            shape[dim] *= attention.wo_b.oproj.group.tp_size
        full = _drawn(name, tuple(shape), parameter.dtype, seed)
        if kind == "FLOAT":
            full = whole(*shape, parameter.dtype, seed=3)
        own[name].weight_loader(own[name], full)
        parameter.weight_loader(parameter, full)
    first = attention.wo_a.weight
    first.weight_loader(first, _first(text))
    for layer in (attention.wo_a, attention.wo_b, unsharded):
        layer.quant_method.process_weights_after_loading(layer)
    return attention, unsharded


def _first(text: Any) -> torch.Tensor:
    """Return the whole wo_a [groups * rank, heads of a group * head size]."""
    return whole(text.o_groups * v4.RANK, v4.HEAD_DIM, torch.bfloat16, seed=4)


def _v4_steps(config: Any, attention: Any, unsharded: Any, limit: float) -> None:
    """Compare each step with the unsharded layers; an idle rank's output is zero."""
    impl, text = attention.dsa_attn.dsa_attn.impl, config.model_config.hf_config
    assert type(impl).__name__ == "AscendDSAImpl"
    mine, name = config.parallel_config.data_parallel_rank, attention.wo_b.oproj.name
    tp, tp_rank = attention.wo_b.oproj.group.tp_size, attention.wo_b.oproj.group.tp_rank
    for counts in ([3, 5], [4, -2], [-1, 3], [-1, -1]):
        rows = abs(counts[mine])
        output = torch.full((rows, text.hidden_size), 7.0, dtype=torch.bfloat16)
        told = None if counts[mine] < 0 else {name: ascend.metadata(rows)}
        o = whole(rows, 8 * v4.HEAD_DIM, torch.bfloat16, seed=60 + mine).view(rows, 8, -1) * 9
        with torch.inference_mode(), forward_context(config, rows, told):
            if told is None:
                impl.forward(name, o, None, None, output=output)
                assert not output.any()
                continue
            impl._forward_o_proj(o.chunk(tp, 1)[tp_rank].contiguous(), output)
            z = torch.einsum("tgk,grk->tgr", o, _first(text).view(8, v4.RANK, -1))
            expected = unsharded(z.reshape(rows, -1).chunk(tp, 1)[tp_rank].contiguous())
        error = float((output - expected).abs().max())
        assert error <= limit * tp * float(expected.abs().max()), (counts, error)
