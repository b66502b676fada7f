"""In a rank: vLLM's real groups over gloo without an engine, and one o_proj in them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

O_PROJ = "model.layers.0.self_attn.o_proj"
DEVICE = torch.device(os.environ.get("OPROJ_TEST_DEVICE", "cpu"))
"""Where the layers and their rows are; on `cuda` the collectives are NCCL's."""

_open = contextlib.ExitStack()


def moe_model_config() -> Any:
    """Return what the shim reads of a ModelConfig: that the ranks run in lock step."""
    return SimpleNamespace(is_moe=True, model="a mixture-of-experts model")


def configuration() -> Any:
    """Return vLLM's configuration without a model, which 0.9.1 and 0.9.2 refuse on a CPU."""
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.platforms import current_platform

    try:
        config = VllmConfig()
    except AttributeError:
        with mock.patch.object(type(current_platform), "check_and_update_config"):
            config = VllmConfig()
    config.parallel_config = ParallelConfig()
    config.additional_config = {}
    return config


def enter_device() -> str:
    """Prepare this rank for `DEVICE`; return the backend of its collectives.

    All ranks may share one GPU: NCCL takes them for nodes, which it connects by sockets.
    """
    if DEVICE.type == "cpu":
        return "gloo"
    os.environ |= {"NCCL_HOSTID": os.environ["RANK"], "NCCL_SOCKET_IFNAME": "lo"}
    os.environ["NCCL_IB_DISABLE"] = "1"
    torch.cuda.set_device(int(os.environ["RANK"]) % torch.cuda.device_count())
    return "nccl"


@contextlib.contextmanager
def world() -> Iterator[None]:
    """Enter torch.distributed and vLLM's world group of WORLD_SIZE ranks."""
    from vllm.distributed import parallel_state

    rank = int(os.environ["RANK"])
    # The CPU executor sets it; vLLM names its shared memory by it.
    os.environ.setdefault("VLLM_DIST_IDENT", os.environ["MASTER_PORT"])
    backend = enter_device()
    parallel_state.init_distributed_environment(
        world_size=int(os.environ["WORLD_SIZE"]),
        rank=rank,
        distributed_init_method="tcp://{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ),
        local_rank=rank,
        backend=backend,
    )
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment()


@functools.cache
def join_world() -> None:
    """Enter `world` once in this process; it is left when the process ends."""
    _open.enter_context(world())


