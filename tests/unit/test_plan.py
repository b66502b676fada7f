"""`oproj-patch plan`: exact figures, and one sentence for whatever is wrong with an input."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oproj_patch.cli import main
from oproj_patch.cli.plan import (
    BUILTIN_MODELS,
    DESCRIPTIONS,
    ModelShape,
    format_plan,
    load_model,
    make_plan,
    parse_config,
)
from oproj_patch.errors import OprojValueError
from oproj_patch.sharding.topology import gather_bytes, gather_threshold, legal_sizes, step_bytes

GIB = 2**30
R1_K, R1_HIDDEN, R1_LAYERS = 16384, 7168, 61
ASCEND, MODELOPT = DESCRIPTIONS
ROOT = Path(__file__).resolve().parents[2]


def command_line(*arguments: str) -> int:
    """Run the `plan` command in this process and return its exit code."""
    return main(["plan", *arguments])


def write_config(directory: Path, config: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return path


def r1_config(**changes: Any) -> dict[str, Any]:
    return {**BUILTIN_MODELS["deepseek-r1"], **changes}


def dtype_of(shape: ModelShape) -> str:
    """The data type that the plan shows."""
    dtype: str = make_plan("m", shape)["dtype"]
    return dtype


# --- arithmetic -------------------------------------------------------------------------------


def test_legal_sizes_divide_dp_and_the_shard_is_whole_blocks() -> None:
    assert legal_sizes(32, R1_K) == [2, 4, 8, 16, 32]
    assert legal_sizes(12, R1_K) == [2, 4]
    assert legal_sizes(12, 96 * 128) == [2, 3, 4, 6, 12]
    assert legal_sizes(32, 2048, block=128) == [2, 4, 8, 16]
    assert legal_sizes(32, 2048, tp_size=4, block=128) == [2, 4]
    assert legal_sizes(1, R1_K) == []


@pytest.mark.parametrize(
    ("n", "weight_bytes", "rows"),
    [(2, 2, 3823), (4, 2, 2607), (8, 2, 1593), (16, 2, 896), (8, 1, 797)],
)
def test_gather_pays_from_k_h_over_k_plus_n_h_rows(n: int, weight_bytes: int, rows: int) -> None:
    gather = gather_bytes(n, R1_K // n * R1_HIDDEN * weight_bytes)
    step = step_bytes(n, R1_K // n, R1_HIDDEN, 2)
    assert gather_threshold(gather, step) == rows
    assert (rows - 1) * step < gather <= rows * step


def test_step_and_gather_bytes() -> None:
    # Out: 7/8 of each row's 16384 channels; back: 7 other ranks' rows of 7168 partial sums.
    assert step_bytes(8, 2048, R1_HIDDEN, 2) == 2 * (7 * 2048 + 7 * 7168)
    assert gather_bytes(8, 2048 * 7168) == 7 * 2048 * 7168
    assert gather_threshold(1, 1000) == 1


@pytest.mark.parametrize(
    ("model", "tp", "kv_dtype", "expected"),
    [
        ("deepseek-r1", 1, "bf16", (512 + 64) * 61 * 2),
        ("deepseek-r1", 8, "fp8", (512 + 64) * 61),
        ("qwen3-235b-a22b", 1, "bf16", 2 * 4 * 128 * 94 * 2),
        ("qwen3-235b-a22b", 2, "bf16", 2 * 2 * 128 * 94 * 2),
        ("qwen3-235b-a22b", 8, "bf16", 2 * 1 * 128 * 94 * 2),
    ],
)
def test_kv_cache_of_mla_and_gqa(model: str, tp: int, kv_dtype: str, expected: int) -> None:
    plan = make_plan(model, load_model(model), dp=8, tp=tp, kv_dtype=kv_dtype)
    assert plan["kv_bytes_per_token"] == expected


def test_values_narrower_than_keys_are_cached_so() -> None:
    fields = {"kv_lora_rank": None, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128}
    plan = make_plan("m", parse_config(r1_config(**fields)))
    assert plan["kv_bytes_per_token"] == 4 * (192 + 128) * 61 * 2


# --- the plan ---------------------------------------------------------------------------------


def test_r1_int8_at_8_saves_5_84_gib() -> None:
    plan = make_plan("deepseek-r1", load_model("deepseek-r1", "int8"), prefill_rows=[4096, 1])
    assert plan["unsharded_bytes_per_rank"] == R1_K * R1_HIDDEN * R1_LAYERS == 7_163_871_232
    assert round(plan["unsharded_bytes_per_rank"] / GIB, 2) == 6.67
    assert [row["otp_size"] for row in plan["rows"]] == [2, 4, 8, 16, 32]
    row = plan["rows"][2]
    assert row["o_proj_bytes_per_rank"] == 895_483_904
    assert row["saved_bytes_per_rank"] == 6_268_387_328
    assert round(row["saved_bytes_per_rank"] / GIB, 2) == 5.84
    assert row["saved_bytes_instance"] == 32 * 6_268_387_328
    assert row["kv_tokens_per_rank"] == 6_268_387_328 // 70_272 == 89_201
    assert row["kv_tokens_instance"] == 32 * 89_201
    sent = 61 * 2 * 7 * (4096 + 3584)  # a quarter of the columns, half of the outputs
    assert (row["wires"][0]["grid"], row["wires"][0]["bytes_per_token"]) == ("4x2", sent)
    assert [cost["rows"] for cost in row["prefill"]] == [4096, 1]
    assert row["prefill"][0]["exchange_bytes"] == 4096 * sent
    assert row["weight_gather_bytes"] == 7 * 2048 * 7168 * 61
    assert row["weight_gather_rows"] == 956  # rounded up from 2048 * 7168 / (2 * 7680)
    assert plan["weight_gather_buffer_bytes"] == R1_K * R1_HIDDEN
    assert (plan["mtp_layers"], plan["mtp_unsharded_bytes_per_rank"]) == (1, R1_K * R1_HIDDEN)
    assert row["mtp_saved_bytes_per_rank"] == R1_K * R1_HIDDEN * 7 // 8


@pytest.mark.parametrize(
    ("model", "saved", "bf16", "alone", "both"),
    [
        ("deepseek-v4-pro", 9.17, 18.35, 7.5, 12.5),
        ("deepseek-v4-flash", 2.35, 4.70, 2.9, 4.7),
        ("deepseek-v4.1-flash", 2.46, 4.92, 3.3, 4.9),
    ],
)
def test_deepseek_v4_shards_wo_a_with_wo_b(
    model: str, saved: float, bf16: float, alone: float, both: float
) -> None:
    plan, wide = (make_plan(model, load_model(model, dtype), dp=32) for dtype in ("int8", "bf16"))
    row = next(row for row in plan["rows"] if row["otp_size"] == 8)
    assert round(row["saved_bytes_per_rank"] / GIB, 2) == saved
    assert round(wide["rows"][2]["saved_bytes_per_rank"] / GIB, 2) == bf16
    assert [(wire["layers"], wire["grid"]) for wire in row["wires"]] == [
        ("wo_a, wo_b", "8x1"),
        ("wo_b", "4x2"),
    ]
    assert [round(wire["bytes_per_token_Nx1"] / 2**20, 1) for wire in row["wires"]] == [both, alone]
    assert row["wires"][1]["bytes_per_token"] < row["wires"][1]["bytes_per_token_Nx1"]
    assert row["exchange_bytes_per_token"] == row["wires"][0]["bytes_per_token"]


def test_deepseek_v4_shards_wo_b_alone_where_groups_do_not_divide() -> None:
    shape = load_model("deepseek-v4-flash", "int8")
    plan = make_plan("deepseek-v4-flash", shape, dp=32, tp=2)
    rows = {row["otp_size"]: row for row in plan["rows"]}
    elements = 43 * 4096 * 8192 // 2  # of each of the two layers, on a tensor-parallel rank
    assert plan["unsharded_bytes_per_rank"] == 2 * elements
    assert rows[4]["o_proj_bytes_per_rank"] == 2 * elements // 4
    assert rows[8]["o_proj_bytes_per_rank"] == elements + elements // 8
    assert [wire["layers"] for wire in rows[8]["wires"]] == ["wo_b"]
    text = format_plan(plan)
    assert "wo_b [4096, 8192] and wo_a in 8 groups x 43 layers" in text
    assert all(len(line) <= 80 for line in text.partition("\nStart with")[0].splitlines())


def test_r1_bf16_is_13_3_gib() -> None:
    plan = make_plan("deepseek-r1", load_model("deepseek-r1", "bf16"))
    assert round(plan["unsharded_bytes_per_rank"] / GIB, 1) == 13.3
    assert [row["weight_gather_rows"] for row in plan["rows"]][:4] == [3823, 2607, 1912, 1304]


def test_bytes_on_each_grid_in_each_width() -> None:
    rows = make_plan("deepseek-r1", load_model("deepseek-r1", "int8"))["rows"]
    wide, narrow = ([row["wires"][index] for row in rows] for index in (0, 1))
    assert [wire["grid"] for wire in wide] == ["2x1", "4x1", "4x2", "8x2", "8x4"]
    assert [wire["grid"] for wire in narrow] == ["2x1", "2x2", "4x2", "4x4", "8x4"]
    # Elements for each row and layer, as K/a + H/b to each of the others.
    assert [wire["bytes_per_token"] // 61 // 2 for wire in wide][2:] == [53_760, 84_480, 119_040]
    assert [wire["bytes_per_token_Nx1"] // 61 // 2 for wire in wide][2:] == [
        64_512, 122_880, 238_080,
    ]  # fmt: skip
    assert wide[2]["bytes_per_token_1xN"] == 61 * 2 * 7 * (16_384 + 896)
    # 8 bits out, 16 bits back.
    assert narrow[2]["bytes_per_token"] == 61 * 7 * (4096 + 2 * 3584)
    assert narrow[2]["bytes_per_token_Nx1"] == 61 * 7 * (2048 + 2 * 7168)
    for before, one, other in zip(wide, narrow, narrow[1:], strict=False):
        assert one["bytes_per_token"] < before["bytes_per_token"] <= before["bytes_per_token_Nx1"]
        assert one["bytes_per_token"] < other["bytes_per_token"]


def test_rows_travel_in_8_bits_where_most_of_o_proj_is_static_w8a8(tmp_path: Path) -> None:
    write_config(tmp_path, r1_config(quantization_config=None))
    for described_as, narrow in (
        (described(rest="W8A8", layer_60="W8A8"), True),
        (described(rest="W8A8", layer_60="FLOAT"), True),
        (described(rest="FLOAT", layer_60="W8A8"), False),
        (described(rest="W8A8_DYNAMIC"), False),
    ):
        (tmp_path / ASCEND).write_text(json.dumps(described_as))
        plan = make_plan("m", load_model(str(tmp_path)))
        row, wire = plan["rows"][1], plan["rows"][1]["wires"][narrow]
        assert plan["dispatch"] == wire["wire"] == ("8 bits" if narrow else "bf16")
        assert (row["otp_size"], row["grid"]) == (4, "2x2" if narrow else "4x1")
        assert row["exchange_bytes_per_token"] == wire["bytes_per_token"]
        assert row["prefill"][0]["exchange_bytes"] == 4096 * wire["bytes_per_token"]
        assert make_plan("m", load_model(str(tmp_path), "int8"))["dispatch"] == "bf16"


def test_a_grid_keeps_quantization_blocks_whole() -> None:
    config = r1_config(num_attention_heads=16, hidden_size=1152)  # outputs are 9 blocks of 128
    for dtype, grid in ((None, "4x1"), ("int8", "4x1"), ("bf16", "2x2")):
        row = make_plan("m", parse_config(config, dtype))["rows"][1]
        assert (row["otp_size"], row["wires"][0]["grid"]) == (4, grid)


@pytest.mark.parametrize("name", BUILTIN_MODELS)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_grid_is_the_one_that_the_host_takes(name: str, tp: int) -> None:
    pytest.importorskip("torch")
    from oproj_patch.hosts.vllm import Vllm
    from oproj_patch.settings import Settings

    fields = BUILTIN_MODELS[name]
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**fields)),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp),
        quant_config=SimpleNamespace(weight_block_size=[128, 128])
        if "quantization_config" in fields
        else None,
    )
    host = Vllm.__new__(Vllm)
    rows = make_plan(name, load_model(name), tp=tp)["rows"]
    assert len(rows) >= 3
    for row in rows:
        host.settings = Settings(size=row["otp_size"])
        own = [wire for wire in row["wires"] if wire.get("layers") != "wo_a, wo_b"]
        with mock.patch.object(host, "wire_bytes", return_value=None):  # it asks vLLM's layers
            assert (row if len(own) > 1 else own[0])["grid"] == str(host.grid(config))


def test_outputs_that_n_does_not_divide_have_no_grid_of_1_x_n() -> None:
    plan = make_plan("glm-4.5", load_model("glm-4.5"), dp=12)
    told = ["bytes_per_token_1xN" in row["wires"][0] for row in plan["rows"]]
    assert told == [True, False, True, False, False]  # 5120 outputs and N = 2, 3, 4, 6, 12
    [line] = [line for line in format_plan(plan).splitlines() if line.split()[:2] == ["12", "bf16"]]
    assert line.split()[-1] == "-"


def test_time_is_a_cost_in_each_of_three_cases() -> None:
    plan = make_plan("deepseek-r1", load_model("deepseek-r1", "int8"), batch=24, link=196)
    for row in plan["rows"]:
        step = 24 * row["wires"][0]["bytes_per_token"]
        assert row["seconds_latency"] == pytest.approx(2 * 61 * 10e-6)
        assert row["seconds_link"] - row["seconds_latency"] == pytest.approx(step / 196e9)
        assert row["seconds_slow_link"] - row["seconds_latency"] == pytest.approx(step / 25e9)
    # What upstream reports at N = 8 is 1 ms.
    assert plan["rows"][2]["wires"][0]["bytes_per_token_Nx1"] * 24 / 196e9 == pytest.approx(
        1e-3, rel=0.04
    )
    text = " ".join(format_plan(plan).split())
    assert "assumed, not measured: 10 us for each of 122 all-to-alls" in text
    assert "the gain is memory, never speed" in text
    assert "latency alone 196 GB/s 25 GB/s" in text


def test_tensor_parallel_ranks_hold_a_part_already() -> None:
    one = make_plan("glm-4.5", load_model("glm-4.5"), dp=8)
    four = make_plan("glm-4.5", load_model("glm-4.5"), dp=8, tp=4)
    assert four["unsharded_bytes_per_rank"] * 4 == one["unsharded_bytes_per_rank"]
    for wide, narrow in zip(one["rows"], four["rows"], strict=True):
        assert narrow["saved_bytes_per_rank"] * 4 == wide["saved_bytes_per_rank"]
        assert narrow["saved_bytes_instance"] == wide["saved_bytes_instance"]


@pytest.mark.parametrize(
    ("name", "k", "hidden", "layers", "dtype"),
    [
        ("deepseek-r1", 16384, 7168, 61, "fp8"),
        ("deepseek-v2-lite", 2048, 2048, 27, "bf16"),
        ("kimi-k2", 8192, 7168, 61, "fp8"),
        ("qwen3-235b-a22b", 8192, 4096, 94, "bf16"),
        ("glm-4.5", 12288, 5120, 92, "bf16"),
    ],
)
def test_builtin_models(name: str, k: int, hidden: int, layers: int, dtype: str) -> None:
    shape = load_model(name)
    assert (shape.o_proj_input, shape.hidden_size, len(shape.dtypes)) == (k, hidden, layers)
    plan = make_plan(name, shape)
    assert plan["dtype"] == dtype
    bits = 8 if dtype == "fp8" else 16
    assert plan["unsharded_bytes_per_rank"] == k * hidden * layers * bits // 8
    for row in plan["rows"]:
        kept = row["o_proj_bytes_per_rank"]
        assert kept * row["otp_size"] == plan["unsharded_bytes_per_rank"]
        assert kept + row["saved_bytes_per_rank"] == plan["unsharded_bytes_per_rank"]
    assert max(len(line) for line in format_plan(plan).splitlines()) <= 80


@given(
    heads=st.integers(1, 64),
    head_dim=st.sampled_from([64, 96, 128, 192]),
    hidden=st.integers(1, 8192),
    layers=st.integers(1, 128),
    dp=st.integers(2, 64),
    dtype=st.sampled_from(["int4", "int8", "bf16", "fp32"]),
)
def test_a_legal_shard_times_n_is_the_whole(
    heads: int, head_dim: int, hidden: int, layers: int, dp: int, dtype: str
) -> None:
    config = {
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_experts": 8,
    }
    shape = parse_config(config, dtype)
    try:
        plan = make_plan("x", shape, dp=dp)
    except OprojValueError:
        assert all(dp % n or (heads * head_dim) % n for n in range(2, dp + 1))
        return
    for row in plan["rows"]:
        assert dp % row["otp_size"] == 0
        # Half a byte at the end of an int4 shard is rounded up in every layer.
        slack = row["o_proj_bytes_per_rank"] * row["otp_size"] - plan["unsharded_bytes_per_rank"]
        assert 0 <= slack <= layers * row["otp_size"]
        assert row["saved_bytes_per_rank"] > 0


# --- the data type of each o_proj -------------------------------------------------------------

NAME = "model.layers.{}.self_attn.o_proj"
FIRST_TWO = [NAME.format(0), NAME.format(1)]
ATTENTION_NORMS = ["lm_head", "model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm"]
CT8 = {"type": "float", "num_bits": 8}
CT4 = {"type": "int", "num_bits": 4, "group_size": 64}


def excluding(method: str, key: str, *entries: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, key: list(entries), **more}


def compressed(*ignore: str, **targets: dict[str, Any]) -> dict[str, Any]:
    groups = {f"group_{n}": {"targets": t["of"], "weights": t["is"]} for n, t in targets.items()}
    groups = groups or {"group_0": {"targets": ["Linear"], "weights": CT8}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": list(ignore)}


def described(**kinds: str) -> dict[str, str]:
    """ModelSlim's description of 61 layers: `rest`, and others by `layer_N`."""
    return {
        f"{NAME.format(n)}.weight": kinds.get(f"layer_{n}", kinds["rest"]) for n in range(61)
    } | {"model_quant_type": "W8A8_DYNAMIC"}


