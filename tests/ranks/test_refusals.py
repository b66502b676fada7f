"""What is refused up front: vLLM's own configuration objects, one feature at a time."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from oproj_patch.errors import OprojError
from oproj_patch.hosts import refusals
from oproj_patch.hosts.vllm import Vllm
from oproj_patch.releases import VLLM_RELEASES
from oproj_patch.settings import Settings
from tests.ranks.launch import World

pytestmark = pytest.mark.quick
MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 256,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "torch_dtype": "float32",
}

TRANSFORM = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
            },
        }
    },
    "transform_config": {
        "config_groups": {
            "u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
        }
    },
}
DENSE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "n_routed_experts": None}

DYNAMIC = SimpleNamespace(num_speculative_tokens_per_batch_size=[(1, 8, 3), (9, 64, 1)])

OLD_EPLB = SimpleNamespace(use_async=True)

# case -> (EngineArgs, set afterwards, what is said)
CASES: dict[str, tuple[dict[str, Any], list[list[Any]], str]] = {
    "nothing special": ({}, [], "passes with 2"),
    "expert parallel": ({"enable_expert_parallel": True}, [], "passes with 2"),
    "tensor parallel": ({"tensor_parallel_size": 2}, [], "passes with 2"),
    "decode context parallel": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        [],
        "passes with 2",
    ),
    "prefill context parallel": (
        {},
        [["parallel_config.prefill_context_parallel_size", 2]],
        "passes with 2",
    ),
    "elastic expert parallel": (
        {},
        [["parallel_config.enable_elastic_ep", True]],
        "--enable-elastic-ep is True: ",
    ),
    "fault tolerance": (
        {},
        [["parallel_config.enable_fault_tolerance", True]],
        "--enable-fault-tolerance is True: ",
    ),
    # As up to 0.22, where NCCL is the only communicator.
    "asynchronous EPLB": (
        {},
        [["parallel_config.enable_eplb", True], ["parallel_config.eplb_config", OLD_EPLB]],
        "eplb_config.use_async over NCCL is True: ",
    ),
    "asynchronous EPLB over DeepEP": (
        {},
        [
            ["parallel_config.enable_eplb", True],
            ["parallel_config.eplb_config.use_async", True],
            ["parallel_config.eplb_config.communicator", "pynccl"],
            ["parallel_config.all2all_backend", "deepep_low_latency"],
        ],
        "eplb_config.use_async over NCCL is True: ",
    ),
    "asynchronous EPLB without NCCL": (
        {},
        [
            ["parallel_config.enable_eplb", True],
            ["parallel_config.eplb_config.use_async", True],
            ["parallel_config.eplb_config.communicator", "nixl"],
            ["parallel_config.all2all_backend", "deepep_low_latency"],
        ],
        "passes with 2",
    ),
    "EPLB that is not asynchronous": (
        {},
        [
            ["parallel_config.enable_eplb", True],
            ["parallel_config.eplb_config.use_async", False],
            ["parallel_config.all2all_backend", "deepep_low_latency"],
        ],
        "passes with 2",
    ),
    "asynchronous EPLB that is off": (
        {},
        [["parallel_config.enable_eplb", False], ["parallel_config.eplb_config", OLD_EPLB]],
        "passes with 2",
    ),
    "a dynamic number of drafted tokens": (
        {},
        [["speculative_config", DYNAMIC]],
        "speculative_config.num_speculative_tokens_per_batch_size is given: a rank drafts",
    ),
    "dual-batch overlap": ({}, [["parallel_config.enable_dbo", True]], "passes with 2"),
    "micro-batches": ({}, [["parallel_config.ubatch_size", 3]], "passes with 2"),
    "LoRA": ({"enable_lora": True}, [], "passes with 2"),
    "sharded-state files": ({"load_format": "sharded_state"}, [], "--load-format is sharded_state"),
    "sharded-state stream": (
        {"load_format": "runai_streamer_sharded"},
        [],
        "--load-format is runai_streamer_sharded",
    ),
    "tensorizer": (
        {"load_format": "tensorizer", "model_loader_extra_config": {"tensorizer_uri": "x"}},
        [],
        "--load-format is tensorizer",
    ),
    "weight cache": ({"load_format": "ipc_cache"}, [], "--load-format is ipc_cache"),
    "another package's loader": (
        {"load_format": "modelexpress"},
        [],
        "--load-format is modelexpress",
    ),
    "bitsandbytes loader": (
        {"load_format": "bitsandbytes"},
        [],
        "--load-format is bitsandbytes",
    ),
    "bitsandbytes": (
        {},
        [["model_config.quantization", "bitsandbytes"]],
        "--quantization is bitsandbytes",
    ),
    "GGUF": ({}, [["model_config.quantization", "gguf"]], "--quantization is gguf"),
    "quantization transforms": (
        {"model": {"quantization_config": TRANSFORM}},
        [],
        "the quantization's transform_config is given",
    ),
    "DeepSeek V4": (
        {},
        [["model_config.hf_config.architectures", ["DeepseekV4ForCausalLM"]]],
        "passes with 2",
    ),
    "DeepSeek V4 on ROCm": (
        {},
        [
            ["model_config.hf_config.architectures", ["DeepseekV4ForCausalLM"]],
            ["platform.is_rocm", lambda: True],
        ],
        "on ROCm the model architecture is DeepseekV4ForCausalLM: its kernels there (_bpre_attn",
    ),
    "DeepSeek V4 below LoRA layers": (
        {},
        [
            ["model_config.hf_config.architectures", ["DeepseekV4ForCausalLM"]],
            ["lora_config", True],
        ],
        "--enable-lora with the model architecture is DeepseekV4ForCausalLM: its two output",
    ),
    "DeepSeek V4.1, fused GEMM and reduce-scatter": (
        {"tensor_parallel_size": 2},
        [
            ["model_config.hf_config.architectures", ["DeepseekV41ForCausalLM"]],
            ["environment.VLLM_ENABLE_GEMM_RS", "1"],
        ],
        "VLLM_ENABLE_GEMM_RS with tensor parallelism and the model architecture is DeepseekV41For",
    ),
    "DeepSeek V4.1, tensor parallel": (
        {"tensor_parallel_size": 2},
        [["model_config.hf_config.architectures", ["DeepseekV41ForCausalLM"]]],
        "passes with 2",
    ),
    "Kimi-K3, tensor parallel": (
        {"tensor_parallel_size": 2},
        [["model_config.hf_config.architectures", ["KimiK3ForConditionalGeneration"]]],
        "architecture is KimiK3ForConditionalGeneration: a fused kernel",
    ),
    "Kimi-K3": (
        {},
        [["model_config.hf_config.architectures", ["KimiK3ForConditionalGeneration"]]],
        "passes with 2",
    ),
    "Muse Spark, tensor parallel": (
        {"tensor_parallel_size": 2},
        [["model_config.hf_config.architectures", ["MuseSpark1xForCausalLM"]]],
        "architecture is MuseSpark1xForCausalLM: a fused kernel",
    ),
    "specialized decoding": (
        {},
        [["additional_config", {"decode_backend": "latency_specialized"}]],
        "additional_config.decode_backend is latency_specialized: its kernels read o_proj's weight",
    ),
    "stock decoding": ({}, [["additional_config", {"decode_backend": "auto"}]], "passes with 2"),
    "a dense model": ({"model": DENSE}, [], "is a dense model: its data-parallel ranks run indep"),
    # vLLM runs dense ranks as instances of their own; the reason must still be the model.
    "a dense model without data parallelism": (
        {"model": DENSE, "data_parallel_size": 1},
        [],
        "is a dense model: its data-parallel ranks run indep",
    ),
    "one rank": ({"data_parallel_size": 1}, [], "OPROJ003: OPROJ_TENSOR_PARALLEL_SIZE is 2; the"),
    "three ranks": ({"data_parallel_size": 3}, [], "accepted are the divisors of the data-paral"),
}
PASSES = {name for name, (_, _, says) in CASES.items() if says.startswith("passes")}
OTHER_CODE = {"a dense model": 4, "a dense model without data parallelism": 4} | {
    "one rank": 3,
    "three ranks": 3,
}


def verdict(name: str, directory: Path) -> str:
    """In a process: return the refusal of a case's configuration, or how it passed.

    What vLLM does not let one configure on a CPU is set on the finished configuration, or for the
    check on the platform or in the environment.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    case, sets, _ = CASES[name]
    given = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "data_parallel_size": 2,
        "enforce_eager": True,
        "max_model_len": 128,
        "enable_prefix_caching": False,
        **case,
    }
    (directory / "config.json").write_text(json.dumps(MODEL | given.pop("model", {})))
    config = EngineArgs(model=str(directory), **given).create_engine_config()
    held = contextlib.ExitStack()
    for path, value in sets:
        *owners, attribute = path.split(".")
        owner: Any = config
        if owners == ["environment"]:
            held.enter_context(mock.patch.dict(os.environ, {attribute: value}))
            continue
        if owners == ["platform"]:
            held.enter_context(mock.patch.object(current_platform, attribute, value))
            continue
        for part in owners:
            owner = getattr(owner, part)
        # The attribute exists in this release, unless it is one of older ones.
        owner.__dict__[attribute] = value
    ranks = config.parallel_config.data_parallel_size
    try:
        with held:
            Vllm({"vllm": VLLM_RELEASES[-1]}).check(config, Settings(size=2))
    except OprojError as error:
        return str(error)
    return f"passes with {ranks} data-parallel ranks"


