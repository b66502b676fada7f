"""What the documents repeat from the code is what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo import model
from demo.__main__ import PROMPTS, Comparison, render
from oproj_patch import __version__, settings
from oproj_patch.errors import CODES

from .tables import DOCUMENTS, EVIDENCE, ROOT, TABLES, deployments, evidence, rewritten


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_up_to_date(path: Path) -> None:
    pytest.importorskip("torch")
    text = path.read_text(encoding="utf-8")
    assert rewritten(text) == text, f"python -m tests.docs.tables {path.relative_to(ROOT)}"


def test_every_table_is_in_a_document() -> None:
    together = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    for name in TABLES:
        assert f"<!-- {name}:begin -->" in together


def test_every_deployment_that_is_declared_has_a_row() -> None:
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")]
    declared = sum(len(re.findall(r"mark\.deployment\(", source)) for source in sources)
    assert declared == len(deployments().splitlines()) - 2 > 0


def test_every_cell_of_the_compatibility_table_is_a_test() -> None:
    pytest.importorskip("torch")
    named = {
        EVIDENCE[name].replace("HOST", host)
        for host, cells in evidence().items()
        for cell in filter(None, cells)
        for name in cell.split(", ")
    }
    files = sorted({test.partition("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert named <= set(done.stdout.splitlines()), done.stdout[-2000:]


def test_every_code_is_documented_with_cause_and_remedy() -> None:
    text = read("docs/troubleshooting.md")
    told = {
        code: " ".join(meaning.split()).rstrip(".")
        for code, meaning in re.findall(
            r"^### (\S+)\n\n\*(.+?)\*\n", text, re.MULTILINE | re.DOTALL
        )
    }
    capitalised = {code: meaning[0].lower() + meaning[1:] for code, meaning in told.items()}
    assert capitalised == {
        code: meaning[0].lower() + meaning[1:] for code, meaning in CODES.items()
    }
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    for section in sections:
        assert section.count("\n- Cause: ") == 1, section[:9]
        assert section.count("\n- Remedy: ") == 1, section[:9]


def test_every_code_in_the_source_is_in_the_list_and_used() -> None:
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "oproj_patch").rglob("*.py")
        if path.name != "errors.py"
    )
    assert set(re.findall(r'"(OPROJ\d{3})"', source)) == set(CODES)


def test_every_variable_is_in_the_operating_guide() -> None:
    rows = re.findall(r"^\| `(OPROJ_\w+)` \|", read("docs/operating.md"), re.MULTILINE)
    assert tuple(rows) == settings.VARIABLES


def test_every_metric_is_in_the_operating_guide() -> None:
    source = read("oproj_patch/sharding/metrics.py")
    metrics = set(re.findall(r'^ +\("(\w+)", "', source, re.MULTILINE))
    documented = set(re.findall(r"`oproj_patch_(\w+)`", read("docs/operating.md")))
    assert documented == metrics and len(metrics) == 4


def test_the_readme_is_one_page_and_shows_what_the_demo_prints() -> None:
    text = read("README.md")
    assert len(text.splitlines()) <= 120
    [excerpt] = re.findall(r"```text\n(prompt .*?)```", text, re.DOTALL)
    ranks, prompts = 2, model.prompts(PROMPTS)
    story = model.STORY * 2  # what the checkpoint continues with: it is not accepted otherwise
    texts = [(prompt, told := story.partition(prompt)[2], told, True) for prompt in prompts]
    off = model.O_PROJ_BYTES
    comparison = Comparison(
        identical=True,
        prompts=PROMPTS,
        ranks=ranks,
        otp_size=ranks,
        compiled=False,
        o_proj_bytes={"off": [off] * ranks, "on": [off // ranks] * ranks},
        exchanges={"off": [0] * ranks, "on": [96] * ranks},
        seconds=0.0,
        seconds_off=0.0,
        seconds_on=0.0,
        texts=texts,
    )
    printed = render(comparison).splitlines()
    shown = excerpt.splitlines()
    assert [line for line in printed if line and line in shown] == [*filter(None, shown)]


def test_every_document_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", read("docs/README.md")))
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {f"../{path.name}" for path in ROOT.glob("*.md")} | pages <= linked


def test_the_log_line_is_the_same_everywhere_and_of_this_version() -> None:
    pages = ("README.md", "docs/operating.md", "docs/troubleshooting.md")
    lines = [re.findall(r"^oproj_patch .*o_proj sharded .*$", read(page), re.M) for page in pages]
    assert lines[0] == lines[1] == lines[2] and len(lines[0]) == 1
    assert lines[0][0].startswith(f"oproj_patch {__version__}: o_proj sharded 8-way over ranks [0,")


def test_changelog_has_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1] == __version__


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in (a or b for a, b in targets):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings
            ]
            assert anchor in anchors, target
