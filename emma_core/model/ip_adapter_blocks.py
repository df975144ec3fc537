"""Which cross-attentions of a base an IP-Adapter works in: all, those of style alone, or all but those of the layout.

For SDXL the blocks are InstantStyle's (arXiv 2404.02733, section 3.3): `up_blocks.0.attentions.1` carries style,
`down_blocks.2.attentions.1` the layout. For SD1.5 no paper names any; those here are what users settled on, as the public
ComfyUI_IPAdapter_plus documents in its weight types: "style transfer" acts in all but the lowest resolutions, "composition" in
`down_blocks.2`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TrainingConfigError

BLOCKS = ("all", "style", "no layout")


@dataclass(frozen=True)
class _Known:
    """A family of bases: its attentions with the layers in each, in an IP-Adapter's order, and what they carry."""

    attentions: tuple[tuple[str, int], ...]
    style: tuple[str, ...]
    layout: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The attention that each layer is in."""
        return tuple(name for name, count in self.attentions for _ in range(count))


def _attentions(kind: str, block: int, count: int, layers: int) -> tuple[tuple[str, int], ...]:
    return tuple((f"{kind}_blocks.{block}.attentions.{index}", layers) for index in range(count))


_SD15 = _Known(
    (*_attentions("down", 0, 2, 1), *_attentions("down", 1, 2, 1), *_attentions("down", 2, 2, 1), *_attentions("up", 1, 3, 1),
     *_attentions("up", 2, 3, 1), *_attentions("up", 3, 3, 1), ("mid_block.attentions.0", 1)),
    style=("down_blocks.0.", "down_blocks.1.", "up_blocks.1.attentions.2", "up_blocks.2.", "up_blocks.3."),
    layout=("down_blocks.2.",))
_SDXL = _Known(
    (*_attentions("down", 1, 2, 2), *_attentions("down", 2, 2, 10), *_attentions("up", 0, 3, 10), *_attentions("up", 1, 3, 2),
     ("mid_block.attentions.0", 10)),
    style=("up_blocks.0.attentions.1",), layout=("down_blocks.2.attentions.1",))
_KNOWN = {len(family.layers): family for family in (_SD15, _SDXL)}


def layers_in(blocks: str, layers: int) -> tuple[bool, ...]:
    """Whether each of a base's cross-attentions, in an IP-Adapter's order, is among the blocks.

    Args:
        blocks: one of `BLOCKS`.
        layers: how many cross-attentions the base has.
    Raises:
        TrainingConfigError: parts of a base whose blocks are not known.
    """
    if blocks == "all":
        return (True,) * layers
    if layers not in _KNOWN:
        raise TrainingConfigError(f"the blocks of {blocks!r} are known for SD1.5 (16 cross-attentions) and SDXL (70); this "
                                  f"model has {layers}. Choose the blocks `all`.")
    family = _KNOWN[layers]
    if blocks == "style":
        return tuple(name.startswith(family.style) for name in family.layers)
    return tuple(not name.startswith(family.layout) for name in family.layers)