Told = Callable[[str], str]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """`verdict` of a case, all in one process."""
    with World(1, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as world:

        @functools.cache
        def once(name: str) -> str:
            [found] = world.run(verdict, name, tmp_path_factory.mktemp("model"))
            return str(found)

        yield once


@pytest.mark.parametrize("name", CASES)
def test_refusal(told: Told, name: str) -> None:
    sentence = told(name)
    assert CASES[name][2] in sentence
    if name not in PASSES:
        assert sentence.startswith(f"OPROJ0{OTHER_CODE.get(name, 15):02}: ")
        assert "OPROJ_TENSOR_PARALLEL_SIZE is" in sentence and "unset" in sentence


def test_every_rule_has_a_case(told: Told) -> None:
    sentences = [told(name) for name in CASES]
    for rule in refusals.RULES:
        if rule.host != "vllm" or rule.option == "VLLM_USE_V1" or rule.until:  # of old releases
            continue
        assert any(rule.option in found and rule.why in found for found in sentences), rule


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("release", ["0.11.0", "0.12.0", "0.13.0", "0.32.0"])
def test_dual_batch_overlap_in_graphs(release: str, mode: str) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(is_moe=True, enforce_eager=False),
        parallel_config=SimpleNamespace(data_parallel_size=2, enable_dbo=True),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=mode)),
    )
    host, settings = Vllm({"vllm": release}), Settings(size=2)
    if release > "0.12.0" or "FULL" not in mode:
        host.check(config, settings)
        return
    with pytest.raises(OprojError) as raised:
        host.check(config, settings)
    assert str(raised.value) == (
        "OPROJ015: OPROJ_TENSOR_PARALLEL_SIZE is 2, and --enable-dbo with device graphs of vllm "
        f"{release} is {mode}: a rank that replays a graph and one that does not announce "
        "different rows for the halves of a batch; use PIECEWISE or NONE, or vLLM 0.13 or later."
    )


