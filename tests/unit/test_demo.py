"""The demo without an engine: what it accepts, prints and complains about; its checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo import __main__ as demo
from demo import engines
from demo import model as demo_model

ROOT = Path(__file__).resolve().parents[2]


def comparison(*, same: bool = True, on_bytes: int = 512, calls: int = 9) -> demo.Comparison:
    long_prompt = demo_model.prompts(12)[7]
    texts = [(long_prompt, "a" * 24, "a" * 24 if same else "b" * 24, same)] * 4
    return demo.Comparison(
        identical=same,
        prompts=4,
        ranks=2,
        otp_size=2,
        compiled=False,
        o_proj_bytes={"off": [1024, 1024], "on": [512, on_bytes]},
        exchanges={"off": [0, 0], "on": [9, calls]},
        seconds=61.5,
        seconds_off=30.25,
        seconds_on=31.0,
        texts=texts,
    )


def test_success_has_no_complaint() -> None:
    assert comparison().complaints() == []


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (comparison(same=False), "4 of 4 continuations differ"),
        (comparison(on_bytes=513), "not 1/2"),
        (comparison(calls=0), "ranks [1]"),
    ],
)
def test_each_failure_is_named(bad: demo.Comparison, word: str) -> None:
    assert [word in complaint for complaint in bad.complaints()] == [True]


@pytest.mark.parametrize("same", [True, False])
def test_table_fits_80_columns(same: bool) -> None:
    lines = demo.render(comparison(same=same)).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.startswith("...")]
    assert [line.split()[-1] for line in rows] == ["yes" if same else "NO"] * 4


def test_table_survives_unprintable_text() -> None:
    broken = ("p", "\x1b[2Jé\n", "ok", False)
    table = demo.render(demo.Comparison(**{**vars(comparison()), "texts": [broken]}))
    assert "\x1b" not in table
    assert "\\x1b[2J\\xe9\\n" in table


def test_progress_is_one_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    progress = demo.Progress()
    for _ in range(10):
        progress("training")
    progress.label = "without the shim"
    progress("training")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["   0 s  model: training", "   0 s  without the shim: training"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--ranks 1", "the group size is 1, but --ranks 1 "),
        ("--ranks 3", "accept no size: give --ranks an even number"),
        ("--ranks 4 --otp-size 3", "accept one of [2, 4]"),
        ("--ranks 2 --otp-size 4", "accept one of [2]"),
        ("--ranks 4 --otp-size -2", "the group size is -2, but"),
    ],
)
def test_sizes_that_do_not_fit(
    arguments: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments.split())
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


def test_an_environment_without_vllm_is_refused_before_torch_is_imported() -> None:
    code = (
        "import importlib.util, sys\n"
        "from demo.__main__ import main\n"
        "importlib.util.find_spec = lambda name: None\n"
        "try: main([])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([m for m in ('torch', 'vllm', 'transformers', 'oproj_patch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stdout.split("\n")[:2] == ["2", "[]"]
    assert "run `tox -e demo`" in done.stderr


def test_prompts_are_distinct_and_come_from_the_story() -> None:
    prompts = demo_model.prompts(64)
    assert len(set(prompts)) == 64
    assert all(prompt in demo_model.STORY * 2 for prompt in prompts)
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) >= 12
    # Room for the longest continuation of any test within what was trained.
    assert max(lengths) + 32 <= 192


def test_cache_directory_honours_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engines.default_cache_dir() == tmp_path / "oproj_patch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert engines.default_cache_dir() == tmp_path / ".cache" / "oproj_patch"


@pytest.mark.long
@pytest.mark.parametrize("variant", ["dense", "moe"])
def test_random_checkpoint(variant: demo_model.Variant, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = demo_model.ensure(variant, trained=False, cache_dir=tmp_path)
    assert demo_model.ensure(variant, trained=False, cache_dir=tmp_path) == path
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    config = json.loads((path / "config.json").read_text())
    assert config["topk_method"] == "noaux_tc"
    assert config["first_k_dense_replace"] == (3 if variant == "dense" else 1)

    from safetensors import safe_open
    from transformers import AutoTokenizer

    with safe_open(path / "model.safetensors", "pt") as weights:
        shapes = {
            name: weights.get_slice(name).get_shape()
            for name in weights.keys()  # noqa: SIM118 - not a dict
            if ".o_proj." in name
        }
    assert len(shapes) == demo_model.NUM_LAYERS
    assert set(map(tuple, shapes.values())) == {(demo_model.HIDDEN_SIZE, demo_model.O_PROJ_IN)}
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "Any text: é, 日本, \t tabs."
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@pytest.mark.long
def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'sparse'"):
        demo_model.ensure("sparse", trained=False, cache_dir=tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
