"""The second world as one object, from the folder that `export` wrote and the runs of the trainer.

Shapes: B pictures of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from emma_core.base.backbones import Backbone, load_playground
from emma_core.base.own_text import load_own_text
from emma_core.base.pipeline import Pipeline, Request, Sampling, generate, pipeline_for
from emma_core.encoders.base import ReferenceEncoder, encode_pictures
from emma_core.encoders.loading import load_encoder
from emma_core.encoders.matching import check_for_module
from emma_core.encoders.options import EncodeOptions
from emma_core.files.connector_file import load_connector
from emma_core.files.module_file import load_module
from emma_core.model.addition import Addition
from emma_core.model.assembly import Assembly, Reference
from emma_core.model.gated_resampler import GatedResampler
from emma_core.model.reference_features import combine_features
from emma_core.text.encoder import load_text_encoder
from emma_core.training.ip_adapter_teacher import IpAdapterTeacher

from ..playground.evaluate import Trial
from .dataset import Pictures


@dataclass(frozen=True)
class World:
    """The pipelines on ELLA and on the base's own tokens, modules by name, the reference encoder; features are kept.

    ``adapter`` is the IP-Adapter on the base, where there is one.
    """

    pipeline: Pipeline
    own: Pipeline
    modules: Mapping[str, GatedResampler]
    encoder: ReferenceEncoder
    data: Pictures
    device: str
    adapter: IpAdapterTeacher | None = None
    known: dict = field(default_factory=dict)

    @property
    def _at_once(self) -> int:
        return 16 if self.device == "cpu" else 256

    def _picture(self, position: int) -> torch.Tensor:
        """(1, H, W, 3) in [0, 1]."""
        return torch.from_numpy(self.data.images_NHWC[position].copy())[None].float() / 255

    def reference(self, module: GatedResampler, position: int, strength: float) -> Reference:
        """A picture of the data as a module's reference.

        Raises:
            ReferenceMismatchError: the module was trained with another encoder.
        """
        options = EncodeOptions(tuple(module.config.features))
        key = (position, options.features)
        if key not in self.known:
            features, _ = encode_pictures(self.encoder, self._picture(position), None, options)
            combined = combine_features(features, "concat", self.encoder.description)
            check_for_module(combined, module.config)
            self.known[key] = {name: tensor.to(self.device) for name, tensor in combined.features.items()}
        return Reference(module, self.known[key], strength)

    def draw(
        self, prompts: Sequence[str], trials: Sequence[Trial], shown: Mapping[str, tuple[GatedResampler, float]],
        pipeline: Pipeline, addition: Addition, sampling: Sampling,
    ) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], a picture for each trial.

        Args:
            shown: condition -> the module that takes the trial's reference of it, and its strength.
            pipeline: one of the world's, or one that assembles in another way.
        """
        requests = []
        for prompt, trial in zip(prompts, trials, strict=True):
            references = [self.reference(module, getattr(trial, condition), strength)
                          for condition, (module, strength) in shown.items()]
            requests.append(Request(prompt, Assembly(references, addition), seed=trial.seed))
        return _signed(generate(pipeline, requests, sampling, self._at_once))

    def draw_by_adapter(self, prompts: Sequence[str], trials: Sequence[Trial], sampling: Sampling) -> torch.Tensor:
        """As `draw`, on ELLA's tokens with the style references shown to the IP-Adapter itself."""
        parts = []
        for start in range(0, len(prompts), self._at_once):
            some = slice(start, start + self._at_once)
            pictures = [self._picture(trial.style) for trial in trials[some]]
            embeds_BVD = torch.cat([self.adapter.encode_reference(picture)["ip_adapter"] for picture in pictures])
            is_shown_B = torch.ones(len(embeds_BVD), dtype=torch.bool)
            shown = {"ip_adapter": embeds_BVD.repeat(2, 1, 1), "present_B": torch.cat([is_shown_B, ~is_shown_B])}

            def predict(noised_N4hw, timestep_N, context_NKW, shown=shown) -> torch.Tensor:
                return self.adapter.predict(noised_N4hw, timestep_N, context_NKW, shown)

            requests = [Request(prompt, seed=trial.seed) for prompt, trial in zip(prompts[some], trials[some], strict=True)]
            parts.append(generate(replace(self.pipeline, predict_noise=predict), requests, sampling, len(requests)))
        return _signed(torch.cat(parts))


def _signed(image_BHW3: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    return image_BHW3.permute(0, 3, 1, 2) * 2 - 1


def load_world(
    files: Path, runs: Path, names: Sequence[str], data: Pictures, device: str, dtype: torch.dtype = torch.float32,
) -> World:
    """Base, ELLA and the modules `emma-<name>` of the trainer's runs.

    Args:
        dtype: of the UNet's weights.
    Raises:
        FileError: a part is missing or damaged.
    """
    model = load_playground(files)
    backbone = Backbone(model.unet, model.autoencoder, model.spec, files.name, model.sha256).to(device, dtype)
    connector = load_connector(runs / "ella" / "ella.safetensors", device=device)
    encode = load_text_encoder(files / "t5.safetensors", torch.float32, device).encode
    own_text = load_own_text(files, backbone.spec, torch.float32)
    own_text.model.to(device)
    modules = {name: load_module(runs / f"emma-{name}" / f"emma-{name}.safetensors", device=device) for name in names}
    on_own = pipeline_for(backbone, backbone.spec.own_tokens, own_text.encode)
    sees, trained = files / "clip_vision.safetensors", files / "ip-adapter.safetensors"
    encoder = load_encoder(sees)
    adapter = IpAdapterTeacher(backbone, trained, encoder, 1.0) if trained.exists() else None
    return World(pipeline_for(backbone, connector, encode), on_own, modules,
                 encoder, data, device, adapter)
