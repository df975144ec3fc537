"""`python docs/compatibility_pictures.py`: redraws docs/compatibility.jpg, the playground beside ComfyUI's own nodes.

Each picture is a graph that runs on a real ComfyUI: the same prompt, seed, style and face reference, and one thing more.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from harness.commands import SERVER_NEEDS  # noqa: E402
from harness.environment import say  # noqa: E402
from harness.hosts import find_hosts, host_python  # noqa: E402
from harness.server import HostServer  # noqa: E402
from harness.server_client import ComfyClient  # noqa: E402

PROMPT, STYLE = "man cook", "style-fluent-emoji-flat"
FACE, OTHER_FACE, OTHER_PICTURE = "face-light", "face-dark", "style-twemoji"
SIDE_PX, SEED, STEPS, GUIDANCE = 128, 11, 20, 4.0
INPAINTED_PX = 104
SHOWN_PX, LABEL_PX, GAP_PX, COLUMNS, QUALITY = 176, 34, 10, 5, 88
MODEL, CLIP, VAE, ELLA, STYLE_MODULE, FACE_MODULE, ENCODER = range(7)
Wire = list[Any]


@dataclass
class Graph:
    """A prompt in the server's API format that grows node by node."""

    nodes: dict[str, dict] = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Any) -> str:
        """A new node; its id."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}
        return number

    def wire(self, class_type: str, **inputs: Any) -> Wire:
        """The first output of a new node."""
        return [self.add(class_type, **inputs), 0]


@dataclass(frozen=True)
class Connected:
    """What EMMA Connector gives in a graph."""

    graph: Graph
    playground: str
    model: Wire
    positive: Wire
    negative: Wire

    def latent(self) -> Wire:
        return self.graph.wire("EmptyLatentImage", width=SIDE_PX, height=SIDE_PX, batch_size=1)

    def sampled(self, **changed: Any) -> Wire:
        """KSampler with these inputs exchanged."""
        inputs = {"model": self.model, "positive": self.positive, "negative": self.negative, "seed": SEED, "steps": STEPS,
                  "cfg": GUIDANCE, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0, **changed}
        if "latent_image" not in inputs:
            inputs["latent_image"] = self.latent()
        return self.graph.wire("KSampler", **inputs)

    def with_other_face(self) -> Wire:
        """The positive of one more EMMA Connector, with the other face reference."""
        return connect(self.graph, self.playground, OTHER_FACE)[1]


def connect(graph: Graph, playground: str, face: str) -> tuple[Wire, Wire, Wire]:
    """MODEL, positive and negative with both references."""
    assembly: dict[str, Wire] = {}
    for module, picture in ((STYLE_MODULE, STYLE), (FACE_MODULE, face)):
        image = graph.wire("EMMAPlaygroundPicture", picture=picture)
        reference = graph.wire("EMMAEncodeReference", module=[playground, module], encoder=[playground, ENCODER], image=image,
                               combine="concat")
        assembly = {"assembly": graph.wire("EMMAAssembleModules", module=[playground, module], reference=reference,
                                           strength=1.0, start_percent=0.0, end_percent=1.0, **assembly)}
    texts = [graph.wire("CLIPTextEncode", clip=[playground, CLIP], text=text) for text in (PROMPT, "")]
    connector = graph.add("EMMAConnector", model=[playground, MODEL], ella=[playground, ELLA], positive=texts[0],
                          negative=texts[1], **assembly)
    return [connector, 0], [connector, 1], [connector, 2]


def patched(class_type: str, **inputs: Any) -> Callable[[Connected], Wire]:
    """A stock node on the connector's MODEL."""
    return lambda connected: connected.sampled(model=connected.graph.wire(class_type, model=connected.model, **inputs))


def from_picture(connected: Connected) -> Wire:
    image = connected.graph.wire("EMMAPlaygroundPicture", picture=OTHER_PICTURE)
    latent = connected.graph.wire("VAEEncode", pixels=image, vae=[connected.playground, VAE])
    return connected.sampled(latent_image=latent, denoise=0.7)


def rectangle(graph: Graph, x: int, width: int, height: int) -> Wire:
    """A mask, white in a rectangle at the upper edge."""
    whole = graph.wire("SolidMask", value=0.0, width=SIDE_PX, height=SIDE_PX)
    part = graph.wire("SolidMask", value=1.0, width=width, height=height)
    return graph.wire("MaskComposite", destination=whole, source=part, x=x, y=0, operation="add")


def inpainted(connected: Connected) -> Wire:
    """A person with the other face reference, whose upper part is then made anew with ours."""
    graph = connected.graph
    other = connected.with_other_face()
    mask = rectangle(graph, 0, SIDE_PX, INPAINTED_PX)
    before = connected.sampled(positive=other)
    return connected.sampled(latent_image=graph.wire("SetLatentNoiseMask", samples=before, mask=mask))


