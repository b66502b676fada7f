"""What the processes that vLLM starts need from the environment: `VLLM_PLUGINS`, Ray."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

from ..settings import VARIABLES

PLUGIN = "oproj_patch"
RAY_EXTRA = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def add_to_vllm_plugins(environ: MutableMapping[str, str]) -> Callable[[], None]:
    """Add us to `VLLM_PLUGINS`, which filters plugins by name, if it is set; return the undo."""
    before = environ.get("VLLM_PLUGINS")
    # Empty means "no plugin at all", which is a filter too.
    if before is None or PLUGIN in before.split(","):
        return lambda: None
    environ["VLLM_PLUGINS"] = ",".join([*filter(None, before.split(",")), PLUGIN])
    return lambda: environ.update(VLLM_PLUGINS=before)


def add_to_ray(environ: MutableMapping[str, str]) -> Callable[[], None]:
    """Make vLLM copy our variables to Ray workers; return what removes them, and nothing else.

    vLLM copies what its platform's `additional_env_vars` (0.9.1 to 0.18) or the variable
    `VLLM_RAY_EXTRA_ENV_VARS_TO_COPY` names (since 0.17; older ones do not know it).
    """
    from vllm import envs
    from vllm.platforms import current_platform

    before = environ.get(RAY_EXTRA)
    present = before.split(",") if before else []
    ours: list[str] = []
    if RAY_EXTRA in envs.environment_variables:
        ours = [name for name in VARIABLES if name not in present]
        environ[RAY_EXTRA] = ",".join(present + ours)
    copied = getattr(current_platform, "additional_env_vars", None)
    names = copied if isinstance(copied, list) else []
    added = [name for name in VARIABLES if name not in names]
    names.extend(added)

    def undo() -> None:
        for name in set(added).intersection(names):  # others may have added theirs since
            names.remove(name)
        left = [name for name in environ.get(RAY_EXTRA, "").split(",") if name not in ours]
        environ[RAY_EXTRA] = ",".join(left)
        if before is None and not any(left):
            del environ[RAY_EXTRA]

    return undo
