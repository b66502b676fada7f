"""Have tox install torch and what needs it through `tools/install.py`, and show what that says.

`install_command` of tox.ini would do the first, but tox shows its output only when it fails.
"""

from __future__ import annotations

from typing import Any

from tox.execute.request import StdinSource
from tox.plugin import impl
from tox.tox_env.api import ToxEnv
from tox.tox_env.python.pip.req_file import PythonDeps


@impl
def tox_on_install(tox_env: ToxEnv, arguments: Any, section: str, of_type: str) -> None:
    """Install the dependencies of an environment that needs torch; tox then finds them there."""
    requirements = arguments.as_root_args if isinstance(arguments, PythonDeps) else []
    if any(requirement.startswith("torch==") for requirement in requirements):
        command = ["python", "tools/install.py", *requirements]
        tox_env.execute(command, StdinSource.OFF, show=True, run_id="install").assert_success()
