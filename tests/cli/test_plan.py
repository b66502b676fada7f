"""``oproj-patch plan``: exact figures, and one sentence for whatever is wrong with an input."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oproj_patch.cli import main
from oproj_patch.cli.model_config import (
    BUILTIN_MODELS,
    MAX_CONFIG_BYTES,
    InputError,
    load_model,
    parse_config,
)
from oproj_patch.cli.plan import (
    exchange_bytes,
    format_plan,
    kv_bytes_per_token,
    legal_otp_sizes,
    make_plan,
    weight_bytes,
    weight_gather_bytes,
    weight_gather_rows,
)

GIB = 2**30
R1_K, R1_HIDDEN, R1_LAYERS = 16384, 7168, 61
ROOT = Path(__file__).resolve().parents[2]


def command_line(*arguments: str) -> int:
    """Run the ``plan`` command in this process and return its exit code."""
    return main(["plan", *arguments])


def write_config(directory: Path, config: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return path


def r1_config(**changes: Any) -> dict[str, Any]:
    return {**BUILTIN_MODELS["deepseek-r1"], **changes}


# --- arithmetic -------------------------------------------------------------------------------


def test_legal_sizes_divide_dp_and_the_shard_is_whole_blocks() -> None:
    assert legal_otp_sizes(32, R1_K) == [2, 4, 8, 16, 32]
    assert legal_otp_sizes(12, R1_K) == [2, 4]
    assert legal_otp_sizes(12, 96 * 128) == [2, 3, 4, 6, 12]
    assert legal_otp_sizes(32, 2048, block=128) == [2, 4, 8, 16]
    assert legal_otp_sizes(32, 2048, tp=4, block=128) == [2, 4]
    assert legal_otp_sizes(1, R1_K) == []


def test_weight_bytes_round_up() -> None:
    assert weight_bytes(3, 1, 4) == 2
    assert weight_bytes(R1_K, R1_HIDDEN, 8) == 117_440_512


@pytest.mark.parametrize(("n", "rows"), [(2, 3823), (4, 2607), (8, 1593), (16, 896)])
def test_gather_pays_from_k_h_over_k_plus_n_h_rows(n: int, rows: int) -> None:
    assert weight_gather_rows(n, R1_K, R1_HIDDEN, bits=16, element_bytes=2) == rows
    gather = weight_gather_bytes(n, R1_K, R1_HIDDEN, 16)
    assert exchange_bytes(rows, n, R1_K, R1_HIDDEN, 2) >= gather
    assert exchange_bytes(rows - 1, n, R1_K, R1_HIDDEN, 2) < gather


def test_gather_pays_earlier_when_the_weight_is_smaller_than_the_activations() -> None:
    assert weight_gather_rows(8, R1_K, R1_HIDDEN, bits=8, element_bytes=2) == 797


def test_exchange_and_gather_bytes() -> None:
    # Out: 7/8 of each row's 16384 channels; back: 7 other ranks' rows of 7168 partial sums.
    assert exchange_bytes(24, 8, R1_K, R1_HIDDEN, 2) == 2 * 24 * (7 * 2048 + 7 * 7168)
    assert weight_gather_bytes(8, R1_K, R1_HIDDEN, 8) == 7 * 2048 * 7168


def test_kv_cache_of_mla_and_gqa() -> None:
    r1 = load_model("deepseek-r1")
    assert kv_bytes_per_token(r1, tp=1, kv_bits=16) == (512 + 64) * 61 * 2
    assert kv_bytes_per_token(r1, tp=8, kv_bits=8) == (512 + 64) * 61
    qwen = load_model("qwen3-235b-a22b")
    assert kv_bytes_per_token(qwen, tp=1, kv_bits=16) == 2 * 4 * 128 * 94 * 2
    assert kv_bytes_per_token(qwen, tp=2, kv_bits=16) == 2 * 2 * 128 * 94 * 2
    assert kv_bytes_per_token(qwen, tp=8, kv_bits=16) == 2 * 1 * 128 * 94 * 2


# --- the plan ---------------------------------------------------------------------------------


def test_r1_int8_at_8_saves_5_84_gib() -> None:
    plan = make_plan("deepseek-r1", load_model("deepseek-r1", "int8"), prefill_rows=[4096, 1])
    assert plan.unsharded_bytes_per_rank == R1_K * R1_HIDDEN * R1_LAYERS == 7_163_871_232
    assert round(plan.unsharded_bytes_per_rank / GIB, 2) == 6.67
    assert [row.otp_size for row in plan.rows] == [2, 4, 8, 16, 32]
    row = plan.rows[2]
    assert row.o_proj_bytes_per_rank == 895_483_904
    assert row.saved_bytes_per_rank == 6_268_387_328
    assert round(row.saved_bytes_per_rank / GIB, 2) == 5.84
    assert row.saved_bytes_instance == 32 * 6_268_387_328
    assert row.kv_tokens_per_rank == 6_268_387_328 // 70_272 == 89_201
    assert row.kv_tokens_instance == 32 * 89_201
    assert row.exchange_bytes_per_token == 2 * (14_336 + 50_176) * 61
    assert row.exchange_bytes_per_step == 24 * row.exchange_bytes_per_token
    assert [cost.rows for cost in row.prefill] == [4096, 1]
    assert row.prefill[0].exchange_bytes == 4096 * row.exchange_bytes_per_token
    assert row.prefill[0].weight_gather_bytes == 7 * 2048 * 7168 * 61
    assert row.weight_gather_rows == 797
    assert plan.weight_gather_buffer_bytes == R1_K * R1_HIDDEN
    assert (plan.mtp_layers, plan.mtp_unsharded_bytes_per_rank) == (1, R1_K * R1_HIDDEN)
    assert row.mtp_saved_bytes_per_rank == R1_K * R1_HIDDEN * 7 // 8


def test_r1_bf16_is_13_3_gib() -> None:
    plan = make_plan("deepseek-r1", load_model("deepseek-r1", "bf16"))
    assert round(plan.unsharded_bytes_per_rank / GIB, 1) == 13.3
    assert [row.weight_gather_rows for row in plan.rows][:4] == [3823, 2607, 1593, 896]


def test_tensor_parallel_ranks_hold_a_part_already() -> None:
    one = make_plan("glm-4.5", load_model("glm-4.5"), dp=8)
    four = make_plan("glm-4.5", load_model("glm-4.5"), dp=8, tp=4)
    assert four.unsharded_bytes_per_rank * 4 == one.unsharded_bytes_per_rank
    for wide, narrow in zip(one.rows, four.rows, strict=True):
        assert narrow.saved_bytes_per_rank * 4 == wide.saved_bytes_per_rank
        assert narrow.saved_bytes_instance == wide.saved_bytes_instance


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
    assert (shape.o_proj_input, shape.hidden_size, shape.num_layers) == (k, hidden, layers)
    assert shape.weight_dtype == dtype
    plan = make_plan(name, shape)
    bits = 8 if dtype == "fp8" else 16
    assert plan.unsharded_bytes_per_rank == k * hidden * layers * bits // 8
    for row in plan.rows:
        kept = row.o_proj_bytes_per_rank
        assert kept * row.otp_size == plan.unsharded_bytes_per_rank
        assert kept + row.saved_bytes_per_rank == plan.unsharded_bytes_per_rank
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
    except InputError:
        assert all(dp % n or (heads * head_dim) % n for n in range(2, dp + 1))
        return
    for row in plan.rows:
        assert dp % row.otp_size == 0
        # Half a byte at the end of an int4 shard is rounded up in every layer.
        slack = row.o_proj_bytes_per_rank * row.otp_size - plan.unsharded_bytes_per_rank
        assert 0 <= slack <= layers * row.otp_size
        assert row.saved_bytes_per_rank > 0


# --- reading a configuration ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "dtype", "block"),
    [
        (None, "bf16", 1),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, "fp8", 128),
        ({"quant_method": "fp8"}, "fp8", 1),
        ({"quant_method": "fp8", "ignored_layers": ["model.layers.0.self_attn"]}, "bf16", 1),
        ({"quant_method": "fp8", "ignored_layers": ["lm_head", "x.self_attn.q_proj"]}, "fp8", 1),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "int4", 64),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 1),
        ({"quant_method": "ascend"}, "int8", 1),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
            },
            "int8",
            1,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
                "ignore": ["lm_head", "re:.*self_attn.*"],
            },
            "bf16",
            1,
        ),
    ],
)
def test_quantization_config_decides_the_dtype(
    quantization: dict[str, Any] | None, dtype: str, block: int
) -> None:
    shape = parse_config(r1_config(quantization_config=quantization))
    assert (shape.weight_dtype, shape.quant_block) == (dtype, block)
    assert parse_config(r1_config(quantization_config=quantization), "int8").weight_dtype == "int8"


def test_quantization_blocks_limit_the_group_size() -> None:
    narrow = r1_config(num_attention_heads=16)
    assert [row.otp_size for row in make_plan("m", parse_config(narrow)).rows] == [2, 4, 8, 16]


def test_nested_configuration_directory_and_file(tmp_path: Path) -> None:
    inner = r1_config()
    quantization = inner.pop("quantization_config")
    path = write_config(
        tmp_path,
        {"text_config": inner, "quantization_config": quantization, "vision_config": {"depth": 1}},
    )
    assert load_model(str(path)) == load_model(str(tmp_path)) == load_model("deepseek-r1")


def test_modelslim_description_beside_the_configuration(tmp_path: Path) -> None:
    write_config(tmp_path, r1_config(quantization_config=None))
    assert load_model(str(tmp_path)).weight_dtype == "bf16"
    (tmp_path / "quant_model_description.json").write_text("{}")
    shape = load_model(str(tmp_path))
    assert shape.weight_dtype == "int8"
    assert "int8 is assumed" in shape.notes[0]
    assert load_model(str(tmp_path), "bf16").weight_dtype == "bf16"


def test_dense_model_is_remarked_on() -> None:
    assert "no experts" in parse_config(r1_config(n_routed_experts=None)).notes[0]
    assert parse_config(r1_config()).notes == ()


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
    assert "1 MTP layer not counted: 0.11 GiB more" in captured.out


def test_runs_without_torch_and_vllm() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'transformers', 'matplotlib', 'wrapt'):\n"
        "    sys.modules[name] = None\n"
        "from oproj_patch.cli.model_config import load_model\n"
        "from oproj_patch.cli.plan import format_plan, make_plan\n"
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


def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command_line("kimi-k2", "--plot", str(tmp_path / "plan.svg")) == 2
    assert "pip install 'oproj_patch[plot]'" in one_sentence(capsys)


@pytest.mark.parametrize(("name", "magic"), [("plan.svg", b"<?xml"), ("plan.png", b"\x89PNG")])
def test_plot(name: str, magic: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert command_line("deepseek-r1", "--plot", str(tmp_path / name)) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)
    capsys.readouterr()
    assert command_line("deepseek-r1", "--plot", str(tmp_path / "missing" / name)) == 2
    assert "cannot be written" in one_sentence(capsys)


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
        ["--plot", "plan.exe"],
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
        (["--dp", "1"], "--dp is 1"),
        (["--dp", "7"], "--dp is 7"),
        (["--tp", "3"], "--tp is 3, which does not divide the model's 128 attention heads"),
    ],
)
def test_deployments_that_cannot_be(
    arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("deepseek-r1", *arguments) == 2
    assert fragment in one_sentence(capsys)


# --- untrusted input --------------------------------------------------------------------------


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("oproj-patch: OPROJ018: ")
    assert line.isprintable()
    assert len(line) < 500
    return line


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "not valid JSON"),
        (json.dumps(r1_config()).encode()[:-30], "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 100_000 + b"}", "not valid JSON"),
        (b"[1, 2]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b"{}", "no num_attention_heads"),
        (b" " * (MAX_CONFIG_BYTES + 1), "larger than 8 MiB"),
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
        ({"num_hidden_layers": -3}, "num_hidden_layers = -3"),
        ({"num_hidden_layers": 10**9}, "an integer from 1 to 10000"),
        ({"hidden_size": "7168"}, "hidden_size = '7168'"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"hidden_size": 7168.0}, "hidden_size = 7168.0"),
        ({"hidden_size": "\x1b[31m" * 1000}, "hidden_size = '\\x1b[31m"),
        ({"hidden_size": int("9" * 4000)}, "hidden_size = 999"),
        ({"hidden_size": float("nan")}, "hidden_size = nan"),
        ({"kv_lora_rank": {}}, "kv_lora_rank = {}"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype = ['bfloat16']"),
        ({"quantization_config": "fp8"}, "quantization_config = 'fp8'"),
        ({"quantization_config": {"quant_method": "new"}}, "quant_method = 'new'"),
        ({"quantization_config": {"quant_method": "awq", "bits": "4"}}, "name it with --dtype"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear-attention layers"),
        ({"o_lora_rank": 1024}, "o_lora_rank"),
    ],
)
def test_wrong_values(
    changes: dict[str, Any], fragment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path, r1_config(**changes))
    assert command_line(str(tmp_path)) == 2
    assert fragment in one_sentence(capsys)


def test_missing_unreadable_and_special_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for model, fragment in [
        (str(tmp_path / "none"), "or one of deepseek-r1"),
        (str(tmp_path), "No such file"),
        (str(tmp_path / "pipe"), "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("", "cannot be read"),
    ]:
        assert command_line(model) == 2, model[:20]
        assert fragment in one_sentence(capsys)


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1, 256)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["fp8", "awq", "gptq", "compressed-tensors", "bfloat16", "self_attn"])
)
_names = st.sampled_from(
    [
        *BUILTIN_MODELS["deepseek-r1"],
        *("num_key_value_heads", "head_dim", "text_config", "bits", "group_size", "quant_method"),
        *("config_groups", "weights", "num_bits", "type", "ignore", "layer_types", "o_lora_rank"),
    ]
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=6),
    max_leaves=20,
)


@settings(deadline=None, max_examples=300)
@given(changes=st.dictionaries(_names, _values, max_size=6), tp=st.integers(1, 16))
def test_any_configuration_gives_a_plan_or_one_sentence(changes: dict[str, Any], tp: int) -> None:
    config = json.loads(json.dumps(r1_config(**changes)))
    try:
        plan = make_plan("model", parse_config(config), tp=tp)
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 400
    else:
        assert plan.rows
        assert all(row.o_proj_bytes_per_rank > 0 for row in plan.rows)
        format_plan(plan)
        json.dumps(dataclasses.asdict(plan))


@settings(deadline=None, max_examples=200)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_give_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        load_model(str(path))
    assert str(refused.value).isprintable()
