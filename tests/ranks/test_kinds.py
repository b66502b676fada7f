"""Kinds of trouble that users of such plugins report, each by the kind and not by one instance."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ranks import layers
from tests.ranks.launch import World
from tests.ranks.layers import O_PROJ, build, finish, made, reference, sharding, whole

COLUMNS, HIDDEN = 48, 20
LIMIT = 5e-6
two_ranks = pytest.mark.parametrize("world", [2], indirect=True)


@pytest.mark.parametrize("kind", ["scale", "statistic", "padding", "memory"])
def test_rows_of_one_rank_never_change_another_ranks_result(world: World, kind: str) -> None:
    world.run(loud_peer, kind)


def test_rows_of_one_rank_never_change_another_ranks_result_in_8_bits(world: World) -> None:
    world.run(loud_peer, "scale", True)


def test_every_rank_refuses_a_method_that_remembers_rows_on_one_of_them(world: World) -> None:
    """The other rank would wait for it in the step."""
    told = world.run(forgetful_peer)
    assert told[0] == told[1] and " on rank 1: it remembers rows" in told[0]


def test_ranks_of_which_one_traces_the_step_are_refused(world: World) -> None:
    """A traced step takes equal rows for granted, another one agrees on them."""
    for told in world.run(one_traced):
        assert " traced] on rank 1 but [" in told and "traced] on rank 0" not in told


def one_traced() -> str:
    import oproj_patch

    with sharding(2, 2):
        layer, _, _ = made(HIDDEN, COLUMNS)
        layer.oproj.traceable = os.environ["RANK"] == "1"
        with pytest.raises(oproj_patch.OprojError) as raised, torch.inference_mode():
            layer(whole(3, COLUMNS, torch.float32))
    assert raised.value.code == "OPROJ012"
    return str(raised.value)


def forgetful_peer() -> str:
    """In a rank: what is raised where the method of rank 1 alone remembers rows."""
    import oproj_patch

    with sharding(2, 2):
        layer, _, _ = made(HIDDEN, COLUMNS)
        layer.shard = layer.weight.detach().clone()
        kind = "memory" if os.environ["RANK"] == "1" else "scale"
        layer.quant_method = Mixing(layer.quant_method, kind)
        with pytest.raises(oproj_patch.OprojError) as raised, torch.inference_mode():
            layer(whole(3, COLUMNS, torch.float32))
    assert raised.value.code == "OPROJ015"
    return str(raised.value)


class Mixing:
    """A quantization method in which rows change each other's results.

    By one dynamic scale; by the mean of all rows; by the first row, which fills up a tile; by the
    largest value of all steps so far.
    """

    def __init__(self, method: Any, kind: str) -> None:
        self.method, self.kind, self.largest = method, kind, torch.zeros(())

    def process_weights_after_loading(self, layer: Any) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Any, bias: Any = None) -> torch.Tensor:
        if isinstance(x, tuple):  # values of 8 bits and their scales
            x = x[0].float() * x[1]
        if x.numel() and self.kind == "statistic":
            x = x - x.mean(0)
        elif x.numel() and self.kind == "padding":
            x = x + x[:1] * 0.1
        elif x.numel():
            largest = x.abs().amax()
            self.largest = torch.maximum(self.largest, largest)
            scale = (self.largest if self.kind == "memory" else largest) / 7
            x = (x / scale).round() * scale
        return torch.nn.functional.linear(x, layer.shard, bias)


def loud_peer(kind: str, narrow: bool = False) -> None:
    """In a rank: rank 1's rows are quiet, loud, NaN, none; rank 0's results stay bit-identical.

    narrow: rows travel in 8 bits, and the method takes values and scales in their place.
    """
    import oproj_patch
    from oproj_patch.sharding import wire

    rank = int(os.environ["RANK"])
    with sharding(2, 2) as config:
        layer, _, _ = made(HIDDEN, COLUMNS)
        layer.shard = layer.weight.detach().clone()
        layer.quant_method = Mixing(layer.quant_method, kind)
        if narrow:
            own = wire.scaled(torch.int8, COLUMNS // 2, COLUMNS // 2, torch.float32)
            layer.oproj.wire = replace(own, restore=lambda *taken: taken)
        told = []
        for factor, theirs in ((1.0, 3), (1000.0, 3), (float("nan"), 3), (1.0, 0)):
            x = whole(theirs if rank else 3, COLUMNS, torch.float32, seed=rank)
            x = x * (factor if rank else 1.0)
            counts = layers.forward_context(config, [3, theirs], announced=True)
            with counts, torch.inference_mode():
                if kind == "memory":
                    with pytest.raises(oproj_patch.OprojError) as raised:
                        layer(x)
                    assert "OPROJ015: " in str(raised.value) and "Mixing of" in str(raised.value)
                    return
                told.append(layer(x)[0])
        assert layer.oproj.mixes_rows
        if rank == 0:
            assert all(torch.equal(told[0], other) for other in told[1:])
            assert bool(told[0].isfinite().all())


@pytest.mark.parametrize(
    "lists", [[[0], [1], [2], [3]], [[0, 2], [1, 3]], [[0, 1, 2, 3]], [[0, 1], [2, 3]]], ids=str
)
@pytest.mark.parametrize("world", [4], indirect=True)
def test_a_layer_follows_the_groups_where_it_is_built(world: World, lists: list[Any]) -> None:
    world.run(nested, lists)


def nested(lists: list[list[int]]) -> None:
    """In a rank: between two layers, one in a tensor-parallel group of its own, as a drafter's."""
    from vllm.distributed import parallel_state

    rank = int(os.environ["RANK"])
    with sharding(2, 2, 2):
        before = parallel_state._TP
        own = parallel_state.init_model_parallel_group(lists, rank, "gloo", group_name="tp")
        try:
            for index, (group, same) in enumerate(
                [(before, True), (own, lists == [[0, 1], [2, 3]]), (before, True)]
            ):
                parallel_state._TP = group
                ways = len(group.ranks)
                layer, weight, _ = made(HIDDEN, 64, prefix=f"a.{index}.self_attn.o_proj")
                layer._cpu_skip_gemm_dispatch = True  # the packed kernel checks no shapes
                finish(layer)
                assert hasattr(layer, "oproj") == same
                assert layer.weight.shape == (HIDDEN, 64 // ways // (2 if same else 1))
                x = whole(3, 64, torch.float32, seed=group.ranks[0])  # of all ranks of the group
                mine = x.chunk(ways, -1)[group.rank_in_group].contiguous()
                output = layer(mine)[0].double()
                assert float((output - reference(x, weight, None)).abs().max()) <= LIMIT
        finally:
            parallel_state._TP = before
            own.destroy()


@two_ranks
def test_what_is_patched_on_a_class_after_the_build_is_heard(world: World) -> None:
    world.run(patched_later)


def patched_later() -> None:
    """In a rank: o_proj and down_proj call what others have put in place meanwhile, as often."""
    from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

    heard: list[tuple[str, Any]] = []

    def listening(owner: Any, name: str) -> Any:
        before = vars(owner)[name]

        def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
            layer = self if isinstance(self, RowParallelLinear) else args[0]
            heard.append((name, layer))
            return before(self, *args, **kwargs)

        return mock.patch.object(owner, name, theirs)

    with sharding(2, 2), contextlib.ExitStack() as stack:
        weight = whole(HIDDEN, COLUMNS, torch.float32)
        built = [build(name, HIDDEN, COLUMNS, bias=False) for name in ("a.mlp.down_proj", O_PROJ)]
        for owner, name in (
            (UnquantizedLinearMethod, "process_weights_after_loading"),
            (UnquantizedLinearMethod, "apply"), (RowParallelLinear, "weight_loader_v2"),
        ):  # fmt: skip
            stack.enter_context(listening(owner, name))
        for layer in built:
            layer.weight_loader_v2(layer.weight, weight)
            finish(layer)
            layer(whole(3, COLUMNS, torch.float32))
            names = [name for name, of in heard if of is layer]
            assert names == ["weight_loader_v2", "process_weights_after_loading", "apply"], heard


@two_ranks
def test_another_plugins_method_of_one_quantization_method_is_kept(world: World) -> None:
    world.run(on_the_instance)


def on_the_instance() -> None:
    """In a rank: what another plugin put on the instance runs, and sees the layer's own group."""
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    seen: list[int] = []

    class Config(QuantizationConfig):  # type: ignore[misc]
        get_name = get_supported_act_dtypes = get_min_capability = None
        get_config_filenames = from_config = None

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            method = UnquantizedLinearMethod()
            process = method.process_weights_after_loading

            def theirs(layer: Any) -> None:
                seen.append(get_tensor_model_parallel_world_size())
                process(layer)

            method.process_weights_after_loading = theirs
            return method

    with sharding(2, 2):
        layer, _, _ = made(HIDDEN, COLUMNS, quant_config=Config())
        finish(layer)
        assert seen == [2]


@two_ranks
@pytest.mark.parametrize("name", ["weight", "packed", "handle"])
def test_bytes_are_those_of_the_weight_as_it_is_served(world: World, name: str) -> None:
    world.run(smaller, name)


def smaller(name: str) -> None:
    """In a rank: a quant method makes 8 bits of a weight while it loads, under its own name.

    Or it hands the weight to a kernel: then the bytes are those that were loaded.
    """
    import oproj_patch

    class Online:
        def __init__(self, method: Any) -> None:
            self.method = method

        def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            held = getattr(layer, name)
            return torch.nn.functional.linear(x, held.to(x.dtype) / 64, bias)

    with sharding(2, 2, OPROJ_WEIGHT_GATHER_ROWS="0"):
        layer, _, _ = made(HIDDEN, COLUMNS)
        layer.quant_method = Online(layer.quant_method)
        held = (layer.weight.data * 64).round().to(torch.int8)
        size = HIDDEN * COLUMNS // 2
        if name == "handle":  # as vLLM's int8 kernel for CPUs does
            layer.weight, layer.handle, size = None, held, 4 * size
        else:
            del layer.weight
            setattr(layer, name, torch.nn.Parameter(held, requires_grad=False))
        layer(whole(3, COLUMNS, torch.float32))
        status = oproj_patch.status()
        assert (status.bytes_kept, status.bytes_saved) == (size, size)


SCHEMES = {
    "nvfp4": ("compressed_tensors_w4a4_nvfp4", "CompressedTensorsW4A4Fp4", "nvfp4_linear", 16),
    "mxfp4": ("compressed_tensors_w4a4_mxfp4", "CompressedTensorsW4A4Mxfp4", "mxfp4_linear", 32),
    "mxfp8": ("compressed_tensors_w8a8_mxfp8", "CompressedTensorsW8A8Mxfp8", "mxfp8_linear", 32),
}


@two_ranks
@pytest.mark.parametrize("hidden", [False, True], ids=["known scheme", "hidden scheme"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_no_block_of_scales_is_cut(world: World, kind: str, hidden: bool) -> None:
    world.run(blocks_cut, kind, hidden)


def blocks_cut(kind: str, hidden: bool) -> None:
    """In a rank: three blocks for two ranks are refused where the layer is built.

    vLLM's own schemes; of the kernels, which a CPU has not, only their choice is stood in for.
    hidden: the layer does not tell its scheme, so only the shape of the scales shows the blocks.
    """
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.layers.quantization import compressed_tensors

    import oproj_patch

    module, name, kernel, block = SCHEMES[kind]
    schemes = importlib.import_module(f"{compressed_tensors.__name__}.schemes.{module}")
    choice = mock.patch.object(schemes, f"init_{kernel}_kernel", mock.MagicMock())
    with choice:
        scheme = getattr(schemes, name)()

    class Method(LinearMethodBase):  # type: ignore[misc]
        def create_weights(self, layer: Any, **given: Any) -> None:
            names = inspect.signature(scheme.create_weights).parameters
            given["layer"] = layer
            scheme.create_weights(**{k: v for k, v in given.items() if k in names})

        def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            raise NotImplementedError

    class Config:
        def __getattr__(self, name: str) -> Any:
            return None  # nothing else that is asked for matters here

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            if not hidden:
                layer.scheme = scheme
            return Method()

    Method.__name__ = "CompressedTensorsLinearMethod"  # vLLM chooses the weight loader by it
    with sharding(2, 2), choice:
        for blocks in (2, 3):
            given = {"quant_config": Config(), "params_dtype": torch.bfloat16, "bias": False}
            if blocks == 2:
                build(f"a.{O_PROJ}", 64, blocks * block, **given)
                continue
            with pytest.raises(oproj_patch.OprojError) as raised:
                build(O_PROJ, 64, blocks * block, **given)
    told = f"leaves {3 * block // 2} input columns of {O_PROJ} on a rank (grid 2x1)"
    assert raised.value.code == "OPROJ006" and told in str(raised.value)
