"""`oproj-patch`, also `python -m oproj_patch`: plan, doctor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import OprojError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    from . import doctor, plan

    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["demo"]:
        told = "the demo is not part of the installed package: run `tox -e demo` in a checkout"
        print(f"oproj-patch: {told} of the project", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        prog="oproj-patch",
        description="Shard vLLM's attention output projection over data-parallel ranks.",
    )
    parser.add_argument("--version", action="version", version=f"oproj_patch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (plan, doctor):
        module.add_parser(commands)
    args = parser.parse_args(arguments)
    try:
        code: int = args.func(args)
        sys.stdout.flush()
    except OprojError as error:
        print(f"oproj-patch: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The interpreter flushes once more on its way out, into the same closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for a program that SIGPIPE ended
    except KeyboardInterrupt:
        return 130
    return code
