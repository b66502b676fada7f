"""What a seam is, and the applier: resolve all, then wrap all, or put everything back."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import releases
from ..errors import OprojError


@dataclass(frozen=True)
class Seam:
    """One patched symbol of a host.

    module, path: where it is, e.g. `vllm.config` and `VllmConfig.compute_hash`.
    wrapper: called as wrapt calls it: (wrapped, instance, args, kwargs).
    parameters: names the symbol's signature must have (drift check).
    why, lower, unpatched, upstream, remove: the inventory row: why it is needed; why this
        seam and not one lower; what happens without it; where it was read; when it can go.
    optional: a release may lack the symbol.
    since, until: first and last release of the host with the symbol; empty: no such end.
    """

    module: str
    path: str
    wrapper: Callable[..., Any]
    parameters: tuple[str, ...]
    why: str
    lower: str
    unpatched: str
    upstream: str
    remove: str
    optional: bool = False
    since: str = ""
    until: str = ""

    @property
    def symbol(self) -> str:
        return f"{self.module}.{self.path}"


@dataclass(frozen=True)
class Installed:
    """A wrapped symbol and what undoes it."""

    seam: Seam
    parent: Any
    attribute: str
    original: Any
    inherited: bool

    def undo(self) -> None:
        if self.inherited:
            delattr(self.parent, self.attribute)
        else:
            setattr(self.parent, self.attribute, self.original)


def resolve(seam: Seam, host: str) -> tuple[Any, str, Any] | None:
    """(parent, attribute name, original) of a seam; None for an optional one that is absent.

    host: name and version for the message. Raises OprojError when the symbol is missing or
    its signature lacks a parameter the wrapper relies on.
    """
    import wrapt

    try:
        module = importlib.import_module(seam.module)
        parent, attribute, original = wrapt.resolve_path(module, seam.path)
    except (ModuleNotFoundError, AttributeError) as error:
        if seam.optional and _is_absent(error, seam):
            return None
        raise _drift(seam, host, f"cannot be found ({type(error).__name__}: {error})") from error
    found = inspect.signature(inspect.unwrap(getattr(parent, attribute))).parameters
    lacking = [name for name in seam.parameters if name not in found]
    if lacking:
        raise _drift(seam, host, f"has no parameter {', '.join(lacking)}, only {', '.join(found)}")
    return parent, attribute, original


def install(seams: Sequence[Seam], host: str) -> list[Installed]:
    """Wrap every seam; on any error nothing is wrapped. Raises OprojError as `resolve` does."""
    import wrapt

    targets = [(seam, found) for seam in seams if (found := resolve(seam, host)) is not None]
    done: list[Installed] = []
    try:
        for seam, (parent, attribute, original) in targets:
            inherited = inspect.isclass(parent) and attribute not in vars(parent)
            wrapt.apply_patch(parent, attribute, wrapt.FunctionWrapper(original, seam.wrapper))
            done.append(Installed(seam, parent, attribute, original, inherited))
    except BaseException:
        undo(done)
        raise
    return done


def undo(installed: Sequence[Installed]) -> None:
    """Put the originals back, last first."""
    for entry in reversed(installed):
        entry.undo()


def source(module: str, path: str) -> str:
    """The file in which `path` of `module` is, or was: the nearest there is."""
    while module not in sys.modules and "." in module:
        module, path = module.rpartition(".")[0], ""
    owner = vars(sys.modules[module]).get(path.partition(".")[0]) if module in sys.modules else None
    # A package may only re-export the class.
    defined_in = getattr(owner, "__module__", None)
    for name in (defined_in, module):
        file = getattr(sys.modules.get(name or ""), "__file__", None)
        if file is not None:
            return str(file)
    return f"{module.replace('.', '/')}.py"


def _is_absent(error: Exception, seam: Seam) -> bool:
    """Whether the symbol itself is absent, and not something its module failed to import."""
    if isinstance(error, ModuleNotFoundError):
        return bool(error.name) and f"{seam.module}.".startswith(f"{error.name}.")
    return True


def _drift(seam: Seam, host: str, what: str) -> OprojError:
    return OprojError(
        "OPROJ008",
        f"{seam.symbol} of {host} {what}; oproj_patch needs it to "
        f"{seam.why[0].lower()}{seam.why[1:].rstrip('.')}: see {source(seam.module, seam.path)}, "
        f"install a supported release (vllm {releases.VLLM_RELEASES[0]} to "
        f"{releases.VLLM_RELEASES[-1]}, vllm-ascend {', '.join(releases.ASCEND_RELEASES)}), or "
        "unset OPROJ_TENSOR_PARALLEL_SIZE.",
    )
