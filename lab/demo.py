"""`python -m lab.demo`: one sheet of prompts x {text only, + style, + face, + both}, from the shipped playground.

Bare, or (``--server URL``) by a ComfyUI server from workflows/02-compare.json. Both take the same path in numbers: the
same noise, timesteps and steps.
"""

import argparse
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from emma_core.drawing.contact_sheet import SheetRow, draw_contact_sheet
from emma_core.files.picture_file import open_picture, picture_tensor
from emma_core.playground import PLAYGROUND_DIR

WORKFLOW = PLAYGROUND_DIR.parent / "workflows" / "02-compare.json"
COLUMNS = ("style reference", "face reference", "text only", "+ style", "+ face", "+ style + face")
VARIANTS = {"text only": (), "+ style": ("style",), "+ face": ("face",), "+ style + face": ("style", "face")}


@dataclass(frozen=True)
class DemoRow:
    """One prompt with its reference pictures (names in playground/references)."""

    prompt: str
    style: str
    face: str
    seed: int


ROWS = (
    DemoRow("man cook", "style-fluent-emoji-flat", "face-medium-light", 0),
    DemoRow("santa", "style-fluent-emoji", "face-light", 5),
    DemoRow("woman firefighter", "style-fluent-emoji", "face-light", 103),
    DemoRow("vampire", "style-twemoji", "face-medium", 15),
    DemoRow("woman police officer", "style-fluent-emoji-flat", "face-medium-dark", 100),
)


def shown(name: str) -> torch.Tensor:
    """A shipped reference picture (1, H, W, 3) in [0, 1]."""
    return picture_tensor(open_picture(PLAYGROUND_DIR / "references" / f"{name}.png"))


def bare_pictures(rows=ROWS) -> list[list[torch.Tensor]]:
    """Pictures (H, W, 3) of each row's variants, without ComfyUI."""
    from emma_core.base.pipeline import Request, generate
    from emma_core.model.addition import ADDITIONS, RECOMMENDED
    from emma_core.model.assembly import Assembly

    from .playground.world import load_world

    world = load_world()
    requests = []
    for row in rows:
        references = {kind: world.encode_reference(kind, shown(getattr(row, kind)))
                      for kind in ("style", "face")}
        requests += [Request(row.prompt, Assembly([references[kind] for kind in kinds], ADDITIONS[RECOMMENDED]), seed=row.seed)
                     for kinds in VARIANTS.values()]
    images_BHW3 = generate(world.pipeline, requests)
    return [list(part) for part in images_BHW3.split(len(VARIANTS))]


def server_pictures(url: str, rows=ROWS) -> list[list[torch.Tensor]]:
    """The same by a ComfyUI server from the shipped workflow."""
    from harness.server_client import ComfyClient, api_prompt, node_titled

    client = ComfyClient(url)
    prompt = api_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), client.object_info())
    pictures = []
    for row in rows:
        prompt[node_titled(prompt, "prompt")]["inputs"]["text"] = row.prompt
        prompt[node_titled(prompt, "style reference")]["inputs"]["picture"] = row.style
        prompt[node_titled(prompt, "face reference")]["inputs"]["picture"] = row.face
        for node in prompt.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["seed"] = row.seed
        outputs = client.run(prompt)
        files = [client.picture(outputs[node_titled(prompt, variant)]["images"][0]) for variant in VARIANTS]
        pictures.append([picture_tensor(open_picture(io.BytesIO(file)))[0] for file in files])
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("emma-demo.png"), help="picture to write (default: %(default)s)")
    parser.add_argument("--server", metavar="URL", help="a running ComfyUI with this pack, for instance http://127.0.0.1:8188")
    options = parser.parse_args()
    started = time.monotonic()
    pictures = server_pictures(options.server) if options.server else bare_pictures()
    sheet = demo_sheet(pictures, "ComfyUI" if options.server else "emma_core alone")
    sheet.save(options.out)
    print(f"{options.out}: {len(ROWS)} prompts x {len(VARIANTS)} in {time.monotonic() - started:.1f} s")


def demo_sheet(pictures: list[list[torch.Tensor]], made_by: str, rows=ROWS):
    """The labelled sheet (a PIL image)."""
    sheet_rows = [
        SheetRow(f'"{row.prompt}"', [shown(row.style)[0], shown(row.face)[0], *variants])
        for row, variants in zip(rows, pictures, strict=True)
    ]
    return draw_contact_sheet(COLUMNS, sheet_rows, references=2, footer=f"EMMA playground, made by {made_by}")


if __name__ == "__main__":
    main()
