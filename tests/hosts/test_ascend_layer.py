"""vllm-ascend's real packages on a CPU: sharded layers, idle ranks, quantization.

Each test runs two real ranks over gloo in children with that release's overlays. What of the
NPU is stood in for is in `tests/bodies/ascend.py` and `ascend_kernels.py`; names of tests that
stand in for arithmetic kernels say so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oproj_patch.releases import ASCEND_RELEASES
from tests import ranks
from tests.bodies import ascend
from tests.hosts.overlay import Host, environment

RELEASES = tuple(ASCEND_RELEASES)
NEWEST = RELEASES[-1]
TORCHAIR = ("0.9.1", "0.11.0")
SPARSE = ("0.13.0", "0.18.0", "0.23.0")
MODELS = {"sparse": {**ascend.DEEPSEEK, **ascend.SPARSE}, "qwen": ascend.QWEN}
SECONDS = 400
# Rows by step and rank: a profile run, both working, one idle, the other idle, both idle.
PLAN = [[-6, -6], [3, 5], [4, 0], [0, 2], [0, 0]]
# Rows of one request by pass and rank, drafted for; 0 is an idle rank.
DRAFTS = [[4, 4], [4, 0], [0, 4], [4, 8]]
KINDS = ["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"]

Results = list[dict[str, Any]]


def on(*releases: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("host", [Host("ascend", r) for r in releases], ids=str)


def option(host: Host) -> dict[str, Any]:
    """vllm-ascend's own option, where this release reads it (0.9.1 has none)."""
    size = {"oproj_tensor_parallel_size": 2}
    return size if host.version in ("0.9.1", "0.11.0") else {"finegrained_tp_config": size}


def outcomes_of(
    host: Host,
    world: int,
    body: str,
    size: int | str,
    directory: Path,
    described: dict[str, Any] = ascend.DEEPSEEK,
    **args: Any,
) -> list[ranks.Outcome]:
    arguments = {"model": ascend.write_model(directory / "model", described), **args}
    env = {**environment(host, {}), "OPROJ_TENSOR_PARALLEL_SIZE": str(size)}
    if host.version == "0.9.1":
        env["VLLM_USE_V1"] = "1"  # not the default there on an NPU
    return ranks.outcomes_of(
        world, f"tests.bodies.ascend_{body}", arguments, seconds=SECONDS, env=env
    )


def run(
    host: Host, body: str, size: int | str, directory: Path, tp: int = 1, **args: Any
) -> Results:
    given = args if tp == 1 else {**args, "tp": tp}
    return results(outcomes_of(host, 2 * tp, body, size, directory, dp=2, **given))


def results(outcomes: list[ranks.Outcome]) -> Results:
    for outcome in outcomes:
        assert not outcome.error, f"rank {outcome.rank}: {outcome.error}\n{outcome.log[-4000:]}"
    return [outcome.result for outcome in outcomes]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Host], Results]:
    """Results by rank of one start of a release's processes, with the toggle `auto`."""

    @functools.cache
    def once(host: Host) -> list[ranks.Outcome]:
        directory = tmp_path_factory.mktemp(str(host))
        others = ["sparse"] * (host.version in SPARSE) + ["qwen"] * (host.version == NEWEST)
        return outcomes_of(
            host,
            2,
            "host:host",
            "auto",
            directory,
            dp=2,
            plan=PLAN,
            kinds=KINDS,
            drafts=DRAFTS if host.version == NEWEST else None,
            others={name: ascend.write_model(directory / name, MODELS[name]) for name in others},
            additional_config=option(host),
        )

    return lambda host: results(once(host))


