"""What a test and its workers say of a weight. No vLLM."""

from __future__ import annotations

import hashlib

import torch

STRIDE = 3
"""Between the elements of a weight that a sparse patch replaces."""


def digest(weight: torch.Tensor) -> str:
    """Return a digest of a tensor, row by row."""
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
