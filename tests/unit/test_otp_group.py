"""The scope in which one thread sees the layer's own tensor-parallel group."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from oproj_patch.sharding import otp_group
from oproj_patch.sharding.otp_group import LayerScope, LayerTPGroup


def seen(parallel_state: Any) -> list[int]:
    """Return what another thread and this one see of the tensor-parallel group."""
    told: list[int] = []
    thread = threading.Thread(target=lambda: told.append(parallel_state._TP.world_size))
    thread.start()
    thread.join(10)
    return [*told, parallel_state._TP.world_size]


def scope(parallel_state: Any, size: int) -> LayerScope:
    return LayerScope(parallel_state, LayerTPGroup(0, range(size), None, None))


def test_only_the_own_thread_sees_the_layers_group() -> None:
    vllm = SimpleNamespace(world_size=1, name="tp")
    state = SimpleNamespace(_TP=vllm)
    with scope(state, 8):
        assert seen(state) == [1, 8]
        with scope(state, 4):
            assert seen(state) == [1, 4]
        assert seen(state) == [1, 8]
        with pytest.raises(AttributeError, match="has no 'name'"):
            _ = state._TP.name
    assert state._TP is vllm


def test_two_threads_leave_in_either_order() -> None:
    vllm = SimpleNamespace(world_size=1)
    state = SimpleNamespace(_TP=vllm)
    inside, leave, left = threading.Event(), threading.Event(), threading.Event()
    told: list[list[int]] = []

    def other() -> None:
        with scope(state, 4):
            inside.set()
            leave.wait(10)
            told.append([state._TP.world_size])
        told.append([state._TP.world_size])
        left.set()

    with scope(state, 8):
        threading.Thread(target=other, daemon=True).start()
        assert inside.wait(10)
        assert state._TP.world_size == 8
    # This thread has left, the other one is still inside.
    assert state._TP.world_size == 1
    leave.set()
    assert left.wait(10)
    assert told == [[4], [1]] and state._TP is vllm


def test_a_refused_start_is_repeated() -> None:
    refusal = otp_group.OprojError("OPROJ003", "size 3 does not fit.")
    otp_group.refuse(refusal)
    try:
        with pytest.raises(otp_group.OprojError) as raised:
            otp_group.require("model.layers.0.self_attn.o_proj")
        assert raised.value is refusal
    finally:
        otp_group.refuse(None)
    with pytest.raises(otp_group.OprojError, match=r"^OPROJ007: "):
        otp_group.require("model.layers.0.self_attn.o_proj")
