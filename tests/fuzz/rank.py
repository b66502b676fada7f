"""A long-lived rank: takes layouts and examples as JSON lines, answers each with one line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import Any

import torch

PREFIX = "model.layers.0.self_attn.o_proj"


class Rank:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.member = False
        self.groups = contextlib.ExitStack()
        self.config: Any = None

    def layout(self, dp: int, tp: int, size: int, port: int) -> None:
        """Leave the layout before; join the next one, when it has room for this rank."""
        import oproj_patch
        from tests.bodies.world import groups

        self.groups.close()
        self.member = self.rank < dp * tp
        oproj_patch.disable()
        if self.member:
            oproj_patch.enable(size)
            os.environ.update(
                RANK=str(self.rank),
                WORLD_SIZE=str(dp * tp),
                MASTER_PORT=str(port),
                VLLM_DIST_IDENT=f"fuzz{port}",
            )
            self.groups = contextlib.ExitStack()
            self.config = self.groups.enter_context(groups(dp, tp))
            assert oproj_patch.status().size == size

    def example(
        self,
        rows: list[list[int]],
        columns: int,
        hidden: int,
        dtype: str,
        bias: bool,
        skip_bias_add: bool,
        told: bool,
        parallel_input: bool,
        buffer: int,
    ) -> dict[str, Any] | None:
        """Largest error of the sharded layer, in units of the largest output, by step with rows.

        rows[step][data-parallel rank]; told: vLLM announces the row counts; buffer: bytes of a
        buffer, above which a step is cut into parts.
        """
        if not self.member:
            return None
        from vllm.distributed import get_tp_group
        from vllm.forward_context import set_forward_context

        import oproj_patch
        from oproj_patch import exchange, otp_group
        from tests.bodies.layer import build, load
        from tests.bodies.world import whole

        exchange.BUFFER_BYTES = buffer
        kind = getattr(torch, dtype)
        torch.set_default_dtype(kind)
        dp_rank = self.config.parallel_config.data_parallel_rank
        tp = get_tp_group()
        layer = build(
            PREFIX,
            hidden,
            columns,
            bias=bias,
            skip_bias_add=skip_bias_add,
            input_is_parallel=parallel_input,
        )
        weight = whole(hidden, columns, kind)
        offset = whole(1, hidden, kind, seed=1)[0] if bias else None
        load(layer, weight, offset)
        shard = list(layer.weight.shape)
        layer.quant_method.process_weights_after_loading(layer)
        before = oproj_patch.status().exchanges
        errors = []
        for step, counts in enumerate(rows):
            mine = counts[dp_rank]
            x = whole(mine, columns, kind, seed=100 + 10 * step + dp_rank)
            fed = x.chunk(tp.world_size, dim=-1)[tp.rank_in_group] if parallel_input else x
            across = torch.tensor(counts, dtype=torch.int32) if told else None
            with (
                set_forward_context(
                    None,
                    self.config,
                    num_tokens=mine if told else None,
                    num_tokens_across_dp=across,
                ),
                torch.inference_mode(),
            ):
                output, extra = layer(fed.contiguous())
            expected = x.double() @ weight.double().t()
            if offset is not None and skip_bias_add:
                assert torch.equal(extra.data, offset)
            elif offset is not None:
                expected += offset.double()
            assert output.dtype == kind and output.shape == (mine, hidden), output.shape
            if mine:
                # The usual size of an output, where a single one may be zero by accident.
                scale = max(columns**-0.5, float(expected.abs().max()))
                if offset is not None:
                    scale = max(scale, float(offset.abs().max()))
                errors.append(float((output.double() - expected).abs().max()) / scale)
        group = otp_group.require(PREFIX)
        group.layers.clear()
        ran = group.exchanges - before
        return {"errors": errors, "shard": shard, "exchanges": ran}


def main() -> None:
    rank = Rank(int(os.environ["RANK"]))
    answers = os.fdopen(int(os.environ["ANSWERS"]), "w")
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            told: dict[str, Any] = {"result": getattr(rank, command)(**arguments)}
        except BaseException:
            told = {"error": traceback.format_exc()}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
