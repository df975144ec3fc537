"""Pictures on a bare machine: connector, UNet and autoencoder in diffusers' DDIM loop, without ComfyUI.

Shapes: B pictures, N evaluations for them, T timesteps, K cross-attention tokens of width W, latents 4 x h x w,
pictures 3 x H x W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange, repeat

from ..errors import ImageInputError
from ..model.addition import TokenTerms, joined
from ..model.assembly import Assembly, terms_over_schedule
from ..model.connector import Connector
from ..model.own_tokens import OwnTokens
from .backbones import Backbone
from .config import PICTURES_AT_ONCE
from .denoiser import NO_EXTRA
from .own_text import beside_text, sizes_of
from .schedule import TIMESTEPS, Ddim
from .spec import PLAYGROUND_SPEC, SD15, BaseSpec

PIXELS_PER_LATENT = SD15.pixels_per_latent


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are the playground's.

    The timesteps are those of ComfyUI's scheduler `ddim_uniform`, the steps those of its sampler `ddim`.
    """

    steps: int = 20
    guidance: float = 4.0
    width_px: int = PLAYGROUND_SPEC.side_px
    height_px: int = PLAYGROUND_SPEC.side_px

    def __post_init__(self):
        if not 1 <= self.steps < TIMESTEPS or self.width_px % PIXELS_PER_LATENT or self.height_px % PIXELS_PER_LATENT:
            raise ImageInputError(f"{self.steps} steps at {self.width_px} x {self.height_px} pixels; wanted 1 to "
                                  f"{TIMESTEPS - 1} steps and sides that are multiples of {PIXELS_PER_LATENT}.")


@dataclass(frozen=True)
class Request:
    """One picture: a prompt, references, and the seed of its noise."""

    prompt: str
    assembly: Assembly = field(default_factory=Assembly)
    negative: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Pipeline:
    """What generating needs.

    Args:
        encode_text: prompts -> text features (1, N, D) each.
        connector: ELLA, or the base's own tokens.
        predict_noise: (noised latent (B, 4, h, w), timestep (B,), context (B, K, W) and, where a base reads more, what it reads
            beside it, see `Denoiser.predict_noise`) -> predicted noise.
        decode: latents of unit deviation -> pictures (B, 3, H, W) in [-1, 1].
        spec: of the base: its latents, its noise schedule, what it predicts.
        assemble: (connector, text, timesteps, assembly) -> what each timestep predicts with, as `terms_over_schedule`.
        beside: (prompts, how they are sampled) -> what the base reads beside the tokens, by its name: tensors with a row for
            each prompt, or values for all.
        time_T: what modules count at each timestep; None: the timesteps.
        kept: a prompt -> (1, N) False where a token is padding; None: none is.
    """

    encode_text: Callable[[Sequence[str]], list[torch.Tensor]]
    connector: Connector | OwnTokens
    predict_noise: Callable[..., torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    spec: BaseSpec
    assemble: Callable[[Connector, torch.Tensor, torch.Tensor, Assembly], list[TokenTerms]] = terms_over_schedule
    beside: Callable[[Sequence[str], Sampling], Mapping[str, Any]] = lambda prompts, sampling: NO_EXTRA
    time_T: torch.Tensor | None = None
    kept: Callable[[str], torch.Tensor | None] = lambda prompt: None


def pipeline_for(
    backbone: Backbone, connector: Connector | OwnTokens, encode_text: Callable[[Sequence[str]], list[torch.Tensor]],
    pooled_text: Callable[[Sequence[str]], list[torch.Tensor]] | None = None,
) -> Pipeline:
    """The pipeline of a base and its text, whoever draws: commands, sample sheets, thumbnails, evaluations.

    Args:
        pooled_text: prompts -> pooled vectors (1, P) each, of a base that reads them.
    """
    def beside(prompts: Sequence[str], sampling: Sampling) -> Mapping[str, torch.Tensor]:
        if pooled_text is None or not backbone.spec.pooled_width:
            return NO_EXTRA
        size_px = (sampling.width_px, sampling.height_px)
        return beside_text(torch.cat(pooled_text(prompts)), sizes_of([(size_px, size_px)] * len(prompts)))

    return Pipeline(encode_text, connector, backbone.predict_noise, backbone.decode, backbone.spec, beside=beside)


def initial_noise(seed: int, sampling: Sampling, spec: BaseSpec) -> torch.Tensor:
    """The noise (1, 4, h, w) that ComfyUI makes for a seed and one picture."""
    cell_px = spec.pixels_per_latent
    size = (1, spec.latent_channels, sampling.height_px // cell_px, sampling.width_px // cell_px)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(
    pipeline: Pipeline, requests: Sequence[Request], sampling: Sampling | None = None, at_once: int = PICTURES_AT_ONCE
) -> torch.Tensor:
    """Pictures (B, H, W, 3) in [0, 1], one per request; a request's picture does not depend on the others.

    Args:
        at_once: pictures that are sampled together; they are decoded one by one, as that takes the most memory.
    Raises:
        ConnectorMismatchError, ReferenceMismatchError: see `terms_over_schedule`.
    """
    sampling = sampling or Sampling()
    parts = []
    for start in range(0, len(requests), at_once):
        for latent_14hw in _sample(pipeline, requests[start:start + at_once], sampling).split(1):
            image_13HW = pipeline.decode(latent_14hw)
            parts.append(rearrange(((image_13HW + 1) / 2).clamp(0, 1), "b c h w -> b h w c").cpu())
    return torch.cat(parts)


def _sample(pipeline: Pipeline, requests: Sequence[Request], sampling: Sampling) -> torch.Tensor:
    scheduler = Ddim(pipeline.spec.alphas_cumprod_T, pipeline.spec.prediction, sampling.steps)
    positive_T = _terms(pipeline, [(request.prompt, request.assembly) for request in requests], scheduler.timesteps)
    negative_T = _terms(pipeline, [(request.negative, Assembly()) for request in requests], scheduler.timesteps)
    # in float32, whatever the tokens are: half precision would round at every step
    noises = [initial_noise(request.seed, sampling, pipeline.spec) for request in requests]
    noise_B4hw = torch.cat(noises).to(positive_T[0].tokens_BKW.device)
    latent_B4hw = scheduler.begin(noise_B4hw)
    beside = _beside(pipeline, requests, sampling, noise_B4hw.device)
    for timestep, positive, negative in zip(scheduler.timesteps, positive_T, negative_T, strict=True):
        both = joined(_of_one_length([positive, negative]))
        with_text_B4hw, without_B4hw = _predict(pipeline, latent_B4hw, timestep, both, beside).chunk(2)
        guided_B4hw = without_B4hw + sampling.guidance * (with_text_B4hw - without_B4hw)
        latent_B4hw = scheduler.step(guided_B4hw, int(timestep), latent_B4hw)
    return latent_B4hw


def _beside(
    pipeline: Pipeline, requests: Sequence[Request], sampling: Sampling, device: torch.device
) -> Mapping[str, Any]:
    """What the base reads beside the tokens of the positives and then of the negatives; empty for most."""
    prompts = [request.prompt for request in requests] + [request.negative for request in requests]
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in pipeline.beside(prompts, sampling).items()}


