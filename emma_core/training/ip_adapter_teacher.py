"""A teacher that is an IP-Adapter on the base: it sees the reference itself.

Shapes: B rows, G some of them, K cross-attention tokens of width W, V vectors of width D of a reference, latents 4 x h x w.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..base.backbones import Backbone
from ..base.denoiser import NO_EXTRA
from ..base.ip_adapter_file import read_ip_adapter
from ..encoders.clip_vision import ClipVisionEncoder, load_clip_vision
from ..encoders.options import EncodeOptions
from ..encoders.weights import weights_path
from ..errors import FileError, ReferenceMismatchError, TrainingConfigError, short
from ..files.picture_file import open_picture, picture_tensor
from ..files.plain_file import is_there
from ..model.ip_adapter_blocks import layers_in
from .config import TeacherConfig
from .draws import BatchRow
from .prepared import Prepared
from .student import TeacherTarget
from .teacher import Teacher, TeacherKind, TeacherText, numbers_beside, told_of_rows


@contextmanager
def _silenced(logger: str) -> Iterator[None]:
    """Nothing of this logger is shown inside."""
    told = logging.getLogger(logger)
    before, told.disabled = told.disabled, True
    try:
        yield
    finally:
        told.disabled = before


class IpAdapterTeacher(Teacher):
    """The base with an IP-Adapter (plain or plus), on the base's own weights; rows without reference get the base's word.

    Args:
        backbone: the base.
        path: of the IP-Adapter.
        image_encoder: the CLIP that it was trained with.
        scale: strength.
        blocks: where it works, see `layers_in`.
    """

    def __init__(self, backbone: Backbone, path: Path, image_encoder: ClipVisionEncoder, scale: float, blocks: str = "all"):
        self._base, self._backbone, self._encoder = backbone, backbone.twin(), image_encoder
        adapter = read_ip_adapter(path)
        self._layout = adapter.layout
        adapter.layout.check_base(backbone.spec.context_width, backbone.name)
        weights, layers = backbone.unet.state_dict(), _cross_attentions(backbone)
        adapter.check_layers([tuple(tuple(weights[f"{layer}.to_{part}.weight"].shape) for part in "kv") for layer in layers])
        config = image_encoder.model.config
        adapter.layout.check_encoder(config.projection_dim, config.hidden_size)
        unet = self._backbone.unet
        parts = {"image_proj": dict(adapter.projection), "ip_adapter": dict(adapter.attention)}
        try:
            with _silenced("diffusers.models.modeling_utils"):  # which warns of every call of `to`, also where no type changes
                unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
        except Exception as found:  # diffusers and torch have no common error for weights that do not go together
            reason = short(" ".join(str(found).split()), 200)
            raise FileError(f"{path.name} is no IP-Adapter that can be read ({reason}). Download it again.") from found
        for layer, chosen in zip(layers, layers_in(blocks, len(layers)), strict=True):
            # diffusers leaves the image's attention out where its scale is 0
            unet.attn_processors[f"{layer}.processor"].scale = [scale if chosen else 0.0]
        unet.requires_grad_(False).eval()
        self.to(backbone.device)

    def encode_reference(self, image_BHW3: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures in [0, 1] -> {"ip_adapter": (B, V, D)}, what `predict` wants; it can be kept.

        Raises:
            ImageInputError: unusable pictures.
        """
        # as the published adapters were trained: plain on the projected embedding, plus on the penultimate hidden states
        name = self._layout.reads
        encoded = self._encoder.encode(image_BHW3, None, EncodeOptions((name,), "penultimate"))
        return {"ip_adapter": torch.cat([one.features[name] for one in encoded])}

    @torch.no_grad()
    def predict(self, noised_B4hw, timestep_B, context_BKW, reference=None, beside=NO_EXTRA) -> torch.Tensor:
        rows = len(noised_B4hw)
        present_B = torch.zeros(rows, dtype=torch.bool) if reference is None else self._present(reference, rows)
        present_B = present_B.to(noised_B4hw.device)
        target_B4hw = torch.empty_like(noised_B4hw, dtype=torch.float32)
        for shown in (True, False):
            rows_G = (present_B == shown).nonzero()[:, 0]
            if not len(rows_G):
                continue
            seen = [noised_B4hw[rows_G], timestep_B.to(rows_G.device)[rows_G], context_BKW[rows_G]]
            told = {name: value[rows_G] for name, value in beside.items()}
            if shown:
                embeds_GVD = reference["ip_adapter"].to(self._backbone.device, self._backbone.dtype)[rows_G]
                # diffusers wants (B, pictures, D), or of hidden states (B, pictures, V, D)
                embeds = [embeds_GVD[:, None] if self._layout.plus else embeds_GVD]
                target_B4hw[rows_G] = self._backbone.predict_noise(*seen, {**told, "image_embeds": embeds})
            else:
                target_B4hw[rows_G] = self._base.predict_noise(*seen, told)
        return target_B4hw

    def target_on(self, data: Prepared, texts: Sequence[TeacherText] = ()) -> TeacherTarget:
        """As `Teacher.target_on`; the teacher sees each row's reference whole, as it is, and encodes it once."""
        known: dict[int, torch.Tensor] = {}

        def vectors(reference: int) -> torch.Tensor:
            if reference not in known:
                picture_1HW3 = picture_tensor(open_picture(data.pictures.pictures[reference]))
                known[reference] = self.encode_reference(picture_1HW3)["ip_adapter"].cpu()
            return known[reference]

        def predict(noised_B4hw, timestep_B, context_BKW, rows: Sequence[BatchRow]) -> torch.Tensor:
            shown = {"ip_adapter": torch.cat([vectors(row.reference) for row in rows]),
                     "present_B": torch.tensor([row.strength > 0 for row in rows])}
            context_BKW, beside = told_of_rows(list(texts) * len(rows), rows, context_BKW)
            return self.predict(noised_B4hw, timestep_B, context_BKW, shown, beside)

        return TeacherTarget("IP-Adapter", predict, self.bytes_beside)

    def bytes_beside(self, dtype: torch.dtype) -> int:
        """Its projection and attention, and the image encoder, which keeps its own type."""
        encoder = self._encoder.model
        return (numbers_beside(self._backbone, self._base) * dtype.itemsize
                + sum(value.nbytes for value in (*encoder.parameters(), *encoder.buffers())))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        self._backbone.to(device, dtype)
        self._encoder.model.to(device)
        return self

    def _present(self, reference: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
        found = reference.get("ip_adapter")
        if found is None or found.ndim != 3 or (len(found), found.shape[-1]) != (rows, self._layout.dim):
            size = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise ReferenceMismatchError(f"the IP-Adapter teacher got {size} as its reference; wanted ({rows}, vectors, "
                                         f"{self._layout.dim}). Make it with this teacher's encode_reference.")
        return reference.get("present_B", torch.ones(rows, dtype=torch.bool))


def _cross_attentions(backbone: Backbone) -> list[str]:
    """Their names, in the order of an IP-Adapter's layers."""
    return [key.removesuffix(".processor") for key in backbone.unet.attn_processors if key.endswith("attn2.processor")]


def _check(config: TeacherConfig) -> None:
    if not config.ip_image_encoder:
        raise TrainingConfigError("teacher.ip_adapter needs teacher.ip_image_encoder: the folder or file of its CLIP vision "
                                  "encoder (for SD1.5 adapters CLIP ViT-H, models/image_encoder). Set it.")
    for key in ("ip_adapter", "ip_image_encoder"):
        if not is_there(getattr(config, key)):
            raise TrainingConfigError(f"teacher.{key} = {getattr(config, key)!r} does not exist. Check the path.")


def _load(config: TeacherConfig, backbone: Backbone, text_is_used: bool) -> Teacher:
    encoder = load_clip_vision(weights_path(config.ip_image_encoder))
    return IpAdapterTeacher(backbone, Path(config.ip_adapter), encoder, config.scale, config.blocks)


KIND = TeacherKind("ip_adapter", _check, _load)
