"""Gate maps: where a module acts, token index across and block depth down (EMMA paper, gate value figure).

Shapes: K latent tokens, I blocks of the connector.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..model.assembly import Assembly, TokenSource, assembled_tokens

_CELL_WIDTH, _CELL_HEIGHT = 10, 28
_MARGIN_LEFT, _MARGIN_TOP, _MARGIN_BOTTOM, _BAR_WIDTH, _BAR_GAP, _BAR_LABELS = 64, 34, 44, 14, 16, 64
_FONT_SIZE = 14
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_NEGATIVE, _POSITIVE = np.array([33, 102, 172]), np.array([178, 24, 43])


@dataclass(frozen=True)
class GateMap:
    """Values g * A of one reference's module, (I, K), as plain numbers, and its title."""

    title: str
    values_IK: np.ndarray


def gate_values(source: TokenSource, text_1ND: torch.Tensor, timestep: float, assembly: Assembly) -> list[torch.Tensor]:
    """Separable gate times global gate, g(L0) * A, of every reference of an assembly.

    Args:
        source: the connector.
        text_1ND: T5 features of one prompt.
        timestep: 0 to 999.
        assembly: references; one that does not act at this timestep has zeros.
    Returns:
        One (I, K) tensor per reference, float32 on the CPU.
    """
    gates = defaultdict(list)
    hooks = [
        block.gate.register_forward_hook(lambda _, __, gate, key=(module, index): gates[key].append(gate[0, :, 0]))
        for module in dict.fromkeys(reference.module for reference in assembly.references)
        for index, block in enumerate(module.blocks)
    ]
    timestep_1 = torch.tensor([float(timestep)], device=text_1ND.device)
    try:
        with torch.no_grad():
            tokens_1KW = assembled_tokens(source, text_1ND[:1], timestep_1, assembly)
    finally:
        for hook in hooks:
            hook.remove()
    return [_values_of(reference, timestep_1, gates, tokens_1KW.shape[1]) for reference in assembly.references]


def _values_of(reference, timestep_1, gates, latents: int) -> torch.Tensor:
    module = reference.module
    values_IK = torch.zeros(len(module.blocks), latents)
    if not bool(reference.weight_of_rows(timestep_1).any()):
        return values_IK
    for index, block in enumerate(module.blocks):
        # references that share a module call its gate in their order
        gate_K = gates[module, index].pop(0) if module.config.separable_gates else torch.ones(latents)
        values_IK[index] = gate_K.float().cpu() * block.attn_gate.float().cpu()
    return values_IK


def draw_gate_maps(maps: Sequence[GateMap], subtitle: str = "") -> Image.Image:
    """One panel per map, each with its own colour bar (blue negative, white 0, red positive)."""
    panels = [_draw_panel(one) for one in maps]
    font = ImageFont.load_default(_FONT_SIZE)
    head = _FONT_SIZE + 14 if subtitle else 0
    width = max([panel.width for panel in panels] + [int(font.getlength(subtitle)) + 16])
    sheet = Image.new("RGB", (width, head + sum(panel.height for panel in panels)), _PAPER)
    if subtitle:
        ImageDraw.Draw(sheet).text((8, 8), subtitle, fill=_INK, font=font)
    top = head
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def _draw_panel(one: GateMap) -> Image.Image:
    blocks, tokens = one.values_IK.shape
    cell = max(_CELL_WIDTH, 320 // tokens)
    width, height = tokens * cell, blocks * _CELL_HEIGHT
    right = _BAR_GAP + _BAR_WIDTH + _BAR_LABELS
    panel = Image.new("RGB", (_MARGIN_LEFT + width + right, _MARGIN_TOP + height + _MARGIN_BOTTOM), _PAPER)
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(_FONT_SIZE)
    most = float(np.abs(one.values_IK).max()) or 1.0
    map_IK3 = Image.fromarray(_colours(one.values_IK / most))
    panel.paste(map_IK3.resize((width, height), Image.Resampling.NEAREST), (_MARGIN_LEFT, _MARGIN_TOP))
    draw.rectangle((_MARGIN_LEFT - 1, _MARGIN_TOP - 1, _MARGIN_LEFT + width, _MARGIN_TOP + height), outline=_INK)
    draw.text((_MARGIN_LEFT, 10), one.title, fill=_INK, font=font)
    for index in range(blocks):
        middle = _MARGIN_TOP + index * _CELL_HEIGHT + _CELL_HEIGHT // 2
        draw.text((_MARGIN_LEFT - 6, middle), f"block {index}", fill=_INK, font=font, anchor="rm")
    for token in range(0, tokens, max(1, tokens // 8)):
        draw.text((_MARGIN_LEFT + token * cell + cell // 2, _MARGIN_TOP + height + 4), str(token), fill=_INK, font=font,
                  anchor="ma")
    draw.text((_MARGIN_LEFT + width // 2, _MARGIN_TOP + height + 22), "token index", fill=_INK, font=font, anchor="ma")
    _draw_bar(panel, draw, font, _MARGIN_LEFT + width + _BAR_GAP, height, most)
    return panel


def _draw_bar(panel: Image.Image, draw: ImageDraw.ImageDraw, font, left: int, height: int, most: float) -> None:
    ramp = np.linspace(1, -1, height)[:, None]
    panel.paste(Image.fromarray(_colours(ramp)).resize((_BAR_WIDTH, height)), (left, _MARGIN_TOP))
    draw.rectangle((left - 1, _MARGIN_TOP - 1, left + _BAR_WIDTH, _MARGIN_TOP + height), outline=_INK)
    for share in (1, 0, -1):
        position = _MARGIN_TOP + (1 - share) / 2 * height
        draw.text((left + _BAR_WIDTH + 5, position), f"{share * most:.2g}", fill=_INK, font=font, anchor="lm")


def _colours(values: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] -> uint8 RGB."""
    share = np.abs(values)[..., None].clip(0, 1)
    target = np.where(values[..., None] < 0, _NEGATIVE, _POSITIVE)
    return (np.array(_PAPER) * (1 - share) + target * share).round().astype(np.uint8)
