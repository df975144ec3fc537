"""`python -m lab.emoji build --out DIR [--packages NODE_MODULES] [--unseen]`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .dataset import build
from .icons import install_packages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.emoji", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="render the emoji people and write images, index and card")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--packages", type=Path, help="a node_modules folder; without it npm installs into OUT/npm")
    command.add_argument("--unseen", action="store_true",
                         help="also OpenMoji (CC-BY-SA-4.0), a style that nothing learns from: to evaluate, with its own judge")
    options = parser.parse_args()
    packages = options.packages or install_packages(options.out / "npm")
    card = build(packages, options.out, unseen=options.unseen)
    shown = {key: card[key] for key in ("pictures", "per_vendor", "per_tone", "per_split")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
