"""In a rank: real vLLM model classes with tiny configurations."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

from .layer import finish
from .world import model_groups, whole, world


def engine_config(model: str, dtype: str = "float32") -> Any:
    """vLLM's configuration for a directory in which only `config.json` exists."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=model, skip_tokenizer_init=True, load_format="dummy", dtype=dtype,
        enforce_eager=True, max_model_len=128, max_num_batched_tokens=128, max_num_seqs=8,
        disable_log_stats=True,
    ).create_engine_config()  # fmt: skip
    config.additional_config = {}
    return config


def create(config: Any) -> Any:
    """The model, built by vLLM's own loader and not loaded yet."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype):
        loader = get_model_loader(config.load_config)
        return loader.create_model(vllm_config=config, model_config=config.model_config)


def told(models: dict[str, dict[str, Any]], dp: int) -> dict[str, Any]:
    """By model: its layers after its own `load_weights`, or how building it ended.

    models: name -> {"path": its directory, "env": environment}.
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found: dict[str, Any] = {}
    with world():
        for name, case in models.items():
            os.environ.update(case["env"])
            try:
                config = engine_config(case["path"])
                with model_groups(dp, config=config):
                    found[name] = _layers(config, dp)
            except Exception:
                found[name] = {"error": traceback.format_exc()}
            finally:
                for variable in case["env"]:
                    del os.environ[variable]
    return found


def _layers(config: Any, dp: int) -> dict[str, Any]:
    from vllm.model_executor.layers.linear import RowParallelLinear

    from oproj_patch.row_parallel import ShardedMixin

    # `check_model` has run in it.
    model = create(config)
    rank = config.parallel_config.data_parallel_rank
    layers = {k: m for k, m in model.named_modules() if isinstance(m, RowParallelLinear)}
    weights = {
        key: whole(layer.output_size, layer.input_size, torch.float32, seed=index)
        for index, (key, layer) in enumerate(layers.items())
        if isinstance(layer, ShardedMixin) or "vision" in key
    }
    model.load_weights((f"{key}.weight", weight) for key, weight in weights.items())
    sharded: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for key, layer in layers.items():
        of = sharded if isinstance(layer, ShardedMixin) else plain
        of[key] = {"own class": type(layer) is RowParallelLinear, "ways": layer.tp_size}
        if key not in weights:
            continue
        width = layer.input_size // (dp if of is sharded else 1)
        start = rank * width if of is sharded else 0
        of[key]["exact"] = torch.equal(layer.weight.data, weights[key][:, start : start + width])
    for key, layer in layers.items():
        if key in sharded:
            bias = 0 if layer.bias is None else layer.bias.data.fill_(0.5).double()
            finish(layer)
            x = whole(3 + rank, layer.input_size, torch.float32, seed=90 + rank)
            output = layer(x)
            output = output[0] if isinstance(output, tuple) else output
            expected = x.double() @ weights[key].double().t() + bias
            sharded[key]["error"] = float((output.double() - expected).abs().max())
    caches = {
        prefix for prefix, m in config.compilation_config.static_forward_context.items()
        if hasattr(m, "kv_cache")
    }  # fmt: skip
    return {
        "model": type(model).__name__,
        "attention": sorted({type(model.get_submodule(k.rpartition(".")[0])).__name__
                             for k in sharded}),
        "sharded": sharded,
        "plain": plain,
        "without a cache": [
            key for key in sharded
            if not any(prefix.startswith(key.rpartition(".")[0] + ".") for prefix in caches)
        ],
    }  # fmt: skip


def start(model: str, dp: int, then: str = "", dtype: str = "float32") -> list[str]:
    """What a rank does when it starts: plug-ins, configuration, groups, model.

    then: a value to which the toggle is changed with the model built; what both ways to do so
    say, and the state afterwards.
    """
    from vllm.plugins import load_general_plugins

    import oproj_patch
    from oproj_patch import api

    load_general_plugins()
    config = engine_config(model, dtype)
    with world(), model_groups(dp, config=config):
        create(config)
        if not then:
            return ["built"]
        said = []
        changes: list[Callable[[], None]] = [lambda: oproj_patch.enable(then), api.activate]
        for change in changes:
            try:
                change()
                said.append("accepted")
            except oproj_patch.OprojError as error:
                said.append(str(error))
            said.append(os.environ["OPROJ_TENSOR_PARALLEL_SIZE"])
            os.environ["OPROJ_TENSOR_PARALLEL_SIZE"] = then
        status = oproj_patch.status()
        return [*said, f"{status.size}-way, {status.layers} layers"]
