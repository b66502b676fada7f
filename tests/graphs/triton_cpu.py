"""A vLLM platform plugin that offers Triton's interpreter as a CPU backend, and no platform.

vLLM's second model runner needs Triton. vLLM asks for platforms before it looks for Triton.
"""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import Any


def offer() -> None:
    """What vLLM calls when it looks for its platform; None: this is no platform."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        found: dict[str, Any] = importlib.import_module("triton.backends").backends
        driver = SimpleNamespace(is_active=lambda: True)
        found.setdefault("cpu", SimpleNamespace(compiler=None, driver=driver))
