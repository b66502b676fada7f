"""Beside another plugin that wraps the same symbols: both work, in both orders, and it stays."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections import Counter
from typing import Any

import pytest
import torch
import wrapt

from tests.ranks import launch
from tests.ranks.layers import (
    O_PROJ,
    build,
    finish,
    made,
    model_groups,
    reference,
    sharding,
    whole,
    world,
)
from tests.ranks.test_activation import SAVERS, SEAMS


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


KEYS = {
    "init_model_parallel_group": lambda _, kwargs: kwargs["group_name"],
    "RowParallelLinear.__init__": lambda _, kwargs: f"init {kwargs['prefix']}",
    "RowParallelLinear.forward": lambda args, _: f"forward {args[0].prefix}",
}
SYMBOLS = [(module, path) for module, paths in (SEAMS | SAVERS).items() for path in paths]
SYMBOLS.append(("vllm.model_executor.layers.linear", "RowParallelLinear.forward"))


def wrap_all(calls: Counter[str]) -> list[tuple[Any, str, Any]]:
    """Wrap every symbol that is ours too, and the forward that sharded layers do not call."""
    found = []
    for module, path in SYMBOLS:
        owner, name, _ = wrapt.resolve_path(importlib.import_module(module), path)
        key = KEYS.get(path, lambda *_, path=path: path)
        found.append((owner, name, wrap(owner, name, calls, key)))
    return found


def beside(order: str) -> None:
    """In a rank: wrap before or after activation, or between two starts; then switch off."""
    calls: Counter[str] = Counter()
    theirs = wrap_all(calls) if order == "before" else []
    import oproj_patch

    oproj_patch.enable(2)
    if order == "after":
        theirs = wrap_all(calls)
    with world():
        if order == "during":
            with model_groups(2):
                made(20, 48)
            theirs = wrap_all(calls)
        with model_groups(2) as config:
            layer, weight, _ = made(20, 48)
            finish(layer)
            other = build("model.layers.0.mlp.down_proj", 20, 48, bias=False)
            finish(other)
            x = whole(3, 48, torch.float32, seed=int(os.environ["RANK"]))
            output = layer(x)[0]
            other(x)
            assert oproj_patch.status().layers == 1
            key = config.compute_hash()
        error = (output.double() - reference(x, weight, None)).abs().max()
        assert float(error) <= 5e-6 * float(output.abs().max())
        # It sees every group that vLLM creates, every constructor, and no forward of a sharded
        # layer, which is a class of its own.
        assert {"tp", "dcp", "pp", "dp"} <= set(calls), calls
        assert calls[f"init {O_PROJ}"] == 1 and calls["init model.layers.0.mlp.down_proj"] == 1
        assert calls["forward model.layers.0.mlp.down_proj"] == 1
        assert calls[f"forward {O_PROJ}"] == 0
        assert calls["VllmConfig.compute_hash"] == 1
        oproj_patch.disable()
        for owner, name, wrapper in theirs:
            assert vars(owner)[name] is wrapper, name
        calls.clear()
        with model_groups(1, 2):
            whole_layer = build(O_PROJ, 20, 48, bias=False)
            assert not hasattr(whole_layer, "oproj")
            assert config.compute_hash() != key
        assert calls[f"init {O_PROJ}"] == 1 and calls["tp"] == 1 and calls["dp"] == 1
        assert calls["VllmConfig.compute_hash"] == 1


@pytest.mark.parametrize("how", ["wrapped", "replaced", "registered", "not at all"])
def test_a_forward_that_is_bypassed_is_named_once(how: str) -> None:
    launch.run(2, bypassed, how)


def bypassed(how: str) -> None:
    """In a rank: another plugin's forward of o_proj's class; two layers, one warning, no call."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    calls: Counter[str] = Counter()
    original = RowParallelLinear.forward

    def forward(self: Any, x: Any) -> Any:
        calls["forward"] += 1
        return original(self, x)

    forward.__module__ = "another_plugin"

    class Registered(RowParallelLinear):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            calls["init"] += 1

    Registered.__module__, Registered.forward = "another_plugin", forward
    if how == "wrapped":
        functools.update_wrapper(forward, original)
        RowParallelLinear.forward = forward
    elif how == "replaced":
        RowParallelLinear.forward = forward
    elif how == "registered":
        RowParallelLinear.register_oot(Registered)
    told: list[str] = []
    logging.getLogger("vllm.oproj_patch").addFilter(
        lambda record: told.append(record.getMessage()) is None
    )
    with sharding(2, 2):
        for index in range(2):
            layer, weight, _ = made(20, 48, prefix=f"model.layers.{index}.self_attn.o_proj")
            finish(layer)
            x = whole(3, 48, torch.float32, seed=int(os.environ["RANK"]))
            error = (layer(x)[0].double() - reference(x, weight, None)).abs().max()
            assert float(error) <= 5e-6
        other = build("model.layers.0.mlp.down_proj", 20, 48, bias=False)
        finish(other)
        other(x)
    named = [line for line in told if "oproj_patch does not call it for o_proj layers" in line]
    assert len(named) == (how != "not at all"), told
    assert calls["forward"] == (how != "not at all")  # down_proj's
    assert calls["init"] == 3 * (how == "registered")
    for line in named:
        owner = "another_plugin" if how == "registered" else "vllm.model_executor.layers.linear"
        assert line.startswith(f"{owner}."), line
        assert "another_plugin" in line or how == "wrapped"