# What a quantizer writes, the data type with its layers, and the quantization block.
QUANTIZATIONS: dict[str, tuple[dict[str, Any], str, int]] = {
    "fp8": ({"quant_method": "fp8"}, "fp8", 1),
    "fp8, blocks": ({"quant_method": "fp8", "weight_block_size": [64, 128]}, "fp8", 128),
    "fp8, norms excluded":
        (excluding("fp8", "modules_to_not_convert", *ATTENTION_NORMS), "fp8", 1),
    "fp8, another projection excluded":
        (excluding("fp8", "ignored_layers", "x.self_attn.q_proj"), "fp8", 1),
    "fp8, two layers excluded":
        (excluding("fp8", "ignored_layers", *FIRST_TWO), "bf16 x 2 + fp8 x 59", 1),
    "fp8, layer 1 is not layers 10 to 19":
        (excluding("fp8", "modules_to_not_convert", NAME.format(1)), "fp8 x 60 + bf16 x 1", 1),
    "fp8, all excluded by name":
        (excluding("fp8", "ignored_layers", *map(NAME.format, range(62))), "bf16", 1),
    "fp8 compares whole names":
        (excluding("fp8", "ignored_layers", "model.layers.0.self_attn"), "fp8", 1),
    "fp8 reads no `ignore`": (excluding("fp8", "ignore", NAME.format(0)), "fp8", 1),
    "awq compares parts of names":
        (excluding("awq", "modules_to_not_convert", "self_attn", bits=4, group_size=64), "bf16", 1),
    "awq, one layer":
        (excluding("awq", "modules_to_not_convert", "layers.60.", bits=4, group_size=64),
         "int4 x 60 + bf16 x 1", 64),
    "awq, older keys": ({"quant_method": "awq", "w_bit": 4, "group_size": 64}, "int4", 64),
    "gptq": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 1),
    "mxfp4 is of the experts": ({"quant_method": "mxfp4"}, "bf16", 1),
    "compressed-tensors": (compressed("lm_head"), "fp8", 1),
    "compressed-tensors, expression": (compressed("re:.*self_attn.*"), "bf16", 1),
    "compressed-tensors, expression for some":
        (compressed(r"re:model\.layers\.[0-2]\.self_attn\..*"), "bf16 x 3 + fp8 x 58", 1),
    "compressed-tensors, expression from the start of the name":
        (compressed("re:self_attn.*o_proj"), "fp8", 1),
    "compressed-tensors, an attention's name is not its o_proj's":
        (compressed("model.layers.0.self_attn"), "fp8", 1),
    "compressed-tensors, two groups":
        (compressed(a={"of": ["Linear"], "is": CT4}, b={"of": ["re:.*o_proj"], "is": CT8}),
         "fp8", 1),
    "compressed-tensors, NVFP4":
        (compressed(a={"of": ["Linear"], "is": CT8 | {"num_bits": 4, "group_size": 16}}),
         "fp4", 16),
    "compressed-tensors, blocks":
        (compressed(a={"of": ["Linear"], "is": CT8 | {"block_structure": [64, 128]}}), "fp8", 128),
    "compressed-tensors, no group of it":
        (compressed(a={"of": ["re:.*experts.*"], "is": CT4}), "bf16", 1),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4", 16),
    "modelopt, wildcard":
        (excluding("modelopt", "ignore", "*.layers.60.self_attn*", quant_algo="FP8"),
         "fp8 x 60 + bf16 x 1", 1),
    "modelopt, each layer":
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
          "quantized_layers": {name: {"quant_algo": "FP8"} for name in FIRST_TWO}},
         "fp8 x 2 + bf16 x 59", 1),
    "ascend, described in config.json":
        ({"quant_method": "ascend", **described(rest="W8A8")}, "int8", 1),
}  # fmt: skip


