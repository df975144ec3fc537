"""Sample pictures of a run: fixed prompts, references and seeds, drawn with the weights as they are.

Shapes: R rows (prompts), C columns, pictures H x W, latents 4 x h x w.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..base.backbones import Backbone
from ..base.pipeline import Pipeline, Request, Sampling, generate, pipeline_for
from ..drawing import thumbnails
from ..drawing.contact_sheet import SheetRow, draw_contact_sheet, draw_tiles
from ..files.picture_file import open_picture, picture_tensor
from ..model.assembly import Assembly, Reference
from ..model.connector import Connector
from ..model.gated_resampler import GatedResampler
from ..model.own_tokens import OwnTokens
from .config import ReportConfig
from .own_latents import OwnLatents
from .prepared import Prepared
from .trainer import Trainer

_TILES = 3  # rows of a thumbnail
_SAMPLE_REFERENCES = 2  # shown if the configuration names none


@dataclass(frozen=True, eq=False)
class Sheet:
    """What was drawn at one moment.

    Args:
        prompts: of the rows.
        references: the reference pictures, (H, W, 3) each.
        columns: titles of what is drawn: text only, then each reference, at the start where that differs, and now.
        picture_RCHW3: in [0, 1].
        step: updates so far.
    """

    prompts: Sequence[str]
    references: Sequence[torch.Tensor]
    columns: Sequence[str]
    picture_RCHW3: torch.Tensor
    step: int

    def image(self) -> Image.Image:
        """The sheet with its titles; reference pictures stand before each row."""
        titles = [f"reference {number}" for number in range(1, len(self.references) + 1)]
        rows = [SheetRow(prompt or "(no text)", [*self.references, *pictures])
                for prompt, pictures in zip(self.prompts, self.picture_RCHW3, strict=True)]
        return draw_contact_sheet([*titles, *self.columns], rows, len(titles), f"after {self.step} updates")

    def thumbnail(self) -> torch.Tensor:
        """(H, W, 3): the first rows with the first reference, text only, and the reference now."""
        now = self.columns.index("+ reference 1") if "+ reference 1" in self.columns else 0
        return draw_tiles([[*self.references[:1], pictures[0], pictures[now]] for pictures in self.picture_RCHW3[:_TILES]])


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws the sample sheets of a run.

    Args:
        pipeline_on: (what gives the tokens, device) -> what draws.
        settings: sampling steps, guidance.
        prompts: that are drawn.
        references: features of each reference picture, name -> (V, D).
        size_px: width and height.
        shown: the reference pictures themselves, (H, W, 3) each.
        still: what never changes, by the title of its column: text only, and what a module to start from drew.
    """

    pipeline_on: Callable[[Connector | OwnTokens, torch.device], Pipeline]
    settings: ReportConfig
    prompts: Sequence[str]
    references: Sequence[Mapping[str, torch.Tensor]]
    size_px: tuple[int, int]
    shown: Sequence[torch.Tensor] = ()
    still: dict[str, torch.Tensor] = field(default_factory=dict)

    def begin(self, trainer: Trainer) -> None:
        """Keep what a module that starts from another draws before the first update; a new one draws what ELLA draws."""
        if trainer.config.module.start and trainer.step == 0:
            module = trainer.result()
            for number, features in enumerate(self.references, 1):
                self.still[f"at the start {number}"] = self._column(trainer, _assembly(module, features))

    def sheet(self, trainer: Trainer) -> Sheet:
        """Each prompt without a reference and with each of them; for an ELLA, each prompt."""
        result = trainer.result()
        if isinstance(result, Connector):
            columns = {"now": self._column(trainer, Assembly(), result)}
        else:
            if "text only" not in self.still:
                self.still["text only"] = self._column(trainer, Assembly())
            columns = {"text only": self.still["text only"], **self.still}
            for number, features in enumerate(self.references, 1):
                columns[f"+ reference {number}"] = self._column(trainer, _assembly(result, features))
        return Sheet(self.prompts, self.shown, list(columns), torch.stack(list(columns.values()), dim=1), trainer.step)

    @torch.no_grad()
    def picture(self, trainer: Trainer) -> torch.Tensor:
        """(H, W, 3) in [0, 1]: the first prompt with the first reference, by the module as it is."""
        assembly = _on(trainer, _assembly(trainer.result(), self.references[0]))
        return self._drawn(trainer, [Request(self.prompts[0], assembly)])[0]

    @torch.no_grad()
    def at_strength(self, trainer: Trainer, references: Sequence[Mapping[str, torch.Tensor]], strength: float) -> torch.Tensor:
        """(B, H, W, 3): a picture of each of these references, the prompts in turn; each has a noise of its own."""
        module, prompts = trainer.result().to(trainer.accelerator.device), self.prompts
        requests = [Request(prompts[row % len(prompts)], _assembly(module, features, strength), seed=row)
                    for row, features in enumerate(references)]
        return self._drawn(trainer, requests)

    @torch.no_grad()
    def _column(self, trainer: Trainer, assembly: Assembly, connector: Connector | None = None) -> torch.Tensor:
        """(R, H, W, 3): every prompt with these references; each row has a noise of its own."""
        assembly = _on(trainer, assembly)
        requests = [Request(prompt, assembly, seed=row) for row, prompt in enumerate(self.prompts)]
        return self._drawn(trainer, requests, connector)

    def _drawn(self, trainer: Trainer, requests: list[Request], connector: Connector | None = None) -> torch.Tensor:
        device = trainer.accelerator.device
        pipeline = self.pipeline_on(connector.to(device) if connector else trainer.student.connector, device)
        with trainer.accelerator.autocast():
            # what fits with gradients fits without
            return generate(pipeline, requests, self._sampling(), trainer.config.train.batch)

    def _sampling(self) -> Sampling:
        return Sampling(self.settings.sample_steps, self.settings.guidance, *self.size_px)


