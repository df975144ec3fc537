"""`python -m emma_core`: train modules, inspect them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    from . import inspection
    from .training import command

    parser = argparse.ArgumentParser(prog="python -m emma_core", description="EMMA modules without ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)
    command.add_arguments(commands.add_parser("train", help="train an EMMA module, or an ELLA connector"))
    inspection.add_arguments(commands.add_parser("inspect", help="print what a module says of itself, draw its gate map"))
    options = parser.parse_args(arguments)
    return {"train": command.train, "inspect": inspection.inspect}[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
