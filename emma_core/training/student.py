"""What learns, with what stays frozen around it: one forward pass from a batch to its errors.

Shapes: B rows, N text tokens, K cross-attention tokens of width W, V vectors of a feature, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..base.denoiser import Denoiser
from ..base.schedule import add_noise
from ..model.addition import TokenTerms, joined
from ..model.assembly import Assembly, Reference, token_terms
from ..model.connector import Connector
from ..model.gated_resampler import GatedResampler
from ..model.own_tokens import OwnTokens
from .config import ObjectiveConfig
from .draws import Batch, BatchRow, TrainingSet
from .losses import row_weights, squared_errors, target_of

if TYPE_CHECKING:
    from .reading import Reading


@dataclass(frozen=True)
class TeacherTarget:
    """What a teacher says of the rows of a batch, in place of the noise.

    Args:
        kind: what the teacher is, for the module's metadata.
        predict: noised latents (B, 4, h, w), timesteps (B,), the student's tokens without references (B, K, W) and the rows
            -> what the student is to predict (B, 4, h, w), in float32 and without a gradient.
        bytes_beside: what it has on the device beside the base, whose weights it shares, where these are of this type.
    """

    kind: str
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[BatchRow]], torch.Tensor]
    bytes_beside: Callable[[torch.dtype], int] = lambda dtype: 0


@dataclass(frozen=True)
class OwnText:
    """What the text of a model is beside its tokens, where modules act on these.

    Args:
        time_T: what modules count at each timestep: the timesteps themselves, or sigma x 1000.
        beside: a row -> what the model reads beside the tokens, by its name: tensors of one row, or values.
        kept: a caption -> (1, N) False where a token is padding; None: none is.
    """

    time_T: torch.Tensor
    beside: Callable[[BatchRow], Mapping[str, Any]]
    kept: Callable[[str], torch.Tensor | None]

    def groups(self, data: TrainingSet, rows: Sequence[BatchRow]) -> list[list[int]]:
        """Rows that the model can evaluate together: texts of one length, and alike in what is beside them."""
        found: dict[Any, list[int]] = {}
        for index, row in enumerate(rows):
            beside = {name: tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                      for name, value in self.beside(row).items()}
            found.setdefault((data.text(row.caption).shape, tuple(sorted(beside.items()))), []).append(index)
        return list(found.values())

    def stacked(self, rows: Sequence[BatchRow], device: torch.device) -> dict[str, Any]:
        """What is beside the tokens of some rows."""
        each = [self.beside(row) for row in rows]
        return {name: torch.cat([one[name] for one in each]).to(device) if isinstance(value, torch.Tensor) else value
                for name, value in each[0].items()}

    def kept_of(self, rows: Sequence[BatchRow], device: torch.device, length: int) -> torch.Tensor | None:
        """(B, N) of some rows."""
        each = [self.kept(row.caption) for row in rows]
        if all(one is None for one in each):
            return None
        whole_1N = torch.ones(1, length, dtype=torch.bool)
        return torch.cat([whole_1N if one is None else one for one in each]).to(device)


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
    """What gives the tokens, the module that may be learning on them, and the frozen denoiser.

    Args:
        denoiser: the diffusion model.
        connector: ELLA, which learns if there is no module; or the model's own tokens.
        module: the EMMA module that learns, or None.
        objective: weights of the loss.
        teacher: gives the target in place of the noise.
        places: (1, h, w) weights of a target by its index, or None.
        own: what goes with the model's own tokens; None with an ELLA.
        reading: what teaches an ELLA in the first batches; None: the denoiser from the beginning.
    """

    denoiser: Denoiser
    connector: Connector | OwnTokens
    module: GatedResampler | None
    objective: ObjectiveConfig
    teacher: TeacherTarget | None = None
    places: Callable[[int], torch.Tensor] | None = None
    own: OwnText | None = None
    reading: Reading | None = None

    @property
    def learning(self) -> nn.Module:
        """The only part with gradients."""
        return self.connector if self.module is None else self.module

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that learn."""
        return ((name, value) for name, value in self.learning.named_parameters() if value.requires_grad)

    def freeze(self) -> None:
        """Everything but what learns stays as it is."""
        if isinstance(self.connector, nn.Module):
            self.connector.requires_grad_(self.module is None)
        self.learning.train()

    def terms(
        self, data: TrainingSet, batch: Batch, device: torch.device, with_reference: bool = True
    ) -> TokenTerms:
        """What the rows predict with; those of equal text length share a pass, text is never padded."""
        def assembly_of(group: Sequence[int]) -> Assembly:
            return self._assembly(data, [batch.rows[index] for index in group], device) if with_reference else Assembly()

        texts = [data.text(row.caption).to(device, torch.float32) for row in batch.rows]
        if self.own is None:
            return terms_of_texts(self.connector, texts, batch.timestep_B.to(device), assembly_of)
        source = replace(self.connector, kept_FK=self.own.kept_of(batch.rows, device, texts[0].shape[1]))
        time_B = self.own.time_T.to(device)[batch.timestep_B.to(device)]
        return token_terms(source, torch.cat(texts), time_B, assembly_of(range(len(texts))))

    def errors(
        self, data: TrainingSet, batch: Batch, device: torch.device, with_reference: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) squared errors, and (B,) the weights that the objective gives them."""
        if self.own is None:
            return self._errors(data, batch, device, with_reference)
        groups = self.own.groups(data, batch.rows)
        found = [self._errors(data, batch.part(group), device, with_reference) for group in groups]
        order = torch.tensor([index for group in groups for index in group], device=device).argsort()
        error_B, weight_B = (torch.cat(each)[order] for each in zip(*found, strict=True))
        return error_B, weight_B

    def _errors(self, data: TrainingSet, batch: Batch, device: torch.device, with_reference: bool):
        latent_B4hw = torch.stack([data.latent(row.target, row.flipped) for row in batch.rows]).to(device, torch.float32)
        noise_B4hw, timestep_B = batch.noise_B4hw.to(device), batch.timestep_B.to(device)
        kept_B = self.denoiser.alphas_cumprod_T.to(device)[timestep_B]
        noised_B4hw = add_noise(latent_B4hw, noise_B4hw, kept_B)
        terms = self.terms(data, batch, device, with_reference)
        evaluated = [batch.rows[index] for index in terms.rows.tolist()]
        beside = () if self.own is None else (self.own.stacked(evaluated, device),)
        predicted_N4hw = self.denoiser.predict_noise(noised_B4hw[terms.rows], timestep_B[terms.rows], terms.stacked, *beside)
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
