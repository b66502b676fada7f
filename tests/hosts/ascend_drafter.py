"""In a rank on vllm-ascend: what its own proposer of an MTP model needs on a CPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch

from tests.ranks.layers import whole

from .ascend import checkpoint


def draft_checkpoint(hf: Any) -> list[tuple[str, torch.Tensor]]:
    """`checkpoint` of the one layer of an MTP model."""
    place, hidden = hf.num_hidden_layers, hf.hidden_size
    own = f"model.layers.{place}"
    tensors = [
        (name.replace("model.layers.0", own), tensor)
        for name, tensor in checkpoint(hf)
        if name.startswith("model.layers.0.")
    ]
    return [
        *tensors,
        (f"{own}.embed_tokens.weight", whole(hf.vocab_size, hidden, torch.float32, seed=90)),
        (f"{own}.shared_head.head.weight", whole(hf.vocab_size, hidden, torch.float32, seed=91)),
        (f"{own}.shared_head.norm.weight", torch.ones(hidden)),
        (f"{own}.eh_proj.weight", whole(hidden, 2 * hidden, torch.float32, seed=92)),
        (f"{own}.enorm.weight", torch.ones(hidden)),
        (f"{own}.hnorm.weight", torch.ones(hidden)),
    ]


def proposer_of(config: Any, model: Any) -> Any:
    """vllm-ascend's proposer with what its passes read; its constructor allocates on the NPU."""
    from vllm.config import CUDAGraphMode
    from vllm_ascend.spec_decode.eagle_proposer import AscendEagleProposer

    dp = config.parallel_config.data_parallel_size

    def synchronised(rows: int, **_: Any) -> Any:
        return rows, torch.full((dp,), rows, dtype=torch.int32), CUDAGraphMode.NONE

    proposer = AscendEagleProposer.__new__(AscendEagleProposer)
    given: dict[str, Any] = {
        "model": model,
        "method": "mtp",
        "vllm_config": config,
        "draft_model_config": config.speculative_config.draft_model_config,
        "num_speculative_tokens": config.speculative_config.num_speculative_tokens,
        "runner": SimpleNamespace(
            _sync_metadata_across_dp=synchronised,
            attn_groups=[],
            max_num_reqs=4,
            synchronize_input_prep=contextlib.nullcontext,
            input_batch=SimpleNamespace(sampling_metadata=None),
            dynamic_eplb=False,
        ),
        "device": torch.device("cpu"),
        "input_ids": torch.zeros(16, dtype=torch.int64),
        "positions": torch.zeros(16, dtype=torch.int64),
        "hidden_states": torch.zeros(16, 64),
        "arange": torch.arange(16),
        "token_indices_to_sample": torch.zeros(16, dtype=torch.int64),
        "pass_hidden_states_to_model": True,
        "extra_slots_per_request": 1,
        "pcp_size": 1,
        "dcp_size": 1,
        "uses_xdrope_dim": 0,
        "_runnable": proposer._run_merged_draft,
    }
    names = ("use_cuda_graph", "uses_mrope", "supports_mm_inputs", "parallel_drafting",
             "is_multimodal_model", "enable_shared_expert_dp", "_share_mtp_indices",
             "_enable_probabilistic_draft_probs", "dynamic_spec", "use_compress")  # fmt: skip
    vars(proposer).update(given, **dict.fromkeys(names, False))
    return proposer
