"""In a rank on vllm-ascend: its MTP model under its own proposer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .ascend import checkpoint, configured, forward_context, metadata, unsharded
from .ascend_kernels import kernels_stood_in
from .world import whole


def proposed(
    model: str, dp: int, steps: int, plan: list[list[int]], **engine: Any
) -> dict[str, Any]:
    """The real MTP model under vllm-ascend's own proposer, `steps` drafted tokens a request.

    plan: rows by pass and rank, all of one request; 0 is an idle rank, whose proposer runs its
    own dummy pass. Returns exchanges by pass and whether the unsharded model drafts the same.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader

    import oproj_patch

    told = {"method": "mtp", "num_speculative_tokens": steps}
    config = configured(model, dp, speculative_config=told, **engine)
    with set_current_vllm_config(config):
        draft = config.speculative_config.draft_model_config
        built = base_loader.initialize_model(config, model_config=draft)
        built.load_weights(draft_checkpoint(draft.hf_config))
        block = built.model.layers[str(draft.hf_config.num_hidden_layers)].mtp_block
        attentions = [module for module in built.modules() if hasattr(module, "impl")]
        for module in attentions:
            kernels_stood_in(module)
        proposer = proposer_of(config, built)
        mine = config.parallel_config.data_parallel_rank

        def run(rows: int) -> Any:
            proposer.input_ids.copy_(torch.arange(16) % 8)
            proposer.positions.copy_(torch.arange(16))
            proposer.hidden_states.copy_(whole(16, 64, torch.float32, seed=5))
            with torch.inference_mode():
                if not rows:
                    return proposer.dummy_run(1)
                layers = {module.layer_name: metadata(rows) for module in attentions}
                with forward_context(config, rows, layers):
                    drafted: torch.Tensor = proposer._run_merged_draft(
                        num_input_tokens=rows,
                        batch_size=1,
                        token_indices_to_sample=torch.tensor([rows - 1]),
                        target_positions=None,
                        inputs_embeds=None,
                        multi_steps_attn_metadata=[layers] * steps,
                        num_tokens=rows,
                    )
            return [drafted.tolist(), proposer.hidden_states[0].clone()]

        result: dict[str, Any] = {"exchanges": [], "errors": [], "tokens": []}
        outputs = []
        for counts in plan:
            before = oproj_patch.status().exchanges
            outputs.append(run(counts[mine]))
            result["exchanges"].append(oproj_patch.status().exchanges - before)
        layer = block.self_attn.o_proj
        result["shape"] = list(layer.weight.shape)
        full = dict(draft_checkpoint(draft.hf_config))
        unsharded(layer, next(w for name, w in full.items() if name.endswith("o_proj.weight")))
        before = oproj_patch.status().exchanges
        for counts, output in zip(plan, outputs, strict=True):
            expected = run(counts[mine])
            if counts[mine]:
                result["tokens"].append([output[0], expected[0]])
                # What the last step was given: the hidden states of the one before.
                result["errors"].append(float((output[1] - expected[1]).abs().max()))
        result["unsharded exchanges"] = oproj_patch.status().exchanges - before
        return result


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
            _sync_metadata_across_dp=synchronised, attn_groups=[], max_num_reqs=4
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
             "is_multimodal_model", "enable_shared_expert_dp", "_share_mtp_indices")  # fmt: skip
    vars(proposer).update(given, **dict.fromkeys(names, False))
    return proposer
