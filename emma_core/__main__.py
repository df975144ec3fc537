"""`python -m emma_core`, or `emma` where it is installed: draw pictures; train modules, judge them, inspect them."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

_COMMANDS = {
    "generate": "draw pictures from prompts and references", "train": "train an EMMA module, or an ELLA connector",
    "eval": "judge modules on prompts x references, by CLIP and DINO",
    "calibrate": "say in a module's file which strength of it strength 1 stands for",
    "inspect": "print what a module says of itself, draw its gate map",
    "card": "make a folder to share a module with: its file, a model card, pictures, scores",
}
_HOME = {"eval": "evaluate"}  # where the module has another name than the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Only what the command needs is imported: drawing does without the trainer."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt or a file's name may be more than the terminal or the pipe can show
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a run's log is read while it runs
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog=_called_as(), description="EMMA modules without ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=explained) for name, explained in _COMMANDS.items()}
    chosen = next(iter(arguments), "")
    if chosen not in parsers:
        parser.parse_args(arguments)  # help, or a word that is no command: ends here
        parser.error(f"the command comes first: {', '.join(parsers)}")
    command = import_module(f".commands.{_HOME.get(chosen, chosen)}", __package__)
    command.add_arguments(parsers[chosen])
    return command.run(parser.parse_args(arguments))


def _called_as() -> str:
    called = Path(sys.argv[0]).stem
    return called if called == "emma" else "python -m emma_core"


if __name__ == "__main__":
    sys.exit(main())
