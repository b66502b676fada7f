"""The sum of the partial results of a layer's ranks."""

from __future__ import annotations

import pytest
import torch

from oproj_patch.sharding import exchange


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 20), (300, 7168)], ids=str)
def test_sum_is_that_of_float64_rounded_once(ranks: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(ranks)
    parts = [torch.randn(shape, generator=generator).bfloat16() for _ in range(ranks)]
    total = exchange.sum_of(parts)
    assert total.dtype == torch.bfloat16 and total.shape == shape
    exact = torch.stack([part.double() for part in parts]).sum(0)
    # Half a unit in the last of 8 bits, and float32's own rounding.
    assert bool(((total.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all())


def test_small_terms_are_not_lost_between_large_ones() -> None:
    parts = [torch.full((1, 4), value).bfloat16() for value in (256.0, 1.0, 1.0, -256.0)]
    assert exchange.sum_of(parts).tolist() == [[2.0] * 4]
