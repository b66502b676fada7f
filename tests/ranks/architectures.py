"""In a rank: architectures of vLLM on the meta device, cut to a few layers."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from tests.ranks.launch import SIZE
from tests.ranks.layers import join_world, model_groups
from tests.ranks.models import Config, engine_config, write


class _Drafting(SimpleNamespace):
    """A SpeculativeConfig in which everything else is unset."""

    def __getattr__(self, name: str) -> None:
        return None


def construct(architecture: str, config: Config) -> dict[str, int]:
    """Return each softmax attention with a KV cache, and how many sharded o_proj it has.

    config: what differs from the defaults of transformers' configuration class.
    """
    from vllm.model_executor.model_loader import base_loader
    from vllm.plugins import load_general_plugins
    from vllm.utils.torch_utils import set_default_torch_dtype

    from oproj_patch.sharding import otp_group

    importlib.import_module("vllm.v1.worker.cpu.shm")  # gives a CPU torch.cuda.Event
    join_world()
    with mock.patch.dict(os.environ, {SIZE: "2"}), tempfile.TemporaryDirectory() as directory:
        load_general_plugins()
        made = engine_config(write(config, Path(directory)), "bfloat16")
        made.model_config.hf_config.architectures = [architecture]
        if re.search("MTP|Eagle|DFlash|DSpark", architecture):  # it reads its configuration there
            made.speculative_config = _Drafting(
                draft_model_config=made.model_config, num_speculative_tokens=1, method="mtp"
            )
        with (
            model_groups(2, config=made),
            set_default_torch_dtype(torch.bfloat16),
            torch.device("meta"),
        ):
            base_loader.initialize_model(vllm_config=made)
            owners = [name.rpartition(".")[0] for name in otp_group.require("it").layers]
            return {
                prefix: sum(f"{prefix}.".startswith(f"{owner}.") for owner in owners)
                for prefix, layer in made.compilation_config.static_forward_context.items()
                if (hasattr(layer, "impl") or hasattr(layer, "forward_mqa"))  # DeepSeek V4 has none
                and hasattr(layer, "kv_cache")
            }
