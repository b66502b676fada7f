"""DeepSeek V4 on vLLM's CPU attention: wo_b alone, and wo_a with it as one step.

Kernels that vLLM builds for AVX-512 only have stand-ins where they are missing.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ranks import v4
from tests.ranks.launch import World
from tests.ranks.layers import join_world, model_groups, whole
from tests.ranks.models import create, engine_config, write

# By step and rank; negative: an idle rank's rows, for which there is no metadata.
ROWS = [[3, 5], [40, 2], [4, -1], [-2, 3], [-1, -1], [0, 6], [0, 0]]
HEADS, DIM, ROPE = 8, 512, 64


@pytest.mark.parametrize("shape", v4.SHAPES)
def test_both_are_one_step(world: World, shape: str, tmp_path: Path) -> None:
    hidden, groups = v4.SHAPES[shape]
    path = write(v4.config(hidden, groups), tmp_path)
    world.run(projected, path, "auto", [2, 1], True, seconds=120)


@pytest.mark.parametrize(
    ("grid", "ways", "fields"),
    [("1x2", [1, 2], {}), ("2x1", [2, 1], {"o_groups": 1, "num_attention_heads": 2})],
    ids=["the outputs are cut", "one group"],
)
def test_second_alone(
    world: World, grid: str, ways: list[int], fields: dict[str, Any], tmp_path: Path
) -> None:
    path = write(v4.config(256, HEADS, **fields), tmp_path)
    world.run(projected, path, grid, ways, False, seconds=120)


def test_a_first_layer_without_its_second_is_refused(world: World, tmp_path: Path) -> None:
    path = write(v4.config(256, HEADS), tmp_path)
    for told in world.run(first_alone, path):
        assert told.startswith("OPROJ007: DeepseekV4ForCausalLM is sharded in part: ")
        assert "attn.wo_a was sharded, but no row-parallel layer " in told and "attn.wo_b " in told


def first_alone(path: str) -> str:
    """In a rank: what is raised where vLLM gives its wo_b a name that is no o_proj's."""
    from vllm.models.deepseek_v4 import attention

    import oproj_patch

    second = attention.RowParallelLinear

    def renamed(*args: Any, prefix: str, **kwargs: Any) -> Any:
        return second(*args, prefix=prefix.replace("wo_b", "wo_c"), **kwargs)

    with (
        _groups(path) as config,
        mock.patch.object(attention, "RowParallelLinear", renamed),
        pytest.raises(oproj_patch.OprojError) as raised,
    ):
        create(config)
    return str(raised.value)


def projected(path: str, grid: str, ways: list[int], both: bool) -> None:
    """In a rank: build the model, load the two weights, compare each step with float64."""
    with _groups(path, OPROJ_GRID=grid) as config:
        _check(config, ways, both)


@contextlib.contextmanager
def _groups(path: str, **env: str) -> Iterator[Any]:
    """Switch the shim on and create the groups of a model's configuration; yield that."""
    import oproj_patch
    from tests.engines import v4_kernels

    importlib.import_module("vllm.v1.worker.cpu.shm")  # gives a CPU torch.cuda.Event
    join_world()
    v4_kernels.stand_in()
    with mock.patch.dict(os.environ, env):
        oproj_patch.enable(2)
        try:
            with model_groups(2, config=engine_config(path, "bfloat16")) as config:
                yield config
        finally:
            oproj_patch.disable()


def _check(config: Any, ways: list[int], both: bool) -> None:
    from oproj_patch.sharding.layer import ShardedMixin

    model, text = create(config), config.model_config.hf_config
    attention = model.model.layers[0].attn
    wo_a, wo_b = attention.wo_a, attention.wo_b
    rank, heads = config.parallel_config.data_parallel_rank, text.num_attention_heads
    groups, hidden = text.o_groups, text.hidden_size
    first = whole(groups * v4.RANK, heads * DIM // groups, torch.bfloat16, seed=1)
    second = whole(hidden, groups * v4.RANK, torch.bfloat16, seed=2)
    weights = {"wo_a": first, "wo_b": second}
    model.load_weights((f"layers.0.attn.{name}.weight", w) for name, w in weights.items())
    cut = second.chunk(ways[0], 1)[rank // ways[1]].chunk(ways[1], 0)[rank % ways[1]]
    assert torch.equal(wo_b.weight.data, cut) and isinstance(wo_b, ShardedMixin)
    assert isinstance(wo_a, ShardedMixin) == both
    assert torch.equal(wo_a.weight.data, first.chunk(2, 0)[rank] if both else first)
    kept = second.numel() + both * first.numel()
    assert (wo_b.oproj.kept, wo_b.oproj.saved) == (kept, kept)
    assert (wo_b.oproj.pair is not None, bool(wo_b.oproj.alone)) == (both, not both)
    for layer in (wo_a, wo_b):
        layer.quant_method.process_weights_after_loading(layer)
    attention.process_weights_after_loading(torch.bfloat16)
    for step, counts in enumerate(ROWS):
        _step(config, attention, counts, first, second, seed=10 * step + rank)
    # A step in parts, and the group's own count of steps.
    from oproj_patch.sharding import otp_group

    group = otp_group.require("the test")
    assert group.steps == len(ROWS) and list(group.layers) == ["model.layers.0.attn.wo_b"]
    wo_b.oproj.plan = wo_b.oproj.plan._replace(buffer_bytes=3 * wo_b.oproj.plan.row_bytes)
    _step(config, attention, [11, 7], first, second, seed=500 + rank)


def _step(
    config: Any, attention: Any, counts: list[int], first: Any, second: Any, seed: int
) -> None:
    """Run a step; rows that exist have the unsharded layers' results, an idle rank's are zero."""
    from vllm.forward_context import set_forward_context

    rank = config.parallel_config.data_parallel_rank
    rows, idle = abs(counts[rank]), counts[rank] < 0
    heads, groups = attention.n_heads, attention.n_groups
    o = whole(max(rows, 1), heads * DIM, torch.bfloat16, seed=seed)[:rows].view(rows, heads, DIM)
    o = torch.zeros_like(o) if idle else o * 20
    positions = (torch.arange(rows) * 7 + 13 * rank) % 500
    every = torch.tensor([abs(count) for count in counts], dtype=torch.int32)
    metadata = None if idle else {}
    with (
        torch.inference_mode(),
        set_forward_context(metadata, config, num_tokens=rows, num_tokens_across_dp=every),
    ):
        output = attention._o_proj(o, positions)
    assert output.shape == (rows, second.shape[0]) and output.dtype == torch.bfloat16
    if idle or not rows:
        assert not output.any()
        return
    x = _turned_back(o.double(), attention.rotary_emb.cos_sin_cache[positions].double())
    z = torch.einsum(
        "tgd,grd->tgr", x.view(rows, groups, -1), first.double().view(groups, v4.RANK, -1)
    )
    expected = z.flatten(1) @ second.double().t()
    error = float((output.double() - expected).abs().max() / expected.abs().max())
    assert error < 0.02, error


def _turned_back(o: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the last values of each head back: as complex numbers, by minus the angle."""
    cos, sin = table.chunk(2, -1)
    turned = torch.view_as_complex(o[..., -ROPE:].unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.complex(cos, -sin).unsqueeze(1)
    return torch.cat((o[..., :-ROPE], torch.view_as_real(turned).flatten(-2)), -1)
