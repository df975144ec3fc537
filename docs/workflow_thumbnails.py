"""`python docs/workflow_thumbnails.py [NAME ...]`: redraws workflows/*.jpg, of all graphs or of those named.

Graphs of the playground run on a real ComfyUI and show what came out; for the others, whose weights are not shipped, their
nodes are drawn. A band at the foot says what a graph needs.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from harness.commands import SERVER_NEEDS  # noqa: E402
from harness.environment import say  # noqa: E402
from harness.hosts import find_hosts, host_python  # noqa: E402
from harness.server import HostServer  # noqa: E402
from harness.server_client import ComfyClient, api_prompt, node_titled  # noqa: E402

FOLDER = ROOT / "workflows"
SIZE_PX, GAP_PX, LABEL_PX, HEAD_PX, FOOT_PX, QUALITY = 400, 8, 20, 40, 30, 85
PLACE_PX = SIZE_PX - FOOT_PX
INK, FAINT, LINE, PAPER = (40, 40, 40), (120, 120, 120), (150, 150, 150), (255, 255, 255)
# titles of output nodes, in rows
SHOWN = {
    "01-first-picture": (("style reference", "face reference"), ("picture",)),
    "01-first-picture.app": (("picture",),),
    "02-compare": (("text only", "+ style"), ("+ face", "+ style + face")),
    "03-object": (("object reference", "style reference"), ("pictures",)),
    "04-story": (("text only",), ("one character",)),
    "05-video": (("frames",),),
    "06-two-styles": (("first reference", "second reference"), ("averaged", "half each", "one, then other")),
    "07-gate-map": (("gates at timestep 900",), ("gates at timestep 100",)),
    "08-train-a-style": (("without the module", "with the module"), ("loss",)),
}
# what a graph with a node of this type needs, and the colour of the band that says it; the first one found counts
NEEDS = {
    "EMMALoadModule": ("needs a module that you train", (196, 122, 20)),
    "CheckpointLoaderSimple": ("needs public downloads", (52, 96, 168)),
    "EMMAPlayground": ("runs at once", (44, 128, 72)),
}
# node types that a drawing names -> the name, or None for the node's own title; the rest is left out
NAMED = {
    "LoadImage": None, "PrimitiveStringMultiline": None, "CLIPTextEncode": None, "EMMAPromptList": None,
    "EMMATrainModule": "Train EMMA Module", "EMMASaveModule": "Save EMMA Module", "EMMAEncodeReference": None,
    "EMMAAssembleModules": None,
    "EMMAConnector": "EMMA Connector", "KSampler": "KSampler", "Canny": "Canny", "ControlNetApplyAdvanced": "Apply ControlNet",
    "ADE_UseEvolvedSampling": "AnimateDiff-Evolved", "ConditioningSetAreaPercentage": None, "ConditioningCombine": "Combine",
    "SaveImage": "picture", "SaveAnimatedWEBP": "video", "EMMABlendReferences": "Blend References",
}
LEFT_OUT = "negative"
FILLS = {"EMMA": (226, 234, 250), "ADE_": (243, 228, 243), "Load": (250, 240, 214), "Prim": (225, 240, 222)}


def draw_results(name: str, workflow: Mapping[str, Any], url: str) -> Image.Image:
    """The pictures that a graph of the playground makes on a running server."""
    client = ComfyClient(url)
    prompt = api_prompt(workflow, client.object_info())
    outputs = client.run(prompt, timeout_s=1800)
    sheet = Image.new("RGB", (SIZE_PX, SIZE_PX), PAPER)
    draw, rows = ImageDraw.Draw(sheet), SHOWN[name]
    height = PLACE_PX // len(rows)
    for row, titles in enumerate(rows):
        width = SIZE_PX // len(titles)
        for column, title in enumerate(titles):
            images = outputs[node_titled(prompt, title)]["images"]
            pictures = [Image.open(io.BytesIO(client.picture(image))).convert("RGB") for image in images]
            box = (width - GAP_PX, height - GAP_PX - LABEL_PX)
            columns = max(range(1, len(pictures) + 1), key=lambda count: _scale(pictures, count, box))
            _paste_grid(sheet, pictures, columns, (column * width + GAP_PX // 2, row * height + GAP_PX // 2, *box))
            place = (column * width + width // 2, (row + 1) * height - LABEL_PX // 2)
            draw.text(place, title, fill=INK, font=ImageFont.load_default(13), anchor="mm")
    return sheet


def _scale(pictures: Sequence[Image.Image], columns: int, box: tuple[int, int]) -> float:
    """How large pictures of one size can be in a box (width, height), so many in a row."""
    rows = -(-len(pictures) // columns)
    return min(box[0] / (columns * pictures[0].width), box[1] / (rows * pictures[0].height))


def _paste_grid(sheet: Image.Image, pictures: Sequence[Image.Image], columns: int, box: tuple[int, int, int, int]) -> None:
    """Pictures of one size, row by row, in the middle of a box (left, top, width, height)."""
    left, top, width, height = box
    scale = _scale(pictures, columns, (width, height))
    across, down = (int(side * scale) for side in pictures[0].size)
    left += (width - columns * across) // 2
    top += (height - -(-len(pictures) // columns) * down) // 2
    for index, picture in enumerate(pictures):
        small = picture.resize((across, down), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + index % columns * across, top + index // columns * down))


def draw_nodes(name: str, workflow: Mapping[str, Any]) -> Image.Image:
    """The named nodes of a graph from top to bottom, those of one name as one box."""
    labels = {node["id"]: _label(node) for node in workflow["nodes"] if _label(node)}
    edges = {(labels[source], labels[target]) for source, target in _joined(workflow, set(labels))}
    edges = {edge for edge in edges if edge[0] != edge[1]}
    fills = {labels[node["id"]]: FILLS.get(node["type"][:4], (238, 238, 238)) for node in workflow["nodes"]
             if node["id"] in labels}
    rows = _rows(list(fills), edges)
    sheet = Image.new("RGB", (SIZE_PX, SIZE_PX), PAPER)
    draw, step = ImageDraw.Draw(sheet), (PLACE_PX - HEAD_PX) / len(rows)
    boxes = {}
    for row, members in enumerate(rows):
        width, middle = SIZE_PX / len(members), HEAD_PX + (row + 0.5) * step
        half = min(width - 2 * GAP_PX, 200) / 2
        for column, label in enumerate(members):
            centre = (column + 0.5) * width
            boxes[label] = (centre - half, middle - step * 0.32, centre + half, middle + step * 0.32)
    for source, target in sorted(edges):
        a, b = boxes[source], boxes[target]
        draw.line(((a[0] + a[2]) / 2, a[3], (b[0] + b[2]) / 2, b[1]), fill=LINE, width=2)
    for label, box in boxes.items():
        draw.rounded_rectangle(box, 6, fills[label], FAINT)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, label, fill=INK, font=_font_for(draw, label, box[2] - box[0]), anchor="mm")
    draw.text((SIZE_PX / 2, HEAD_PX / 2), _heading(workflow), fill=INK, font=ImageFont.load_default(18), anchor="mm")
    return sheet


def draw_foot(sheet: Image.Image, workflow: Mapping[str, Any]) -> None:
    """What the graph needs, on a band along the lower edge."""
    types = {node["type"] for node in workflow["nodes"]}
    text, colour = next(need for kind, need in NEEDS.items() if kind in types)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((0, PLACE_PX, SIZE_PX, SIZE_PX), colour)
    draw.text((SIZE_PX / 2, PLACE_PX + FOOT_PX / 2), text, fill=PAPER, font=ImageFont.load_default(17), anchor="mm")


def _label(node: Mapping[str, Any]) -> str:
    """What a drawing calls a node; empty for those that it leaves out."""
    title = node.get("title", node["type"]).partition(":")[0]
    passes_on = node["type"] == "CLIPTextEncode" and node["flags"].get("collapsed")  # a text that another node holds
    if node["type"] not in NAMED or title.startswith(LEFT_OUT) or passes_on:
        return ""
    return NAMED[node["type"]] or title


def _heading(workflow: Mapping[str, Any]) -> str:
    note = next(node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    return note["widgets_values"][0].partition("\n")[0].lstrip("# ")


def _joined(workflow: Mapping[str, Any], kept: set[int]) -> set[tuple[int, int]]:
    """Pairs of kept nodes that are linked, directly or through nodes that are left out."""
    after: dict[int, set[int]] = {}
    for _, source, _, target, *_ in workflow["links"]:
        after.setdefault(source, set()).add(target)

    def next_kept(node: int) -> set[int]:
        found = after.get(node, set())
        return (found & kept).union(*(next_kept(other) for other in found - kept))

    return {(source, target) for source in kept for target in next_kept(source)}


def _rows(labels: Sequence[str], edges: set[tuple[str, str]]) -> list[list[str]]:
    """Labels by the longest way to them; sources stand just above what they feed."""
    depth = dict.fromkeys(labels, 0)
    for _ in labels:
        for source, target in edges:
            depth[target] = max(depth[target], depth[source] + 1)
    for label in labels:
        if all(target != label for _, target in edges):
            depth[label] = min((depth[target] - 1 for source, target in edges if source == label), default=0)
    return [[label for label in labels if depth[label] == row] for row in sorted(set(depth.values()))]


def _font_for(draw: ImageDraw.ImageDraw, text: str, width: float):
    """The largest font that fits the text into a box of this width."""
    fonts = (ImageFont.load_default(size) for size in (14, 12, 10, 8))
    return next((font for font in fonts if draw.textlength(text, font) <= width - GAP_PX), ImageFont.load_default(8))


def main() -> None:
    """Draw them."""
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help="workflows to redraw (default: all)")
    parser.add_argument("--comfyui", metavar="DIR", action="append", default=[], help="run graphs in this ComfyUI")
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"no workflow {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    graphs = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in options.names or names}
    drawn = {name: draw_nodes(name, graph) for name, graph in graphs.items() if name not in SHOWN}
    if len(drawn) < len(graphs):
        hosts = find_hosts(options.comfyui)
        if not hosts:
            parser.error("no ComfyUI found to run graphs in: set COMFYUI_PATH to a ComfyUI folder, or pass --comfyui DIR")
        python = host_python(hosts[0], SERVER_NEEDS)
        with tempfile.TemporaryDirectory(prefix="emma-thumbnails-") as folder, HostServer(
            hosts[0], python, Path(folder)
        ) as server:
            drawn |= {name: draw_results(name, graphs[name], server.url) for name in graphs if name in SHOWN}
    for name, picture in drawn.items():
        draw_foot(picture, graphs[name])
        picture.save(FOLDER / f"{name}.jpg", quality=QUALITY)
        say(f"workflows/{name}.jpg")


if __name__ == "__main__":
    main()