def two_masks(connected: Connected) -> Wire:
    """The same prompt with the other face reference in the right half."""
    graph = connected.graph
    other = connected.with_other_face()
    masked = [graph.wire("ConditioningSetMask", conditioning=positive, mask=rectangle(graph, x, SIDE_PX // 2, SIDE_PX),
                         strength=1.0, set_cond_area="default")
              for positive, x in ((connected.positive, 0), (other, SIDE_PX // 2))]
    both = graph.wire("ConditioningCombine", conditioning_1=masked[0], conditioning_2=masked[1])
    return connected.sampled(positive=both)


def split_sampling(connected: Connected) -> Wire:
    """Two KSamplerAdvanced, one after the other."""
    graph, common = connected.graph, {"noise_seed": SEED, "steps": STEPS, "cfg": GUIDANCE, "sampler_name": "ddim",
                                      "scheduler": "ddim_uniform", "model": connected.model, "positive": connected.positive,
                                      "negative": connected.negative}
    first = graph.wire("KSamplerAdvanced", add_noise="enable", latent_image=connected.latent(), start_at_step=0,
                       end_at_step=STEPS // 2, return_with_leftover_noise="enable", **common)
    return graph.wire("KSamplerAdvanced", add_noise="disable", latent_image=first, start_at_step=STEPS // 2, end_at_step=STEPS,
                      return_with_leftover_noise="disable", **common)


def two_ranges(connected: Connected) -> Wire:
    """The other face reference from 30% of the sampling on."""
    graph = connected.graph
    other = connected.with_other_face()
    ranges = [graph.wire("ConditioningSetTimestepRange", conditioning=positive, start=start, end=end)
              for positive, start, end in ((connected.positive, 0.0, 0.3), (other, 0.3, 1.0))]
    both = graph.wire("ConditioningCombine", conditioning_1=ranges[0], conditioning_2=ranges[1])
    return connected.sampled(positive=both)


def own_steps(connected: Connected) -> Wire:
    graph = connected.graph
    return graph.wire("SamplerCustom", model=connected.model, add_noise=True, noise_seed=SEED, cfg=GUIDANCE,
                      positive=connected.positive, negative=connected.negative, latent_image=connected.latent(),
                      sampler=graph.wire("KSamplerSelect", sampler_name="dpmpp_2m"),
                      sigmas=graph.wire("AlignYourStepsScheduler", model_type="SD1", steps=10, denoise=1.0))


def perp_neg(connected: Connected) -> Wire:
    graph = connected.graph
    guider = graph.wire("PerpNegGuider", model=connected.model, positive=connected.positive, negative=connected.negative,
                        empty_conditioning=connected.negative, cfg=GUIDANCE, neg_scale=1.0)
    sigmas = graph.wire("BasicScheduler", model=connected.model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)
    return graph.wire("SamplerCustomAdvanced", noise=graph.wire("RandomNoise", noise_seed=SEED), guider=guider, sigmas=sigmas,
                      sampler=graph.wire("KSamplerSelect", sampler_name="ddim"), latent_image=connected.latent())


CASES: dict[str, Callable[[Connected], Wire]] = {
    "EMMA alone": Connected.sampled,
    "FreeU V2": patched("FreeU_V2", b1=1.1, b2=1.2, s1=0.9, s2=0.8),
    "Perturbed-Attention\nGuidance": patched("PerturbedAttentionGuidance", scale=2.0),
    "Self-Attention\nGuidance": patched("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "RescaleCFG": patched("RescaleCFG", multiplier=0.7),
    "Perp-Neg guider": perp_neg,
    "HyperTile": patched("HyperTile", tile_size=64, swap_size=2, max_depth=0, scale_depth=False),
    "EasyCache, 0.2": patched("EasyCache", reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False),
    "dpmpp_2m, Align Your\nSteps, 10 steps": own_steps,
    "dpmpp_sde, karras": lambda connected: connected.sampled(sampler_name="dpmpp_sde", scheduler="karras"),
    "two KSamplers\n(Advanced)": split_sampling,
    "image to image, 0.7": from_picture,
    "upper part inpainted\nover another face": inpainted,
    "another face from 30%\nof the sampling on": two_ranges,
    "two masks, each with\nits own face": two_masks,
}


def drawn(client: ComfyClient, case: Callable[[Connected], Wire]) -> Image.Image:
    """The picture that a case makes."""
    graph = Graph()
    playground = graph.add("EMMAPlayground")
    connected = Connected(graph, playground, *connect(graph, playground, FACE))
    image = graph.wire("VAEDecode", samples=case(connected), vae=[playground, VAE])
    preview = graph.add("PreviewImage", images=image)
    content = client.picture(client.run(graph.nodes)[preview]["images"][0])
    return Image.open(io.BytesIO(content)).convert("RGB")


def sheet_of(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures with their names, in rows."""
    width, height = SHOWN_PX + GAP_PX, SHOWN_PX + GAP_PX + LABEL_PX
    sheet = Image.new("RGB", (COLUMNS * width + GAP_PX, -(-len(pictures) // COLUMNS) * height + GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (name, picture) in enumerate(pictures.items()):
        left, top = GAP_PX + number % COLUMNS * width, GAP_PX + number // COLUMNS * height
        sheet.paste(picture.resize((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS), (left, top))
        draw.multiline_text((left + SHOWN_PX // 2, top + SHOWN_PX + 4), name, fill=(40, 40, 40), font=font, anchor="ma",
                            align="center")
    return sheet


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="DIR", action="append", default=[], help="run graphs in this ComfyUI")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "compatibility.jpg")
    options = parser.parse_args()
    hosts = find_hosts(options.comfyui)
    if not hosts:
        parser.error("no ComfyUI found to run graphs in: set COMFYUI_PATH to a ComfyUI folder, or pass --comfyui DIR")
    python = host_python(hosts[0], SERVER_NEEDS)
    with tempfile.TemporaryDirectory(prefix="emma-pictures-") as folder, HostServer(hosts[0], python, Path(folder)) as server:
        client = ComfyClient(server.url)
        pictures = {name: drawn(client, case) for name, case in CASES.items()}
    sheet_of(pictures).save(options.out, quality=QUALITY)
    say(str(options.out))


if __name__ == "__main__":
    main()
