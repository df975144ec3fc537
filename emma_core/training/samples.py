"""Sample pictures of a run: fixed prompts, references and seeds, drawn with the weights as they are.

Shapes: pictures H x W, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..base.backbones import Backbone
from ..base.pipeline import Pipeline, Request, Sampling, generate, pipeline_for
from ..drawing.contact_sheet import SheetRow, draw_contact_sheet
from ..model.assembly import Assembly, Reference
from ..model.connector import Connector
from ..model.gated_resampler import GatedResampler
from .config import ReportConfig
from .trainer import Trainer


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws the sample sheet of a run.

    Args:
        backbone: diffusion model and autoencoder.
        settings: sampling steps, guidance.
        texts: prompt -> T5 features (1, N, D), "" among them; all others are drawn.
        references: features of each reference picture, name -> (V, D).
        size_px: width and height.
    """

    backbone: Backbone
    settings: ReportConfig
    texts: Mapping[str, torch.Tensor]
    references: Sequence[Mapping[str, torch.Tensor]]
    size_px: tuple[int, int]

    @torch.no_grad()
    def sheet(self, trainer: Trainer) -> Image.Image:
        """Each prompt without a reference and with each of them; for an ELLA, each prompt."""
        result, connector = trainer.result(), trainer.student.connector
        device = trainer.accelerator.device
        if isinstance(result, Connector):
            connector, assemblies = result.to(device), [Assembly()]
        else:
            assemblies = [Assembly(), *(_assembly(result.to(device), features) for features in self.references)]
        prompts = [prompt for prompt in self.texts if prompt] or [""]
        requests = [Request(prompt, assembly, seed=row) for row, prompt in enumerate(prompts) for assembly in assemblies]
        with trainer.accelerator.autocast():
            # what fits with gradients fits without
            pictures = generate(self._pipeline(connector, device), requests, self._sampling(), trainer.config.train.batch)
        return _drawn(prompts, pictures, len(assemblies), trainer.step)

    @torch.no_grad()
    def picture(self, trainer: Trainer) -> torch.Tensor:
        """(H, W, 3) in [0, 1]: the first prompt with the first reference, by the module as it is."""
        device = trainer.accelerator.device
        request = Request(next((prompt for prompt in self.texts if prompt), ""),
                          _assembly(trainer.result().to(device), self.references[0]))
        with trainer.accelerator.autocast():
            return generate(self._pipeline(trainer.student.connector, device), [request], self._sampling())[0]

    def _sampling(self) -> Sampling:
        return Sampling(self.settings.sample_steps, self.settings.guidance, *self.size_px)

    def _pipeline(self, connector: Connector, device: torch.device) -> Pipeline:
        def texts(prompts: Sequence[str]) -> list[torch.Tensor]:
            return [self.texts[prompt].float().to(device) for prompt in prompts]

        return pipeline_for(self.backbone, connector, texts)


def _assembly(module: GatedResampler, features: Mapping[str, torch.Tensor]) -> Assembly:
    return Assembly([Reference(module, {name: tensor[None].float() for name, tensor in features.items()})])


def _drawn(prompts: Sequence[str], pictures_BHW3: torch.Tensor, columns: int, step: int) -> Image.Image:
    titles = ["text only", *(f"+ reference {number}" for number in range(1, columns))]
    rows = [SheetRow(prompt or "(no text)", list(pictures_BHW3[row * columns:(row + 1) * columns]))
            for row, prompt in enumerate(prompts)]
    return draw_contact_sheet(titles, rows, 0, f"after {step} updates")
