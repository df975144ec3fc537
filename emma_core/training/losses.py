"""What a step is trained to predict, and how much each row, timestep and place counts.

Shapes: B rows, T timesteps, latents 4 x h x w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..base.schedule import TIMESTEPS
from .config import ObjectiveConfig

BUCKETS = 5


def target_of(prediction: str, latent_B4hw: torch.Tensor, noise_B4hw: torch.Tensor, kept_B: torch.Tensor) -> torch.Tensor:
    """What a model of this kind is to predict: the noise (eps), the velocity (v, arXiv 2202.00512, section 3), or the flow from
    picture to noise (arXiv 2209.03003, eq. 1).
    """
    if prediction == "eps":
        return noise_B4hw
    if prediction == "flow":
        return noise_B4hw - latent_B4hw
    kept_B111 = kept_B.reshape(-1, *(1,) * (noise_B4hw.ndim - 1))
    return kept_B111.sqrt() * noise_B4hw - (1 - kept_B111).sqrt() * latent_B4hw


def row_weights(prediction: str, kept_B: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """(B,) weights of the squared error.

    min-SNR (arXiv 2303.09556, eq. 3 for eps: min(SNR, gamma)/SNR; for v with SNR + 1 below, for a flow its sigma^2 in place of
    1/SNR), or 1/SNR up to a bound, which measures the error on the picture instead of the noise. Both may be on: they multiply.
    """
    snr_B = kept_B / (1 - kept_B)
    weight_B = torch.ones_like(kept_B)
    if objective.min_snr > 0 and prediction == "v":
        weight_B = weight_B * snr_B.clamp(max=objective.min_snr) / (snr_B + 1)
    elif objective.min_snr > 0 and prediction == "flow":  # SNR = (1 - sigma)^2 / sigma^2
        weight_B = weight_B * snr_B.clamp(max=objective.min_snr) / (snr_B.sqrt() + 1).square()
    elif objective.min_snr > 0:  # min(1, gamma/SNR): the same, and a number where the SNR is 0
        weight_B = weight_B * (objective.min_snr / snr_B).clamp(max=1)
    if objective.inverse_snr > 0:
        weight_B = weight_B * (1 / snr_B).clamp(max=objective.inverse_snr)
    return weight_B


def squared_errors(
    predicted_B4hw: torch.Tensor, target_B4hw: torch.Tensor, place_B1hw: torch.Tensor | None = None
) -> torch.Tensor:
    """(B,) mean squared error, its mean over places weighted."""
    error_B4hw = F.mse_loss(predicted_B4hw.float(), target_B4hw.float(), reduction="none")
    return (error_B4hw if place_B1hw is None else error_B4hw * place_B1hw).flatten(1).mean(1)


class TimestepBuckets:
    """Mean loss in each of BUCKETS equal parts of the timesteps: what a reference tells shows in the last ones only."""

    def __init__(self):
        self.sums, self.counts = torch.zeros(BUCKETS), torch.zeros(BUCKETS)

    def add(self, timestep_B: torch.Tensor, loss_B: torch.Tensor) -> None:
        bucket_B = timestep_B.cpu().long() * BUCKETS // TIMESTEPS
        self.sums.index_add_(0, bucket_B, loss_B.detach().float().cpu())
        self.counts.index_add_(0, bucket_B, torch.ones(len(bucket_B)))

    def means(self) -> list[float | None]:
        """The mean of each bucket; None where no row fell into it."""
        pairs = zip(self.sums.tolist(), self.counts.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]
