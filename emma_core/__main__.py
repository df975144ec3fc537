"""`python -m emma_core`: draw pictures; train modules, judge them, inspect them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    from .commands import evaluate, generate, inspect, train

    parser = argparse.ArgumentParser(prog="python -m emma_core", description="EMMA modules without ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate.add_arguments(commands.add_parser("generate", help="draw pictures from prompts and references"))
    train.add_arguments(commands.add_parser("train", help="train an EMMA module, or an ELLA connector"))
    evaluate.add_arguments(commands.add_parser("eval", help="judge modules on prompts x references, by CLIP and DINO"))
    inspect.add_arguments(commands.add_parser("inspect", help="print what a module says of itself, draw its gate map"))
    options = parser.parse_args(arguments)
    run = {"generate": generate.generate, "train": train.train, "eval": evaluate.evaluate,
           "inspect": inspect.inspect}[options.command]
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
