"""Device graphs on a CPU: stand behind `torch.cuda.CUDAGraph`, `torch.npu.NPUGraph` and their kin.

A device graph is a list of kernels and collectives that the device replays on the same memory,
without Python. Here a dispatch mode records each call of a region with its arguments and outputs,
and a replay runs the calls again into the same outputs. The host's own wrapper decides what is
captured and replayed; nothing here knows a host.

As on a device
- a captured collective is recorded and does not run, so a rank may capture alone;
- what needs the device's result while it captures raises `CaptureError`;
- an operator with a Python implementation is entered, and its kernels are recorded.

Unlike on a device, kernels other than collectives also run while they are recorded (their output
shapes are needed), and every graph keeps its memory for itself.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TORCH = str(Path(torch.__file__).parent)
# What reads a tensor's values on the CPU; some of them never reach the dispatcher.
_READERS = ("tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__")
_SYNCHRONIZING = frozenset(
    f"aten::{name}"
    for name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select")
)
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CPU_KEYS = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")


class CaptureError(RuntimeError):
    """Something that would break the capture of a real device graph."""


@dataclass(frozen=True)
class Allocation:
    """Memory that a captured call took: the operator, and the frame that asked for it."""

    operator: str
    bytes: int
    file: str
    function: str
    line: int


@dataclass(frozen=True)
class _Call:
    run: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class Graph:
    """Stands behind `torch.cuda.CUDAGraph` and `torch.npu.NPUGraph`.

    calls: names of the recorded kernels and collectives, in order.
    allocations: memory taken while they were recorded.
    captures, replays: how often any graph of this process was captured and replayed.
    """

    captures = 0
    replays = 0
    all: list[Graph] = []  # noqa: RUF012

    def __init__(self, *_: Any, **__: Any) -> None:
        self.allocations: list[Allocation] = []
        self._calls: list[_Call] = []
        self._recorder: _Recorder | None = None
        self._on_device: set[int] = set()

    @property
    def calls(self) -> list[str]:
        return [call.name for call in self._calls]

    def allocations_in(self, directory: str) -> list[Allocation]:
        """Allocations that a function of a file below `directory` asked for itself."""
        return [found for found in self.allocations if found.file.startswith(directory)]

    def capture_begin(self, *_: Any, **__: Any) -> None:
        if capturing():
            raise CaptureError("a graph is captured within another one's capture")
        _capturing.append(self)
        self._undo = Patches()
        # Only now: outside a capture a compiler may ask for these, by identity.
        for name in _READERS:
            self._undo.put(torch.Tensor, name, _reader(name))
        for device in _devices:
            self._undo.put(device, "is_available", lambda: True)
        self._recorder = _Recorder(self)
        self._recorder.__enter__()

    def capture_end(self) -> None:
        assert self._recorder is not None, "capture_begin() comes first"
        self._recorder.__exit__(None, None, None)
        self._recorder = None
        _capturing.remove(self)
        self._undo.close()
        Graph.captures += 1
        Graph.all.append(self)

    def replay(self) -> None:
        """Run the recorded calls again, into the memory that they wrote to."""
        if capturing():
            raise CaptureError("a graph is replayed within a capture")
        Graph.replays += 1
        with torch.inference_mode():
            for call in self._calls:
                new = call.run(*call.args, **call.kwargs)
                for was, now in zip(tree_leaves(call.out), tree_leaves(new), strict=True):
                    if isinstance(now, torch.Tensor):
                        if was.data_ptr() != now.data_ptr():
                            was.copy_(now)
                    elif isinstance(now, torch.ScriptObject):
                        dist.distributed_c10d.Work.unbox(now).wait()

    def reset(self) -> None:
        self._calls.clear()

    def pool(self) -> tuple[int, int]:
        return pool_handle()

    def enable_debug_mode(self) -> None:
        """Nothing to do: kept because hosts call it."""

    def debug_dump(self, *_: Any) -> None:
        """Nothing to do: kept because hosts call it."""

    def record(self, call: _Call) -> None:
        self._calls.append(call)
        for leaf in (*tree_leaves(call.args), *tree_leaves(call.kwargs), *tree_leaves(call.out)):
            if isinstance(leaf, torch.Tensor) and leaf.numel():
                self._on_device.add(leaf.untyped_storage().data_ptr())

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a recorded kernel read or wrote the memory of `tensor`: it is the device's.

        Every tensor here is a CPU tensor. One that no kernel touches, such as the row counts of
        the data-parallel ranks, is on the CPU on a device as well.
        """
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._on_device


