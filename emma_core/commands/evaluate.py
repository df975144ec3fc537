"""`python -m emma_core eval CONFIG.toml`: a flag for every key of the configuration."""

from __future__ import annotations

import argparse
import sys

from ..base.found_files import with_found_files
from ..errors import EmmaError
from ..evaluation.config import EvalConfig, resolve_evaluation
from ..files.comfyui_folders import find_comfyui
from ..settings import read_toml
from .flags import add_comfyui, add_keys, changes_of, end_as_interrupt

_EPILOG = """examples:
  python -m emma_core eval my.toml
  python -m emma_core eval my.toml --modules.strengths 0.5 1 1.5
  python -m emma_core eval playground/recipes/evaluate.toml        (on the playground: needs no other file)

An evaluation that was stopped goes on when it is started again with the same output folder. Nothing is downloaded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eval`; each key of the configuration is a flag."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.usage = "%(prog)s [CONFIG.toml] [--section.key VALUE ...]"
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="a configuration file; flags win over it")
    parser.add_argument("--device", default="", choices=["", "cpu"], help="cpu: leave GPUs alone")
    add_comfyui(parser)
    add_keys(parser, EvalConfig)


def config_of(options: argparse.Namespace) -> EvalConfig:
    """The configuration that the arguments name.

    Raises:
        SettingsError: see `resolve_evaluation` and `with_found_files`.
    """
    config = resolve_evaluation(read_toml(options.config) if options.config else {}, changes_of(options))
    return with_found_files(config, find_comfyui(options.comfyui))


def run(options: argparse.Namespace) -> int:
    """Run it; mistakes are told in one line, and Ctrl-C leaves an evaluation that can go on."""
    from ..evaluation import runs

    end_as_interrupt()
    try:
        print(f"results: {runs.run(config_of(options), print, bars=sys.stderr.isatty(), device=options.device)}")
        return 0
    except EmmaError as found:
        print(f"error: {found}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; finished pictures and scores are kept. Start again with the same folder to go on.", file=sys.stderr)
        return 130
