"""Import it before vLLM: Triton's interpreter becomes a CPU backend of Triton."""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter

from tests.graphs import triton_cpu


def _constexprs(kernel: Any) -> list[int]:
    """Return the places of a kernel's constants, which vLLM asks a compiled kernel for."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return [i for i, given in enumerate(parameters) if "constexpr" in str(given.annotation)]


interpreter.InterpretedFunction.constexprs = property(_constexprs)
triton_cpu.offer()
