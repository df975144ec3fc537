"""`python -m emma_core train`: flags for every key of the configuration, presets, dry run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from ..base.found_files import with_found_files
from ..errors import EmmaError
from ..files.comfyui_folders import find_comfyui
from ..settings import read_toml
from ..training.config import TrainConfig, resolve
from ..training.presets import PRESETS
from .flags import add_comfyui, add_keys, changes_of, end_as_interrupt

_EPILOG = """examples:
  python -m emma_core train --preset small-card --data.folder pictures --output.folder run     (on the playground)
  python -m emma_core train --preset sdxl-12gb --data.folder pictures --output.folder run \\
      --base.checkpoint sd_xl_base_1.0.safetensors --encoder.file CLIP-ViT-H-14-laion2B-s32B-b79K        (no ELLA)
  python -m emma_core train my.toml --train.steps 4000
  python -m emma_core train ella my.toml
  accelerate launch -m emma_core train my.toml                                                  (several GPUs)

A run that was stopped goes on when it is started again with the same output folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`; each key of the configuration is a flag."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.usage = "%(prog)s [ella] [CONFIG.toml] [--preset NAME] [--dry-run] [--section.key VALUE ...]"
    parser.add_argument("words", nargs="*", metavar="[ella] [CONFIG.toml]",
                        help="`ella` to train the connector itself; a configuration file")
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="defaults to begin with: the paper's recipe; one for a small card and few pictures; `distil`, to "
                             "learn what an IP-Adapter or a LoRA does, without captioned pictures; and the second one on a "
                             "checkpoint's own tokens (no ELLA), for cards of 8 GB with SD1.5 and 12 GB with SDXL "
                             "(default: paper, or the file's `preset`)")
    parser.add_argument("--dry-run", action="store_true", help="check everything: files, data, disk; tell memory and time by a "
                                                               "trial of two updates; exit with 1 if something stops it")
    parser.add_argument("--device", default="", choices=["", "cpu"], help="cpu: leave GPUs alone")
    add_comfyui(parser)
    add_keys(parser, TrainConfig)


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments name.

    Raises:
        SettingsError: see `resolve` and `with_found_files`.
    """
    words = list(options.words)
    what = words.pop(0) if words[:1] == ["ella"] else None
    given: dict[str, Any] = read_toml(words[0]) if words else {}
    preset, changes = options.preset or given.get("preset", "paper"), changes_of(options)
    comfyui, strict = find_comfyui(options.comfyui), not options.dry_run
    named = with_found_files(resolve(given, preset, changes), comfyui, strict)
    # once more, as the checkpoint that was found decides the side of pictures
    config = with_found_files(resolve(given, preset, {**changes, "base.checkpoint": named.base.checkpoint}), comfyui, strict)
    return dataclasses.replace(config, what=what) if what else config


def run(options: argparse.Namespace) -> int:
    """Run it; mistakes are told in one line, and Ctrl-C leaves a run that can go on."""
    from ..training import runs
    from ..training.dry_run import dry_run
    from ..training.saved import Sitting
    from ..training.shards import disconnect

    end_as_interrupt()
    well, sitting = False, None
    try:
        config = config_of(options)
        if options.dry_run:
            return 0 if dry_run(config, print, sys.stderr.isatty(), options.device) else 1
        sitting = Sitting(config)
        print(f"saved {runs.run(config, print, bars=sys.stderr.isatty(), device=options.device)}")
        well = True
        return 0
    except EmmaError as found:
        print(f"error: {found}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(sitting.ended_early() if sitting else "stopped; nothing was written", file=sys.stderr)
        return 130
    finally:
        disconnect(well)
