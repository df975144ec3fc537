"""Sample sheets in the graph: the command line's own, drawn by the copy that trains, with the CLIP and the VAE of the folder.

Shapes: B rows, K cross-attention tokens of width W, T timesteps, latents C x (frames x) h x w, pictures H x W.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from einops import rearrange

from ..emma_core.base.config import PLAYGROUND_GUIDANCE
from ..emma_core.base.denoiser import NO_EXTRA
from ..emma_core.base.pipeline import Pipeline, Sampling
from ..emma_core.base.spec import PLAYGROUND_SPEC, SD15, BaseSpec
from ..emma_core.model.connector import Connector
from ..emma_core.model.own_tokens import OwnTokens
from ..emma_core.training.config import ReportConfig, TrainConfig
from ..emma_core.training.draws import BatchRow
from ..emma_core.training.sample_prompts import sample_prompts
from ..emma_core.training.samples import Sampler, Sheet, references_of
from ..emma_core.training.student import OwnText
from ..emma_core.training.trainer import Trainer
from .denoiser import HostDenoiser
from .families import context_width
from .latents import normal
from .own_text import OwnTexts
from .training_folder import FolderSet, TrainingFolder, text_of

_FLOW_GUIDANCE = 4.0


class GraphSampler(Sampler):
    """What drawing has loaded beside the copy that trains is let go after each sheet."""

    def sheet(self, trainer: Trainer) -> Sheet:
        try:
            return super().sheet(trainer)
        finally:
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()


def sampler_for(
    model, folder: TrainingFolder, config: TrainConfig, data: FolderSet, denoiser: HostDenoiser, own: OwnText | None
) -> GraphSampler:
    """Of a run on a folder; its texts are encoded at once.

    Args:
        model: MODEL.
        folder: what is wired.
        config: of the run.
        data: that folder, encoded.
        denoiser: the copy that trains.
        own: the texts of the data, where they are the MODEL's own.
    """
    playground = context_width(model.model) == PLAYGROUND_SPEC.context_width
    prompts = sample_prompts(config.module.condition, playground, folder.captions()) or folder.captions()[-1:]
    named = list(dict.fromkeys(["", *prompts]))
    entries = [text_of(folder.clip, prompt)[0] for prompt in named]
    latent = torch.zeros(()).expand(data.latent(0).shape)
    texts = OwnTexts(model, entries, [latent], named) if own else None
    drawing = _Drawing(
        model, folder.vae, denoiser, _spec(denoiser, latent, data.bucket(0)),
        {prompt: texts.tokens(index).float() if texts else entries[index][0] for index, prompt in enumerate(named)},
        texts.own_text(own.time_T) if own else None)
    references = references_of(data, data)
    return GraphSampler(drawing.pipeline, _settings(config.report, denoiser, playground), list(prompts), references.features,
                        data.bucket(0), references.pictures)


def _settings(report: ReportConfig, denoiser: HostDenoiser, playground: bool) -> ReportConfig:
    """With the guidance that such models are drawn with."""
    if playground:
        return replace(report, guidance=PLAYGROUND_GUIDANCE)
    return replace(report, guidance=_FLOW_GUIDANCE if denoiser.prediction == "flow" else ReportConfig().guidance)


def _spec(denoiser: HostDenoiser, latent: torch.Tensor, size_px: tuple[int, int]) -> BaseSpec:
    """Of a MODEL, as drawing reads it; a flow's velocity is told as a diffusion model's."""
    prediction = "v" if denoiser.prediction == "flow" else denoiser.prediction
    return replace(SD15, family=denoiser.name, latent_channels=len(latent), pixels_per_latent=size_px[0] // latent.shape[-1],
                   alphas_cumprod_T=denoiser.alphas_cumprod_T, prediction=prediction)


@dataclass(frozen=True, eq=False)
class _Drawing:
    """Everything around the module.

    Args:
        model, vae: MODEL and VAE.
        denoiser: the copy of the MODEL's network.
        spec: of it.
        tokens: (1, N, D) of each prompt.
        own: what goes with them where they are the MODEL's own.
    """

    model: Any
    vae: Any
    denoiser: HostDenoiser
    spec: BaseSpec
    tokens: Mapping[str, torch.Tensor]
    own: OwnText | None

    def pipeline(self, connector: Connector | OwnTokens, device: torch.device) -> Pipeline:
        """As `Sampler.pipeline_on`."""
        def encoded(prompts: Sequence[str]) -> list[torch.Tensor]:
            return [self.tokens[prompt].to(device) for prompt in prompts]

        if self.own is None:
            return Pipeline(encoded, connector, self._predict, self._decode, self.spec)

        def beside(prompts: Sequence[str], sampling: Sampling) -> Mapping[str, Any]:
            return self.own.stacked([BatchRow(0, False, prompt, 0, 0, 1.0) for prompt in prompts], device)

        return Pipeline(encoded, connector, self._predict, self._decode, self.spec, beside=beside,
                        time_T=self.own.time_T.to(device), kept=self.own.kept)

    def _predict(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor,
        beside: Mapping[str, Any] = NO_EXTRA,
    ) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        predicted_B4hw = self.denoiser.predict_noise(self._with_frame(noised_B4hw), timestep_B, context_BKW, beside)
        predicted_B4hw = predicted_B4hw.reshape(noised_B4hw.shape)
        if self.denoiser.prediction != "flow":
            return predicted_B4hw
        # u = noise - latent of x = a latent + s noise, a^2 + s^2 = 1, as v = a noise - s latent
        kept_B111 = self.denoiser.alphas_cumprod_T.to(timestep_B.device)[timestep_B].reshape(-1, 1, 1, 1)
        a_B111, s_B111 = kept_B111.sqrt(), (1 - kept_B111).sqrt()
        return ((a_B111 - s_B111) * noised_B4hw + predicted_B4hw) / (a_B111 + s_B111)

    def _decode(self, latent_14hw: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # in which the weights of a VAE may have been loaded
            image = self.vae.decode(self.model.model.process_latent_out(self._with_frame(latent_14hw.float())).cpu())
        return normal(rearrange(2 * image.reshape(-1, *image.shape[-3:])[:1] - 1, "b h w c -> b c h w"))

    def _with_frame(self, latent_B4hw: torch.Tensor) -> torch.Tensor:
        """A picture is a video of one frame."""
        return latent_B4hw.unsqueeze(2) if self.model.model.latent_format.latent_dimensions == 3 else latent_B4hw
