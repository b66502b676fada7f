"""Random layouts, grids, rows and shapes: the sharded layer equals the unsharded one.

OPROJ_TEST_FUZZ_EXAMPLES is the number of examples in all (default 200); the processes are real
and live through all of them, so a rank that is left behind in one example fails the next.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.ranks import launch
from tests.ranks.launch import World
from tests.ranks.layers import O_PROJ, cut_up, finish, groups, made, reference, whole

# (data-parallel size, tensor-parallel size, group size, b of the grid): every size from 2 to 8.
LAYOUTS = [
    (2, 1, 2, 2),
    (4, 1, 4, 2),
    (6, 1, 6, 2),
    (6, 1, 6, 3),
    (8, 1, 8, 2),
    (8, 1, 8, 4),
    (8, 1, 8, 8),
    (8, 1, 4, 2),
    (4, 2, 4, 2),
    (4, 2, 4, 4),
    (2, 1, 2, 1),
    (3, 1, 3, 1),
    (4, 1, 4, 1),
    (5, 1, 5, 1),
    (6, 1, 6, 1),
    (7, 1, 7, 1),
    (8, 1, 8, 1),
    (4, 1, 2, 1),
    (6, 1, 3, 1),
    (8, 1, 4, 1),
    (2, 2, 2, 1),
    (4, 2, 4, 1),
    (4, 2, 2, 1),
    (2, 3, 2, 1),
    (2, 4, 2, 1),
]
SHORT = {(3, 1, 3, 1), (4, 2, 4, 2), (8, 1, 4, 1)}
EXAMPLES = int(os.environ.get("OPROJ_TEST_FUZZ_EXAMPLES", "200"))
SECONDS_TO_START = 180
SECONDS_AN_EXAMPLE = 60
# Of the largest output: rounding of the partial results before they are summed.
# No float16: oneDNN, which vLLM multiplies with, does not know it on most CPUs.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2}

ROWS = st.one_of(st.just(0), st.integers(1, 8), st.integers(0, 512))


@dataclass(frozen=True)
class Layout:
    """The data-parallel and tensor-parallel sizes, the group's, its grid, where the ranks meet."""

    dp: int
    tp: int
    size: int
    outputs: int
    port: int


