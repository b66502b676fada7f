"""Dual-batch overlap: sharded layers in the threads of vLLM's own micro-batches.

A CPU has no streams, so `Stream` and `Event` stand in for them. All else is vLLM's: the wrapper of
the model, its threads, their hand-over, the cut of a batch, and each part's metadata.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ranks.launch import World
from tests.ranks.layers import build, cut_up, finish, load, reference, sharding, whole

COLUMNS, LAYERS, LIMIT = 24, 3, 5e-6
NAMES = [f"model.layers.{i}.self_attn.o_proj" for i in range(LAYERS)]


class Stream:
    """Stands in for a stream of the device."""

    here = threading.local()

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


class Event:
    """Stands in for an event of the device."""

    def record(self, stream: Any) -> None: ...


DEFAULT = Stream()


def current_stream(*_: Any) -> Stream:
    found: Stream = getattr(Stream.here, "stream", DEFAULT)
    return found


def set_stream(stream: Stream) -> None:
    Stream.here.stream = stream


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Let the stand-ins take the place of the device's streams."""
    from vllm.v1.worker import gpu_ubatch_wrapper, ubatching

    with contextlib.ExitStack() as stack:
        for owner, name, other in (
            (torch, "Event", Event),
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "current_stream", current_stream),
            (torch.cuda, "set_stream", set_stream),
            (ubatching, "current_stream", current_stream),
            # How many of a device's processors communicate.
            (gpu_ubatch_wrapper, "create_sm_control_context", lambda _: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, other))
        yield


def high_throughput() -> None:
    """Hand over as DeepEP's high-throughput dispatch and combine of experts do."""
    from vllm.v1.worker import ubatching

    for _ in range(2):
        ubatching.dbo_yield_and_switch_from_compute_to_comm()
        ubatching.dbo_switch_to_compute_sync()


def low_latency() -> None:
    """Hand over as vLLM does for experts whose dispatch and combine return a hook."""
    from vllm.v1.worker import ubatching

    for _ in range(2):
        ubatching.dbo_maybe_run_recv_hook()
        ubatching.dbo_register_recv_hook(lambda: None)
        ubatching.dbo_yield()


def no_hand_over() -> None:
    """Run experts that never hand over: one micro-batch after the other."""


