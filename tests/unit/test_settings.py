"""Every accepted and refused value of every variable."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oproj_patch import settings
from oproj_patch.errors import CODES, OprojError, OprojValueError
from oproj_patch.settings import Settings

OFF = ["", "0", "1", " ", "\t\n", " 0 ", "1 ", "00", "01", "000001"]
ON = {"2": 2, "8": 8, " 4\n": 4, "016": 16, "64": 64, "999999": 999999}
REFUSED_SIZES = [
    "-1", "+2", "2.0", "1e1", "0x2", "1_0", "2,", "2 4", "two", "AUTO", "Auto", "auto2", "on",
    "true", "None", "nan", "inf", "\u0662", "\u00b2", "1000000", "9" * 400, "2\x00", "'2'",
]  # fmt: skip


@pytest.mark.parametrize("text", OFF)
def test_off(text: str) -> None:
    assert settings.parse_size(text) == (0, False)
    read = settings.read({settings.TOGGLE: text})
    assert read == Settings() and not read.enabled


def test_unset_is_off() -> None:
    assert settings.read({}) == Settings() and not settings.read({}).enabled


@pytest.mark.parametrize(("text", "size"), ON.items())
def test_on(text: str, size: int) -> None:
    read = settings.read({settings.TOGGLE: text})
    assert (read.size, read.auto, read.enabled) == (size, False, True)


@pytest.mark.parametrize("text", ["auto", " auto\n"])
def test_auto(text: str) -> None:
    read = settings.read({settings.TOGGLE: text})
    assert (read.size, read.auto, read.enabled) == (0, True, True)


@pytest.mark.parametrize("text", REFUSED_SIZES)
def test_refused_size(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        settings.read({settings.TOGGLE: text})
    assert isinstance(raised.value, OprojValueError) and raised.value.code == "OPROJ001"
    assert str(raised.value) == (
        f"OPROJ001: OPROJ_TENSOR_PARALLEL_SIZE is {text!r}; accepted are 0 or 1 (off), an "
        "integer group size of 2 or more, or auto: set one of these or unset the variable."
    )


FLAGS = {settings.DEBUG: "debug", settings.SKIP_VERSION_CHECK: "skip_version_check"}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    ("text", "value"), [("", False), ("0", False), (" 0", False), ("1", True), ("1\n", True)]
)
def test_flags(name: str, text: str, value: bool) -> None:
    assert getattr(settings.read({name: text}), FLAGS[name]) is value


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("text", ["2", "yes", "True", "on", "-1", "01", "1.0"])
def test_refused_flags(name: str, text: str) -> None:
    with pytest.raises(OprojValueError) as raised:
        settings.read({name: text})
    assert str(raised.value) == (
        f"OPROJ002: {name} is {text!r}; accepted are 0 and 1: set one of these or unset it."
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 60.0), (" ", 60.0), ("1", 1.0), ("0.5", 0.5), ("1e3", 1000.0), ("86400", 86400.0)],
)
def test_seconds(text: str, seconds: float) -> None:
    assert settings.read({settings.HANDSHAKE_SECONDS: text}).handshake_seconds == seconds


@pytest.mark.parametrize("text", ["0", "-1", "86401", "inf", "nan", "1 s", "ten", "1e999"])
def test_refused_seconds(text: str) -> None:
    with pytest.raises(OprojValueError) as raised:
        settings.read({settings.HANDSHAKE_SECONDS: text})
    assert str(raised.value) == (
        f"OPROJ002: {settings.HANDSHAKE_SECONDS} is {text!r}; accepted is a number of seconds "
        "above 0 and up to 86400: set one or unset it."
    )


@given(st.dictionaries(st.sampled_from(settings.VARIABLES), st.text(max_size=12)))
def test_any_text_is_settings_or_a_refusal(environ: dict[str, str]) -> None:
    try:
        read = settings.read(environ)
    except OprojValueError as error:
        assert error.code in ("OPROJ001", "OPROJ002")
        assert any(
            f"{name} is {environ[name]!r}" in str(error)
            or f"{name} is {environ[name].strip()!r}" in str(error)
            for name in environ
        )
        return
    assert read.size == 0 or 2 <= read.size <= 999999
    assert not (read.auto and read.size)
    assert 0 < read.handshake_seconds <= 86400


@given(st.integers(min_value=2, max_value=999999))
def test_every_size_is_read_back(size: int) -> None:
    assert settings.parse_size(str(size)) == (size, False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("two", "OPROJ_TENSOR_PARALLEL_SIZE is 'two'"), ("-2", "OPROJ_TENSOR_PARALLEL_SIZE is '-2'")],
)
def test_import_raises(text: str, sentence: str) -> None:
    code = (
        "try:\n import oproj_patch\nexcept ValueError as error:\n print(error)\n"
        "import sys; print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"OPROJ_TENSOR_PARALLEL_SIZE": text, "PYTHONPATH": ":".join(p for p in sys.path if p)},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert sentence in out and "OPROJ001" in out and "[]" in out


@pytest.mark.parametrize("kind", [OprojError, OprojValueError])
def test_errors_cross_process_borders(kind: type[OprojError]) -> None:
    error = pickle.loads(pickle.dumps(kind("OPROJ003", "a sentence.")))
    assert type(error) is kind and (error.code, error.sentence) == ("OPROJ003", "a sentence.")
    assert str(error) == "OPROJ003: a sentence."


def test_an_error_needs_a_known_code() -> None:
    assert all(code == f"OPROJ{number:03}" for number, code in enumerate(CODES, 1))
    with pytest.raises(KeyError):
        OprojError("OPROJ999", "unknown")


ENVIRON = {settings.TOGGLE: "4", settings.DEBUG: "1"}


@pytest.mark.parametrize(
    ("toggle", "ours", "expected"),
    [
        ("4", {"size": 4}, Settings(size=4)),
        ("auto", {"size": 8}, Settings(size=8, auto=True)),
        ("4", {"debug": True}, Settings(4, debug=True)),
        ("4", {"handshake_seconds": 5}, Settings(4, handshake_seconds=5)),
        ("4", {"weight_gather_rows": 0}, Settings(4, weight_gather_rows=0)),
        ("4", {"grid": "2x2"}, Settings(4, grid="2x2")),
        ("4", {"wire": "off"}, Settings(4, wire="off")),
        ("4", {"grid": "Nx1"}, Settings(4, grid="Nx1")),
        ("4", {"skip_version_check": 1}, Settings(4, skip_version_check=True)),
    ],
    ids=str,
)  # fmt: skip
def test_additional_config(toggle: str, ours: dict[str, object], expected: Settings) -> None:
    environ = {settings.TOGGLE: toggle}
    config = {settings.CONFIG_KEY: ours, "refresh": True}
    assert settings.merge(settings.read(environ), config, environ) == expected


@pytest.mark.parametrize("config", [None, {}, "text", {"other": {"size": 8}}])
def test_additional_config_without_our_key(config: object) -> None:
    assert settings.merge(Settings(size=4), config, {}) == Settings(size=4)


def test_a_variable_and_a_key_that_are_equal_are_accepted() -> None:
    config = {settings.CONFIG_KEY: {"debug": True}}
    assert settings.merge(settings.read(ENVIRON), config, ENVIRON).debug


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        (7, 'additional_config.oproj_patch is 7; accepted is an object such as {"size": 8}'),
        ({"sise": 8}, "additional_config.oproj_patch.sise is not known; accepted are size, debug"),
        ({"size": "8"}, "additional_config.oproj_patch.size is '8'; accepted is an integer of 2"),
        ({"size": True}, "additional_config.oproj_patch.size is True; accepted is an integer"),
        ({"size": 8}, "OPROJ_TENSOR_PARALLEL_SIZE is 4 and additional_config.oproj_patch.size is"),
        ({"debug": False}, "OPROJ_PATCH_DEBUG is '1' and additional_config.oproj_patch.debug is F"),
        ({"debug": "yes"}, "additional_config.oproj_patch.debug is 'yes'; accepted are 0 and 1"),
        ({"debug": 1.0}, "additional_config.oproj_patch.debug is 1.0; accepted are 0 and 1"),
        ({"handshake_seconds": [5]}, "oproj_patch.handshake_seconds is [5]; accepted is a number"),
        ({"weight_gather_rows": -1}, "oproj_patch.weight_gather_rows is -1; accepted are 0 (never"),
        (
            {"wire": "int4"},
            "oproj_patch.wire is 'int4'; accepted are auto, off, int8 and fp8: set one or unset",
        ),
        ({"grid": "2 x 2"}, "oproj_patch.grid is '2 x 2'; accepted are auto, Nx1 and two numbers"),
        (
            {"grid": 4},
            "oproj_patch.grid is 4; accepted are auto, Nx1 and two numbers such",
        ),
        ({"weight_gather_rows": 1.5}, "oproj_patch.weight_gather_rows is 1.5; accepted are 0 (nev"),
    ],
    ids=str,
)
def test_additional_config_refused(ours: object, sentence: str) -> None:
    with pytest.raises(OprojError) as raised:
        settings.merge(settings.read(ENVIRON), {settings.CONFIG_KEY: ours}, ENVIRON)
    assert raised.value.code == "OPROJ002" and sentence in str(raised.value)
