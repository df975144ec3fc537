"""Training on samples of the model itself: prompts and reference pictures are all that a teacher needs.

Shapes: N text tokens of width D, K cross-attention tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..base.backbones import Backbone
from ..errors import TrainingConfigError
from ..model.assembly import Assembly
from ..model.connector import Connector
from .config import TrainConfig
from .prepare import Prepared
from .shards import Processes, fill
from .store import FeatureStore, Filling
from .teachers import sample_latents


class OwnLatents:
    """A training set whose targets the model drew from prompts; any of the prepared pictures may be a reference.

    Args:
        prompts: one for each target.
        texts: prompt -> (1, N, D), "" among them.
        latents: (4, h, w) of each target.
        prepared: the reference pictures.
        size_px: width and height of the targets.
    """

    def __init__(
        self, prompts: Sequence[str], texts: Mapping[str, torch.Tensor], latents: Sequence[torch.Tensor], prepared: Prepared,
        size_px: tuple[int, int],
    ):
        self._prompts, self._texts, self._latents, self._size_px = list(prompts), texts, latents, size_px
        self.prepared = prepared
        self._references = tuple(sorted(prepared.variant_keys))

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
        return self.prepared.variants(reference)

    def latent(self, index: int, flipped: bool = False) -> torch.Tensor:
        return self._latents[index]

    def text(self, caption: str) -> torch.Tensor:
        return self._texts[caption]

    def features(self, reference: int, variant: int) -> dict[str, torch.Tensor]:
        return self.prepared.features(reference, variant)

    def summary(self) -> dict:
        """Counts, for a module's metadata."""
        return {"own_latents": len(self), "distinct_prompts": len(set(self._prompts)), "references": len(self._references)}


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        TrainingConfigError: no such file, not text, or no prompts in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as found:
        raise TrainingConfigError(f"teacher.prompts = {str(path)!r} cannot be read ({found}); wanted a text file with a prompt "
                                  "on each line. Check the path.") from found
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise TrainingConfigError(f"{path} holds no prompts; wanted one on each line. Write some.")
    return prompts


def check_own_latents(config: TrainConfig) -> None:
    """Refuse settings that do not go together with own latents.

    Raises:
        TrainingConfigError: no teacher (the model's own noise teaches a reference nothing), no prompts, mirrored targets.
    """
    if not (config.teacher.lora or config.teacher.ip_adapter):
        raise TrainingConfigError("teacher.own_latents needs a teacher: samples of the model itself hold nothing of a "
                                  "reference. Set teacher.lora or teacher.ip_adapter.")
    if not config.teacher.prompts:
        raise TrainingConfigError("teacher.own_latents needs teacher.prompts, a text file with a prompt on each line. Set it.")
    if config.data.flip:
        raise TrainingConfigError("data.flip does not go with teacher.own_latents, whose targets are no pictures. Set it to "
                                  "false.")


@torch.no_grad()
def own_latents(
    config: TrainConfig, backbone: Backbone, connector: Connector, encode: Callable[[list[str]], list[torch.Tensor]],
    prepared: Prepared, cache: Path, progress: Callable[[str, int, int], None] | None = None,
    processes: Processes | None = None,
) -> OwnLatents:
    """Samples for every prompt, `teacher.samples` each, drawn once and kept in the cache; each process draws its part.

    Raises:
        TrainingConfigError: see `check_own_latents` and `read_prompts`.
        TrainingError: see `fill` and `FeatureStore`.
    """
    check_own_latents(config)
    prompts = read_prompts(config.teacher.prompts)
    processes = processes or Processes()
    texts = processes.each(lambda: dict(zip(["", *prompts], encode(["", *prompts]), strict=True)))
    side_px = config.data.resolution_px
    store = processes.first_alone(lambda: FeatureStore(cache / "own_latents", {
        "backbone": backbone.sha256, "base": backbone.name, "ella": connector.sha256, "steps": config.report.sample_steps,
        "guidance": config.report.guidance, "side_px": side_px}))
    jobs = [(prompt, number) for number in range(config.teacher.samples) for prompt in prompts]
    keys = [hashlib.sha256(f"{number} {prompt}".encode()).hexdigest() for prompt, number in jobs]
    job_of = dict(zip(keys, jobs, strict=True))
    connector = connector.to(backbone.device)

    def draw(todo: Sequence[str], filling: Filling) -> None:
        for key in todo:
            filling.add(key, {"latent": _sample(config, backbone, connector, texts, *job_of[key])})

    fill("own latents", store, keys, draw, progress or (lambda what, done, total: None), processes)
    latents = processes.each(lambda: [store.get(key)["latent"] for key in keys])
    return OwnLatents([prompt for prompt, _ in jobs], texts, latents, prepared, (side_px, side_px))


def _sample(config: TrainConfig, backbone: Backbone, connector: Connector, texts, prompt: str, number: int) -> torch.Tensor:
    """One guided sample (4, h, w) from the text alone, the same for the same prompt and number."""
    guidance, spec = config.report.guidance, backbone.spec
    with_text_1ND, without_1ND = (texts[text].to(backbone.device) for text in (prompt, ""))

    def context(timestep_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return connector.tokens(with_text_1ND, timestep_B, Assembly()), connector.tokens(without_1ND, timestep_B, Assembly())

    def predict(noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        shown, plain = (backbone.predict_noise(noised_B4hw, timestep_B, tokens_BKW) for tokens_BKW in tokens)
        return plain + guidance * (shown - plain)

    seed = int.from_bytes(hashlib.sha256(f"{config.train.seed} {number} {prompt}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    cells = config.data.resolution_px // spec.pixels_per_latent
    size = (1, spec.latent_channels, cells, cells)
    return sample_latents(predict, backbone.alphas_cumprod_T, context, generator, config.report.sample_steps, size,
                          spec.prediction)[0].float().cpu()