class Patches(contextlib.ExitStack):
    """Attributes that were exchanged; `close()` puts the original ones back."""

    def put(self, owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            self.callback(setattr, owner, name, vars(owner)[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)


_capturing: list[Graph] = []
_devices: list[Any] = []
_suspended = 0


def capturing() -> bool:
    """Whether a graph is being captured in this process."""
    return bool(_capturing) and not _suspended


def pool_handle() -> tuple[int, int]:
    return (0, 0)


class capture:
    """Stands behind `torch.cuda.graph` and `torch.npu.graph`."""

    def __init__(self, graph: Any, *_: Any, **__: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        self.graph.capture_begin()

    def __exit__(self, *_: object) -> None:
        self.graph.capture_end()


def as_kernel(function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """`function` as one recorded call: a stand-in, in Python, for one kernel of a device."""

    @functools.wraps(function)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not capturing():
            return function(*args, **kwargs)
        graph = _capturing[-1]
        with _not_recording():
            out = function(*args, **kwargs)
        label = name or getattr(function, "__qualname__", repr(function))
        graph.record(_Call(function, label, args, kwargs, out))
        return out

    return kernel


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without its calls recorded: what it computes is on the CPU on a device too."""

    @functools.wraps(function)
    def unrecorded(*args: Any, **kwargs: Any) -> Any:
        if not capturing():
            return function(*args, **kwargs)
        with _not_recording():
            return function(*args, **kwargs)

    return unrecorded


@contextlib.contextmanager
def _not_recording() -> Iterator[None]:
    global _suspended
    recorder = _capturing[-1]._recorder
    assert recorder is not None
    recorder.paused = True
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1
        recorder.paused = False


class _Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Record what reaches the dispatcher within `graph`'s capture."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name: str = func.name()
        if _in_python(name):
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        if name.startswith("c10d::"):
            return self._collective(func, name, args, kwargs)
        self._check(name, args)
        out = func(*args, **kwargs)
        new = _new_memory(out, args, kwargs)
        if new:
            self.graph.allocations.append(_allocation(name, new))
        if not _without_effect(func, name, new):
            self.graph.record(_Call(func, name, args, kwargs, out))
        return out

    def _collective(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Record a collective; as in a real capture it does not run, and no rank waits."""
        if "barrier" in name:
            raise CaptureError(f"{name} makes the CPU wait within a capture")
        work = torch._C._distributed_c10d.FakeWork().boxed()
        out = work if len(func._schema.returns) == 1 else (args[0], work)
        if name not in ("c10d::allreduce_", "c10d::broadcast_"):
            for tensor in tree_leaves(args[0]):
                tensor.zero_()  # What a capture leaves there is arbitrary, but for NaNs.
        self.graph.record(_Call(func, name, args, kwargs, out))
        return out

    def _check(self, name: str, args: Any) -> None:
        base = name.partition(".")[0]
        masked = base == "aten::index" and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if masked or base in _SYNCHRONIZING:
            refuse_to_read(args[0], base)


def refuse_to_read(tensor: Any, how: str) -> None:
    """Raise CaptureError when `tensor` is the device's and its values are asked for."""
    if capturing() and isinstance(tensor, torch.Tensor) and _capturing[-1].holds(tensor):
        raise CaptureError(
            f"{how} waits for the values of a {tensor.dtype} tensor {list(tensor.shape)} within a "
            "capture"
        )


@functools.cache
def _in_python(name: str) -> bool:
    """Whether the operator is implemented in Python on a CPU."""
    space, _, rest = name.partition("::")
    if space in ("aten", "prim", "prims", "c10d"):
        return False
    names = (rest, rest.partition(".")[0])
    return any(f"{space}/{n}/{key}" in torch.library._impls for n in names for key in _CPU_KEYS)


def _new_memory(out: Any, args: Any, kwargs: Any) -> int:
    """Bytes of the outputs whose memory is no input's."""
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    if not outputs:
        return 0
    known = {
        leaf.untyped_storage().data_ptr()
        for leaf in (*tree_leaves(args), *tree_leaves(kwargs))
        if isinstance(leaf, torch.Tensor)
    }
    storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in outputs}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def _without_effect(func: Any, name: str, new: int) -> bool:
    """Whether a replay can leave the call out: it writes nothing."""
    if name.startswith(("aten::empty", "aten::new_empty")):
        return True
    return not new and not func._schema.is_mutable


def _allocation(operator: str, size: int) -> Allocation:
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    code = frame.f_code
    return Allocation(operator, size, code.co_filename, code.co_name, frame.f_lineno)


class _Stream:
    """A stream of the one queue there is on a CPU."""

    device = torch.device("cpu")
    cuda_stream = npu_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        _synchronize()

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _synchronize()


_PROPERTIES = SimpleNamespace(name="emulated", multi_processor_count=1, major=9, minor=0)


def _synchronize(*_: Any, **__: Any) -> None:
    if capturing():
        raise CaptureError("the CPU waits for the device within a capture")


def _reader(name: str) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    @functools.wraps(original)
    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        refuse_to_read(self, name)
        return original(self, *args, **kwargs)

    return read


def install(devices: Sequence[str] = ("cuda",)) -> Callable[[], None]:
    """Put the emulator behind `torch.cuda` (and `torch.npu`); returns what takes it away again."""
    undo = Patches()
    for name in devices:
        module = getattr(torch, name)
        _devices.append(module)
        undo.callback(_devices.remove, module)
        undo.put(module, "CUDAGraph" if name == "cuda" else "NPUGraph", Graph)
        undo.put(module, "graph", capture)
        undo.put(module, "graph_pool_handle", pool_handle)
        undo.put(module, "is_current_stream_capturing", capturing)
        if name == "npu":
            undo.put(module, "is_available", lambda: True)  # asked once, before any capture
            undo.put(torch.accelerator, "is_available", lambda: False)  # asked by the compiler
        undo.put(module, "Stream", _Stream)
        undo.put(module, "Event", _Event)
        undo.put(module, "stream", lambda stream, *_: contextlib.nullcontext(stream))
        undo.put(module, "current_stream", lambda *_: _Stream())
        undo.put(module, "set_stream", lambda *_: None)
        undo.put(module, "synchronize", lambda *_: _synchronize())
        undo.put(module, "get_device_properties", lambda *_: _PROPERTIES)
        undo.put(module, "empty_cache", lambda *_: None)
        undo.put(module, "mem_get_info", lambda *_: (0, 0))
    undo.put(torch, "Event", _Event)
    undo.put(torch.accelerator, "synchronize", lambda *_: _synchronize())
    undo.put(torch.accelerator, "empty_cache", lambda *_: None)
    undo.put(torch.accelerator, "get_memory_info", lambda *_: (0, 0))
    return undo.close


@contextlib.contextmanager
def installed(devices: Sequence[str] = ("cuda",)) -> Iterator[None]:
    """Within it device graphs are emulated."""
    undo = install(devices)
    try:
        yield
    finally:
        undo()
