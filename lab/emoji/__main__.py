"""`python -m lab.emoji build --out DIR [--packages NODE_MODULES] [--unseen]`: the emoji world's data.
`python -m lab.emoji practice --out DIR [--packages NODE_MODULES]`: pictures to try the trainer with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .dataset import build
from .icons import install_packages
from .practice import COUNT, write_practice_pictures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.emoji", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="render the emoji people and write images, index and card")
    practice = commands.add_parser("practice", help=f"write {COUNT} captioned pictures of one emoji set, for the trainer")
    for each in (command, practice):
        each.add_argument("--out", type=Path, required=True)
        each.add_argument("--packages", type=Path, help="a node_modules folder; without it npm installs beside the pictures")
    command.add_argument("--unseen", action="store_true",
                         help="also OpenMoji (CC-BY-SA-4.0), a style that nothing learns from: to evaluate, with its own judge")
    options = parser.parse_args()
    if options.command == "practice":
        packages = options.packages or install_packages(options.out.with_name(f"{options.out.name}-npm"))
        print(f"{len(write_practice_pictures(packages, options.out))} pictures and their texts in {options.out}")
        return
    packages = options.packages or install_packages(options.out / "npm")
    card = build(packages, options.out, unseen=options.unseen)
    shown = {key: card[key] for key in ("pictures", "per_vendor", "per_tone", "per_split")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