@on(*RELEASES)
def test_auto_serves_the_built_in_option_and_hides_it(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    for result in seen(host):
        assert result["option_seen_by_host"] in (None, 0)
        assert result["option_kept"] == option(host) | result["option_kept"]
        assert result["size"] == 2 and result["ranks"] == [0, 1] and result["layers"] == 2


@on(*RELEASES)
def test_model_with_idle_ranks_and_profile_run(host: Host, seen: Callable[[Host], Results]) -> None:
    """vllm-ascend's DeepSeek: constructed, loaded, run; the kernels inside attention stood in."""
    # To import the V3.2 of 0.11.0 would exchange the attention of this DeepSeek too.
    for result in seen(host):
        assert not [symbol for symbol in result["seams"] if "deepseek_v3_2" in symbol]
    # Without metadata 0.9.1 itself returns what happened to be in memory.
    _equal([result["steps"] for result in seen(host)], "AscendMLAImpl", host.version != "0.9.1")


def _equal(told: Results, attention: str, idle: bool = True) -> None:
    """Every rank's output is that of the unsharded model, in every step of the plan."""
    for rank, steps in enumerate(told):
        assert "error_raised" not in steps, steps
        assert steps["attention"] == attention
        assert steps["shapes"] == [[64, 256 // len(told)]] * 2
        assert steps["exact"] == [True, True]
        assert steps["exchanges"] == len(PLAN) * 2
        for counts, error, scale in zip(PLAN, steps["errors"], steps["scales"], strict=True):
            if idle or counts[rank * 2 // len(told)] > 0:
                assert error <= 5e-6 * scale


@on(*RELEASES)
def test_w8a8_static_with_a_stand_in_for_npu_quant_matmul(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    for result in seen(host):
        layer = result["W8A8"]
        assert layer["method"] == "AscendW8A8LinearMethod"
        assert layer["shapes"]["weight"] == [32, 128]
        assert all(layer["exact"].values()), layer["exact"]
        # Integers are exact; what differs is the rounding of two bfloat16 partial results.
        assert layer["error"] <= 8e-3 * layer["scale"]


@on(*RELEASES)
def test_w8a8_dynamic_with_stand_ins_for_npu_dynamic_quant_and_npu_quant_matmul(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    for result in seen(host):
        layer = result["W8A8_DYNAMIC"]
        assert layer["method"] == "AscendW8A8DynamicLinearMethod"
        assert layer["shapes"]["weight"] == [32, 128]
        assert all(layer["exact"].values()), layer["exact"]
        # Each rank scales its own part of a row, as under ordinary tensor parallelism.
        assert layer["error"] <= 2e-2 * layer["scale"]


@on(*RELEASES)
def test_w4a8_with_a_stand_in_for_npu_weight_quant_batchmatmul(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    for result in seen(host):
        layer = result["W4A8_DYNAMIC"]
        assert layer["method"] == "AscendW4A8DynamicLinearMethod"
        assert layer["shapes"]["weight"] == [32, 128]
        assert layer["shapes"]["weight_scale_second"] == [32, 4]
        assert all(layer["exact"].values()), layer["exact"]
        assert layer["error"] <= 8e-3 * layer["scale"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Host], dict[str, str]]:
    """Sentences of one process of a release, with the toggle 4, by what was asked for."""

    @functools.cache
    def once(host: Host) -> list[ranks.Outcome]:
        directory = tmp_path_factory.mktemp(str(host))
        return outcomes_of(host, 1, "refusals:alone", 4, directory, option=option(host))

    return lambda host: results(once(host))[0]


Refused = Callable[[Host], dict[str, str]]


@on(*RELEASES)
def test_a_number_beside_the_built_in_option_is_refused(host: Host, refused: Refused) -> None:
    sentence = refused(host)["both"]
    assert sentence.startswith("OPROJ016: OPROJ_TENSOR_PARALLEL_SIZE is 4")
    assert "oproj_tensor_parallel_size is 2" in sentence


# What is asked for: how the sentence names it, the releases that refuse it, and the remedy.
REFUSALS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "xlite": ("additional_config.xlite_graph_config.enabled", RELEASES, "disable one"),
    "layer_sharding": ("additional_config.layer_sharding ['o_proj']", RELEASES, "out of the list"),
    "prefill": ("prefill_context_parallel_size 2", RELEASES, "set it to 1"),
    "decode": ("decode_context_parallel_size 2", RELEASES, "set it to 1"),
    "VLLM_USE_V2_MODEL_RUNNER": ("VLLM_USE_V2_MODEL_RUNNER", RELEASES, "unset one"),
    "VLLM_ASCEND_ENABLE_DBO": ("VLLM_ASCEND_ENABLE_DBO", RELEASES, "unset one"),
    "eagle": ("speculative decoding by eagle", ("0.11.0",), "num_speculative_tokens to 1"),
    "first engine": ("VLLM_USE_V1=0", ("0.9.1",), "set VLLM_USE_V1=1"),
    "own graphs": ("ACL graphs of vllm-ascend 0.9.1", ("0.9.1",), "use --enforce-eager"),
    "full graphs": ("graph", TORCHAIR, "accepted are|use --enforce-eager"),
    "full graphs, drafter": ("graph", RELEASES, "accepted are|use --enforce-eager"),
    "shared experts": ("enable_shared_expert_dp with torchair", ("0.11.0",), "disable one"),
    "nothing": ("", (), ""),
}


@on(*RELEASES)
def test_configurations_are_refused_by_name_with_a_remedy(host: Host, refused: Refused) -> None:
    told = refused(host)
    for asked, (name, releases, remedy) in REFUSALS.items():
        if host.version not in releases:
            assert told[asked] == "", asked
            continue
        assert told[asked].startswith("OPROJ015: OPROJ_TENSOR_PARALLEL_SIZE is set together with")
        assert name in told[asked], asked
        assert re.search(remedy, told[asked]), told[asked]


@on(*RELEASES[1:])
def test_layers_are_refused_by_name_with_a_remedy(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    name = "model.layers.30.self_attn.o_proj"
    for result in seen(host):
        told = result["refused"]
        assert "error_raised" not in told, told
        assert (told["nothing"], told["sequence parallel without TP"], told["left"]) == (
            "", "", "None",
        )  # fmt: skip
        for asked, code, wanted in (
            ("its own o_proj", "OPROJ015", f"runs {name} through its own OProjRowParallelOp"),
            ("sequence parallel", "OPROJ015", "its own SequenceRowParallelOp (tensor-parallel siz"),
            ("half a group", "OPROJ005", f"leaves 40 input columns of {name} on a rank"),
            ("flatquant", "OPROJ015", "AscendW4A4FlatQuantDynamicLinearMethod, whose transforms"),
        ):
            assert told[asked].startswith(f"{code}: OPROJ_TENSOR_PARALLEL_SIZE is ")
            assert wanted in told[asked], told[asked]


@on(*RELEASES)
def test_another_vllm_is_refused(host: Host, refused: Refused) -> None:
    wanted = f"requested vllm {host.vllm} for vllm-ascend {host.version}, found vllm 0.12.0"
    assert refused(host)["pair"].startswith(f"OPROJ009: {wanted}")


@on(*RELEASES)
def test_a_symbol_that_is_gone_is_named_and_nothing_is_patched(
    host: Host, refused: Refused
) -> None:
    told = refused(host)
    assert told["symbol"].startswith("OPROJ008: vllm_ascend.attention.mla_v1.AscendMLAImpl.forward")
    assert told["host"].startswith(f"vllm-ascend {host.version} on vllm {host.vllm}")
    for wanted in (told["host"], "cannot be found", "vllm_ascend/attention/mla_v1.py, "):
        assert wanted in told["symbol"]
    assert told["patched"] == ""


@on(*RELEASES)
def test_steps_of_a_drafter_with_other_rows_in_one_forward_context(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    """The layer alone: vllm-ascend's proposers are not run."""
    for result in seen(host):
        assert result["drafter"]["exchanges"] == len(result["drafter"]["errors"]) == 3
        assert max(result["drafter"]["errors"]) <= 5e-6


@on(NEWEST)
def test_proposer_drafts_as_often_on_an_idle_rank(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    """The real MTP model under vllm-ascend's own loop over three drafted tokens."""
    for rank, result in enumerate(seen(host)):
        told = result["proposer"]
        assert "error_raised" not in told, told
        assert told["shape"] == [64, 128]
        assert (told["exchanges"], told["unsharded exchanges"]) == ([3] * len(DRAFTS), 0)
        assert len(told["errors"]) == sum(counts[rank] > 0 for counts in DRAFTS)
        assert max(told["errors"]) <= 5e-6
        assert all(len(drafted[0]) == 3 and drafted == same for drafted, same in told["tokens"])


@on(*SPARSE)
def test_sparse_attention_with_idle_ranks_and_profile_run(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    """DeepSeek V3.2; the kernels inside attention stood in."""
    _equal([result["sparse"] for result in seen(host)], "AscendSFAImpl")


@on("0.11.0")
def test_sparse_attention_of_its_own_class(host: Host, tmp_path: Path) -> None:
    """The same in 0.11.0, whose V3.2 has o_proj and attention classes of its own."""
    told = run(host, "host:host", 2, tmp_path, plan=PLAN, described=MODELS["sparse"])
    for result in told:
        assert {symbol.split(".")[-2] for symbol in result["seams"]} >= {
            "CustomDeepseekV2RowParallelLinear",
            "CustomDeepseekV2SFAAttention",
        }
    _equal([result["steps"] for result in told], "AscendSFAImpl")


@on(NEWEST)
def test_grouped_query_attention(host: Host, seen: Callable[[Host], Results]) -> None:
    """Qwen3-MoE, whose o_proj is called by the model and not by the attention."""
    _equal([result["qwen"] for result in seen(host)], "AscendAttentionBackendImpl")


@on(NEWEST)
def test_two_tensor_parallel_ranks_and_quant_bias_once(host: Host, tmp_path: Path) -> None:
    """Four ranks: each weight is split four ways, and the static method adds its bias once."""
    told = run(host, "host:host", 2, tmp_path, tp=2, plan=PLAN, kinds=["W8A8"])
    _equal([result["steps"] for result in told], "AscendMLAImpl")
    for rank, result in enumerate(told):
        assert result["ranks"] == [rank % 2, rank % 2 + 2]
        layer = result["W8A8"]
        assert layer["shapes"]["weight"] == [32, 64]
        assert all(layer["exact"].values()), layer["exact"]
        assert layer["error"] <= 8e-3 * layer["scale"] < layer["bias"] / 4


@on("0.9.1")
def test_scattering_linear(host: Host, seen: Callable[[Host], Results]) -> None:
    """o_proj under enable_prefill_optimizations: sharded without tensor parallelism only."""
    for result in seen(host):
        _scattering(result["scattering"], "RowParallelScatterLinear")


def _scattering(layer: dict[str, Any], name: str) -> None:
    assert "error_raised" not in layer, layer
    assert (layer["class"], layer["sharded"], layer["shape"]) == (name, True, [64, 128])
    assert layer["error"] <= 5e-6
    assert layer["refusal"].startswith("OPROJ015")
    assert f"is a {name}, which scatters its result over 2 tensor-parallel" in layer["refusal"]


@on(*TORCHAIR)
def test_torchair_traces_whole(host: Host, tmp_path: Path) -> None:
    """fullgraph=True, as torchair does it; its compiler is replaced by torch's own backends."""
    plain = "TorchairDeepseekV2RowParallelLinear" if host.version == "0.11.0" else None
    for result in run(
        host, "torchair:torchair", 2, tmp_path, compiled=[4, 8], prefills=[[3, 5], [4, 2]]
    ):
        assert result["classes"] == [plain or "RowParallelLinear"] * 2
        assert result["shapes"] == [[64, 128]] * 2
        assert result["exact"] == [True, True]
        # One graph for both sizes; in it the two collectives of each layer, and not our op.
        assert (result["graphs"], result["collectives"], result["exchanges"]) == (1, 4, 4)
        for name in ("eager", "aot_eager", "outside"):
            assert len(result[name]) == 2 and max(result[name]) <= 5e-6, name
        if plain is None:
            continue
        for kind in ("MLA", "SFA"):
            assert (result[kind]["class"], result[kind]["sharded"]) == (plain, True)
            assert result[kind]["error"] <= 5e-6 and not result[kind]["refusal"]
            _scattering(result[f"{kind} scattering"], f"{plain}ReplaceAllreduce")
