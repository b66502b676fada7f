"""Have tox install torch and what needs it through `tools/install.py`, and show what that says.

`install_command` of tox.ini would do the first, but tox shows its output only when it fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tox.execute.request import StdinSource
from tox.plugin import impl
from tox.tox_env.api import ToxEnv


@impl
def tox_on_install(tox_env: ToxEnv, arguments: Any, section: str, of_type: str) -> None:
    """Install the dependencies of an environment that needs torch; tox then finds them there."""
    if of_type != "deps" or not any(r.startswith("torch==") for r in arguments.as_root_args):
        return
    script = Path(__file__).parent / "tools" / "install.py"
    command = ["python", str(script), *arguments.as_root_args]
    tox_env.execute(command, StdinSource.OFF, show=True, run_id="install").assert_success()
