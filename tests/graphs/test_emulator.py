"""The emulator itself, without a host."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from . import emulator


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with emulator.installed():
        yield


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def captured(function: Callable[[], torch.Tensor]) -> tuple[emulator.Graph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        output = function()
    assert isinstance(graph, emulator.Graph)
    return graph, output


def test_replay_reads_and_writes_the_same_memory() -> None:
    x, weight = torch.ones(2, 3), torch.arange(12.0).view(3, 4)
    graph, output = captured(lambda: (x @ weight).relu_().transpose(0, 1) * 2)
    before = output.data_ptr()
    x.fill_(-3.0)
    x[0] = 5.0
    graph.replay()
    assert output.data_ptr() == before
    assert torch.equal(output, (x @ weight).relu().t() * 2)


def test_replay_runs_no_python() -> None:
    calls = []
    library = torch.library.Library("oproj_emulator", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")

    def twice(x: torch.Tensor) -> torch.Tensor:
        calls.append(emulator.capturing())
        return x * 2

    library.impl("twice", twice, "CompositeExplicitAutograd")
    x = torch.ones(3)
    graph, output = captured(lambda: torch.ops.oproj_emulator.twice(x) + 1)
    x.fill_(4.0)
    graph.replay()
    assert calls == [True]
    assert graph.calls == ["aten::mul.Tensor", "aten::add.Tensor"]
    assert output.tolist() == [9.0] * 3


def test_collectives_run_in_the_replay_only(group: None) -> None:
    x, received = torch.full((4,), 2.0), torch.ones(4)

    def exchange() -> torch.Tensor:
        dist.all_to_all_single(received, x)
        dist.all_reduce(received)
        return received + 1

    graph, output = captured(exchange)
    assert output.tolist() == [1.0] * 4
    assert graph.calls == ["c10d::alltoall_base_", "c10d::allreduce_", "aten::add.Tensor"]
    graph.replay()
    assert output.tolist() == [3.0] * 4


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: bool(x.sum()),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
        lambda x: torch.accelerator.synchronize(),
    ],
)
def test_what_would_break_a_capture_raises(read: Callable[[torch.Tensor], object]) -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(emulator.CaptureError), torch.cuda.graph(graph):
        read(torch.ones(3) * 2)
    assert not emulator.capturing()
    assert (torch.ones(3) * 2).tolist() == [2.0] * 3


def test_a_tensor_that_no_kernel_touches_is_on_the_cpu() -> None:
    counts = torch.tensor([3, 5])
    read: list[int] = []

    def region() -> torch.Tensor:
        read.extend(counts[1:].tolist())
        return torch.ones(2) + 1

    captured(region)
    assert read == [5]


def test_capturing_is_told_and_torch_is_put_back() -> None:
    told: list[bool] = []

    def region() -> torch.Tensor:
        told.append(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        return torch.ones(2) + 1

    before = torch.Tensor.tolist
    captured(region)
    assert told == [True]
    assert not torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()
    assert torch.Tensor.tolist is before


def test_allocations_name_who_asked() -> None:
    x = torch.ones(4, 8)

    def ours() -> torch.Tensor:
        buffer = torch.empty(8, 4)
        buffer.copy_(x.t())
        return torch.nn.functional.linear(buffer, buffer)

    graph, _ = captured(ours)
    found = graph.allocations_in(__file__)
    assert [(a.bytes, a.function) for a in found] == [(128, "ours"), (256, "ours")]
    assert graph.allocations_in("/nowhere") == []


def test_a_kernel_in_python_is_one_call() -> None:
    def kernel(x: torch.Tensor, out: torch.Tensor) -> None:
        out[:] = torch.tensor([value + 1 for value in x.tolist()])

    x, out = torch.ones(2), torch.zeros(2)
    stand_in = emulator.as_kernel(kernel, "increment")
    graph, _ = captured(lambda: (stand_in(x, out), x)[1])
    assert graph.calls == ["increment"]
    x.fill_(6.0)
    graph.replay()
    assert out.tolist() == [7.0, 7.0]