def examples(dp: int, tp: int, size: int, outputs: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "rows": st.lists(
                st.one_of(
                    st.lists(ROWS, min_size=dp, max_size=dp),
                    ROWS.map(lambda count: [count] * dp),
                ),
                min_size=1,
                max_size=2,
            ),
            "columns": st.integers(1, 40).map(lambda width: width * tp * size),
            "hidden": st.integers(1, 96).map(lambda width: -(-width // outputs) * outputs),
            "dtype": st.sampled_from(sorted(TOLERANCE)),
            "bias": st.booleans(),
            # A grid is refused for a bias that the host adds.
            "skip_bias_add": st.booleans() if outputs == 1 else st.just(False),
            "told": st.booleans(),
            "parallel_input": st.booleans(),
            "buffer": st.sampled_from([500, 5000, 64 << 20]),
            "wire": st.sampled_from(["off", "off", "int8", "fp8"]),
        }
    )


@pytest.mark.parametrize("world", [8], indirect=True)
@pytest.mark.parametrize(
    ("dp", "tp", "size", "outputs"),
    [pytest.param(*layout, marks=[pytest.mark.long] * (layout not in SHORT)) for layout in LAYOUTS],
)
def test_equal_to_the_unsharded_layer(
    world: World, dp: int, tp: int, size: int, outputs: int
) -> None:
    layout = Layout(dp, tp, size, outputs, launch.free_port())
    world.run(join, layout, seconds=SECONDS_TO_START)
    ran = [0]

    @settings(
        max_examples=-(-EXAMPLES // len(LAYOUTS)),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples(dp, tp, size, outputs))
    def equal(example: dict[str, Any]) -> None:
        world.run(right, layout, example, seconds=SECONDS_AN_EXAMPLE)
        ran[0] += 1

    equal()
    print(f"{ran[0]} examples")


# -- in a rank --------------------------------------------------------------------------------

_joined: Layout | None = None
_groups = contextlib.ExitStack()
_config: Any = None


def join(layout: Layout) -> None:
    """Leave the layout before; join the next one, when it has room for this rank."""
    import oproj_patch

    global _joined, _groups, _config
    rank = int(os.environ["RANK"])
    _groups.close()
    oproj_patch.disable()
    _joined, _groups = layout, contextlib.ExitStack()
    if rank < layout.dp * layout.tp:
        os.environ["OPROJ_GRID"] = f"{layout.size // layout.outputs}x{layout.outputs}"
        oproj_patch.enable(layout.size)
        os.environ.update(
            WORLD_SIZE=str(layout.dp * layout.tp),
            MASTER_PORT=str(layout.port),
            VLLM_DIST_IDENT=f"fuzz{layout.port}",
        )
        _config = _groups.enter_context(groups(layout.dp, layout.tp))
        assert oproj_patch.status().size == layout.size


def right(layout: Layout, example: dict[str, Any]) -> None:
    """Check every step of a layer against the unsharded one, in units of the largest output."""
    if layout != _joined:  # these ranks are new: an example has failed
        join(layout)
    if int(os.environ["RANK"]) < layout.dp * layout.tp:
        torch.set_default_dtype(getattr(torch, example["dtype"]))
        with cut_up(example["buffer"]):
            _right(layout, example)


def _right(layout: Layout, example: dict[str, Any]) -> None:
    from vllm.distributed import get_tp_group
    from vllm.forward_context import set_forward_context

    import oproj_patch
    from oproj_patch.sharding import otp_group

    kind = torch.get_default_dtype()
    columns, hidden, told = example["columns"], example["hidden"], example["told"]
    narrow = example["wire"] != "off"
    columns *= 4 if narrow else 1  # float32 scales follow a chunk
    group = otp_group.require(O_PROJ)
    settings = replace(group.settings, wire=example["wire"])
    dp_rank = _config.parallel_config.data_parallel_rank
    tp = get_tp_group()
    with mock.patch.object(group, "settings", settings):
        layer, weight, offset = made(
            hidden,
            columns,
            bias=example["bias"],
            skip_bias_add=example["skip_bias_add"],
            input_is_parallel=example["parallel_input"],
        )
    assert (layer.oproj.wire is not None) == narrow
    inputs = layout.tp * layout.size // layout.outputs
    assert layer.weight.shape == (hidden // layout.outputs, columns // inputs)
    finish(layer)
    before = oproj_patch.status().exchanges
    for step, counts in enumerate(example["rows"]):
        mine = counts[dp_rank]
        x = whole(mine, columns, kind, seed=100 + 10 * step + dp_rank)
        parallel = example["parallel_input"]
        fed = x.chunk(tp.world_size, dim=-1)[tp.rank_in_group] if parallel else x
        across = torch.tensor(counts, dtype=torch.int32) if told else None
        with (
            set_forward_context(
                None,
                _config,
                num_tokens=mine if told else None,
                num_tokens_across_dp=across,
            ),
            torch.inference_mode(),
        ):
            output, extra = layer(fed.contiguous())
        skipped = example["skip_bias_add"]
        if offset is not None and skipped:
            assert torch.equal(extra.data, offset)
        expected = reference(x, weight, None if skipped else offset)
        assert output.dtype == kind and output.shape == (mine, hidden)
        if mine:
            # The usual size of an output, where a single one may be zero by accident.
            scale = max(columns**-0.5, float(expected.abs().max()))
            if offset is not None:
                scale = max(scale, float(offset.abs().max()))
            error = (output.double() - expected).abs()
            if narrow:
                error -= _rounding(x.double(), example["wire"]) @ weight.double().abs().t()
            worst = float(error.max()) / scale
            assert worst <= TOLERANCE[example["dtype"]], (step, worst, example)
    group.layers.clear()
    group.checked = group.main_layers = 0
    assert group.steps - before == len(example["rows"])


def _rounding(x: torch.Tensor, wire: str) -> torch.Tensor:
    """Return how far, at most, rows x [T, K] are from what arrives of them in 8 bits."""
    largest = x.abs().amax(-1, keepdim=True)
    # Half a step of int8; half of the last of fp8's 4 bits, or of its smallest step. And bfloat16.
    step = largest / 254 if wire == "int8" else x.abs() / 16 + largest / 448 / 1024
    return step * (1 + 1e-5) + x.abs() / 256
