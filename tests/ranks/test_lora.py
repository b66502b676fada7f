"""LoRA on a sharded o_proj: vLLM's own manager, adapter files and LoRA layers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.launch import World
from tests.ranks.layers import finish, join_world, model_groups, reference, whole
from tests.ranks.models import CONFIGS, create, write

CONFIG = {**CONFIGS["qwen3_moe"], "architectures": ["Qwen3MoeForCausalLM"]}
COLUMNS, HIDDEN, RANK, LIMIT = 128, 64, 4, 5e-6
NAMES = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
ADAPTERS = (1, 2)
# Pass -> data-parallel rank -> adapter of each row; 0: none.
PASSES: list[list[list[int]]] = [
    [[1, 1, 0, 2], [2, 0]],
    [[0, 0, 0], [1]],
    [[0], [1] * 40],
]


def write_adapter(number: int, directory: Path) -> None:
    """Write an adapter as PEFT saves one; it adapts o_proj of both layers."""
    from safetensors.torch import save_file

    directory.mkdir()
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    text = json.dumps({**described, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"})
    (directory / "adapter_config.json").write_text(text)
    tensors = {}
    for place, name in enumerate(NAMES):
        a, b = factors(number, place)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, directory / "adapter_model.safetensors")


def factors(number: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [RANK, COLUMNS] and B [HIDDEN, RANK] of an adapter at a layer."""
    seed = 10 * number + place
    return (
        whole(RANK, COLUMNS, torch.float32, seed),
        whole(HIDDEN, RANK, torch.float32, seed + 100),
    )


@pytest.mark.parametrize(
    ("world", "tp", "fully"),
    [(2, 1, False), (4, 2, False), (4, 2, True)],
    ids=["2", "2-tp2", "2-tp2-fully-sharded"],
    indirect=["world"],
)
def test_adapters(world: World, tmp_path: Path, tp: int, fully: bool) -> None:
    for number in ADAPTERS:
        write_adapter(number, tmp_path / f"adapter{number}")
    (tmp_path / "model").mkdir()
    write(CONFIG, tmp_path / "model")
    world.run(adapted, str(tmp_path), tp, fully, seconds=120)


def adapted(directory: str, tp: int, fully: bool) -> None:
    """In a rank: o_proj with adapters is the unsharded sum, and exchanges once a pass.

    So it is after vLLM has loaded other weights into it.
    """
    import oproj_patch

    join_world()
    oproj_patch.enable(2)
    try:
        config = _configuration(directory, fully)
        with model_groups(2, tp, config=config), torch.inference_mode():
            _look_at(config, directory, tp)
    finally:
        oproj_patch.disable()


def _configuration(directory: str, fully: bool) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=f"{directory}/model", skip_tokenizer_init=True, load_format="dummy",
        dtype="float32", enforce_eager=True, max_model_len=128, enable_lora=True,
        max_loras=len(ADAPTERS) + 1,  # on a CPU a row without adapter takes the last place's
        max_lora_rank=8, fully_sharded_loras=fully, lora_target_modules=["o_proj"],
        max_num_batched_tokens=128, max_num_seqs=64,
    ).create_engine_config()  # fmt: skip
    config.additional_config = {}
    return config


def _look_at(config: Any, directory: str, tp: int) -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    import oproj_patch

    model = create(config)
    dp_rank, tp_rank = config.parallel_config.data_parallel_rank, int(os.environ["RANK"]) % tp
    weights = list[torch.Tensor]()
    for place, name in enumerate(NAMES):
        layer = model.get_submodule(name)
        weights.append(whole(HIDDEN, COLUMNS, torch.float32, place))
        layer.weight.weight_loader(layer.weight, weights[place])
        finish(layer)
    manager = LoRAModelManager(
        model, 64, 128, CONFIG["vocab_size"], config.lora_config, torch.device("cpu"), config
    )
    for number in ADAPTERS:
        path = f"{directory}/adapter{number}"
        adapter = LoRAModel.from_local_checkpoint(
            path, {"o_proj"}, PEFTHelper.from_local_dir(path, 128), lora_model_id=number,
            device="cpu", dtype=torch.float32,
        )  # fmt: skip
        assert manager.add_adapter(adapter) and manager.activate_adapter(number)
    kind = (
        "RowParallelLinearWithShardedLoRA"
        if config.lora_config.fully_sharded_loras
        else ("RowParallelLinearWithLoRA")
    )
    assert {type(model.get_submodule(name)).__name__ for name in NAMES} == {kind}
    assert oproj_patch.status().layers == 2
    layers = [model.get_submodule(name) for name in NAMES]
    for number, rows in enumerate(PASSES):
        _pass(manager, layers, number, rows[dp_rank], weights, tp, tp_rank)
    assert oproj_patch.status().exchanges == 2 * len(PASSES)
    # On a CPU the quant method packs a weight after loading, and multiplies by what it has packed.
    weights = [whole(HIDDEN, COLUMNS, torch.float32, 40 + place) for place in range(len(NAMES))]
    named = zip((f"{name}.weight" for name in NAMES), weights, strict=True)
    reload_weights(config, model, named, None, True)
    _pass(manager, layers, 0, PASSES[0][dp_rank], weights, tp, tp_rank)


def _pass(
    manager: Any, layers: list[Any], number: int, adapters: list[int], weights: list[torch.Tensor],
    tp: int, tp_rank: int,
) -> None:  # fmt: skip
    from vllm.lora.layers import LoRAMapping

    manager.set_adapter_mapping(LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=True))
    for place, layer in enumerate(layers):
        x = whole(len(adapters), COLUMNS, torch.float32, seed=50 + 10 * number + place)
        expected = reference(x, weights[place], None)
        for row, adapter in enumerate(adapters):
            if adapter:
                a, b = (factor.double() for factor in factors(adapter, place))
                change = 2 * (x[row].double() @ a.t() @ b.t())
                assert float(change.abs().max()) > 0.05
                expected[row] += change
        mine = x.chunk(tp, dim=-1)[tp_rank].contiguous()
        output, bias = layer(mine)
        assert bias is None
        error, scale = (output.double() - expected).abs().max(), expected.abs().max()
        assert float(error) <= LIMIT * float(scale)