EXPERTS: dict[str, Callable[[], None]] = {
    "high throughput": high_throughput,
    "low latency": low_latency,
    "no hand-over": no_hand_over,
}
# Tokens of the requests of each rank, rows after padding, micro-batches.
PASSES: list[tuple[list[list[int]], int, int]] = [
    ([[4, 4], [3, 4]], 8, 2),
    ([[9], [2, 2, 2, 2]], 9, 2),
    ([[1] * 40, [38]], 40, 2),
    ([[7, 4], [11]], 11, 3),
]


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("buffer", [None, 256], ids=["whole", "parts"])
def test_order_and_numbers_with_stand_ins_for_streams(
    world: World, experts: str, buffer: int | None
) -> None:
    """Both ranks exchange in one order; a step ends before another micro-batch begins one."""
    first, second = world.run(overlapped, experts, buffer, seconds=120)
    assert first == second
    for events, (_, rows, ways) in zip(first, PASSES, strict=True):
        steps = [event for event in events if event[0] == "step"]
        halves = [rows // ways] * (ways - 1) + [rows - rows // ways * (ways - 1)]
        assert sorted(steps) == sorted(
            ("step", part, name, (halves[part],) * 2) for part in range(ways) for name in NAMES
        )
        order = [part for _, part, *_ in steps]
        if experts == "no hand-over":
            assert order == sorted(order)
        else:
            assert order == [*range(ways)] * LAYERS
        inside = None
        for what, part, *_ in events:
            assert what == "step" or part == inside, "two steps at once"
            inside = {"step": part, "end": None}.get(what, inside)
        sent = sum(what == "sent" for what, *_ in events)
        assert sent == 2 * len(steps) if buffer is None else sent > 2 * len(steps)


def overlapped(experts: str, buffer: int | None) -> list[list[tuple[Any, ...]]]:
    """In a rank: run the passes; return what happened in each, in order."""
    with sharding(2, 2) as config, streams(), cut_up(buffer):
        model, weights, errors = _model(EXPERTS[experts])
        told = []
        for number, (requests, rows, ways) in enumerate(PASSES):
            x = whole(rows, COLUMNS, torch.float32, seed=10 * number + _rank(config))
            with _recorded() as events:
                output = _run(config, model, x, requests, rows, ways)
            told.append(events)
            expected = x.double()
            for weight in weights:
                expected = torch.tanh(reference(expected, weight, None))
            assert not errors and float((output.double() - expected).abs().max()) <= LIMIT
        from oproj_patch.sharding import otp_group

        lanes = 1 if buffer is None else 2
        assert len(otp_group.require("the test").buffers) == 3 * lanes, "all parts share them"
        return told


def _rank(config: Any) -> int:
    return int(config.parallel_config.data_parallel_rank)


def _model(experts: Callable[[], None]) -> tuple[Any, list[torch.Tensor], list[str]]:
    """Return a model, the whole weights of its projections, and refusals that it meets.

    It goes on after one, because vLLM's threads wait for each other.
    """
    import oproj_patch

    stack = [build(name, COLUMNS, COLUMNS, bias=False) for name in NAMES]
    weights = [whole(COLUMNS, COLUMNS, torch.float32, seed=i) for i in range(LAYERS)]
    for layer, weight in zip(stack, weights, strict=True):
        load(layer, weight, None)
        finish(layer)
    delay, errors = random.Random(os.environ["RANK"]), list[str]()

    def run(inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        x = inputs_embeds
        for layer in stack:
            time.sleep(delay.random() / 200)  # the ranks' threads do not run at one speed
            try:
                x = torch.tanh(layer(x)[0])
            except oproj_patch.OprojError as error:
                errors.append(str(error))
            experts()
        return x

    return run, weights, errors


def _run(
    config: Any, model: Any, x: torch.Tensor, requests: list[list[int]], rows: int, ways: int
) -> torch.Tensor:
    """Run the model by vLLM's wrapper, which cuts the batch into `ways` micro-batches."""
    import numpy as np
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.gpu_ubatch_wrapper import UBatchWrapper
    from vllm.v1.worker.ubatch_utils import maybe_create_ubatch_slices

    config.parallel_config.ubatch_size = ways
    wrapper = UBatchWrapper(model, config, CUDAGraphMode.NONE, torch.device("cpu"))
    mine = requests[_rank(config)]
    _, slices = maybe_create_ubatch_slices(True, np.array(mine), rows, len(mine), ways)
    counts = torch.tensor([rows] * 2, dtype=torch.int32)
    with set_forward_context(
        None, config, num_tokens=rows, num_tokens_across_dp=counts, ubatch_slices=slices
    ):
        output: torch.Tensor = wrapper(
            input_ids=None, positions=torch.arange(rows), intermediate_tensors=None,
            inputs_embeds=x,
        )  # fmt: skip
    return output


@contextlib.contextmanager
def _recorded() -> Iterator[list[tuple[Any, ...]]]:
    """Record steps and collectives with the micro-batch in which they happen."""
    from vllm.v1.worker.ubatching import dbo_current_ubatch_id

    from oproj_patch.sharding import exchange

    run, send, events = exchange.run, exchange._all_to_all, list[tuple[Any, ...]]()

    def step(layer: Any, x: torch.Tensor, positions: None) -> torch.Tensor:
        part, shard = dbo_current_ubatch_id(), layer.oproj
        counts = shard.host.announced(shard.group)
        events.append(("step", part, shard.name, counts))
        assert current_stream() is DEFAULT  # the stream on which both micro-batches compute
        output = run(layer, x, positions)
        events.append(("end", part))
        return output

    def sent(*given: Any) -> Any:
        events.append(("sent", dbo_current_ubatch_id(), tuple(given[2]), tuple(given[3])))
        return send(*given)

    with (
        mock.patch.object(exchange, "run", step),
        mock.patch.object(exchange, "_all_to_all", sent),
    ):
        yield events


def test_rows_that_ranks_agree_on_do_not_serve_two_micro_batches(world: World) -> None:
    """What keeps vllm-ascend's overlap refused: there the ranks agree at a pass's first layer."""
    world.run(agreed, seconds=60)


def agreed() -> None:
    """In a rank: of 5 and 4 rows the second micro-batch's count replaces the first one's."""
    from vllm.v1.worker import ubatch_utils

    from oproj_patch.hosts.vllm import Vllm

    cut = ubatch_utils.maybe_create_ubatch_slices
    with (
        sharding(2, 2) as config,
        streams(),
        mock.patch.object(Vllm, "announced", lambda *_: None),
        mock.patch.object(
            ubatch_utils, "maybe_create_ubatch_slices", lambda *given: cut(*given, split_point=5)
        ),
    ):
        model, _, errors = _model(high_throughput)
        _run(config, model, whole(9, COLUMNS, torch.float32), [[9], [9]], 9, 2)
    assert errors == [
        f"OPROJ014: o_proj got 5 rows on rank {os.environ['RANK']} at {name}, but the ranks' "
        "agreement at the first layer of this forward pass says [4, 4] for ranks [0, 1]: this "
        "forward pass changes its row count between layers or hides it, which is not supported; "
        "please report model and options."
        for name in NAMES[1:]
    ]


def test_halves_that_two_ranks_announce_otherwise(world: World) -> None:
    """What keeps graphs with the overlap refused before vLLM 0.13: there they announce so."""
    world.run(announced_otherwise, seconds=60)


def announced_otherwise() -> None:
    """In a rank: rank 0 replays and announces a half's rows, rank 1 announces the whole batch's."""
    import oproj_patch
    from tests.ranks.layers import forward_context

    with sharding(2, 2, OPROJ_PATCH_DEBUG="1") as config:
        layer = build(NAMES[0], COLUMNS, COLUMNS, bias=False)
        load(layer, whole(COLUMNS, COLUMNS, torch.float32), None)
        finish(layer)
        counts = [[4, 4], [8, 8]][_rank(config)]
        with (
            forward_context(config, counts, announced=True),
            pytest.raises(oproj_patch.OprojError, match=r"^OPROJ013: .* announced \[8, 8\]"),
        ):
            layer(whole(4, COLUMNS, torch.float32))
