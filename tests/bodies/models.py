"""In a rank: real vLLM model classes with tiny configurations."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch


def engine_config(model: dict[str, Any], **options: Any) -> Any:
    """vLLM's configuration for a model of which only `config.json` exists."""
    from vllm.engine.arg_utils import EngineArgs

    path = Path(tempfile.mkdtemp(prefix="oproj_patch_model_"))
    (path / "config.json").write_text(json.dumps(model))
    config = EngineArgs(
        model=str(path), skip_tokenizer_init=True, load_format="dummy", dtype="float32",
        enforce_eager=True, max_model_len=128, max_num_batched_tokens=128, max_num_seqs=8,
        disable_log_stats=True, **options,
    ).create_engine_config()  # fmt: skip
    config.additional_config = {}
    return config


def create(config: Any) -> Any:
    """The model, built by vLLM's own loader and not loaded yet."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(torch.float32):
        loader = get_model_loader(config.load_config)
        return loader.create_model(vllm_config=config, model_config=config.model_config)
