"""Starts that cannot work: one sentence on every rank, and every rank has ended by itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import launch
from tests.ranks.launch import SIZE
from tests.ranks.layers import O_PROJ, model_groups, world
from tests.ranks.models import CONFIGS, Config, create, engine_config, write

MOE = CONFIGS["qwen3_moe"]
DENSE = {key: value for key, value in MOE.items() if "experts" not in key} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
}


def start(model: str, dp: int, dtype: str = "float32", then: str = "") -> None:
    """In a rank: plug-ins, configuration, groups, model, as a worker starts.

    then: change the toggle to it with the model built; both ways to do so are refused.
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = engine_config(model, dtype)
    with world(), model_groups(dp, config=config):
        create(config)
        if then:
            changed_to(then)


def errors(size: int, dp: int, model: Config, directory: Path, *args: str) -> list[str]:
    """Return how each of `dp` ranks ended that start `model` with the toggle `size`."""
    outcomes = launch.outcomes_of(
        dp, start, write(model, directory), dp, *args, env={SIZE: str(size)}
    )
    for outcome in outcomes:
        print(outcome.log[-3000:])
    return [outcome.error for outcome in outcomes]


# case -> (toggle, data-parallel size, the whole sentence)
SIZES: dict[str, tuple[int, int, str]] = {
    "no divisor of the data-parallel size": (
        2, 3, f"OPROJ003: {SIZE} is 2; accepted are the divisors of the data-parallel size 3 "
        "above 1 (3): change it, change the data-parallel size, or unset it.",
    ),
    "columns that cannot be divided": (
        3, 3, f"OPROJ005: {SIZE} is 3, but the input dimension 128 of {O_PROJ} is not "
        "divisible by tensor-parallel size * group size = 1 * 3; accepted are sizes that divide "
        "128: change the variable.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_size(name: str, tmp_path: Path) -> None:
    size, dp, sentence = SIZES[name]
    assert errors(size, dp, MOE, tmp_path) == [f"OprojValueError: {sentence}"] * dp


def test_dense_model(tmp_path: Path) -> None:
    sentence = (
        f"OPROJ004: {SIZE} is set, but {tmp_path} is a dense model: its data-parallel ranks run "
        "independently of each other and cannot share an o_proj; accepted are mixture-of-experts "
        "models: unset the variable for this model."
    )
    assert errors(2, 2, DENSE, tmp_path) == [f"OprojError: {sentence}"] * 2


def test_toggle_changed_after_the_model_was_built(tmp_path: Path) -> None:
    assert errors(2, 2, MOE, tmp_path, "float32", "4") == ["", ""]


def changed_to(value: str) -> None:
    """In a rank: refuse the change, by call and by environment; the model stays as it was."""
    import oproj_patch
    from oproj_patch import activation

    refused = (
        f"OPROJ010: {SIZE} changed while 2 o_proj layers are sharded 2-way in this process "
        f"(it now reads {value!r}): shut the engine down first."
    )
    changes: list[tuple[Callable[[], None], str]] = [
        (lambda: oproj_patch.enable(value), "2"),
        (activation.activate, value),
    ]
    for change, after in changes:
        with pytest.raises(oproj_patch.OprojError) as raised:
            change()
        assert str(raised.value) == refused and os.environ[SIZE] == after
        os.environ[SIZE] = value
    assert (oproj_patch.status().size, oproj_patch.status().layers) == (2, 2)


def test_quantization_blocks_that_cannot_be_divided(tmp_path: Path) -> None:
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
    assert (
        errors(2, 2, quantized, tmp_path, "bfloat16")
        == [
            f"OprojValueError: OPROJ006: {SIZE} is 2, and vLLM cannot build {O_PROJ} as "
            "one of 2 parts of 128 input columns (ValueError: Weight input_size_per_partition = "
            "64 is not divisible by weight quantization block_k = 128.): if vLLM builds this "
            "model with the variable unset, choose a smaller group size or report the model."
        ]
        * 2
    )
