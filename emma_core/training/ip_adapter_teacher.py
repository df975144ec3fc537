"""A teacher that is an IP-Adapter on the base: it sees the reference itself.

Shapes: B rows, G some of them, K cross-attention tokens of width W, V vectors of width D of a reference, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..base.backbones import Backbone
from ..encoders.clip_vision import ClipVisionEncoder, load_clip_vision
from ..encoders.options import EncodeOptions
from ..encoders.weights import weights_path
from ..errors import FileError, ReferenceMismatchError, TrainingConfigError, short
from ..files.picture_file import open_picture, picture_tensor
from ..files.tensor_file import check_finite, check_shapes, read_tensors
from .config import TeacherConfig
from .draws import BatchRow
from .prepared import Prepared
from .student import TeacherTarget
from .teacher import Teacher, TeacherKind

_IP_ADAPTER = "an IP-Adapter for SD1.5"
# of the plain one, and of the plus one
_PROJECTIONS = ({"proj.weight"}, {"latents", "proj_in.weight", "proj_out.weight"})
_TOKENS = 4  # that a plain IP-Adapter makes of one embedding


class IpAdapterTeacher(Teacher):
    """The base with an IP-Adapter (plain or plus), on the base's own weights; rows without reference get the base's word."""

    def __init__(self, backbone: Backbone, path: Path, image_encoder: ClipVisionEncoder, scale: float):
        self._base, self._backbone, self._encoder = backbone, backbone.twin(), image_encoder
        projection, attention = _read_ip_adapter(path)
        self._plus = "latents" in projection
        first = projection["proj_in.weight" if self._plus else "proj.weight"]
        last = projection["proj_out.weight"] if self._plus else first
        if first.ndim != 2 or last.ndim != 2:
            raise FileError(f"{path.name} has projections of shape {tuple(first.shape)} and {tuple(last.shape)}; wanted "
                            f"{_IP_ADAPTER}. Download it again.")
        self._dim = first.shape[1]
        _check_ip_adapter(projection, attention, self._backbone, path.name)
        self._check_encoder(path.name)
        unet = self._backbone.unet
        try:
            unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}], low_cpu_mem_usage=False)
        except Exception as found:  # diffusers and torch have no common error for weights that do not go together
            reason = short(" ".join(str(found).split()), 200)
            raise FileError(f"{path.name} is not {_IP_ADAPTER} that can be read ({reason}). Download it again.") from found
        for processor in unet.attn_processors.values():
            if hasattr(processor, "to_k_ip"):
                processor.scale = [scale]
        unet.requires_grad_(False).eval()
        self.to(backbone.device)

    def encode_reference(self, image_BHW3: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures in [0, 1] -> {"ip_adapter": (B, V, D)}, what `predict` wants; it can be kept.

        Raises:
            ImageInputError: unusable pictures.
        """
        # as the published adapters were trained: plain on the projected embedding, plus on the penultimate hidden states
        name = "local" if self._plus else "global"
        encoded = self._encoder.encode(image_BHW3, None, EncodeOptions((name,), "penultimate"))
        return {"ip_adapter": torch.cat([one.features[name] for one in encoded])}

    @torch.no_grad()
    def predict(self, noised_B4hw, timestep_B, context_BKW, reference=None) -> torch.Tensor:
        rows = len(noised_B4hw)
        present_B = torch.zeros(rows, dtype=torch.bool) if reference is None else self._present(reference, rows)
        present_B = present_B.to(noised_B4hw.device)
        target_B4hw = torch.empty_like(noised_B4hw, dtype=torch.float32)
        for shown in (True, False):
            rows_G = (present_B == shown).nonzero()[:, 0]
            if not len(rows_G):
                continue
            seen = [noised_B4hw[rows_G], timestep_B.to(rows_G.device)[rows_G], context_BKW[rows_G]]
            if shown:
                embeds_GVD = reference["ip_adapter"].to(self._backbone.device, self._backbone.dtype)[rows_G]
                # diffusers wants (B, pictures, D), or of hidden states (B, pictures, V, D)
                embeds = [embeds_GVD[:, None] if self._plus else embeds_GVD]
                target_B4hw[rows_G] = self._backbone.predict_noise(*seen, {"image_embeds": embeds})
            else:
                target_B4hw[rows_G] = self._base.predict_noise(*seen)
        return target_B4hw

    def target_on(self, data: Prepared) -> TeacherTarget:
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
            return self.predict(noised_B4hw, timestep_B, context_BKW, shown)

        return TeacherTarget("IP-Adapter", predict)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        self._backbone.to(device, dtype)
        self._encoder.model.to(device)
        return self

    def _present(self, reference: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
        found = reference.get("ip_adapter")
        if found is None or found.ndim != 3 or (len(found), found.shape[-1]) != (rows, self._dim):
            size = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise ReferenceMismatchError(f"the IP-Adapter teacher got {size} as its reference; wanted ({rows}, vectors, "
                                         f"{self._dim}). Make it with this teacher's encode_reference.")
        return reference.get("present_B", torch.ones(rows, dtype=torch.bool))

    def _check_encoder(self, name: str) -> None:
        config = self._encoder.model.config
        found = config.hidden_size if self._plus else config.projection_dim
        if found != self._dim:
            raise FileError(f"{name} reads vectors of {self._dim}, and the image encoder gives {found}; wanted the one it was "
                            "trained with (for SD1.5 adapters CLIP ViT-H, models/image_encoder). Choose it as "
                            "teacher.ip_image_encoder.")


def _read_ip_adapter(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The image projection and the attention of a file, names without prefix."""
    tensors, _ = read_tensors(path, _IP_ADAPTER)
    check_finite(tensors, path.name)
    parts = tuple({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                  for prefix in ("image_proj.", "ip_adapter."))
    if not all(parts):
        raise FileError(f"{path.name} holds no IP-Adapter (image_proj.*, ip_adapter.*); wanted {_IP_ADAPTER}, such as "
                        "ip-adapter_sd15.safetensors. Choose another file.")
    projection, attention = parts
    known = any(keys <= projection.keys() for keys in _PROJECTIONS)
    if not known or any("lora" in key for key in attention):
        raise FileError(f"{path.name} is an IP-Adapter of another kind (FaceID, full-face); wanted the plain or the plus one "
                        "for SD1.5. Choose ip-adapter_sd15.safetensors or ip-adapter-plus_sd15.safetensors.")
    return projection, attention


def _check_ip_adapter(
    projection: Mapping[str, torch.Tensor], attention: Mapping[str, torch.Tensor], backbone: Backbone, name: str
) -> None:
    width = backbone.spec.context_width
    found = projection["proj_out.weight"].shape[0] if "latents" in projection else projection["proj.weight"].shape[0] / _TOKENS
    if found != width:
        raise FileError(f"{name} makes tokens of width {found:g}, and {backbone.name} has {width}; wanted {_IP_ADAPTER}. "
                        "Choose one made for this kind of model.")
    weights = backbone.unet.state_dict()
    layers = [key.removesuffix(".processor") for key in backbone.unet.attn_processors if key.endswith("attn2.processor")]
    # the published files number all attention layers, and every second one is a cross-attention
    wanted = {f"{2 * index + 1}.to_{part}_ip.weight": tuple(weights[f"{layer}.to_{part}.weight"].shape)
              for index, layer in enumerate(layers) for part in "kv"}
    check_shapes(attention, wanted, name, _IP_ADAPTER)


def _check(config: TeacherConfig) -> None:
    if not config.ip_image_encoder:
        raise TrainingConfigError("teacher.ip_adapter needs teacher.ip_image_encoder: the folder or file of its CLIP vision "
                                  "encoder (for SD1.5 adapters CLIP ViT-H, models/image_encoder). Set it.")
    for key in ("ip_adapter", "ip_image_encoder"):
        if not Path(getattr(config, key)).exists():
            raise TrainingConfigError(f"teacher.{key} = {getattr(config, key)!r} does not exist. Check the path.")


def _load(config: TeacherConfig, backbone: Backbone) -> Teacher:
    encoder = load_clip_vision(weights_path(config.ip_image_encoder))
    return IpAdapterTeacher(backbone, Path(config.ip_adapter), encoder, config.scale)


KIND = TeacherKind("ip_adapter", _check, _load)
