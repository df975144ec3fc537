"""The layers that ELLA's connector and EMMA's gated blocks share.

Shapes: B rows (prompt x timestep), K latent tokens, C context tokens, W width, E channels of the time embedding.
"""

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

LAYER_NORM_EPS = 1e-6
MAX_PERIOD = 10_000


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep, cos before sin, then two linear layers (as in SD's UNet)."""

    def __init__(self, channels: int, width: int, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        self.channels = channels
        self.linear_1 = operations.Linear(channels, width, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(width, width, dtype=dtype, device=device)

    def forward(self, timestep_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Timesteps 0 to 999, or sigmas x 1000 of flow models (B,) -> temb (B, E) in ``dtype``."""
        half = self.channels // 2
        # multiplied before divided, as the UNet's embedding does: the other order rounds to other angles
        exponent_H = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=timestep_B.device) / half
        angle_BH = timestep_B.float()[:, None] * torch.exp(exponent_H)
        wave_BC = torch.cat([angle_BH.cos(), angle_BH.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(wave_BC)))


class AdaLayerNorm(nn.Module):
    """LayerNorm without affine, shifted and scaled by the time embedding (ELLA, section 3.2)."""

    def __init__(self, width: int, time_width: int, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        self.linear = operations.Linear(time_width, 2 * width, dtype=dtype, device=device)

    def forward(self, x_BKW: torch.Tensor, activated_temb_BE: torch.Tensor) -> torch.Tensor:
        """``activated_temb_BE`` is SiLU(temb), computed once by the caller."""
        shift_B1W, scale_B1W = self.linear(activated_temb_BE).unsqueeze(1).chunk(2, dim=-1)
        return F.layer_norm(x_BKW, x_BKW.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale_B1W) + shift_B1W


class LatentAttention(nn.Module):
    """Multi-head attention of latents over themselves and a context: kv = concat[q, context].

    Files name the weights as ``torch.nn.MultiheadAttention`` does; `emma_core.files.state_names` translates.
    """

    def __init__(self, width: int, heads: int, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        self.heads = heads
        self.q_proj = operations.Linear(width, width, dtype=dtype, device=device)
        self.kv_proj = operations.Linear(width, 2 * width, dtype=dtype, device=device)
        self.out_proj = operations.Linear(width, width, dtype=dtype, device=device)

    def forward(
        self, q_BKW: torch.Tensor, context_BCW: torch.Tensor, kept_BK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``kept_BK``: False where a latent is padding, which none attends to."""
        kv_BSW = torch.cat([q_BKW, context_BCW], dim=1)
        k_BSW, v_BSW = self.kv_proj(kv_BSW).chunk(2, dim=-1)
        seen_B11S = None
        if kept_BK is not None:
            seen_B11S = F.pad(kept_BK, (0, context_BCW.shape[1]), value=True)[:, None, None]
        out_BHKd = F.scaled_dot_product_attention(
            self._split_heads(self.q_proj(q_BKW)), self._split_heads(k_BSW), self._split_heads(v_BSW), attn_mask=seen_B11S
        )
        return self.out_proj(rearrange(out_BHKd, "b h k d -> b k (h d)"))

    def _split_heads(self, x_BSW: torch.Tensor) -> torch.Tensor:
        return rearrange(x_BSW, "b s (h d) -> b h s d", h=self.heads)


class SquaredReLUFeedForward(nn.Module):
    """c_proj(relu(c_fc(x))^2), hidden width 4W (eq. 2)."""

    def __init__(self, width: int, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        self.c_fc = operations.Linear(width, 4 * width, dtype=dtype, device=device)
        self.c_proj = operations.Linear(4 * width, width, dtype=dtype, device=device)

    def forward(self, x_BKW: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BKW), inplace=True).square())


class ResamplerLayers(nn.Module):
    """The attention and feed-forward of one resampler block, without its residual sums.

    ELLA adds what they return (eqs. 1, 2); EMMA gates it first (eqs. 3 to 6).
    """

    def __init__(
        self, width: int, heads: int, time_width: int, operations: ModuleType | type = nn, dtype=None, device=None
    ):
        super().__init__()
        placement = {"operations": operations, "dtype": dtype, "device": device}
        self.attn = LatentAttention(width, heads, **placement)
        self.mlp = SquaredReLUFeedForward(width, **placement)
        self.ln_1 = AdaLayerNorm(width, time_width, **placement)
        self.ln_2 = AdaLayerNorm(width, time_width, **placement)
        self.ln_ff = AdaLayerNorm(width, time_width, **placement)

    def attention(
        self, latents_BKW: torch.Tensor, context_BCW: torch.Tensor, activated_temb_BE: torch.Tensor,
        kept_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attn(L, context, temb) of eqs. (1), (3) and (7)."""
        return self.attn(self.ln_1(latents_BKW, activated_temb_BE), self.ln_2(context_BCW, activated_temb_BE), kept_BK)

    def feed_forward(self, latents_BKW: torch.Tensor, activated_temb_BE: torch.Tensor) -> torch.Tensor:
        """FFN(L, temb) of eqs. (2), (4) and (8)."""
        return self.mlp(self.ln_ff(latents_BKW, activated_temb_BE))


def cast_like(parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A bare parameter on the device and in the dtype of an activation (hosts may keep it elsewhere)."""
    return parameter.to(device=like.device, dtype=like.dtype)
