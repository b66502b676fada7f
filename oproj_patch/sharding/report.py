"""One block of the log after a failure: what a person needs to report it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ..errors import OprojError

Record = Mapping[str, str]
"""What a rank tells the others, by name."""
Records = Mapping[int, "Record | None"]
"""Records by rank; None: not arrived by the deadline."""

WHERE, ROWS, NODE, LAYERS = "where", "rows", "node", "layers"
REPORTED = ("OPROJ011", "OPROJ012", "OPROJ013")
"""Codes of what ranks find out together."""

RECORDER = (
    "to record what each rank sent last, start again with TORCH_FR_BUFFER_SIZE=2000 and "
    "TORCH_FR_CPP_STACK=1 (older releases of torch: TORCH_NCCL_TRACE_BUFFER_SIZE, "
    "TORCH_NCCL_TRACE_CPP_STACK); `py-spy dump --pid PID` shows the stacks of a rank that hangs"
)


def block(error: OprojError, records: Records, facts: Record) -> str:
    """Return the sentence, the place of every rank that answered, and what all have in common.

    records: what each rank told; facts: what is the same on all ranks, by name.
    """
    told = [record for record in records.values() if record is not None]
    names = dict.fromkeys(name for record in told for name in record if name != LAYERS)
    own = [name for name in names if name in (WHERE, ROWS) or len({r.get(name) for r in told}) > 1]
    own = [name for name in own if name != NODE]
    common = {n: told[0][n] for n in names if n not in own and n != NODE}
    lines = [str(error), "what to put into a report:"]
    for rank, record in records.items():
        if record is None:
            lines.append(f"  rank {rank}: no answer")
            continue
        values = [record.get(WHERE, "")] + [
            f"{name} {record.get(name, 'none')}"
            for name in own
            if name != WHERE and record.get(name) != ""
        ]
        node = f" (node {record[NODE]})" if NODE in record else ""
        lines.append(f"  rank {rank}{node}: {', '.join(filter(None, values))}")
    everywhere = common | dict(facts) | {"torch": torch.__version__}
    lines.append("  all: " + "; ".join(f"{name} {value}" for name, value in everywhere.items()))
    return "\n".join([*lines, f"  {RECORDER}"])


def log(error: OprojError, rank: int, records: Records, facts: Record) -> None:
    """Log the block, on the first rank of each node that answered.

    rank: this one. A refusal of one rank is no failure of the ranks together, and has no block.
    """
    own = records[rank]
    here = [r for r, told in records.items() if told and own and told.get(NODE) == own.get(NODE)]
    if error.code in REPORTED and rank == min(here, default=rank):
        logging.getLogger("vllm.oproj_patch").error("%s", block(error, records, facts))