@pytest.mark.parametrize("what", QUANTIZATIONS)
def test_each_layer_is_counted_as_the_quantizer_would(what: str) -> None:
    quantization, dtype, block = QUANTIZATIONS[what]
    shape = parse_config(r1_config(quantization_config=quantization))
    assert (dtype_of(shape), shape.blocks[0]) == (dtype, block)
    [note] = shape.notes
    assert "--dtype says otherwise" in note
    given = parse_config(r1_config(quantization_config=quantization), "int8")
    assert (dtype_of(given), given.blocks, given.notes) == ("int8", (1, 128), [])


def test_a_model_without_quantization_is_counted_in_its_own_data_type() -> None:
    shape = parse_config(r1_config(quantization_config=None, torch_dtype="float32"))
    assert (dtype_of(shape), shape.blocks, shape.notes) == ("fp32", (1, 1), [])


def test_bytes_of_a_mixture_are_the_sum_over_its_layers() -> None:
    quantization = excluding("fp8", "ignored_layers", *FIRST_TWO)
    plan = make_plan("m", parse_config(r1_config(quantization_config=quantization)))
    layer = R1_K * R1_HIDDEN
    assert plan["unsharded_bytes_per_rank"] == 59 * layer + 2 * 2 * layer
    assert plan["rows"][2]["o_proj_bytes_per_rank"] * 8 == plan["unsharded_bytes_per_rank"]
    assert plan["weight_gather_buffer_bytes"] == 2 * layer
    # 7 * 63 chunks are gathered instead of the rows of 61 layers.
    assert plan["rows"][2]["weight_gather_rows"] == -(-7 * 63 * layer // 8 // (61 * 2 * 7 * 7680))
    assert "fp8 x 59" in format_plan(plan)
    assert max(map(len, format_plan(plan).splitlines())) <= 80


W8A8 = described(rest="W8A8")
OTHER = {"quantization": {"quant_algo": "NVFP4", "ignored_layers": FIRST_TWO}}
NO_O_PROJ = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["*o_proj"]}}


