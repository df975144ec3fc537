"""The text of a MODEL without an ELLA, as training reads it: its tokens, and what the model is told beside them.

Shapes: C texts of an entry, S tokens, D their width, T timesteps, latents C x (frames x) h x w.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from ..emma_core.training.draws import BatchRow
from ..emma_core.training.student import OwnText
from .own_tokens import kept_tokens

_CONTEXT, _MASK = "c_crossattn", "attention_mask"


@dataclass(frozen=True, eq=False)
class OwnTexts:
    """The conditioning of a training set, as the host's model prepares it for sampling.

    Args:
        model: MODEL.
        entries: [tokens (1, S, D), options] of each text.
        latents: of each picture; only their shapes are told the model.
        names: what the training set calls each text.
    """

    model: Any
    entries: Sequence[list]
    latents: Sequence[torch.Tensor]
    names: Sequence[str]
    _known: dict[tuple, dict[str, Any]] = field(default_factory=dict)

    def index(self, caption: str) -> int:
        """Which text a caption of the training set is."""
        return self.names.index(caption)

    def tokens(self, index: int) -> torch.Tensor:
        """(1, S, D) of a text, as they enter the model."""
        return self._told(index, self.latents[0])[_CONTEXT]

    def beside(self, index: int, latent: torch.Tensor) -> dict[str, Any]:
        """What the model is told beside the tokens of a text, for a picture of this size."""
        return {name: value for name, value in self._told(index, latent).items() if name != _CONTEXT}

    def own_text(self, time_T: torch.Tensor) -> OwnText:
        """For the student.

        Args:
            time_T: what modules count at each timestep.
        """
        return OwnText(time_T, self._beside, self._kept)

    def marks(self) -> dict[str, torch.Tensor]:
        """Everything that the model is told of the texts, for a fingerprint."""
        return {f"text {index} {name}": value for index in range(len(self.entries))
                for name, value in self._told(index, self.latents[0]).items() if isinstance(value, torch.Tensor)}

    def _beside(self, row: BatchRow) -> Mapping[str, Any]:
        return self.beside(self.index(row.caption), self.latents[row.target])

    def _kept(self, caption: str) -> torch.Tensor | None:
        index = self.index(caption)
        told, options = self._told(index, self.latents[0]), self.entries[index][1]
        return kept_tokens(told[_CONTEXT], told.get(_MASK, options.get(_MASK)))

    def _told(self, index: int, latent: torch.Tensor) -> dict[str, Any]:
        key = (index, tuple(latent.shape))
        if key not in self._known:
            self._known[key] = self._encoded(self.entries[index], latent)
        return self._known[key]

    def _encoded(self, entry: list, latent: torch.Tensor) -> dict[str, Any]:
        device = comfy.model_management.get_torch_device()
        comfy.model_management.load_models_gpu([self.model])
        noise = torch.zeros_like(latent)[None].to(device)
        with torch.inference_mode():  # in which the host's models prepare text for sampling
            [encoded] = comfy.samplers.encode_model_conds(
                self.model.model.extra_conds, comfy.sampler_helpers.convert_cond([entry]), noise, device, "positive",
                latent_image=noise, denoise_mask=None, seed=0)
            conds = {name: cond.process_cond(batch_size=1, device=device, area=None).cond
                     for name, cond in encoded["model_conds"].items()}
        with torch.inference_mode(False):
            return {name: _plain(value) for name, value in conds.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.detach().clone().cpu() if isinstance(value, torch.Tensor) else value
