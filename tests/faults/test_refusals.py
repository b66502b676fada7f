"""What is refused up front: vLLM's own configuration objects, one feature at a time."""

from __future__ import annotations

import re
from typing import Any

import pytest

from oproj_patch import refusals
from tests.warm import Warm

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

# case -> (EngineArgs, set afterwards, what is said)
CASES: dict[str, tuple[dict[str, Any], list[list[Any]], str]] = {
    "nothing special": ({}, [], "passes with 2"),
    "expert parallel": ({"enable_expert_parallel": True}, [], "passes with 2"),
    "tensor parallel": ({"tensor_parallel_size": 2}, [], "passes with 2"),
    "decode context parallel": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        [],
        "--decode-context-parallel-size is 2: ",
    ),
    "prefill context parallel": (
        {},
        [["parallel_config.prefill_context_parallel_size", 2]],
        "--prefill-context-parallel-size is 2: ",
    ),
    "elastic expert parallel": (
        {},
        [["parallel_config.enable_elastic_ep", True]],
        "--enable-elastic-ep is True: ",
    ),
    "dual-batch overlap": ({}, [["parallel_config.enable_dbo", True]], "--enable-dbo is True: "),
    "micro-batches": ({}, [["parallel_config.ubatch_size", 2]], "--ubatch-size is 2: "),
    "LoRA": ({"enable_lora": True}, [], "--enable-lora is given: "),
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
        {"model": {"architectures": ["DeepseekV4ForCausalLM"]}},
        [],
        "the model architecture is DeepseekV4ForCausalLM: its output projection is wo_a",
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


@pytest.fixture(scope="module")
def verdicts(warm: Warm) -> dict[str, str]:
    told: dict[str, str] = warm.run(
        1,
        "tests.faults.configs:verdicts",
        {
            "cases": {name: arguments for name, (arguments, _, _) in CASES.items()},
            "sets": {name: values for name, (_, values, _) in CASES.items()},
        },
        seconds=240,
    )[0]
    return told


@pytest.mark.parametrize("name", CASES)
def test_refusal(verdicts: dict[str, str], name: str) -> None:
    told = verdicts[name]
    assert re.search(re.escape(CASES[name][2]), told), told
    if name not in PASSES:
        assert told.startswith(f"OPROJ0{OTHER_CODE.get(name, 15):02}: "), told
        assert "OPROJ_TENSOR_PARALLEL_SIZE is" in told and "unset" in told


def test_every_rule_has_a_case(verdicts: dict[str, str]) -> None:
    for rule in refusals.RULES:
        assert any(rule.option in told and rule.why in told for told in verdicts.values()), rule
