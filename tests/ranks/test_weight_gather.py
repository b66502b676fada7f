"""The weight gather on real ranks: when it is chosen, and that results stay right."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.ranks.launch import World
from tests.ranks.layers import finish, load, made, reference, sharding, whole

pytestmark = pytest.mark.quick
STEPS = [[8, 8], [7, 7], [9, 8], [40, 40], [1, 40], [0, 8], [8, 11], [300, 300], [3, 3], [8, 10]]
"""Rows that cross a threshold of 8 between consecutive steps, and unequal ones."""
GATHERED = [1, 0, 1, 1, 0, 0, 0, 1, 0, 1]
FOUR = [[16] * 4, [16, 17, 18, 20], [16, 17, 18, 21], [16, 16, 16, 0], [15] * 4]
LARGE = [[8, 8], [300, 300]]
BIAS = {"bias": True}


@dataclass(frozen=True)
class Case:
    """What OPROJ_WEIGHT_GATHER_ROWS says, rows by step and rank, and what comes of it.

    gathered: by step, 1 where the weight is gathered; least: rows from which on it is, None where
    the layer does not matter; buffer: whether one is kept; summary: in the log's line of the
    group; packed: let vLLM pack the weight for its CPU kernels, so that it
    cannot be read; transposed: keep the weight as [input, output], as many quant methods do;
    wrapped: keep it in a subclass of tensors, as torchao does;
    elsewhere: a quant method that reads another tensor than the layer's parameter; reload: load
    other weights before every step.
    """

    says: str = "8"
    rows: list[list[int]] = field(default_factory=lambda: STEPS)
    gathered: list[int] = field(default_factory=lambda: GATHERED)
    least: int | None = 8
    buffer: bool = True
    summary: str = ""
    dp: int = 2
    tp: int = 1
    dtype: str = "float32"
    packed: bool = False
    transposed: bool = False
    elsewhere: bool = False
    wrapped: bool = False
    reload: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    # On both sides of the threshold.
    "plain": Case(),
    "bias": Case(options=BIAS),
    "bfloat16": Case(dtype="bfloat16", options=BIAS),
    "transposed": Case(transposed=True),
    "reload": Case(reload=True, options=BIAS),
    # From where it moves fewer bytes: K*H / (K + N*H) = 48*20 / (48 + 2*20) = 10.9
    "default": Case(
        "", [[10, 10], [11, 11]], [0, 1], 11,
        summary="; weights gathered from 11 rows a rank on, through a buffer of",
    ),
    "zero is never": Case("0", LARGE, [0, 0], None, buffer=False),
    "packed by the host": Case(
        "8", LARGE, [0, 0], None, buffer=False, packed=True,
        summary="; weights not gathered: the host has packed the weights",
    ),
    "a subclass of tensors": Case(
        "", LARGE, [0, 0], 0, buffer=False, wrapped=True
    ),
    "a subclass of tensors, a number": Case(
        "8", LARGE, [0, 0], 0, buffer=False, wrapped=True,
        summary="; weights not gathered: weight is a Wrapped, which cannot be read plainly",
    ),
    "a quant method that reads something else": Case("8", LARGE, [0, 0], 0, elsewhere=True),
    "four ranks": Case("16", FOUR, [1, 1, 0, 0, 0], 16, dp=4, options=BIAS),
    "tp": Case(tp=2, options=BIAS),
    "tp, whole input": Case(tp=2, options={"input_is_parallel": False}),
}  # fmt: skip


class Wrapped(torch.Tensor):  # type: ignore[misc]
    """A tensor around another one, which has no plain bytes and cannot be detached in a pass."""

    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.plain = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            if torch.is_inference_mode_enabled():
                raise RuntimeError("Cannot set version_counter for inference tensor")
            return cls(args[0].plain)
        return func(*(getattr(arg, "plain", arg) for arg in args), **(kwargs or {}))


@pytest.mark.parametrize(
    ("world", "case"),
    [pytest.param(case.dp * case.tp, case, id=name) for name, case in CASES.items()],
    indirect=["world"],
)
def test_gather(world: World, case: Case) -> None:
    world.run(gathers, case)


def gathers(case: Case) -> None:
    """In a rank: every step's result is right, and the weight is gathered where it should be."""
    import oproj_patch
    from oproj_patch.sharding import layer as sharded
    from oproj_patch.sharding import otp_group, weight_gather

    columns, hidden, kind = 48, 20, getattr(torch, case.dtype)
    limit = {"float32": 5e-6, "bfloat16": 1e-2}[case.dtype]
    with sharding(case.dp, case.dp, case.tp, kind, OPROJ_WEIGHT_GATHER_ROWS=case.says) as config:
        from vllm.distributed import get_tensor_model_parallel_rank

        dp_rank = config.parallel_config.data_parallel_rank
        layer, weight, offset = made(hidden, columns, **case.options)
        # vLLM's own switch for layers that its CPU kernels do not pack.
        layer._cpu_skip_gemm_dispatch = not case.packed
        finish(layer)
        group = otp_group.require("the test")
        if case.transposed:
            layer.weight.data = layer.weight.data.t().contiguous().t()
        if case.wrapped:
            layer.weight = torch.nn.Parameter(Wrapped(layer.weight.data), requires_grad=False)
        if case.elsewhere:
            other = layer.weight.detach().clone()
            layer.quant_method.apply = types.MethodType(
                lambda _, layer, x, bias=None: torch.nn.functional.linear(x, other, bias),
                layer.quant_method,
            )
        gathered = []
        for step, counts in enumerate(case.rows):
            if case.reload:
                weight = whole(hidden, columns, kind, seed=10 + step)
                offset = whole(1, hidden, kind, seed=11 + step)[0]
                load(layer, weight, offset)
                finish(layer)
            x = whole(counts[dp_rank], columns, kind, seed=1000 * step + dp_rank)
            mine = x
            if layer.input_is_parallel:
                mine = x.chunk(case.tp, dim=-1)[get_tensor_model_parallel_rank()].contiguous()
            before = group.gathers
            with torch.inference_mode():
                output = layer(mine)[0]
            expected = reference(x, weight, offset)
            assert output.dtype == kind and output.shape == expected.shape
            if x.numel():
                worst = float((output.double() - expected).abs().max())
                assert worst <= limit * float(expected.abs().max()), (step, worst)
            gathered.append(group.gathers - before)
        assert gathered == case.gathered
        assert oproj_patch.status().exchanges == len(case.rows)
        if case.least is not None:
            assert layer.oproj.plan.gather_from == case.least
        summary = sharded.summary(group)
        assert case.summary in summary
        assert ("gather" in summary) == (case.says != "0" and (case.says != "" or not case.wrapped))
        kept = group.buffers["weight"].numel() if "weight" in group.buffers else 0
        if not case.buffer:
            assert kept == 0
        elif case.least == 11:
            bytes_ = columns * hidden * 4
            assert bytes_ <= kept < bytes_ + 2 * weight_gather.ALIGNMENT
