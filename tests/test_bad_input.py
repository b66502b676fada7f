"""Values that cannot work: one sentence on every rank, and every rank has ended by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.bodies.model_configs import CONFIGS, write
from tests.warm import Warm

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
MOE = CONFIGS["qwen3_moe"]
O_PROJ = "model.layers.0.self_attn.o_proj"
DENSE = {key: value for key, value in MOE.items() if "experts" not in key} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
}


Ended = Callable[..., list[ranks.Outcome]]


@pytest.fixture
def ended(warm: Warm) -> Ended:
    """How the ranks of a start of `model` ended."""

    def start(size: int, dp: int, model: str, **args: Any) -> list[ranks.Outcome]:
        return warm.outcomes_of(
            dp, "tests.bodies.models:start", {"model": model, "dp": dp, **args},
            env={TOGGLE: str(size)}, seconds=120,
        )  # fmt: skip

    return start


# case -> (toggle, data-parallel size, the whole sentence)
SIZES: dict[str, tuple[int, int, str]] = {
    "no divisor of the data-parallel size": (
        2, 3, f"OPROJ003: {TOGGLE} is 2; accepted are the divisors of the data-parallel size 3 "
        "above 1 (3): change it, change the data-parallel size, or unset it.",
    ),
    "columns that cannot be divided": (
        3, 3, f"OPROJ005: {TOGGLE} is 3, but the input dimension 128 of {O_PROJ} is not "
        "divisible by tensor-parallel size * group size = 1 * 3; accepted are sizes that divide "
        "128: change the variable.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_size(ended: Ended, name: str, tmp_path: Path) -> None:
    size, dp, sentence = SIZES[name]
    assert [o.error for o in ended(size, dp, write(MOE, tmp_path))] == [
        f"OprojValueError: {sentence}"
    ] * dp


def test_dense_model(ended: Ended, tmp_path: Path) -> None:
    sentence = (
        f"OPROJ004: {TOGGLE} is set, but {tmp_path} is a dense model: its data-parallel ranks run "
        "independently of each other and cannot share an o_proj; accepted are mixture-of-experts "
        "models: unset the variable for this model."
    )
    outcomes = ended(2, 2, write(DENSE, tmp_path))
    assert [o.error for o in outcomes] == [f"OprojError: {sentence}"] * 2


def test_toggle_changed_after_the_model_was_built(ended: Ended, tmp_path: Path) -> None:
    """Refused through the interface and through the environment; the model stays as it was."""
    refused = (
        f"OPROJ010: {TOGGLE} changed while 2 o_proj layers are sharded 2-way in this process "
        "(it now reads '4'): shut the engine down first."
    )
    for outcome in ended(2, 2, write(MOE, tmp_path), then="4"):
        assert outcome.error == ""
        assert outcome.result == [refused, "2", refused, "4", "2-way, 2 layers"]


def test_quantization_blocks_that_cannot_be_divided(ended: Ended, tmp_path: Path) -> None:
    """128 columns in blocks of 128: vLLM's own error is the reason given."""
    quantized = {
        **MOE,
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [64, 128],
            # Most CPUs have no kernel for it, which vLLM notices in the first layer.
            "ignored_layers": [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"],
        },
    }
    for outcome in ended(2, 2, write(quantized, tmp_path), dtype="bfloat16"):
        assert outcome.error == (
            f"OprojValueError: OPROJ006: {TOGGLE} is 2, and vLLM cannot build {O_PROJ} for a "
            "2-way split of its 128 input columns (ValueError: Weight input_size_per_partition = "
            "64 is not divisible by weight quantization block_k = 128.): choose a smaller group "
            "size."
        ), outcome.log[-3000:]
