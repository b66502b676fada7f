"""The tables of the documents that are made from the code.

    python -m tests.docs.tables FILE...

writes each table of these files anew between its markers, `<!-- NAME:begin -->` and
`<!-- NAME:end -->`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from oproj_patch.releases import ASCEND_RELEASES, VLLM_RELEASES
from oproj_patch.settings import Settings
from tests.hosts.wheels import INSTALLED

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path for glob in ("*.md", "docs/*.md", ".github/*/*.md") for path in ROOT.glob(glob)
)


def seams() -> str:
    """Return the seam inventory: every symbol of every host; symbols of one purpose share a row.

    The module of a symbol, and what follows a semicolon in the reason, stay in the code.
    """
    from oproj_patch import activation
    from oproj_patch.hosts import ascend_option, deepseek_v4, lora, vllm, vllm_ascend

    host = vllm.Vllm({"vllm": ""})
    v4 = deepseek_v4.seams(host, None)
    upstream = (activation.group_seam(), *host.seams(None), *v4, *lora.seams())
    own = vllm_ascend.registry(vllm_ascend.VllmAscend({}))
    ascend = (*ascend_option.seams(Settings(size=2)), *own)
    rows: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
    for host, releases, registry in (
        ("vLLM", VLLM_RELEASES, upstream),
        ("vllm-ascend", ASCEND_RELEASES, ascend),
    ):
        for seam in registry:
            ends = seam.since or seam.until
            span = _span(seam.since, seam.until, tuple(releases)) if ends else "all"
            rows.setdefault((host, seam.why.partition(";")[0]), {})[f"`{seam.path}`", span] = None
    cells = []
    for (host, why), found in rows.items():
        symbols, spans = zip(*found, strict=True)
        told = spans[:1] if len({*spans}) == 1 else spans
        cells.append((host, why, "<br>".join(symbols), "<br>".join(told)))
    return _table(("host", "needed to", "symbols", "releases"), cells)


def _span(since: str, until: str, releases: tuple[str, ...]) -> str:
    first, last = since or releases[0], until or releases[-1]
    return first if first == last else f"{first} to {last}"


def refusals() -> str:
    """Return what cannot be combined with a sharded o_proj, on either host."""
    from oproj_patch.hosts.refusals import RULES

    rows = []
    for rule in RULES:
        releases = VLLM_RELEASES if rule.host == "vllm" else tuple(ASCEND_RELEASES)
        span = f" {_span(rule.since, rule.until, releases)}" if rule.since or rule.until else ""
        names = ", ".join(getattr(rule.found, "patterns", ()))
        option = f"{rule.option}: {names}" if names else rule.option
        rows.append((option, f"{rule.host}{span}", rule.why, rule.remedy))
    return _table(("configured by", "host", "why not", "what to do"), rows)


# What shows that a host works, by the name the table gives it: the test, for that host.
_VLLM_LAYER = "tests/hosts/test_vllm_layer.py::test_"
_ASCEND_LAYER = "tests/hosts/test_ascend_layer.py::test_"
EVIDENCE: Mapping[str, str] = {
    "construct": f"{_VLLM_LAYER}construct[HOST]",
    "load": f"{_VLLM_LAYER}load[HOST]",
    "eager": f"{_VLLM_LAYER}forward_eager[HOST]",
    "compiled": f"{_VLLM_LAYER}forward_compiled[HOST]",
    "quantized": f"{_VLLM_LAYER}quantized[HOST]",
    "idle": f"{_VLLM_LAYER}idle_rank[HOST]",
    "drafter": f"{_VLLM_LAYER}drafter[HOST]",
    "model": f"{_ASCEND_LAYER}model_with_idle_ranks_and_profile_run[HOST]",
    "W8A8": f"{_ASCEND_LAYER}w8a8_static_with_a_stand_in_for_npu_quant_matmul[HOST]",
    "W8A8 dynamic": f"{_ASCEND_LAYER}w8a8_dynamic_with_stand_ins_for_npu_dynamic_quant_and_npu_"
    "quant_matmul[HOST]",
    "W4A8": f"{_ASCEND_LAYER}w4a8_with_a_stand_in_for_npu_weight_quant_batchmatmul[HOST]",
    "sparse": f"{_ASCEND_LAYER}sparse_attention_with_idle_ranks_and_profile_run[HOST]",
    "sparse class": f"{_ASCEND_LAYER}sparse_attention_of_its_own_class[HOST]",
    "grouped query": f"{_ASCEND_LAYER}grouped_query_attention[HOST]",
    "TP 2": f"{_ASCEND_LAYER}two_tensor_parallel_ranks_and_quant_bias_once[HOST]",
    "proposer": f"{_ASCEND_LAYER}proposer_drafts_as_often_on_an_idle_rank[HOST]",
    "torchair": "tests/hosts/test_ascend_torchair.py::test_torchair_traces_whole[HOST-2x1]",
    "engine": "tests/engines/test_offline.py::test_experts",
    "MTP": "tests/engines/test_mtp.py::test_drafter[first runner]",
    "V4": "tests/engines/test_deepseek_v4.py::test_same_tokens[both]",
    "V4 layers": f"{_ASCEND_LAYER}deepseek_v4_with_a_stand_in_for_npu_transpose_batchmatmul[HOST]",
    "V4 blocks": f"{_ASCEND_LAYER}deepseek_v4_in_fp8_blocks_with_stand_ins_for_kernels[HOST]",
    "oldest engine": "tests/engines/test_releases.py::test_oldest_engine",
}
_ENGINES = {"0.28.0": "oldest engine", INSTALLED: "engine, MTP, V4"}
# What is run of each vllm-ascend release: models, more with idle ranks, and what torchair traces.
# 0.9.1 has no sparse attention, the releases after 0.11.0 no torchair.
_ASCEND_LAYERS: Mapping[str, tuple[str, str, str]] = {
    "0.9.1": ("model", "", "torchair"),
    "0.11.0": ("model, sparse class, grouped query", "", "torchair"),
    "0.13.0": ("model, sparse, grouped query", "", ""),
    "0.18.0": ("model, sparse, grouped query", "", ""),
    "0.23.0": ("model, sparse, grouped query, TP 2, V4 layers", ", proposer", ""),
    "0.23.0.post1": ("model, sparse, grouped query", "", ""),
    "0.26.0rc1": ("model, sparse, grouped query", "", ""),
    "0.30.0rc2": ("model, sparse, grouped query, V4 layers, V4 blocks", "", ""),
}


def evidence() -> dict[str, tuple[str, ...]]:
    """Host -> its cells, each some names of `EVIDENCE` or nothing."""
    rows: dict[str, tuple[str, ...]] = {}
    for release in VLLM_RELEASES:
        own = ("construct", "load", "eager", "compiled", "quantized", "idle, drafter")
        rows[f"vllm-{release}"] = (*own, _ENGINES.get(release, ""))
    for release in ASCEND_RELEASES:
        models, idle, traced = _ASCEND_LAYERS[release]
        quantized = "W8A8, W8A8 dynamic" + ", W4A8" * (release != "0.30.0rc2")
        rows[f"ascend-{release}"] = (*(models,) * 3, traced, quantized, models + idle, "")
    return rows


def compat() -> str:
    """The compatibility table: for each host the tests that show that it works."""
    head = ("host", "construct", "load", "forward eager", "compiled or traced", "quantization",
            "idle rank", "end to end")  # fmt: skip
    rows = [(host, *(cell or "-" for cell in cells)) for host, cells in evidence().items()]
    key = "\n".join(f"- {name}: `{test}`" for name, test in EVIDENCE.items())
    return f"{_table(head, rows)}\n\nEach name in a cell is a test:\n\n{key}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.rstrip('.') for cell in line)} |" for line in lines)


def graphs() -> str:
    """What `tests/graphs` shows of each host in each graph mode."""
    from tests.graphs.test_releases import HOSTS, MODES, default, outcome

    head = ("host", *(f"`{mode}`" for mode in MODES))
    rows = []
    for host in HOSTS:
        cells = [outcome(host, mode) + ", default" * (mode == default(host)) for mode in MODES]
        rows.append((str(host), *cells))
    return _table(head, rows)


def savings() -> str:
    """Return what each group size saves and costs two models, as `oproj-patch plan` says."""
    from oproj_patch.cli.plan import GIB, MIB, load_model, make_plan

    names = "deepseek-r1", "deepseek-v4-pro"
    plans = [make_plan(name, load_model(name, "int8"), dp=32) for name in names]
    head = ("N", "R1: o_proj on a rank", "saved", "more tokens of KV cache",
            "sent for each token", "V4-Pro: saved", "sent")  # fmt: skip
    rows = [("off", f"{plans[0]['unsharded_bytes_per_rank'] / GIB:.2f} GiB", *[""] * 5)]
    for pair in zip(*(plan["rows"] for plan in plans), strict=False):
        if pair[0]["otp_size"] <= 16:
            (kept, *_), saved, sent = (
                [row[f"{what}_bytes_per_{unit}"] / size for row in pair]
                for what, unit, size in (
                    ("o_proj", "rank", GIB), ("saved", "rank", GIB), ("exchange", "token", MIB)
                )
            )  # fmt: skip
            rows.append(
                (
                    str(pair[0]["otp_size"]),
                    f"{kept:.2f} GiB",
                    f"{saved[0]:.2f} GiB",
                    f"{pair[0]['kv_tokens_per_rank']:,}",
                    f"{sent[0]:.1f} MiB",
                    f"{saved[1]:.2f} GiB",
                    f"{sent[1]:.1f} MiB",
                )
            )
    return _table(head, rows)


def architectures() -> str:
    """Return what becomes of the o_proj of every architecture that builds experts."""
    from tests.docs.architectures import CONSTRUCTED, READ, REFUSED

    rows = {name: ("sharded", "constructed by a test") for name in CONSTRUCTED}
    rows |= {name: ("sharded", f"read: {why}") for why, names in READ.items() for name in names}
    rows |= {name: ("refused", why) for why, names in REFUSED.items() for name in names}
    head = ("architecture", "o_proj", "by what, or why not")
    return _table(head, [(f"`{name}`", *rows[name]) for name in sorted(rows)])


def deployments() -> str:
    """Return the rows that tests declare by `@pytest.mark.deployment(NAME, WHAT WAS RUN)`.

    The sources are read and not imported, because some tests need packages that others do not.
    """
    rows = [row for path in sorted(ROOT.glob("tests/*/test_*.py")) for row in _declared(path)]
    return _table(("deployment", "what was run", "test"), rows)


def _declared(path: Path) -> Iterator[tuple[str, str, str]]:
    for test in ast.parse(path.read_text(encoding="utf-8")).body:
        for mark in test.decorator_list if isinstance(test, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.deployment":
                name, run = map(ast.literal_eval, mark.args)
                assert test.name.startswith("test_"), f"{path}: {test.name} is no test"
                yield name, run, f"`{path.relative_to(ROOT)}::{test.name}`"


TABLES: Mapping[str, Callable[[], str]] = {
    "seams": seams,
    "refusals": refusals,
    "compat": compat,
    "graphs": graphs,
    "savings": savings,
    "architectures": architectures,
    "deployments": deployments,
}


def rewritten(text: str) -> str:
    """`text` with the table between each pair of markers made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in text:
            pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
            table = f"{begin}\n{make()}\n{end}"
            text = pattern.sub(lambda _, table=table: table, text, count=1)  # type: ignore[misc]
    return text


def main(paths: Iterable[str]) -> None:
    for path in map(Path, paths):
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