@pytest.mark.parametrize(
    ("beside", "dtype"),
    [
        ({ASCEND: described(rest="W8A8_DYNAMIC")}, "int8"),
        ({ASCEND: described(rest="W8A8", layer_0="FLOAT")}, "bf16 x 1 + int8 x 60"),
        ({ASCEND: described(rest="W4A8_DYNAMIC")}, "int4"),
        ({ASCEND: described(rest="W8A8_MXFP8")}, "fp8"),
        ({ASCEND: described(rest="FLOAT")}, "bf16"),
        ({ASCEND: {f"{NAME.format(0)}.weight": "W8A8"}}, "int8 x 1 + bf16 x 60"),
        ({MODELOPT: {"quantization": {"quant_algo": "FP8"}}}, "fp8"),
        ({MODELOPT: NO_O_PROJ}, "bf16"),
        # A file of another quantizer than the configuration's is not read.
        ({ASCEND: W8A8, MODELOPT: OTHER, "config.json": r1_config()}, "fp8"),
    ],
)
def test_files_beside_the_configuration_are_read(
    beside: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    for name, content in {"config.json": r1_config(quantization_config=None), **beside}.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert dtype_of(load_model(str(tmp_path))) == dtype
    assert dtype_of(load_model(str(tmp_path), "bf16")) == "bf16"


def test_the_mtp_layer_is_counted_in_its_own_data_type(tmp_path: Path) -> None:
    write_config(tmp_path, r1_config(quantization_config=None))
    (tmp_path / ASCEND).write_text(json.dumps(W8A8))
    shape = load_model(str(tmp_path))
    assert (set(shape.dtypes), shape.mtp_dtypes) == ({"int8"}, ("bf16",))
    assert make_plan("m", shape)["mtp_unsharded_bytes_per_rank"] == 2 * R1_K * R1_HIDDEN


@pytest.mark.parametrize("root", ["model.language_model", "language_model.model"])
def test_names_inside_a_multimodal_model(root: str) -> None:
    inner = r1_config(quantization_config=None)
    ignore = [f"{root}.layers.0.self_attn.o_proj"]
    config = {"text_config": inner, "quantization_config": compressed(*ignore)}
    assert dtype_of(parse_config(config)) == "bf16 x 1 + fp8 x 60"


# --- reading a configuration ------------------------------------------------------------------


def test_quantization_blocks_limit_the_group_size() -> None:
    narrow = r1_config(num_attention_heads=16)
    rows = make_plan("m", parse_config(narrow))["rows"]
    assert [row["otp_size"] for row in rows] == [2, 4, 8, 16]


def test_nested_configuration_directory_and_file(tmp_path: Path) -> None:
    inner = r1_config()
    quantization = inner.pop("quantization_config")
    path = write_config(
        tmp_path,
        {"text_config": inner, "quantization_config": quantization, "vision_config": {"depth": 1}},
    )
    assert load_model(str(path)) == load_model(str(tmp_path)) == load_model("deepseek-r1")


def test_dense_model_is_remarked_on() -> None:
    [note] = parse_config(r1_config(n_routed_experts=None), "fp8").notes
    assert "no experts" in note


# --- the command ------------------------------------------------------------------------------


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("deepseek-r1", "--dtype", "int8", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    row = next(row for row in output["rows"] if row["otp_size"] == 8)
    assert row["o_proj_bytes_per_rank"] == 895_483_904
    assert row["saved_bytes_per_rank"] == 6_268_387_328
    assert output["dtype"] == "int8"


def test_table_shows_the_saving(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("DeepSeek-R1", "--dtype", "int8") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    [line] = [
        line for line in captured.out.splitlines() if line.split()[:3] == ["8", "0.83", "5.84"]
    ]
    assert line.split()[3:] == ["186.8", "+89,201", "+2,854,432"]
    assert "MTP is not counted: 0.11 GiB more" in captured.out


@pytest.mark.parametrize(
    ("arguments", "size", "reason", "options"),
    [
        (["--dp", "32"], 8, "the largest whose groups divide", " --data-parallel-size 32"),
        (["--dp", "4"], 4, "the largest whose groups divide", " --data-parallel-size 4"),
        # 6 of 12 ranks would leave a group on two nodes.
        (["--dp", "12", "--dtype", "bf16"], 4, "the largest", " --data-parallel-size 12"),
        (["--dp", "16", "--tp", "4"], 2, "the largest",
         " --data-parallel-size 16 --tensor-parallel-size 4"),
        (["--dp", "16", "--tp", "8"], 2, "the smallest, because no group divides",
         " --data-parallel-size 16 --tensor-parallel-size 8"),
    ],
)  # fmt: skip
def test_the_last_line_is_the_command_to_start_with(
    arguments: list[str], size: int, reason: str, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("glm-4.5", *arguments) == 0
    *_, why, command = capsys.readouterr().out.splitlines()
    assert why.startswith(f"Start with N = {size}, {reason}")
    assert command == f"OPROJ_TENSOR_PARALLEL_SIZE={size} vllm serve MODEL{options}"
    assert command_line("glm-4.5", *arguments, "--json") == 0
    start = json.loads(capsys.readouterr().out)["start"]
    assert (start["otp_size"], start["command"]) == (size, command)
    assert set(arguments) & {"--tp"} or len(command) <= 80


def test_there_is_no_command_for_a_dense_model() -> None:
    plan = make_plan("m", parse_config(r1_config(n_routed_experts=None)))
    assert plan["start"] is None
    assert "vllm serve" not in format_plan(plan)


def test_a_hugging_face_id_is_read_from_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {"hub": 5, "home/hub": 6, "user/.cache/huggingface/hub": 7}
    for folder, count in layers.items():
        for revision, changed in (("old", 1), ("new", count)):
            snapshot = tmp_path / folder / "models--org--name" / "snapshots" / revision
            snapshot.mkdir(parents=True)
            write_config(snapshot, r1_config(num_hidden_layers=changed, quantization_config=None))
            (snapshot / ASCEND).write_text(json.dumps(W8A8))
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("new")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for variable, count in (("HF_HUB_CACHE", 5), ("HF_HOME", 6), ("HOME", 7)):
        assert load_model("org/name").dtypes == ("int8",) * count
        if variable != "HOME":
            monkeypatch.delenv(variable)
    assert command_line("org/name") == 0
    assert "vllm serve org/name --data-parallel-size 32" in capsys.readouterr().out
    # A folder of that name comes first, and another id is not there.
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_config(tmp_path / "org" / "name", r1_config(num_hidden_layers=8))
    assert len(load_model("org/name").dtypes) == 8
    assert command_line("org/other") == 2
    assert "a Hugging Face id in the local cache" in one_sentence(capsys)


def test_the_model_is_quoted_for_the_shell() -> None:
    command = make_plan("a model/$x", load_model("glm-4.5"))["start"]["command"]
    assert shlex.split(command)[1:4] == ["vllm", "serve", "a model/$x"]
    assert "serve MODEL" in make_plan("x/config.json", load_model("glm-4.5"))["start"]["command"]


def test_runs_without_torch_and_vllm() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'transformers', 'matplotlib', 'wrapt'):\n"
        "    sys.modules[name] = None\n"
        "from oproj_patch.cli.plan import format_plan, load_model, make_plan\n"
        "print(format_plan(make_plan('kimi-k2', load_model('kimi-k2'))))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPROJ_TENSOR_PARALLEL_SIZE"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "o_proj [7168, 8192] x 61 layers, fp8" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dp", "0"],
        ["--dp", "-8"],
        ["--dp", "eight"],
        ["--dp", "9" * 5000],
        ["--tp", "1.5"],
        ["--batch", "0"],
        ["--dtype", "int3"],
        ["--prefill-rows", "4096", "x"],
        ["--plot", "plan.svg"],
    ],
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line("deepseek-r1", *arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--dp", "1"], "--dp is 1 and"),
        (["--dp", "7"], "--dp is 7 and"),
        (["--tp", "3"], "--tp is 3: give a --tp that divides the 128 heads"),
    ],
)
def test_deployments_that_cannot_be(
    arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("deepseek-r1", *arguments) == 2
    assert fragment in one_sentence(capsys)


# --- what cannot be used --------------------------------------------------------------------------


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("oproj-patch: OPROJ018: ")
    assert line.isprintable()
    assert len(line) < 600
    return line


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "JSONDecodeError"),
        (json.dumps(r1_config()).encode()[:-30], "JSONDecodeError"),
        (b"\xff\xfe\x00", "UnicodeDecodeError"),
        (b"[1, 2]", "TypeError"),
        (b"null", "TypeError"),
        (b"{}", "KeyError: 'num_attention_heads'"),
    ],
)
def test_malformed_files(
    content: bytes, fragment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert command_line(str(tmp_path)) == 2
    assert fragment in one_sentence(capsys)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"torch_dtype": "float64"}, "KeyError: 'float64'"),
        ({"quantization_config": "fp8"}, "AttributeError"),
        ({"quantization_config": {"quant_method": "fp8", "ignored_layers": 7}}, "TypeError"),
        ({"quantization_config": compressed("re:(")}, "error: missing )"),
        ({"quantization_config": {"quant_method": "ascend"}}, "name it with --dtype"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "name it with --dtype"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "name it with --dtype"),
        ({"quantization_config": {"quant_method": "new"}}, "quant_method = 'new'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 5}}, "name it with --dtype"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear attention"),
    ],
)
def test_wrong_values(
    changes: dict[str, Any], fragment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path, r1_config(**changes))
    assert command_line(str(tmp_path)) == 2
    assert fragment in one_sentence(capsys)


def test_missing_and_unreadable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, fragment in [
        (str(tmp_path / "none"), "or one of deepseek-r1"),
        (str(tmp_path), "No such file"),
        ("a\0b", "cannot be read"),
        ("", "cannot be read"),
    ]:
        assert command_line(model) == 2, model[:20]
        assert fragment in one_sentence(capsys)


def test_the_demo_is_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "tox -e demo" in captured.err
