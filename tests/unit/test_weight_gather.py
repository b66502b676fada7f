"""When gathering the weights moves fewer bytes than exchanging the activations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oproj_patch.settings import Settings
from oproj_patch.sharding import weight_gather
from oproj_patch.sharding.topology import Grid

torch = pytest.importorskip("torch")


def o_proj(columns: int, hidden: int, ranks: int, weight: Any) -> tuple[Any, Any]:
    """Return a layer of `ranks` ranks on torch's meta device, and its group."""
    layer = torch.nn.Linear(
        columns // ranks, hidden, bias=False, device="meta", dtype=torch.bfloat16
    )
    layer.weight.requires_grad = False
    layer.weight.data = layer.weight.data.to(weight)
    layer.__dict__.update(
        input_size_per_partition=columns // ranks,
        params_dtype=torch.bfloat16,
        oproj=SimpleNamespace(
            saved=columns // ranks * hidden * 2 * (ranks - 1),
            hidden=hidden,
            grid=Grid(ranks, 1),
            wire=None,
            pair=None,
        ),
    )
    return layer, SimpleNamespace(size=ranks, graph_rows=0, settings=Settings(size=ranks))


@pytest.mark.parametrize(("size", "rows"), [(2, 3823), (4, 2607), (8, 1593), (16, 896)])
def test_threshold_of_deepseek_r1(size: int, rows: int) -> None:
    assert abs(weight_gather.threshold(*o_proj(16384, 7168, size, torch.bfloat16)) - rows) <= 1
    # An int8 weight is half as much to gather; the activations stay 16 bits wide.
    assert abs(weight_gather.threshold(*o_proj(16384, 7168, size, torch.int8)) - rows / 2) <= 1


@given(st.integers(0, 5000), st.lists(st.integers(0, 5000), min_size=2, max_size=8))
def test_decision(least: int, counts: list[int]) -> None:
    chosen = weight_gather.wins(least, tuple(counts))
    assert chosen == (0 < least <= min(counts) and max(counts) <= 1.25 * min(counts))
    assert chosen == weight_gather.wins(least, tuple(sorted(counts)))


class Opaque(torch.Tensor):
    """A tensor whose bytes nobody may read, as torchao's are."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(func))


@pytest.mark.parametrize(
    "packed",
    [
        torch.Tensor._make_subclass(Opaque, torch.zeros(32, 32)),
        torch.zeros(32, 32).to_sparse(),
        torch.quantize_per_tensor(torch.ones(32, 32), 0.1, 0, torch.qint8),
    ],
    ids=["subclass", "sparse", "quantized"],
)
def test_a_weight_that_cannot_be_read_plainly_is_not_gathered(packed: Any) -> None:
    layer, group = o_proj(64, 32, 2, torch.bfloat16)
    layer.weight = None
    layer.packed = packed
    told = weight_gather.obstacle(layer, group)
    assert told == f"packed is a {type(packed).__name__}, which cannot be read plainly"
    assert weight_gather.threshold(layer, group) == 0


def test_at_0_nothing_is_inspected() -> None:
    group = SimpleNamespace(size=2, settings=Settings(size=2, weight_gather_rows=0))
    assert weight_gather.threshold(None, group) == 0


def test_a_private_device_format_with_a_stand_in_for_npu_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, group = o_proj(64, 32, 2, torch.bfloat16)
    assert weight_gather.obstacle(layer, group) == ""
    monkeypatch.setattr(weight_gather, "_npu_format", lambda _: 29)  # FRACTAL_NZ
    assert weight_gather.obstacle(layer, group) == "weight is in a private device format"
