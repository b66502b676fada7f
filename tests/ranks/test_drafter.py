"""A draft model whose o_proj does not divide: vLLM's own models, configurations and loader."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ranks.launch import World
from tests.ranks.layers import (
    finish,
    join_world,
    made,
    model_groups,
    reference,
    sharding,
    whole,
)
from tests.ranks.models import CONFIGS, create, write

pytestmark = pytest.mark.parametrize("world", [3], indirect=True)
TARGET = {**CONFIGS["qwen3_moe"], "num_attention_heads": 6, "moe_intermediate_size": 48}
# Of width 32 its heads are 128 columns of o_proj, which 3 ranks cannot share; of 48 they can.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    **{name: TARGET[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
NAMES = [f"model.layers.{number}.self_attn.o_proj" for number in (2, 3)]


@pytest.mark.parametrize("width", [32, 48], ids=["does not divide", "divides"])
def test_drafter(world: World, tmp_path: Path, width: int) -> None:
    """The target is sharded. A drafter that does not divide stays whole, with one line."""
    for name, config in (("target", TARGET), ("draft", {**LLAMA, "head_dim": width})):
        (tmp_path / name).mkdir()
        write(config, tmp_path / name)
    assert len({*world.run(drafted, str(tmp_path), width, seconds=120)}) == 1


def drafted(directory: str, width: int) -> str:
    """In a rank: build target and drafter, run the drafter's layers; return what was logged."""
    import oproj_patch

    join_world()
    oproj_patch.enable(3)
    try:
        config = _configuration(directory)
        with model_groups(3, config=config), _logged() as told:
            create(config)
            assert oproj_patch.status().layers == 2
            draft = _drafter(config)
            columns = 4 * width
            divides = columns % 3 == 0
            assert oproj_patch.status().layers == (4 if divides else 2)
            rank = config.parallel_config.data_parallel_rank
            for seed, name in enumerate(NAMES):
                layer = draft.get_submodule(f"model.layers.{seed}.self_attn.o_proj")
                assert hasattr(layer, "oproj") == divides
                assert layer.weight.shape == (64, columns // 3 if divides else columns), name
                weight = whole(64, columns, torch.float32, seed)
                layer.weight.weight_loader(layer.weight, weight)
                finish(layer)
                x = whole(2 + rank, columns, torch.float32, seed=5 + rank)
                # Whole, it needs no other rank.
                output = layer(x)[0] if divides or rank == 0 else reference(x, weight, None)
                assert float((output.double() - reference(x, weight, None)).abs().max()) <= 5e-6
    finally:
        oproj_patch.disable()
    assert told == (
        []
        if divides
        else [
            f"the draft model keeps its whole o_proj from {NAMES[0]} on "
            f"(OPROJ_TENSOR_PARALLEL_SIZE is 3, but the input dimension 128 of {NAMES[0]} is not "
            "divisible by tensor-parallel size * group size = 1 * 3; accepted are sizes that "
            "divide 128: change the variable.)"
        ]
    )
    return "\n".join(told)


def test_drafter_in_blocks(world: World) -> None:
    world.run(blocks)


def blocks() -> None:
    """In a rank: a draft layer whose quantization refuses the shard is the host's own again."""
    import oproj_patch
    from oproj_patch.sharding import otp_group

    with sharding(3, 3), _logged() as told:
        from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

        class InBlocks(UnquantizedLinearMethod):  # type: ignore[misc]
            def create_weights(self, layer: Any, **given: Any) -> None:
                if given["input_size_per_partition"] % 96:
                    raise ValueError("no whole blocks of 96 columns")
                super().create_weights(layer=layer, **given)

        made(20, 192)
        otp_group.require("the test").main_layers = 1
        config = SimpleNamespace(
            get_quant_method=lambda *_, **__: InBlocks(), online_quantization_config=None
        )
        layer, weight, bias = made(20, 192, bias=True, prefix=NAMES[0], quant_config=config)
        assert type(layer) is RowParallelLinear and not hasattr(layer, "oproj")
        assert layer.weight.shape == (20, 192) and layer.output_size == 20
        finish(layer)
        x = whole(3, 192, torch.float32, seed=3)
        assert float((layer(x)[0].double() - reference(x, weight, bias)).abs().max()) <= 5e-6
        layer, _, _ = made(20, 192, prefix=NAMES[1])
        assert type(layer) is RowParallelLinear, "the rest of the drafter"
        assert oproj_patch.status().layers == 1
    [line] = told
    assert line.startswith(f"the draft model keeps its whole o_proj from {NAMES[0]} on (")
    assert "no whole blocks of 96 columns" in line


def _configuration(directory: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    eagle = {"method": "eagle", "model": f"{directory}/draft", "num_speculative_tokens": 1}
    config = EngineArgs(
        model=f"{directory}/target", skip_tokenizer_init=True, load_format="dummy",
        dtype="float32", enforce_eager=True, max_model_len=128, speculative_config=eagle,
    ).create_engine_config()  # fmt: skip
    config.additional_config = {}
    return config


def _drafter(config: Any) -> Any:
    """Return the drafter, built as vLLM's proposer builds it."""
    from vllm.model_executor.model_loader import base_loader

    return base_loader.initialize_model(
        config, model_config=config.speculative_config.draft_model_config
    )


@contextlib.contextmanager
def _logged() -> Any:
    """Collect the warnings of the package."""
    told: list[str] = []
    logger = logging.getLogger("vllm.oproj_patch")
    with mock.patch.object(logger, "warning", lambda text, *given: told.append(text % given)):
        yield told
