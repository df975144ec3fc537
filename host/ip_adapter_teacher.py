"""An IP-Adapter as a teacher inside the host: it is put on the copy of the MODEL that trains, for each row's own reference.

Shapes: B rows, P tokens of width W of a picture, S image tokens of a block, K cross-attention tokens of width W.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import torch

from ..emma_core.base.ip_adapter import attention_weights, projection_of
from ..emma_core.base.ip_adapter_file import IpAdapterFile, read_ip_adapter
from ..emma_core.encoders.base import encode_pictures
from ..emma_core.encoders.options import EncodeOptions
from ..emma_core.errors import FileError, ReferenceMismatchError, TrainingConfigError
from ..emma_core.files.tensor_file import fingerprint_of_weights
from ..emma_core.model.ip_adapter_blocks import layers_in
from ..emma_core.training.student import OwnText, TeacherTarget
from .denoiser import HostDenoiser
from .encoders import as_encoder
from .families import context_width
from .images import rgb_pictures

Layer = tuple[str, int, int]  # the host's name of a cross-attention: part of the UNet, block in it, layer in that
_PARTS = (("input", "input_blocks"), ("output", "output_blocks"), ("middle", "middle_block"))


@dataclass(frozen=True, eq=False)
class LoadedTeacher:
    """The EMMA_TEACHER that travels through the graph.

    Args:
        adapter: the IP-Adapter.
        encoder: EMMA_ENCODER or CLIP_VISION that it was trained with.
        weight: how strongly it works.
        blocks: where, see `layers_in`.
    """

    adapter: IpAdapterFile
    encoder: Any
    weight: float
    blocks: str

    def __repr__(self) -> str:
        return f"<EMMA_TEACHER {self.adapter.layout.name}>"

    def check(self, model) -> None:
        """Refuse a MODEL that this IP-Adapter is not for, before anything is encoded.

        Raises:
            FileError: tokens of another width, attention of other sizes.
            TrainingConfigError: a MODEL without such cross-attentions, or whose blocks are not known.
        """
        network = model.model.diffusion_model
        layers = cross_attentions(network)
        if not layers:
            raise TrainingConfigError(f"this MODEL ({type(model.model).__name__}) has no cross-attentions of a UNet, which an "
                                      "IP-Adapter works in; wanted SD1.5 or SDXL. Use such a checkpoint, or another teacher.")
        self.adapter.layout.check_base(context_width(model.model), f"this MODEL ({type(model.model).__name__})")
        self.adapter.check_layers([tuple(tuple(getattr(attention, f"to_{part}").weight.shape) for part in "kv")
                                   for attention in layers.values()])
        layers_in(self.blocks, len(layers))

    def tokens(self, images: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """(P, W) of each picture, encoded as the published adapters were trained.

        Raises:
            ImageInputError: unusable pictures.
            FileError: the encoder gives other vectors than the IP-Adapter reads.
        """
        loaded, layout = as_encoder(self.encoder), self.adapter.layout
        options, projection = EncodeOptions((layout.reads,), "penultimate"), projection_of(self.adapter)
        made = []
        for image in images:
            try:
                features, _ = encode_pictures(loaded.encoder, rgb_pictures(image), None, options, cache=loaded.cache,
                                              at_once=loaded.encoder.at_once())
            except ReferenceMismatchError as found:
                raise FileError(f"{layout.name} reads the {layout.reads} vectors of a CLIP: {found}") from found
            vectors_BVD = features[layout.reads].float().cpu()
            layout.check_encoder(*[vectors_BVD.shape[-1]] * 2)
            with torch.no_grad():
                made += list(projection(vectors_BVD))
        return made

    def target(
        self, denoiser: HostDenoiser, tokens: Sequence[torch.Tensor], own: OwnText | None,
        place: tuple[torch.device, torch.dtype],
    ) -> TeacherTarget:
        """Its prediction under each row's own reference; rows whose reference is dropped get the model's own word.

        Args:
            denoiser: of the MODEL that trains, whose weights it shares.
            tokens: of each reference, see `tokens`.
            own: what goes with the model's own tokens.
            place: device and type to compute in.
        """
        layers = list(cross_attentions(denoiser.network))
        weights = dict(zip(layers, attention_weights(self.adapter, layers_in(self.blocks, len(layers)), *place), strict=True))

        def predict(noised_B4hw, timestep_B, plain_BKW, rows) -> torch.Tensor:
            device, dtype = place
            tokens_BPW = torch.stack([tokens[row.reference] for row in rows]).to(device, dtype)
            weight_B = torch.tensor([self.weight * (row.strength > 0) for row in rows], device=device, dtype=dtype)
            patches = {layer: _reading(tokens_BPW, weight_B, *kv) for layer, kv in weights.items() if kv is not None}
            beside = () if own is None else (own.stacked(rows, device),)
            return denoiser.with_attention(patches).predict_noise(noised_B4hw, timestep_B, plain_BKW, *beside)

        def bytes_beside(dtype: torch.dtype) -> int:
            return sum(value.numel() for kv in weights.values() for value in kv or ()) * dtype.itemsize

        return TeacherTarget("IP-Adapter", predict, bytes_beside)

    def mark(self, tokens: Sequence[torch.Tensor]) -> str:
        """What its predictions depend on."""
        weights = {**self.adapter.projection, **self.adapter.attention,
                   **{f"tokens {index}": one for index, one in enumerate(tokens)}}
        return f"{fingerprint_of_weights(weights)} {self.weight} {self.blocks}"


def load_teacher(path: str, encoder, weight: float, blocks: str) -> LoadedTeacher:
    """An IP-Adapter file with the encoder it was trained with.

    Raises:
        FileError: see `read_ip_adapter` and `projection_of`.
    """
    adapter = read_ip_adapter(Path(path))
    projection_of(adapter)
    return LoadedTeacher(adapter, encoder, weight, blocks)


def cross_attentions(network: torch.nn.Module) -> dict[Layer, torch.nn.Module]:
    """The cross-attentions of a UNet by the host's names, in the order of an IP-Adapter's layers: down, up, middle."""
    found: dict[Layer, torch.nn.Module] = {}
    for part, name in _PARTS:
        blocks = getattr(network, name, ())
        for number, block in enumerate([blocks] if part == "middle" else blocks):
            inner = [layer for layer in block.modules()
                     if isinstance(layer, comfy.ldm.modules.attention.BasicTransformerBlock) and layer.attn2 is not None]
            found |= {(part, number, index): layer.attn2 for index, layer in enumerate(inner)}
    return found


def _reading(tokens_BPW: torch.Tensor, weight_B: torch.Tensor, k_CW: torch.Tensor, v_CW: torch.Tensor) -> Callable:
    """Attention to the picture's tokens beside that to the text: Z = Attn(Q, K, V) + weight Attn(Q, K', V') (eq. 5)."""
    k_BPC, v_BPC = (torch.nn.functional.linear(tokens_BPW, weight) for weight in (k_CW, v_CW))

    def attend(q_BSC: torch.Tensor, extra_options: Mapping[str, Any]) -> torch.Tensor:
        seen_BSC = comfy.ldm.modules.attention.attention_pytorch(q_BSC, k_BPC.to(q_BSC), v_BPC.to(q_BSC),
                                                                 extra_options["n_heads"])
        return weight_B[:, None, None].to(seen_BSC) * seen_BSC

    return attend
