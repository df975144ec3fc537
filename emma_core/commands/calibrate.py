"""`python -m emma_core calibrate FILE STRENGTH`: which strength of a module a user's strength 1 stands for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import EmmaError
from ..files.module_file import write_calibration
from .flags import add_comfyui, find_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `calibrate`."""
    parser.add_argument("file", type=Path, help="an EMMA module; it is written again with the strength in its metadata")
    parser.add_argument("strength", type=float, help="the strength, of what was trained, that does best; 1 is as trained")
    parser.add_argument("--by", default="", metavar="WORDS", help="how it was found, for whoever inspects the file")
    add_comfyui(parser)


def run(options: argparse.Namespace) -> int:
    """Write it; mistakes are told in one line."""
    try:
        options = find_files(options)
        write_calibration(options.file, {"strength": options.strength, **({"by": options.by} if options.by else {})})
        print(f"{options.file}: strength 1 stands for {options.strength:g} of what was trained")
        return 0
    except EmmaError as found:
        print(f"error: {found}", file=sys.stderr)
        return 1