GRAPHS = [
    (
        Settings(size=2, weight_gather_rows=512),
        "OPROJ002: OPROJ_WEIGHT_GATHER_ROWS is 512, but device graphs are captured for up to 512 "
        "rows, which exchange rows; accepted are 0 (never gather weights) and numbers above 512: "
        "change it or unset it.",
    ),
    (
        Settings(size=2, debug=True),
        "OPROJ015: OPROJ_PATCH_DEBUG is 1, and device graphs are captured for up to 512 rows: a "
        "rank that replays a graph cannot compare its place with the others; use "
        "--enforce-eager, or unset OPROJ_PATCH_DEBUG.",
    ),
    (Settings(size=2, weight_gather_rows=513), ""),
    (Settings(size=2, weight_gather_rows=0), ""),
]


@pytest.mark.parametrize(("settings", "sentence"), GRAPHS)
def test_settings_that_device_graphs_exclude(settings: Settings, sentence: str) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(is_moe=True, enforce_eager=False),
        parallel_config=SimpleNamespace(data_parallel_size=2),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(name="FULL_AND_PIECEWISE"),
            cudagraph_capture_sizes=[1, 2, 512],
        ),
    )
    host = Vllm({"vllm": VLLM_RELEASES[-1]})
    assert host.graph_rows(config) == 512
    if not sentence:
        host.check(config, settings)
        return
    with pytest.raises(OprojError) as raised:
        host.check(config, settings)
    assert str(raised.value) == sentence
    config.compilation_config.cudagraph_mode.name = "NONE"
    assert host.graph_rows(config) == 0
    host.check(config, settings)


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"cudagraph_capture_sizes": [8, 4, 1], "max_capture_size": 8}, 8),  # up to 0.11.0
        ({"cudagraph_capture_sizes": [8], "level": 3, "use_cudagraph": True}, 8),  # up to 0.10.0
        ({"cudagraph_capture_sizes": [8], "level": 0, "use_cudagraph": True}, 0),
        ({"cudagraph_capture_sizes": [8], "level": 3, "use_cudagraph": False}, 0),
        ({"cudagraph_capture_sizes": [1, 4], "max_cudagraph_capture_size": 4}, 4),
        ({"cudagraph_capture_sizes": [], "max_cudagraph_capture_size": 0}, 0),
        ({"cudagraph_capture_sizes": None}, 0),
        ({}, 0),
    ],
    ids=str,
)
def test_largest_captured_row_count(fields: dict[str, Any], rows: int) -> None:
    config = SimpleNamespace(compilation_config=SimpleNamespace(**fields))
    assert Vllm({"vllm": VLLM_RELEASES[-1]}).graph_rows(config) == rows
    config.model_config = SimpleNamespace(enforce_eager=True)
    assert Vllm({"vllm": VLLM_RELEASES[-1]}).graph_rows(config) == 0
