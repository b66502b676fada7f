"""What a seam is, and the applier: resolve all, then wrap all, or put everything back."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import releases
from ..errors import OprojError
from ..settings import TOGGLE


@dataclass(frozen=True)
class Seam:
    """One patched symbol of a host.

    module, path: where it is, e.g. `vllm.config` and `VllmConfig.compute_hash`.
    wrapper: called as wrapt calls it: (wrapped, instance, args, kwargs).
    why: what we need it for, as the end of "oproj_patch needs it to ...".
    parameters: names the symbol's signature must have (drift check).
    since, until: first and last release with the symbol, as tested; empty: no such end.
    required: refuse a release without the symbol; else the symbol is wrapped where it exists.
    lazy: wrapped only in a process that has imported the module already, and never refused.
    """

    module: str
    path: str
    wrapper: Callable[..., Any]
    why: str
    parameters: tuple[str, ...] = ()
    since: str = ""
    until: str = ""
    required: bool = True
    lazy: bool = False

    @property
    def symbol(self) -> str:
        return f"{self.module}.{self.path}"


@dataclass
class Installed:
    """A wrapped symbol and what undoes it."""

    seam: Seam
    parent: Any
    attribute: str
    inherited: bool
    wrapper: Any = None
    enabled: bool = True

    def undo(self) -> bool:
        """Put the original back if the attribute is still ours, else pass through; tell which."""
        self.enabled = False
        if vars(self.parent).get(self.attribute) is not self.wrapper:
            return False  # another plugin has wrapped it after us
        if self.inherited:
            delattr(self.parent, self.attribute)
        else:
            setattr(self.parent, self.attribute, self.wrapper.__wrapped__)
        return True


def of_release(seams: Iterable[Seam], version: str, untested: bool) -> list[Seam]:
    """Return the seams whose symbols a release has; of an untested one also all that are there.

    Where the user skips the version check, the number is not trusted.
    """
    here = [(seam, releases.in_range(version, seam.since, seam.until)) for seam in seams]
    return [s if found else replace(s, required=False) for s, found in here if found or untested]


def resolve(seam: Seam, host: str) -> tuple[Any, str, Any] | None:
    """Return (parent, attribute name, original) of a seam; None: it is absent and not needed.

    host: name and version for the message. Raises OprojError when the symbol is missing or
    its signature lacks a parameter that the wrapper relies on.
    """
    import wrapt  # the command line does without it

    if seam.lazy and seam.module not in sys.modules:
        return None
    try:
        module = importlib.import_module(seam.module)
        parent, attribute, original = wrapt.resolve_path(module, seam.path)
    except (ModuleNotFoundError, AttributeError) as error:
        # Is the symbol itself absent, or something that its module failed to import?
        name = error.name if isinstance(error, ModuleNotFoundError) else seam.module
        if not seam.required and name and f"{seam.module}.".startswith(f"{name}."):
            return None
        raise _drift(seam, host, f"cannot be found ({type(error).__name__}: {error})") from error
    function = inspect.unwrap(getattr(parent, attribute))
    try:
        found = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        found = ()
    lacking = [name for name in seam.parameters if name not in found]
    if not lacking:
        return parent, attribute, original
    if seam.lazy:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    owner = str(named.__module__)
    what = f"has no parameter {', '.join(lacking)}, only {', '.join(found)}"
    if owner.partition(".")[0] == seam.module.partition(".")[0]:
        raise _drift(seam, host, what)
    raise OprojError(
        "OPROJ008",
        f"{seam.symbol} of {host} was replaced by {owner}.{named.__qualname__}, which {what}; "
        "accepted is a wrapper with functools.wraps, which keeps the signature: correct or "
        f"remove that plugin, or unset {TOGGLE}.",
    )


def install(seams: Sequence[Seam], host: str) -> list[Installed]:
    """Wrap every seam; on any error nothing is wrapped. Raises OprojError as `resolve` does."""
    import wrapt

    targets = [(seam, found) for seam in seams if (found := resolve(seam, host)) is not None]
    done: list[Installed] = []
    try:
        for seam, (parent, attribute, original) in targets:
            inherited = inspect.isclass(parent) and attribute not in vars(parent)
            entry = Installed(seam, parent, attribute, inherited)
            on = functools.partial(getattr, entry, "enabled")
            entry.wrapper = wrapt.FunctionWrapper(original, seam.wrapper, enabled=on)
            wrapt.apply_patch(parent, attribute, entry.wrapper)
            done.append(entry)
    except BaseException:
        undo(done)
        raise
    return done


def install_on_import(
    seam: Seam, module: str, host: Callable[[], str], installed: list[Installed]
) -> Callable[[], None]:
    """Add `seam` to `installed`, now or once `module` is imported; return the undo."""
    import wrapt

    wanted = [True]  # because wrapt keeps a hook forever

    def imported(_: Any) -> None:
        if wanted:
            installed.extend(install([seam], host()))

    def stop() -> None:
        wanted.clear()
        undo(installed)

    wrapt.register_post_import_hook(imported, module)
    return stop


def undo(installed: Sequence[Installed]) -> None:
    """Put the originals back, last first; say so where another plugin's wrapper stays."""
    told = "another wrapper was put on after oproj_patch's, so oproj_patch's stays there and"
    if left := [entry.seam.symbol for entry in reversed(installed) if not entry.undo()]:
        log = logging.getLogger("vllm.oproj_patch")
        log.warning("%s: %s passes through.", ", ".join(left), told)


def _drift(seam: Seam, host: str, what: str) -> OprojError:
    name, found = seam.module, sys.modules
    while name not in found and "." in name:
        name = name.rpartition(".")[0]
    owner = getattr(found.get(name), "__dict__", {}).get(seam.path.partition(".")[0])
    # A package may only re-export the class.
    module = found.get(getattr(owner, "__module__", name), found.get(name))
    where = getattr(module, "__file__", None) or seam.module
    return OprojError(
        "OPROJ008",
        f"{seam.symbol} of {host} {what}; oproj_patch needs it to {seam.why}: see {where}, "
        f"install a supported release (vllm {releases.VLLM_RELEASES[0]} to "
        f"{releases.VLLM_RELEASES[-1]}, vllm-ascend {', '.join(releases.ASCEND_RELEASES)}), or "
        f"unset {TOGGLE}.",
    )
