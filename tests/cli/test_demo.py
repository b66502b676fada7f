from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oproj_patch.cli import demo, demo_model
from oproj_patch.errors import OprojValueError


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


def test_progress_in_a_pipe_is_one_line_a_stage() -> None:
    stream = io.StringIO()
    display = demo._Display(stream)
    for seconds in range(10):
        display.show("model", "training", seconds)
    display.show("model", "done", 10)
    display.end()
    assert stream.getvalue() == "model: training (0 s)\nmodel: done (10 s)\n"


@pytest.mark.parametrize(
    ("ranks", "otp_size", "part"),
    [
        (1, None, "--ranks is 1"),
        (3, None, "--ranks is 3"),
        (4, 3, "one of [2, 4]"),
        (2, 4, "one of [2]"),
        (4, -2, "one of [2, 4]"),
    ],
)
def test_sizes_that_do_not_fit(ranks: int, otp_size: int | None, part: str) -> None:
    args = argparse.Namespace(
        ranks=ranks, otp_size=otp_size, compiled=False, json=True, cache_dir=Path()
    )
    with pytest.raises(OprojValueError, match="OPROJ018") as caught:
        demo.run(args)
    assert part in str(caught.value)


def test_caller_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, oproj_patch.cli.demo as d\n"
        "try: d._check(2, 2)\n"
        "except ValueError: pass\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("OPROJ_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


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
    assert demo_model.default_cache_dir() == tmp_path / "oproj_patch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_model.default_cache_dir() == tmp_path / ".cache" / "oproj_patch"


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


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="AssertionError"):
        demo_model.ensure("sparse", trained=False, cache_dir=tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
