"""`python -m emma_core`: draw pictures; train modules, judge them, inspect them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    from . import inspection, picture_command
    from .evaluation import command as evaluation
    from .training import command

    parser = argparse.ArgumentParser(prog="python -m emma_core", description="EMMA modules without ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)
    picture_command.add_arguments(commands.add_parser("generate", help="draw pictures from prompts and references"))
    command.add_arguments(commands.add_parser("train", help="train an EMMA module, or an ELLA connector"))
    evaluation.add_arguments(commands.add_parser("eval", help="judge modules on prompts x references, by CLIP and DINO"))
    inspection.add_arguments(commands.add_parser("inspect", help="print what a module says of itself, draw its gate map"))
    options = parser.parse_args(arguments)
    run = {"generate": picture_command.generate, "train": command.train, "eval": evaluation.evaluate,
           "inspect": inspection.inspect}[options.command]
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
