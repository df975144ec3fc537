"""Models whose prediction is the target in place of the noise: a LoRA or an IP-Adapter on the frozen base.

A teacher sees the same text as the student without its reference: the tokens that the caller hands over, which are ELLA's
for the caption. CLIP's tokens are not used, even where a checkpoint has a CLIP text encoder: the student's frozen part
speaks ELLA's, so under the same tokens teacher and base differ by the LoRA or the reference alone, and that difference is
all that the module is to learn.

Shapes: B rows, K cross-attention tokens of width W, V vectors of width D of a reference, latents 4 x h x w, T timesteps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..base.backbones import Backbone, load_backbone
from ..base.config import BaseConfig
from ..base.lora import LoraSwitch
from ..encoders.clip_vision import ClipVisionEncoder, load_clip_vision
from ..encoders.options import EncodeOptions
from ..encoders.weights import weights_path
from ..errors import FileError, ReferenceMismatchError, TrainingConfigError
from ..files.tensor_file import check_finite, check_shapes, read_tensors
from .config import TeacherConfig

_IP_ADAPTER = "an IP-Adapter for SD1.5"
# of the plain one, and of the plus one
_PROJECTIONS = ({"proj.weight"}, {"latents", "proj_in.weight", "proj_out.weight"})
_TOKENS = 4  # that a plain IP-Adapter makes of one embedding

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Teacher(ABC):
    """Predicts what the student is to predict: eps or v, whichever the base does."""

    @abstractmethod
    def predict(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor,
        reference: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The target (B, 4, h, w), in float32 and without a gradient.

        Args:
            noised_B4hw: noised latents.
            timestep_B: their timesteps.
            context_BKW: the student's tokens without reference, with text dropped where the student's is.
            reference: what the teacher's `encode_reference` made, a row each; a bool `present_B` beside it marks the rows
                that have a reference. None: no row has.
        """

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """Move what the teacher has beside the base."""
        return self


class LoraTeacher(Teacher):
    """The base with a LoRA at a strength, on the base's own weights; of several, each row is told which one is its teacher.

    Args:
        backbone: the base.
        paths: one LoRA, or one for each group of references by the group's name; their order numbers them.
        scale: strength.
    """

    def __init__(self, backbone: Backbone, paths: Mapping[str, Path], scale: float):
        self._backbone, self.groups = backbone.twin(), tuple(paths)
        self._loras = LoraSwitch(self._backbone.unet, list(paths.values()), scale)
        self.to(backbone.device, backbone.dtype)

    @torch.no_grad()
    def predict(self, noised_B4hw, timestep_B, context_BKW, reference=None) -> torch.Tensor:
        """As `Teacher.predict`; with several LoRAs ``reference`` holds ``lora_B``, the number of each row's."""
        if len(self.groups) == 1:
            return self._backbone.predict_noise(noised_B4hw, timestep_B, context_BKW)
        lora_B = reference["lora_B"].to(noised_B4hw.device)
        target_B4hw = torch.empty_like(noised_B4hw, dtype=torch.float32)
        for number in lora_B.unique().tolist():
            rows_G = (lora_B == number).nonzero()[:, 0]
            self._loras.use(number)
            target_B4hw[rows_G] = self._backbone.predict_noise(
                noised_B4hw[rows_G], timestep_B.to(rows_G.device)[rows_G], context_BKW[rows_G])
        return target_B4hw

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        self._backbone.to(device, dtype)
        return self


class IpAdapterTeacher(Teacher):
    """The base with an IP-Adapter (plain or plus), on the base's own weights; rows without reference get the base's word."""

    def __init__(self, backbone: Backbone, path: Path, image_encoder: ClipVisionEncoder, scale: float):
        self._base, self._backbone, self._encoder = backbone, backbone.twin(), image_encoder
        projection, attention = _read_ip_adapter(path)
        self._plus = "latents" in projection
        self._dim = projection["proj_in.weight" if self._plus else "proj.weight"].shape[1]
        _check_ip_adapter(projection, attention, self._backbone, path.name)
        self._check_encoder(path.name)
        unet = self._backbone.unet
        try:
            unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}], low_cpu_mem_usage=False)
        except (RuntimeError, KeyError) as found:
            reason = " ".join(str(found).split())[:200]
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


