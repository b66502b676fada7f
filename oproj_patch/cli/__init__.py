"""`oproj-patch`, also `python -m oproj_patch`: demo, plan, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import OprojError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from . import demo, plan

    parser = argparse.ArgumentParser(
        prog="oproj-patch",
        description="Shard vLLM's attention output projection over data-parallel ranks.",
    )
    parser.add_argument("--version", action="version", version=f"oproj_patch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (demo, plan):
        module.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        code: int = args.func(args)
    except OprojError as error:
        print(f"oproj-patch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code
