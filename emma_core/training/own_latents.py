"""Training on samples of the model itself: prompts and reference pictures are all that a teacher needs.

Shapes: N text tokens of width D, K cross-attention tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from ..base.backbones import Backbone
from ..base.denoiser import NO_EXTRA
from ..base.own_text import beside_text, sizes_of
from ..errors import FileError, TrainingConfigError
from ..files.plain_file import read_text
from ..model.assembly import Assembly
from ..model.connector import Connector
from ..model.own_tokens import OwnTokens
from .config import TeacherConfig, TrainConfig
from .prepared import Prepared, key_of
from .shards import Processes, fill
from .store import FeatureStore, Filling
from .teachers import named_kinds

SHIPPED_PROMPTS = Path(__file__).with_name("prompts.txt")
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class OwnLatents:
    """A training set whose targets the model drew from prompts; any of the prepared pictures may be a reference.

    Args:
        prompts: one for each target.
        texts: prompt -> (1, N, D), "" among them.
        latents: (4, h, w) of each target.
        pooled: prompt -> (1, P), of a base that reads such a vector.
        reference_set: the prepared pictures that references come from.
        size_px: width and height of the targets.
    """

    def __init__(
        self, prompts: Sequence[str], texts: Mapping[str, torch.Tensor], latents: Sequence[torch.Tensor],
        reference_set: Prepared, size_px: tuple[int, int], pooled: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ):
        self._pooled = pooled
        self._prompts, self._texts, self._latents, self._size_px = list(prompts), texts, latents, size_px
        self.reference_set = reference_set
        self._references = tuple(sorted(reference_set.variant_keys))

    def __len__(self) -> int:
        return len(self._prompts)

    def bucket(self, index: int) -> tuple[int, int]:
        return self._size_px

    def group(self, index: int) -> str:
        return ""

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._prompts[index],)

    def references(self, index: int) -> tuple[int, ...]:
        return self._references

    def variants(self, reference: int) -> int:
        return self.reference_set.variants(reference)

    def latent(self, index: int, flipped: bool = False) -> torch.Tensor:
        return self._latents[index]

    def text(self, caption: str) -> torch.Tensor:
        return self._texts[caption]

    def pooled(self, caption: str) -> torch.Tensor:
        return self._pooled[caption]

    def size_before(self, index: int) -> tuple[int, int]:
        return self._size_px

    def features(self, reference: int, variant: int) -> dict[str, torch.Tensor]:
        return self.reference_set.features(reference, variant)

    def mark(self) -> str:
        """Of the references: the latents come from the model itself."""
        return self.reference_set.mark()

    def summary(self) -> dict:
        """Counts, for a module's metadata."""
        return {"own_latents": len(self), "distinct_prompts": len(set(self._prompts)), "references": len(self._references)}


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        TrainingConfigError: no such file, not text, or no prompts in it.
    """
    try:
        lines = read_text(path, "a text file with a prompt on each line").splitlines()
    except FileError as found:
        raise TrainingConfigError(f"teacher.prompts = {str(path)!r} cannot be read: {found}") from found
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise TrainingConfigError(f"{path} holds no prompts; wanted one on each line. Write some.")
    return prompts


def prompts_of(teacher: TeacherConfig) -> list[str]:
    """The prompts that are named, else those that are shipped: everyday scenes without names of artists.

    Raises:
        TrainingConfigError: see `read_prompts`.
    """
    return read_prompts(teacher.prompts or SHIPPED_PROMPTS)


def check_own_latents(config: TrainConfig) -> None:
    """Refuse settings that do not go together with own latents.

    Raises:
        TrainingConfigError: no teacher (the model's own noise teaches a reference nothing), mirrored targets.
    """
    if not named_kinds(config.teacher):
        raise TrainingConfigError("teacher.own_latents needs a teacher: samples of the model itself hold nothing of a "
                                  "reference. Set teacher.lora or teacher.ip_adapter.")
    if config.data.flip:
        raise TrainingConfigError("data.flip does not go with teacher.own_latents, whose targets are no pictures. Set it to "
                                  "false.")


@torch.no_grad()
def own_latents(
    config: TrainConfig, backbone: Backbone, connector: Connector | OwnTokens,
    encode: Callable[[list[str]], list[torch.Tensor]], prepared: Prepared, cache: Path,
    progress: Callable[[str, int, int], None] | None = None, processes: Processes | None = None,
    encode_pooled: Callable[[list[str]], list[torch.Tensor]] = lambda prompts: [],
) -> OwnLatents:
    """Samples for every prompt, `teacher.samples` each, drawn once and kept in the cache; each process draws its part.

    Raises:
        TrainingConfigError: see `check_own_latents` and `read_prompts`.
        TrainingError: see `fill` and `FeatureStore`.
    """
    check_own_latents(config)
    prompts = prompts_of(config.teacher)
    processes = processes or Processes()
    texts = processes.each(lambda: dict(zip(["", *prompts], encode(["", *prompts]), strict=True)))
    # empty where the base reads none
    pooled = processes.each(lambda: dict(zip(["", *prompts], encode_pooled(["", *prompts]), strict=False)))
    side_px = config.data.resolution_px
    store = processes.first_alone(lambda: FeatureStore(cache / "own_latents", {
        "backbone": backbone.sha256, "base": backbone.name, "ella": ella_mark(connector), "steps": config.report.sample_steps,
        "guidance": config.report.guidance, "side_px": side_px, "seed": config.train.seed,
        "prediction": backbone.spec.prediction, "schedule": _digest(backbone.alphas_cumprod_T)}))
    jobs = [(prompt, number) for number in range(config.teacher.samples) for prompt in prompts]
    shown = {prompt: _digest(text_1ND) + (_digest(pooled[prompt]) if pooled else "") for prompt, text_1ND in texts.items()}
    keys = [key_of(number, prompt, shown[prompt], shown[""]) for prompt, number in jobs]
    job_of = dict(zip(keys, jobs, strict=True))
    connector = connector if isinstance(connector, OwnTokens) else connector.to(backbone.device)

    def draw(todo: Sequence[str], filling: Filling) -> None:
        for key in todo:
            filling.add(key, {"latent": _sample(config, backbone, connector, texts, pooled, *job_of[key])})

    fill("own latents", store, keys, draw, progress or (lambda what, done, total: None), processes)
    latents = processes.each(lambda: [store.get(key)["latent"] for key in keys])
    return OwnLatents([prompt for prompt, _ in jobs], texts, latents, prepared, (side_px, side_px), pooled)


def ella_mark(connector: Connector | OwnTokens) -> str:
    """What made the tokens, for caches."""
    return f"own tokens of {connector.source.family}" if isinstance(connector, OwnTokens) else connector.sha256


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _sample(
    config: TrainConfig, backbone: Backbone, connector: Connector | OwnTokens, texts, pooled, prompt: str, number: int
) -> torch.Tensor:
    """One guided sample (4, h, w) from the text alone, the same for the same prompt and number."""
    guidance, spec = config.report.guidance, backbone.spec
    with_text_1ND, without_1ND = (texts[text].to(backbone.device) for text in (prompt, ""))
    side_px = config.data.resolution_px
    size_16 = sizes_of([((side_px, side_px), (side_px, side_px))]).to(backbone.device)
    beside = [beside_text(pooled[text].to(backbone.device), size_16) if pooled else NO_EXTRA for text in (prompt, "")]

    def context(timestep_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return connector.tokens(with_text_1ND, timestep_B, Assembly()), connector.tokens(without_1ND, timestep_B, Assembly())

    def predict(noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        shown, plain = (backbone.predict_noise(noised_B4hw, timestep_B, tokens_BKW, told)
                        for tokens_BKW, told in zip(tokens, beside, strict=True))
        return plain + guidance * (shown - plain)

    seed = int.from_bytes(hashlib.sha256(f"{config.train.seed} {number} {prompt}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    cells = side_px // spec.pixels_per_latent
    size = (1, spec.latent_channels, cells, cells)
    return sample_latents(predict, backbone.alphas_cumprod_T, context, generator, config.report.sample_steps, size,
                          spec.prediction)[0].float().cpu()


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