def _predict(
    pipeline: Pipeline, latent_B4hw: torch.Tensor, timestep: torch.Tensor, both: TokenTerms, beside: Mapping[str, Any]
) -> torch.Tensor:
    """What the positives and then the negatives predict, (2B, 4, h, w); at most 2B evaluations at once."""
    latent_N4hw = repeat(latent_B4hw, "b c h w -> (sides b) c h w", sides=2)[both.rows]
    predicted = []
    for at_A in torch.arange(len(latent_N4hw), device=latent_N4hw.device).split(2 * len(latent_B4hw)):
        rows_A = both.rows[at_A]
        more = ({name: value[rows_A] if isinstance(value, torch.Tensor) else value for name, value in beside.items()},)
        more = more if beside else ()
        timestep_A = timestep.to(latent_N4hw.device).expand(len(at_A))
        predicted.append(pipeline.predict_noise(latent_N4hw[at_A], timestep_A, both.stacked[at_A], *more))
    return both.added(torch.cat(predicted))


def _of_one_length(terms: Sequence[TokenTerms]) -> list[TokenTerms]:
    """Texts of several lengths, which are multiples of one, repeated: attention over repeated tokens is the same."""
    length = math.lcm(*(one.tokens_BKW.shape[1] for one in terms))
    return [one.repeated(length) for one in terms]


def _terms(
    pipeline: Pipeline, entries: Sequence[tuple[str, Assembly]], timestep_T: torch.Tensor
) -> list[TokenTerms]:
    """Of each timestep: each entry's text has its own length, so each is computed alone, all timesteps in one pass."""
    texts = pipeline.encode_text([prompt for prompt, _ in entries])
    time_T = timestep_T if pipeline.time_T is None else pipeline.time_T[timestep_T]
    known: dict = {}
    for (prompt, assembly), text_1ND in zip(entries, texts, strict=True):
        key = (prompt, assembly.references, assembly.addition)
        if key not in known:
            kept_1N, source = pipeline.kept(prompt), pipeline.connector
            source = source if kept_1N is None else replace(source, kept_FK=kept_1N.to(text_1ND.device))
            known[key] = pipeline.assemble(source, text_1ND, time_T, assembly)
    each = [known[prompt, assembly.references, assembly.addition] for prompt, assembly in entries]
    return [joined(_of_one_length(of_entries)) for of_entries in zip(*each, strict=True)]