@dataclass(frozen=True, eq=False)
class SampleReferences:
    """References of the sample sheets: name -> (V, D) of each, and the pictures (H, W, 3) themselves."""

    features: Sequence[Mapping[str, torch.Tensor]]
    pictures: Sequence[torch.Tensor]


def references_of(prepared: Prepared, data: Prepared | OwnLatents) -> SampleReferences:
    """The first references of the first targets, of different groups if there are several."""
    of_groups: dict[str, int] = {}
    for index in range(len(data)):
        of_groups.setdefault(data.group(index), data.references(index)[0])
    rest = (reference for index in range(len(data)) for reference in data.references(index))
    indices: dict[int, None] = {}
    for index in itertools.chain(of_groups.values(), rest):
        indices[index] = None
        if len(indices) == _SAMPLE_REFERENCES:
            break
    pictures = [picture_tensor(open_picture(prepared.pictures.pictures[index]))[0] for index in indices]
    return SampleReferences([data.features(index, 0) for index in indices], pictures)


def add_thumbnail(trainer: Trainer, picture_HW3: torch.Tensor) -> None:
    """Save the module once more, with a picture in its metadata."""
    module = trainer.student.module
    metadata = {**module.config.file_metadata, thumbnails.KEY: thumbnails.data_uri(picture_HW3)}
    module.config = module.config.replace(file_metadata=metadata)
    trainer.save_result()


def pipeline_of_base(
    backbone: Backbone, texts: Mapping[str, torch.Tensor], pooled: Mapping[str, torch.Tensor]
) -> Callable[[Connector | OwnTokens, torch.device], Pipeline]:
    """For a `Sampler`: a base and texts that were encoded before.

    Args:
        backbone: diffusion model and autoencoder.
        texts: prompt -> text features (1, N, D), "" among them.
        pooled: prompt -> (1, P), of a base that reads such a vector.
    """
    def on(connector: Connector | OwnTokens, device: torch.device) -> Pipeline:
        def encoded(of: Mapping[str, torch.Tensor]) -> Callable[[Sequence[str]], list[torch.Tensor]]:
            return lambda prompts: [of[prompt].float().to(device) for prompt in prompts]

        return pipeline_for(backbone, connector, encoded(texts), encoded(pooled))

    return on


def _assembly(module: GatedResampler, features: Mapping[str, torch.Tensor], strength: float = 1.0) -> Assembly:
    return Assembly([Reference(module, {name: tensor[None].float() for name, tensor in features.items()}, strength)])


def _on(trainer: Trainer, assembly: Assembly) -> Assembly:
    for reference in assembly.references:
        reference.module.to(trainer.accelerator.device)
    return assembly
