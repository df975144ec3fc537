"""`python -m lab.miniature.strangers --out FOLDER`: twenty pictures of the shipped playground for someone to name by eye.

The prompts are drawn from the everyday things and the roles of people. `blind.png` has numbers alone, `named.png` and
`key.json` have the prompts: look at the first, write the names down, then open the others.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from emma_core.base.pipeline import Request, generate
from emma_core.drawing.contact_sheet import SheetRow, draw_contact_sheet
from emma_core.playground.words import known_words

from ..playground.world import load_world
from .concepts import EVERYDAY

COUNT, COLUMNS = 20, 5


def prompts_of(seed: int, count: int = COUNT) -> list[str]:
    """Usual names of everyday things and of people in roles."""
    things = known_words().things
    everyday = {name for names in EVERYDAY.values() for name in names}
    people = [name for name in things["People & Body"] if name.split()[0] in ("woman", "man") and len(name.split()) == 2]
    names = sorted({name for names in things.values() for name in names if name in everyday} | set(people))
    return random.Random(seed).sample(names, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = prompts_of(options.seed)
    pictures = list(generate(load_world().pipeline, [Request(prompt, seed=seed) for seed, prompt in enumerate(prompts)]))
    (options.out / "key.json").write_text(json.dumps(dict(enumerate(prompts, 1)), indent=1) + "\n", encoding="utf-8")
    blind, named = [], []
    for start in range(0, len(prompts), COLUMNS):
        row, shown = prompts[start:start + COLUMNS], pictures[start:start + COLUMNS]
        blind.append(SheetRow(f"{start + 1} to {start + len(row)}", shown))
        named.append(SheetRow(", ".join(row), shown))
    titles = [""] * COLUMNS
    for name, rows in (("blind", blind), ("named", named)):
        draw_contact_sheet(titles, rows, 0, "EMMA playground, words alone").save(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
