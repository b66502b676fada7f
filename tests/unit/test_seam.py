"""Seams: all or nothing, undone exactly, also beside another plugin's wrappers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import wrapt

from oproj_patch.errors import OprojError
from oproj_patch.hosts import seam as seams
from oproj_patch.hosts.seam import Seam

NAME = "a_host_of_this_test"


class Layer:
    def forward(self, x: int) -> int:
        return x


@pytest.fixture
def host() -> Iterator[ModuleType]:
    module: Any = ModuleType(NAME)
    module.Layer = type("Layer", (Layer,), {"__init__": lambda self, size: None})
    module.create = lambda ranks: [ranks]
    sys.modules[NAME] = module
    yield module
    del sys.modules[NAME]


def ours(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    return ["ours", *wrapped(*args, **kwargs)]


def theirs(create: Any, tag: str) -> Any:
    @functools.wraps(create)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return [tag, *create(*args, **kwargs)]

    return wrapper


CREATE = Seam(NAME, "create", ours, "create", ("ranks",))


def test_undone_by_identity(host: Any) -> None:
    before = host.create
    installed = seams.install([CREATE], "host 1")
    assert host.create(1) == ["ours", 1] and host.create is not before
    seams.undo(installed)
    assert host.create is before


def test_an_inherited_symbol_is_deleted_again(host: Any) -> None:
    def doubled(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        return 2 * wrapped(*args, **kwargs)

    installed = seams.install([Seam(NAME, "Layer.forward", doubled, "double", ("x",))], "host 1")
    assert host.Layer(1).forward(3) == 6
    seams.undo(installed)
    assert "forward" not in vars(host.Layer) and host.Layer(1).forward(3) == 3


def test_another_wrapper_before_ours_stays(host: Any) -> None:
    host.create = before = theirs(host.create, "theirs")
    installed = seams.install([CREATE], "host 1")
    assert host.create(1) == ["ours", "theirs", 1]
    seams.undo(installed)
    assert host.create is before and host.create(1) == ["theirs", 1]


def test_another_wrapper_after_ours_stays_and_ours_passes_through(
    host: Any, caplog: pytest.LogCaptureFixture
) -> None:
    installed = seams.install([CREATE], "host 1")
    host.create = after = theirs(host.create, "theirs")
    assert host.create(1) == ["theirs", "ours", 1]
    seams.undo(installed)
    assert host.create is after and host.create(1) == ["theirs", 1]
    assert f"{NAME}.create: another wrapper was put on after" in caplog.text
    again = seams.install([CREATE], "host 1")
    assert host.create(1) == ["ours", "theirs", 1]
    seams.undo(again)
    assert host.create is after


def test_nothing_is_wrapped_when_one_symbol_is_missing(host: Any) -> None:
    before = host.create
    missing = Seam(NAME, "gone", ours, "do without")
    with pytest.raises(OprojError) as raised:
        seams.install([CREATE, missing], "host 1")
    assert f"OPROJ008: {NAME}.gone of host 1 cannot be found" in str(raised.value)
    assert "oproj_patch needs it to do without" in str(raised.value)
    assert host.create is before
    optional = Seam(NAME, "gone", ours, "do without", required=False)
    installed = seams.install([CREATE, optional], "host 1")
    assert [entry.seam for entry in installed] == [CREATE]
    seams.undo(installed)


def test_a_lazy_seam_is_never_refused(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = functools.partial(Seam, NAME, wrapper=ours, why="save time", lazy=True)
    for path, parameters in (("create", ("ranks",)), ("create", ("model",)), ("gone", ())):
        seam = lazy(path=path, parameters=parameters, required=False)
        installed = seams.install([seam], "host 1")
        assert len(installed) == (parameters == ("ranks",))
        seams.undo(installed)
    monkeypatch.delitem(sys.modules, NAME)
    assert seams.install([lazy(path="create", required=False)], "host 1") == []


def careless(create: Any) -> Any:
    def wrapper(*args: Any) -> Any:
        return create(*args)

    wrapper.__module__ = "another_plugin"
    return wrapper


class Callable:
    """A wrapper that is an object."""

    def __init__(self, create: Any) -> None:
        self.create = create

    def __call__(self, *args: Any) -> Any:
        return self.create(*args)


Callable.__module__ = "another_plugin"


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (careless, "another_plugin.careless.<locals>.wrapper"),
        (Callable, "another_plugin.Callable"),
        (lambda create: functools.partial(careless(create)), "functools.partial"),
        (lambda _: print, "builtins.print"),
    ],
    ids=["function", "object", "partial", "built in"],
)
def test_a_wrapper_that_hides_the_signature_is_named(host: Any, wrap: Any, named: str) -> None:
    host.create = wrap(host.create)
    with pytest.raises(OprojError) as raised:
        seams.install([CREATE], "host 1")
    assert f"was replaced by {named}, which has no parameter ranks" in str(raised.value)
    assert "functools.wraps" in str(raised.value) and "install a" not in str(raised.value)
    assert not isinstance(host.create, wrapt.FunctionWrapper)
