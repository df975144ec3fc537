"""The tokens that a checkpoint reads anyway, with modules on them: c_crossattn' = blocks(c_crossattn, references, time).

Shapes: F texts (or 1 for all rows), B rows (one text at one timestep each), S tokens, D their width.
"""

from dataclasses import dataclass

import torch

from ..errors import ConnectorMismatchError
from .assembly import Assembly, assembled_tokens
from .gated_resampler import GatedResampler
from .source_spec import SourceSpec, TimeSpec
from .strength_keyframes import LAST_TIMESTEP


@dataclass(frozen=True, eq=False)
class OwnTokens:
    """A model's own text as a token source: no blocks of its own, so without references the tokens are what they were.

    Args:
        source: which tokens these are.
        time: how the model counts.
        kept_FK: (F, S) False where a token is padding: it stays as it is, and none attends to it.
        shift: of a flow model's sampling, which spends its steps at high noise: percents of references are shares of steps.
    """

    source: SourceSpec
    time: TimeSpec
    kept_FK: torch.Tensor | None = None
    shift: float = 1.0

    @property
    def name(self) -> str:
        """For messages."""
        return f"a {self.source.family} model"

    @property
    def width(self) -> int:
        """D."""
        return self.source.width

    @property
    def layers(self) -> int:
        """No blocks: those of the modules follow one another."""
        return 0

    def check_fits(self, module: GatedResampler) -> None:
        """Refuse a module for an ELLA's tokens, or for those of another kind of model.

        Raises:
            ConnectorMismatchError: no module on own tokens; another family, width or time.
        """
        config = module.config
        if config.source is None:
            raise ConnectorMismatchError(
                f"{module.name} was made for an ELLA (width {config.width}, {config.layers} blocks), and none is wired. Wire "
                f"Load ELLA and its text encoder, or choose a module for the own tokens of {self.source.family}."
            )
        found = (config.source.family, config.source.width, config.time.kind)
        wanted = (self.source.family, self.source.width, self.time.kind)
        if found != wanted:
            raise ConnectorMismatchError(
                f"{module.name} acts on the tokens of {found[0]} models (width {found[1]}, {found[2]} time); this is "
                f"{self.name} (width {wanted[1]}, {wanted[2]} time). Choose a module made for {wanted[0]}, or a checkpoint of "
                f"{found[0]}."
            )

    def strength_timestep(self, timestep_B: torch.Tensor) -> torch.Tensor:
        """Timesteps 999 to 0 over equal shares of the sampling: sigma = s u / (1 + (s - 1) u) solved for u, x 999."""
        if self.time.kind == "ddpm":
            return timestep_B
        sigma_B = timestep_B.float() / self.time.last
        return LAST_TIMESTEP * sigma_B / (self.shift - (self.shift - 1) * sigma_B)

    def activated_time_embedding(self, timestep_B: torch.Tensor) -> None:
        """Modules on own tokens bring theirs."""

    def project_text(self, text_BND: torch.Tensor) -> torch.Tensor:
        """The tokens as they come."""
        if text_BND.ndim != 3 or text_BND.shape[-1] != self.width:
            raise ConnectorMismatchError(
                f"the tokens have shape {tuple(text_BND.shape)}, {self.name} reads (prompts, tokens, {self.width}). Encode the "
                "prompt with the checkpoint's own text encoder."
            )
        return text_BND

    def start(self, text_BNW: torch.Tensor, activated_temb_BE: None) -> torch.Tensor:
        """L0 of the first block."""
        return text_BNW

    def block(self, index: int, latents_BKW: torch.Tensor, text_BNW: torch.Tensor, activated_temb_BE: None) -> torch.Tensor:
        """Nothing of its own."""
        return latents_BKW

    def tokens(
        self, text_BND: torch.Tensor, timestep_B: torch.Tensor | float, assembly: Assembly | None = None
    ) -> torch.Tensor:
        """Cross-attention tokens of prompts at timesteps, with references injected (eqs. 3 to 8 on the model's tokens).

        Args:
            text_BND: what the model's text encoder gives; one row serves all if B is 1.
            timestep_B: timesteps 0 to 999 (ddpm), or sigma x 1000 (flow); one per row or a single one.
            assembly: references; None or empty means the tokens as they are.
        Returns:
            (B, S, D) in the dtype of the text.
        Raises:
            ConnectorMismatchError: the text or a module is another model's.
            ReferenceMismatchError: the number of references is neither 1 nor B.
        """
        return assembled_tokens(self, text_BND, timestep_B, assembly or Assembly([]))
