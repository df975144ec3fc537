"""IP-Adapters on disk, for SD1.5 and SDXL: the plain ones, and the plus ones (plus-face has their layout).

A file is known by its tensors: `image_proj.*` makes tokens of a picture, `ip_adapter.N.to_k_ip` and `.to_v_ip` read them in
the base's cross-attentions. The published files number all attention layers, and every second one is a cross-attention; they
are in the order of diffusers' UNet: down, up, middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import FileError
from ..files.tensor_file import check_finite, check_shapes, open_tensors, read_tensors

_WHAT = "an IP-Adapter"
# of the plain one, and of the plus one
_PROJECTIONS = ({"proj.weight"}, {"latents", "proj_in.weight", "proj_out.weight"})
_PLAIN_TOKENS = 4  # that a plain IP-Adapter makes of one embedding
_KNOWN = "ip-adapter_sd15.safetensors, ip-adapter-plus_sd15.safetensors, ip-adapter-plus_sdxl_vit-h.safetensors"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class IpAdapterLayout:
    """What a file's shapes tell.

    Args:
        name: of the file.
        plus: it reads a CLIP's hidden states; else the projected embedding.
        dim: of the picture's vectors that it reads.
        width: of the tokens that it makes of them.
        layers: cross-attentions that it reads these tokens in.
    """

    name: str
    plus: bool
    dim: int
    width: int
    layers: int

    @property
    def reads(self) -> str:
        """The feature of a CLIP that it reads."""
        return "local" if self.plus else "global"

    def check_base(self, context_width: int, base: str) -> None:
        """Refuse a base with another width of tokens.

        Raises:
            FileError: both widths.
        """
        if self.width != context_width:
            raise FileError(f"{self.name} makes tokens of width {self.width}, and {base} has {context_width}; wanted {_WHAT} "
                            f"made for this kind of model. Choose one, such as {_KNOWN}.")

    def check_encoder(self, projected: int, hidden: int) -> None:
        """Refuse a CLIP that gives other vectors than it reads.

        Raises:
            FileError: both sizes.
        """
        found = hidden if self.plus else projected
        if found != self.dim:
            raise FileError(f"{self.name} reads vectors of {self.dim}, and the image encoder gives {found}; wanted the one it "
                            "was trained with (CLIP ViT-H for SD1.5 adapters and those named vit-h, CLIP ViT-bigG for other "
                            "SDXL ones). Choose it.")


@dataclass(frozen=True, eq=False)
class IpAdapterFile:
    """A file's weights, names without prefix: the image projection, and the attention of the layers by their numbers."""

    layout: IpAdapterLayout
    projection: Mapping[str, torch.Tensor]
    attention: Mapping[str, torch.Tensor]

    def check_layers(self, shapes: Sequence[tuple[Shape, Shape]]) -> None:
        """Refuse attention that does not fit a base's cross-attentions.

        Args:
            shapes: of the keys' and the values' weights of each, in the order of the file.
        Raises:
            FileError: missing, further or misshapen weights.
        """
        wanted = {layer_key(index, part): shape for index, pair in enumerate(shapes)
                  for part, shape in zip("kv", pair, strict=True)}
        family = {16: " for SD1.5", 70: " for SDXL"}.get(len(shapes), "")
        check_shapes(self.attention, wanted, self.layout.name, f"{_WHAT}{family}")


def layer_key(index: int, part: str) -> str:
    """Name of the weight of the keys ("k") or values ("v") of a cross-attention."""
    return f"{2 * index + 1}.to_{part}_ip.weight"


def ip_adapter_layout(shapes: Mapping[str, Shape], name: str) -> IpAdapterLayout:
    """The layout of a file, from its tensors' shapes.

    Raises:
        FileError: no IP-Adapter, or one of another kind.
    """
    projection, attention = ({key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
                             for prefix in ("image_proj.", "ip_adapter."))
    if not projection or not attention:
        raise FileError(f"{name} holds no IP-Adapter (image_proj.*, ip_adapter.*); wanted {_WHAT}, such as {_KNOWN}. Choose "
                        "another file.")
    if not any(keys <= projection.keys() for keys in _PROJECTIONS) or any("lora" in key for key in attention):
        raise FileError(f"{name} is an IP-Adapter of another kind (FaceID, full-face); wanted a plain or a plus one. Choose "
                        f"one such as {_KNOWN}.")
    plus = "latents" in projection
    first, last = (projection[key] for key in (("proj_in.weight", "proj_out.weight") if plus else ("proj.weight",) * 2))
    tokens = 1 if plus else _PLAIN_TOKENS
    if len(first) != 2 or len(last) != 2 or last[0] % tokens:
        raise FileError(f"{name} has projections of shape {first} and {last}; wanted {_WHAT}. Download it again.")
    return IpAdapterLayout(name, plus, first[1], last[0] // tokens, len(attention) // 2)


def read_ip_adapter_layout(path: Path) -> IpAdapterLayout:
    """The layout of a file; no numbers are read.

    Raises:
        FileError: as `ip_adapter_layout`; no such file, a pickle.
    """
    with open_tensors(path, _WHAT) as file:
        return ip_adapter_layout(file.shapes, path.name)


def read_ip_adapter(path: Path) -> IpAdapterFile:
    """A file's weights.

    Raises:
        FileError: as `read_ip_adapter_layout`; non-finite weights.
    """
    tensors, _ = read_tensors(path, _WHAT)
    layout = ip_adapter_layout({key: tuple(value.shape) for key, value in tensors.items()}, path.name)
    check_finite(tensors, path.name)
    projection, attention = ({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                             for prefix in ("image_proj.", "ip_adapter."))
    return IpAdapterFile(layout, projection, attention)