@contextlib.contextmanager
def model_groups(
    dp: int, tp: int = 1, pp: int = 1, config: Any = None, pcp: int = 1, dcp: int = 1
) -> Iterator[Any]:
    """Create vLLM's parallel groups within `world`; yield its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    config = config or configuration()
    parallel = config.parallel_config
    parallel.data_parallel_size = dp
    parallel.tensor_parallel_size = tp
    parallel.pipeline_parallel_size = pp
    parallel.data_parallel_rank = int(os.environ["RANK"]) // (tp * pp * pcp) % dp
    context = (pcp, dcp) if pcp * dcp > 1 else ()  # not known up to 0.10
    if context:
        parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size = context
    with set_current_vllm_config(config):
        try:
            parallel_state.initialize_model_parallel(tp, pp, *context)
            yield config
        finally:
            parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def groups(dp: int, tp: int = 1, pp: int = 1) -> Iterator[Any]:
    """`world` and `model_groups` in one."""
    with world(), model_groups(dp, tp, pp) as config:
        yield config


@contextlib.contextmanager
def sharding(
    size: int, dp: int, tp: int = 1, dtype: torch.dtype = torch.float32, config: Any = None,
    **env: str,
) -> Iterator[Any]:  # fmt: skip
    """Switch the shim on with `env`, create the groups of a `launch.World`; yield vLLM's config.

    config: the configuration, if not one without a model.
    """
    import oproj_patch

    join_world()
    with mock.patch.dict(os.environ, env):
        oproj_patch.enable(size)
        torch.set_default_dtype(dtype)
        try:
            with model_groups(dp, tp, config=config) as given:
                yield given
            assert oproj_patch.status().otp_ranks == ()
        finally:
            torch.set_default_dtype(torch.float32)
            oproj_patch.disable()


@contextlib.contextmanager
def cut_up(buffer: int | None = None) -> Iterator[None]:
    """Cut steps into parts; buffer: bytes of a shared buffer."""
    from oproj_patch.sharding import exchange

    with mock.patch.object(exchange, "BUFFER_BYTES", buffer or exchange.BUFFER_BYTES):
        yield


@contextlib.contextmanager
def bytes_sent(ranks: int) -> Iterator[list[int]]:
    """Count, at the collectives, the bytes that this rank sends to the others; equal rows."""
    from oproj_patch.sharding import exchange

    sent: list[int] = []
    send = exchange._all_to_all

    def counted(output: Any, input_: torch.Tensor, *given: Any) -> Any:
        sent.append(input_.nbytes * (ranks - 1) // ranks)
        return send(output, input_, *given)

    with mock.patch.object(exchange, "_all_to_all", counted):
        yield sent


def kernels(call: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """Return the kernels of `call` but for collectives, by torch's profiler, sorted; and all that
    a device graph records of it, in order.

    What only describes memory is left out.
    """
    from torch.profiler import ProfilerActivity, profile

    from tests.graphs import emulator

    # What calls another kernel, is called by one (a sum fills its result), or describes memory.
    quiet = "view as_strided slice select transpose permute empty expand t unsqueeze narrow detach"
    quiet += " alias fill_ matmul resolve_conj resolve_neg _unsafe_view empty_strided new_empty"
    quiet += " to _to_copy empty_like unflatten reshape clone contiguous result_type"
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    with emulator.installed():
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    names = [event.name.removeprefix("aten::") for event in profiler.events()]
    ran = (n for n in names if n not in quiet.split() and not n.startswith(("c10d", "gloo")))
    return sorted(ran), graph.calls


@contextlib.contextmanager
def on_grid(inputs: int, outputs: int, **others: Any) -> Iterator[None]:
    """Let the layers that are built in it take another grid, in the same groups.

    others: further settings. Its layer groups have no process groups, which few quantization
    methods use.
    """
    from oproj_patch.sharding import otp_group
    from oproj_patch.sharding.topology import Grid

    group, grid = otp_group.require("the test"), Grid(inputs, outputs)
    place = group.tp_rank * inputs + group.rank // outputs
    own = otp_group.LayerTPGroup(place, range(group.tp_size * inputs), None, None)
    settings = replace(group.settings, grid=str(grid), **others)
    with (
        mock.patch.object(group, "layer_tp", {**group.layer_tp, grid: own}),
        mock.patch.object(group, "settings", settings),
    ):
        yield


def whole(out_features: int, in_features: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a full weight [out, in], the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float32)
    return (weight / in_features**0.5).to(DEVICE, dtype)


def build(prefix: str, hidden: int, columns: int, **options: Any) -> Any:
    """Return vLLM's RowParallelLinear, [hidden, columns] before it is cut."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    with DEVICE:
        return RowParallelLinear(columns, hidden, prefix=prefix, **options)


def load(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Load the whole weight [hidden, columns] and bias [hidden] as a checkpoint's."""
    layer.weight.weight_loader(layer.weight, weight)
    if bias is not None:
        layer.bias.weight_loader(layer.bias, bias)


def finish(layer: Any) -> None:
    """Process the layer after loading, as vLLM's loader does."""
    layer.quant_method.process_weights_after_loading(layer)


def made(
    hidden: int, columns: int, bias: bool = False, prefix: str = O_PROJ, **options: Any
) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """Return a loaded layer that is not processed yet, its whole weight, its bias."""
    kind = torch.get_default_dtype()
    layer = build(prefix, hidden, columns, bias=bias, **options)
    weight = whole(hidden, columns, kind)
    offset = whole(1, hidden, kind, seed=1)[0] if bias else None
    load(layer, weight, offset)
    return layer, weight, offset


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the unsharded result in float64."""
    expected = x.double() @ weight.double().t()
    return expected if bias is None else expected + bias.double()


def place(shard: torch.Tensor, weight: torch.Tensor) -> list[int]:
    """Return the first columns at which `shard` is found, bit for bit, in `weight`."""
    width = shard.shape[1]
    return [
        start
        for start in range(0, weight.shape[1], width)
        if torch.equal(shard, weight[:, start : start + width])
    ]


@contextlib.contextmanager
def forward_context(config: Any, counts: list[int], announced: bool) -> Iterator[None]:
    """Enter one forward pass; announced: vLLM tells the ranks each other's row counts."""
    from vllm.forward_context import set_forward_context

    if not announced:
        yield
        return
    rank = config.parallel_config.data_parallel_rank
    with set_forward_context(
        None,
        config,
        num_tokens=counts[rank],
        num_tokens_across_dp=torch.tensor(counts, dtype=torch.int32),
    ):
        yield
