"""Every saver of vLLM that names its files by tensor-parallel rank is refused when called."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ranks.launch import World
from tests.ranks.layers import build, sharding


def test_savers_are_refused(world: World, tmp_path: Path) -> None:
    for told in world.run(save, str(tmp_path)):
        assert len(told) == 5
        for sentence in told:
            assert "it names its files by tensor-parallel rank only" in sentence, sentence
    assert list(tmp_path.iterdir()) == []


def save(directory: str) -> list[str]:
    """In a rank: ask as a user does, by the worker's own methods, and the functions below them."""
    from vllm.model_executor.model_loader import ShardedStateLoader, tensorizer, tensorizer_loader
    from vllm.model_executor.model_loader.tensorizer import TensorizerConfig
    from vllm.v1.worker.gpu_worker import Worker

    import oproj_patch

    told: list[str] = []
    with sharding(2, 2) as config:
        model: Any = SimpleNamespace(o_proj=build("a.self_attn.o_proj", 20, 48, bias=False))
        worker = SimpleNamespace(
            model_runner=SimpleNamespace(model=model), get_model=lambda: model,
            model_config=config.model_config,
        )  # fmt: skip
        how = TensorizerConfig(tensorizer_uri=f"{directory}/model.tensors")
        for call in (
            lambda: Worker.save_sharded_state(worker, directory),
            lambda: Worker.save_tensorized_model(worker, how),
            lambda: ShardedStateLoader.save_model(model, directory),
            lambda: tensorizer_loader.TensorizerLoader.save_model(model, how, None),
            lambda: tensorizer.serialize_vllm_model(model, how, None),
        ):
            with pytest.raises(oproj_patch.OprojError) as raised:
                call()
            assert raised.value.code == "OPROJ015"
            told.append(str(raised.value))
    return told


def test_no_other_file_of_the_loaders_is_named_by_that_rank() -> None:
    """In vLLM's package of loaders these modules ask for the rank; those that write are refused."""
    import vllm

    from oproj_patch.hosts.vllm import SAVERS

    loaders = Path(vllm.__file__).parent / "model_executor" / "model_loader"
    writing = re.compile(r"save_file\(|torch\.save\(|TensorSerializer\(")
    asking = {
        path.stem
        for path in loaders.rglob("*.py")
        if "tensor_model_parallel_rank()" in (text := path.read_text()) and writing.search(text)
    }
    assert asking == {"sharded_state_loader", "tensorizer"} <= {module for module, _ in SAVERS}
