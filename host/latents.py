"""LATENTs of the host as its diffusion model reads them.

Shapes: B rows, latents C x (frames x) h x w.
"""

import torch

from ..emma_core.errors import TrainingDataError


def scaled(model, samples_B4hw: torch.Tensor) -> torch.Tensor:
    """What a VAE of the MODEL's checkpoint gave, as the MODEL reads it.

    Raises:
        TrainingDataError: another number of channels, numbers that are not finite.
    """
    wanted = model.model.latent_format
    if samples_B4hw.ndim == 4 and wanted.latent_dimensions == 3:
        samples_B4hw = samples_B4hw.unsqueeze(2)  # a picture is a video of one frame
    if samples_B4hw.ndim != 2 + wanted.latent_dimensions or samples_B4hw.shape[1] != wanted.latent_channels:
        frames = "frames, " if wanted.latent_dimensions == 3 else ""
        raise TrainingDataError(f"latents of shape {tuple(samples_B4hw.shape)}; wanted (pictures, {wanted.latent_channels}, "
                                f"{frames}height, width). Encode the pictures with the VAE of this checkpoint.")
    if not torch.isfinite(samples_B4hw).all():
        raise TrainingDataError("a latent holds NaN or infinite values; wanted numbers. A VAE in float16 is a common cause: "
                                "start ComfyUI with --fp32-vae and encode again.")
    return model.model.process_latent_in(samples_B4hw.float())


def normal(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy on the CPU that autograd takes, also of an inference tensor."""
    with torch.inference_mode(False):
        return tensor.detach().clone().to("cpu", torch.float32)
