"""ELLA's timestep-aware connector (arXiv 2403.05135): T5 text features become cross-attention tokens.

Shapes: B rows (one prompt at one timestep each), N text tokens, D text width, K latent tokens, W token width,
E channels of the time embedding.
"""

import warnings
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConnectorMismatchError, EmmaWarning
from .assembly import Assembly, assembled_tokens
from .blocks import ResamplerLayers, TimeEmbedding, cast_like
from .gated_resampler import GatedResampler


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of an ELLA connector; the defaults are those of the released SD1.5 file."""

    width: int = 768
    latents: int = 64
    layers: int = 6
    heads: int = 8
    text_dim: int = 2048
    time_channels: int = 320
    time_width: int = 768

    def __post_init__(self):
        if self.width % self.heads:
            raise ConnectorMismatchError(
                f"a connector of width {self.width} cannot have {self.heads} heads: the width must be a multiple. "
                'Correct {"heads": ...} in the file\'s `ella` metadata.'
            )


class PerceiverBlock(ResamplerLayers):
    """One block of ELLA's resampler."""

    def forward(
        self, latents_BKW: torch.Tensor, text_BNW: torch.Tensor, activated_temb_BE: torch.Tensor
    ) -> torch.Tensor:
        # L = L + Attn(L, T, temb)   (1)
        latents_BKW = latents_BKW + self.attention(latents_BKW, text_BNW, activated_temb_BE)
        # L = L + FFN(L, temb)       (2)
        return latents_BKW + self.feed_forward(latents_BKW, activated_temb_BE)


class Perceiver(nn.Module):
    """The resampler itself; its layout gives the released file its key names."""

    def __init__(self, config: ConnectorConfig, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        placement = {"dtype": dtype, "device": device}
        self.latents = nn.Parameter(torch.empty(config.latents, config.width, **placement))
        self.time_aware_linear = operations.Linear(config.time_width, config.width, **placement)
        self.proj_in = operations.Linear(config.text_dim, config.width, **placement)
        self.perceiver_blocks = nn.ModuleList(
            PerceiverBlock(config.width, config.heads, config.time_width, operations, **placement)
            for _ in range(config.layers)
        )
        if self.latents.device.type != "meta":
            nn.init.normal_(self.latents, std=config.width**-0.5)


class Connector(nn.Module):
    """ELLA's connector as a token source: what an EMMA assembly needs is `start`, `block` and `time_embedding`.

    Args:
        config: sizes.
        operations: namespace that the linear layers come from (``torch.nn``, or a host's casting layers).
        dtype, device: of the weights.
        compute_dtype: dtype of the activations; None means that of the weights.
    """

    def __init__(
        self, config: ConnectorConfig, operations: ModuleType | type = nn, dtype=None, device=None, compute_dtype=None
    ):
        super().__init__()
        self.config = config
        self.sha256: str | None = None
        self.name = "this ELLA connector"
        self._compute_dtype = compute_dtype
        placement = {"operations": operations, "dtype": dtype, "device": device}
        self.time_embedding = TimeEmbedding(config.time_channels, config.time_width, **placement)
        self.connector = Perceiver(config, **placement)

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def layers(self) -> int:
        return self.config.layers

    @property
    def time_width(self) -> int:
        return self.config.time_width

    @property
    def latents(self) -> int:
        return self.config.latents

    @property
    def kept_FK(self) -> None:
        """No token of a connector is padding."""
        return None

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the activations and of the tokens returned."""
        return self._compute_dtype or self.connector.latents.dtype

    def check_fits(self, module: GatedResampler) -> None:
        """Refuse a module of another shape or for a checkpoint's own tokens; warn if it was trained on another connector.

        Raises:
            ConnectorMismatchError: width, number of blocks or time embedding differ, or it acts on other tokens.
        """
        config = module.config
        if config.source is not None:
            raise ConnectorMismatchError(
                f"{module.name} acts on the own tokens of {config.source.family} (width {config.source.width}), not on an "
                f"ELLA's, and {self.name} is wired. Leave ELLA out and encode the prompt with the checkpoint's own CLIP, or "
                "choose a module made for this ELLA."
            )
        found = (config.width, config.layers, config.time_width)
        wanted = (self.width, self.layers, self.time_width)
        if found != wanted:
            raise ConnectorMismatchError(
                f"{module.name} was made for a connector of width {found[0]}, {found[1]} blocks and time width {found[2]}; "
                f"{self.name} has width {wanted[0]}, {wanted[1]} blocks and time width {wanted[2]}. "
                "Choose a module made for this ELLA, or load the ELLA it was made for."
            )
        trained_on = config.ella.get("sha256")
        if trained_on and self.sha256 and trained_on != self.sha256:
            warnings.warn(
                f"{module.name} was trained on another ELLA file (sha256 {trained_on[:12]}...) than {self.name} "
                f"({self.sha256[:12]}...): it may do little or harm. Load the ELLA it was trained on.",
                EmmaWarning,
                stacklevel=2,
            )

    def strength_timestep(self, timestep_B: torch.Tensor) -> torch.Tensor:
        """Percents are counted on the connector's own timesteps."""
        return timestep_B

    def activated_time_embedding(self, timestep_B: torch.Tensor) -> torch.Tensor:
        """SiLU(temb) (B, E), as every layer that listens to the timestep wants it."""
        return F.silu(self.time_embedding(timestep_B, self.compute_dtype))

    def project_text(self, text_BND: torch.Tensor) -> torch.Tensor:
        """T = proj_in(text), (B, N, W): the same at every timestep."""
        if text_BND.ndim != 3 or text_BND.shape[-1] != self.config.text_dim:
            raise ConnectorMismatchError(
                f"the text features have shape {tuple(text_BND.shape)}, {self.name} wants (prompts, tokens, "
                f"{self.config.text_dim}). Encode the prompt with the T5 text encoder that belongs to this ELLA "
                "(flan-t5-xl for the released file), not with CLIP."
            )
        return self.connector.proj_in(text_BND.to(self.compute_dtype))

    def start(self, text_BNW: torch.Tensor, activated_temb_BE: torch.Tensor) -> torch.Tensor:
        """The latents before the first block (B, K, W)."""
        shift_B1W = self.connector.time_aware_linear(activated_temb_BE).unsqueeze(1)
        return cast_like(self.connector.latents, shift_B1W) + shift_B1W

    def block(
        self, index: int, latents_BKW: torch.Tensor, text_BNW: torch.Tensor, activated_temb_BE: torch.Tensor
    ) -> torch.Tensor:
        """Block ``index`` of ELLA."""
        return self.connector.perceiver_blocks[index](latents_BKW, text_BNW, activated_temb_BE)

    def tokens(
        self, text_BND: torch.Tensor, timestep_B: torch.Tensor | float, assembly: Assembly | None = None
    ) -> torch.Tensor:
        """Cross-attention tokens of prompts at timesteps, with references injected (eqs. 1, 2, 7, 8).

        Args:
            text_BND: T5 features; one row serves all if B is 1.
            timestep_B: timesteps 0 to 999, one per row or a single one.
            assembly: references; None or empty means ELLA alone.
        Returns:
            (B, K, W) in ``compute_dtype``.
        Raises:
            ConnectorMismatchError: the text or a module has another width than this connector.
            ReferenceMismatchError: the number of references is neither 1 nor B.
        """
        return assembled_tokens(self, text_BND, timestep_B, assembly or Assembly([]))