def load_teacher(config: TeacherConfig, base: BaseConfig, backbone: Backbone | None = None) -> Teacher | None:
    """The teacher that `config` names, or None if it names none.

    Args:
        config: its `scale` is the strength of the LoRA or the IP-Adapter.
        base: the frozen base, which a teacher stands on.
        backbone: `base` as it is already loaded, so that its weights are shared; None loads it.
    Raises:
        TrainingConfigError: both a LoRA and an IP-Adapter, an IP-Adapter without image encoder.
        FileError: files of another kind or for another model, pickles, non-finite weights.
    """
    if config.lora and config.ip_adapter:
        raise TrainingConfigError("teacher.lora and teacher.ip_adapter are both given; a teacher is one of them. Remove one.")
    if not config.lora and not config.ip_adapter:
        return None
    if config.ip_adapter and not config.ip_image_encoder:
        raise TrainingConfigError("teacher.ip_adapter needs teacher.ip_image_encoder: the folder or file of its CLIP vision "
                                  "encoder (for SD1.5 adapters CLIP ViT-H, models/image_encoder). Set it.")
    backbone = backbone or load_backbone(base)
    if config.lora:
        return LoraTeacher(backbone, lora_files(Path(config.lora)), config.scale)
    encoder = load_clip_vision(weights_path(config.ip_image_encoder))
    return IpAdapterTeacher(backbone, Path(config.ip_adapter), encoder, config.scale)


def lora_files(path: Path) -> dict[str, Path]:
    """A LoRA under the name ""; of a folder, each `<group>.safetensors` under its group.

    Raises:
        TrainingConfigError: a folder without such files.
    """
    if not path.is_dir():
        return {"": path}
    files = {file.stem: file for file in sorted(path.glob("*.safetensors"))}
    if not files:
        raise TrainingConfigError(f"teacher.lora = {str(path)!r} is a folder without .safetensors files; wanted a LoRA for "
                                  "each group of references, <group>.safetensors. Put them there, or name one file.")
    return files


@torch.no_grad()
def sample_latents(
    predict: Predict, alphas_cumprod_T: torch.Tensor, context: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator, steps: int, size: tuple[int, int, int, int], prediction: str = "eps",
) -> torch.Tensor:
    """Samples (B, 4, h, w) of the model itself, of unit deviation, to be noised as training latents.

    DDIM without added noise (arXiv:2010.02502, eq. 12 with sigma = 0), from the last timestep down in equal strides.

    Args:
        predict: (noised latent, timestep (B,), context) -> eps or v, already guided if guidance is wanted.
        alphas_cumprod_T: the model's schedule, on the device to sample on.
        context: (B, K, W), or a function of the timestep (B,), as ELLA's tokens change with it.
        generator: of the first noise, on the CPU.
        steps: at least 1.
        size: B, 4, h, w.
        prediction: what `predict` gives, "eps" or "v".
    """
    device = alphas_cumprod_T.device
    latent_B4hw = torch.randn(size, generator=generator).to(device)
    last = len(alphas_cumprod_T)
    strides = torch.linspace(last, 0, steps + 1).round().long().tolist()
    for timestep, following in zip([end - 1 for end in strides[:-1]], [end - 1 for end in strides[1:]], strict=True):
        timestep_B = torch.full((size[0],), timestep, device=device)
        tokens = context(timestep_B) if callable(context) else context
        predicted_B4hw = predict(latent_B4hw, timestep_B, tokens)
        kept, kept_next = alphas_cumprod_T[timestep], alphas_cumprod_T.new_tensor(1.0)
        if following >= 0:
            kept_next = alphas_cumprod_T[following]
        if prediction == "v":
            clean_B4hw = kept.sqrt() * latent_B4hw - (1 - kept).sqrt() * predicted_B4hw
            noise_B4hw = kept.sqrt() * predicted_B4hw + (1 - kept).sqrt() * latent_B4hw
        else:
            noise_B4hw = predicted_B4hw
            clean_B4hw = (latent_B4hw - (1 - kept).sqrt() * noise_B4hw) / kept.sqrt()
        latent_B4hw = kept_next.sqrt() * clean_B4hw + (1 - kept_next).sqrt() * noise_B4hw
    return latent_B4hw


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
