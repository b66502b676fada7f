"""A worker extension that also counts how the drafts of a worker fared. Test support only.

Loaded in worker processes as `worker_extension_cls="drafting.DraftingProbe"`.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from vllm import envs
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from demo.probe import WorkerProbe

_counts: Counter[str] = Counter()
_parse_output = RejectionSampler.parse_output
_input_fits_in_drafter = GPUModelRunner._input_fits_in_drafter


class DraftingProbe(WorkerProbe):
    """The probe; it reports besides: drafts accepted, rejected, and steps too long to draft."""

    def oproj_counts(self) -> dict[str, Any]:
        return {"drafts": dict(_counts)}


@functools.wraps(_parse_output)
def _counting(*args: Any, **kwargs: Any) -> Any:
    tokens, logprobs = _parse_output(*args, **kwargs)
    _counts.update("accepted" if len(of_request) > 1 else "rejected" for of_request in tokens)
    return tokens, logprobs


@functools.wraps(_input_fits_in_drafter)
def _noting(*args: Any, **kwargs: Any) -> bool:
    fits = bool(_input_fits_in_drafter(*args, **kwargs))
    _counts["too long"] += not fits
    return fits


def _count_on_second_runner() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner

    sample = SecondRunner.sample

    @functools.wraps(sample)
    def counting(*args: Any, **kwargs: Any) -> Any:
        output, sampled, rejected = sample(*args, **kwargs)
        _counts.update(accepted=int((sampled > 1).sum()), rejected=int((rejected > 0).sum()))
        return output, sampled, rejected

    SecondRunner.sample = counting


RejectionSampler.parse_output = staticmethod(_counting)
GPUModelRunner._input_fits_in_drafter = _noting
if envs.VLLM_USE_V2_MODEL_RUNNER:
    _count_on_second_runner()
