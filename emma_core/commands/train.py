"""`python -m emma_core train`: flags for every key of the configuration, presets, dry run."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from typing import Any, get_origin, get_type_hints

from ..errors import EmmaError
from ..training.config import PRESETS, TrainConfig, read_toml, resolve, sections

_EPILOG = """examples:
  python -m emma_core train --preset small-card --data.folder pictures --output.folder run     (on the playground)
  python -m emma_core train my.toml --train.steps 4000
  python -m emma_core train ella my.toml
  accelerate launch -m emma_core train my.toml                                                  (several GPUs)

A run that was stopped goes on when it is started again with the same output folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`; each key of the configuration is a flag."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.usage = "python -m emma_core train [ella] [CONFIG.toml] [--preset NAME] [--dry-run] [--section.key VALUE ...]"
    parser.add_argument("words", nargs="*", metavar="[ella] [CONFIG.toml]",
                        help="`ella` to train the connector itself; a configuration file")
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="defaults to begin with: the paper's recipe, or one for a small card and few pictures (default: "
                             "paper, or the file's `preset`)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be trained on and every problem in the data")
    parser.add_argument("--device", default="", choices=["", "cpu"], help="cpu: leave GPUs alone")
    add_keys(parser, TrainConfig)


def add_keys(parser: argparse.ArgumentParser, of: type) -> None:
    """A flag `--section.key` for each key of a class of configurations."""
    for section, kind in sections(of).items():
        group = parser.add_argument_group(section, (kind.__doc__ or "").splitlines()[0])
        hints = get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            group.add_argument(f"--{section}.{entry.name}", dest=f"{section}.{entry.name}", default=None,
                               **_flag(hints[entry.name], entry))


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given: `section.key` -> value."""
    return {path: tuple(value) if isinstance(value, list) else value
            for path, value in vars(options).items() if "." in path and value is not None}


def end_as_interrupt() -> None:
    """Let SIGTERM, which is how clusters and timeouts end a run, do what Ctrl-C does."""
    def stop(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments name.

    Raises:
        TrainingConfigError: see `resolve`.
    """
    words = list(options.words)
    what = words.pop(0) if words[:1] == ["ella"] else None
    given: dict[str, Any] = read_toml(words[0]) if words else {}
    config = resolve(given, options.preset or given.get("preset", "paper"), changes_of(options))
    return dataclasses.replace(config, what=what) if what else config


def train(options: argparse.Namespace) -> int:
    """Run it; mistakes are told in one line, and Ctrl-C leaves a run that can go on."""
    from ..training.runs import dry_run, run
    from ..training.shards import disconnect

    end_as_interrupt()
    well = False
    try:
        config = config_of(options)
        if options.dry_run:
            print(dry_run(config))
            return 0
        print(f"saved {run(config, print, bars=sys.stderr.isatty(), device=options.device)}")
        well = True
        return 0
    except EmmaError as found:
        print(f"error: {found}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the module as it is and a checkpoint are saved. Start again with the same folder to go on.",
              file=sys.stderr)
        return 130
    finally:
        disconnect(well)


def _flag(kind: Any, entry: dataclasses.Field) -> dict[str, Any]:
    default = entry.default if entry.default not in ("", ()) else None
    explain = entry.metadata["help"].replace("%", "%%") + (f" (default: {default})" if default is not None else "")
    if get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "TEXT", "help": explain}
    if kind is bool:
        return {"type": _boolean, "metavar": "true|false", "help": explain}
    choices: Sequence[str] | None = entry.metadata.get("choices")
    if choices:
        return {"choices": list(choices), "help": explain}
    return {"type": kind, "metavar": kind.__name__.upper(), "help": explain}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}; wanted true or false")
    return text.lower() == "true"
