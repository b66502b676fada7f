"""Beside another plugin that wraps the same symbols: both work, in both orders, and it stays."""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import Any

import pytest
import torch

from tests.ranks import launch
from tests.ranks.layers import O_PROJ, build, finish, made, model_groups, reference, whole, world


@pytest.mark.parametrize("order", ["before", "after", "during"])
def test_another_plugin(order: str) -> None:
    launch.run(2, beside, order, env={launch.SIZE: "2"})


def wrap(owner: Any, name: str, calls: Counter[str], key: Any) -> Any:
    """Wrap as another plugin does; count calls by `key(arguments)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls[key(args, kwargs)] += 1
        return original(*args, **kwargs)

    setattr(owner, name, theirs)
    return theirs


def beside(order: str) -> None:
    """In a rank: wrap before or after activation, or between two starts; then switch off."""
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.linear import RowParallelLinear

    calls: Counter[str] = Counter()
    symbols = (
        (parallel_state, "init_model_parallel_group", lambda _, kwargs: kwargs["group_name"]),
        (RowParallelLinear, "__init__", lambda _, kwargs: f"init {kwargs['prefix']}"),
        (RowParallelLinear, "forward", lambda args, _: f"forward {args[0].prefix}"),
    )

    def wrap_all() -> list[Any]:
        return [wrap(owner, name, calls, key) for owner, name, key in symbols]

    theirs = wrap_all() if order == "before" else []
    import oproj_patch

    oproj_patch.enable(2)
    if order == "after":
        theirs = wrap_all()
    with world():
        if order == "during":
            with model_groups(2):
                made(20, 48)
            theirs = wrap_all()
        with model_groups(2):
            layer, weight, _ = made(20, 48)
            finish(layer)
            other = build("model.layers.0.mlp.down_proj", 20, 48, bias=False)
            finish(other)
            x = whole(3, 48, torch.float32, seed=int(os.environ["RANK"]))
            output = layer(x)[0]
            other(x)
            assert oproj_patch.status().layers == 1
        error = (output.double() - reference(x, weight, None)).abs().max()
        assert float(error) <= 5e-6 * float(output.abs().max())
        # It sees every group that vLLM creates, every constructor, and no forward of a sharded
        # layer, which is a class of its own.
        assert {"tp", "dcp", "pp", "dp"} <= set(calls), calls
        assert calls[f"init {O_PROJ}"] == 1 and calls["init model.layers.0.mlp.down_proj"] == 1
        assert calls["forward model.layers.0.mlp.down_proj"] == 1
        assert calls[f"forward {O_PROJ}"] == 0
        oproj_patch.disable()
        for (owner, name, _), wrapper in zip(symbols, theirs, strict=True):
            assert vars(owner)[name] is wrapper, name
        calls.clear()
        with model_groups(1, 2):
            whole_layer = build(O_PROJ, 20, 48, bias=False)
            assert not hasattr(whole_layer, "oproj")
        assert calls[f"init {O_PROJ}"] == 1 and calls["tp"] == 1 and calls["dp"] == 1
