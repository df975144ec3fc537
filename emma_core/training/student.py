"""What learns, with what stays frozen around it: one forward pass from a batch to its errors.

Shapes: B rows, N text tokens, K cross-attention tokens of width W, V vectors of a feature, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..base.denoiser import Denoiser
from ..base.schedule import add_noise
from ..model.addition import TokenTerms, joined
from ..model.assembly import Assembly, Reference, token_terms
from ..model.connector import Connector
from ..model.gated_resampler import GatedResampler
from .config import ObjectiveConfig
from .draws import Batch, BatchRow, TrainingSet
from .losses import row_weights, squared_errors, target_of


@dataclass(frozen=True)
class TeacherTarget:
    """What a teacher says of the rows of a batch, in place of the noise.

    Args:
        kind: what the teacher is, for the module's metadata.
        predict: noised latents (B, 4, h, w), timesteps (B,), the student's tokens without references (B, K, W) and the rows
            -> what the student is to predict (B, 4, h, w), in float32 and without a gradient.
    """

    kind: str
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[BatchRow]], torch.Tensor]


def tokens_of_texts(connector: Connector, texts: Sequence[torch.Tensor], timestep_B: torch.Tensor) -> torch.Tensor:
    """Tokens (B, K, W) of texts (1, N, D) of several lengths, without references."""
    return terms_of_texts(connector, texts, timestep_B, lambda rows: Assembly()).tokens_BKW


def terms_of_texts(
    connector: Connector, texts: Sequence[torch.Tensor], timestep_B: torch.Tensor,
    assembly_of: Callable[[Sequence[int]], Assembly],
) -> TokenTerms:
    """What texts (1, N, D) of several lengths predict with; equal lengths share a pass, text is never padded.

    Args:
        assembly_of: the references of rows, by their indices.
    """
    groups: dict[int, list[int]] = {}
    for index, text_1ND in enumerate(texts):
        groups.setdefault(text_1ND.shape[1], []).append(index)
    parts, order = [], []
    for _, group in sorted(groups.items()):
        text_GND = torch.cat([texts[index] for index in group])
        parts.append(token_terms(connector, text_GND, timestep_B[group], assembly_of(group)))
        order += group
    return joined(parts).placed(torch.tensor(order, device=timestep_B.device))


@dataclass(frozen=True, eq=False)
class Student:
    """A connector, the module that may be learning on it, and the frozen denoiser.

    Args:
        denoiser: the diffusion model.
        connector: ELLA; learns if there is no module.
        module: the EMMA module that learns, or None.
        objective: weights of the loss.
        teacher: gives the target in place of the noise.
        places: (1, h, w) weights of a target by its index, or None.
    """

    denoiser: Denoiser
    connector: Connector
    module: GatedResampler | None
    objective: ObjectiveConfig
    teacher: TeacherTarget | None = None
    places: Callable[[int], torch.Tensor] | None = None

    @property
    def learning(self) -> nn.Module:
        """The only part with gradients."""
        return self.connector if self.module is None else self.module

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that learn."""
        return ((name, value) for name, value in self.learning.named_parameters() if value.requires_grad)

    def freeze(self) -> None:
        """Everything but what learns stays as it is."""
        self.connector.requires_grad_(self.module is None)
        self.learning.train()

    def terms(
        self, data: TrainingSet, batch: Batch, device: torch.device, with_reference: bool = True
    ) -> TokenTerms:
        """What the rows predict with; those of equal text length share a pass, text is never padded."""
        def assembly_of(group: Sequence[int]) -> Assembly:
            return self._assembly(data, [batch.rows[index] for index in group], device) if with_reference else Assembly()

        texts = [data.text(row.caption).to(device, torch.float32) for row in batch.rows]
        return terms_of_texts(self.connector, texts, batch.timestep_B.to(device), assembly_of)

    def errors(
        self, data: TrainingSet, batch: Batch, device: torch.device, with_reference: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) squared errors, and (B,) the weights that the objective gives them."""
        latent_B4hw = torch.stack([data.latent(row.target, row.flipped) for row in batch.rows]).to(device, torch.float32)
        noise_B4hw, timestep_B = batch.noise_B4hw.to(device), batch.timestep_B.to(device)
        kept_B = self.denoiser.alphas_cumprod_T.to(device)[timestep_B]
        noised_B4hw = add_noise(latent_B4hw, noise_B4hw, kept_B)
        terms = self.terms(data, batch, device, with_reference)
        predicted_N4hw = self.denoiser.predict_noise(noised_B4hw[terms.rows], timestep_B[terms.rows], terms.stacked)
        predicted_B4hw = terms.added(predicted_N4hw)
        if self.teacher is None:
            target_B4hw = target_of(self.denoiser.prediction, latent_B4hw, noise_B4hw, kept_B)
        else:
            target_B4hw = self._taught(data, batch, noised_B4hw, timestep_B, device)
        error_B = squared_errors(predicted_B4hw, target_B4hw, self._places(batch, device))
        return error_B, row_weights(self.denoiser.prediction, kept_B, self.objective)

    def _assembly(self, data: TrainingSet, rows, device) -> Assembly:
        if self.module is None:
            return Assembly()
        found = [data.features(row.reference, row.variant) for row in rows]
        features: Mapping[str, torch.Tensor] = {
            name: torch.stack([one[name] for one in found]).to(device, torch.float32) for name in self.module.config.features
        }
        return Assembly([Reference(self.module, features, torch.tensor([row.strength for row in rows], device=device))])

    def _taught(self, data, batch: Batch, noised_B4hw, timestep_B, device) -> torch.Tensor:
        with torch.no_grad():
            plain_BKW = self.terms(data, batch, device, with_reference=False).tokens_BKW
            return self.teacher.predict(noised_B4hw, timestep_B, plain_BKW, batch.rows)

    def _places(self, batch: Batch, device) -> torch.Tensor | None:
        if self.places is None:
            return None
        return torch.stack([self.places(row.target).flip(-1) if row.flipped else self.places(row.target)
                            for row in batch.rows]).to(device)
