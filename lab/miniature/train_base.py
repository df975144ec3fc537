"""`python -m lab.miniature.train_base --data DIR --latents FILE --clip STATE --state FILE`: UNet on the frozen CLIP's tokens.

`--start FILE` takes what can be taken from another UNet of this layout: all but its cross-attention, which read other tokens.

Shapes: B rows, L tokens of width D, latents 4 x h x w, T timesteps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from emma_core.base.schedule import TIMESTEPS, add_noise
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.playground.files import load_unet
from lab.playground.timed_run import draw_timesteps, weights_of_timesteps
from lab.playground.unet import UNET_CONFIG, make_unet

from .clip import token_ids
from .dataset import TRAIN, load
from .feed import Feed, caption_tokens, drawing_weights, one_caption
from .optimizers import MuonAndAdam
from .timed import TimedRun, add_run_arguments, begin, load_averaged, read_state
from .train_clip import load_clip

BATCH, RATE, EMPTY_SHARE = 64, 5e-4, 0.1
_BUCKETS = 5
WIDTHS = (64, 128, 192)  # the last level, 4 x 4 cells, decides where things are and costs next to nothing


def start_from(unet, other) -> None:
    """Takes another UNet's weights but for the cross-attention; that begins anew, silent."""
    weights = unet.state_dict()
    weights.update({key: value for key, value in other.state_dict().items()
                    if ".attn2." not in key and key in weights and value.shape == weights[key].shape})
    weights.update({key: torch.zeros_like(value) for key, value in weights.items() if ".attn2.to_out.0." in key})
    unet.load_state_dict(weights)


def config_of(widths: Sequence[int]) -> dict:
    """diffusers' configuration of a UNet with a level for each width.

    Text is read in the second level, and as in SD1.5 in the middle block, which has the size of the last.
    """
    reads = [level == 1 for level, _ in enumerate(widths)]
    return {**UNET_CONFIG, "block_out_channels": list(widths),
            "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in reads],
            "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(reads)]}


def load_base_unet(state: Path):
    """The UNet of a checkpoint with its averaged weights, frozen."""
    return load_averaged(make_unet(read_state(state)["about"]["unet"]), state)


def by_bucket(loss_B: torch.Tensor, timestep_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean unweighted squared error of fifths of the timesteps, not a number where a fifth is empty."""
    bucket_B = timestep_B * _BUCKETS // TIMESTEPS
    return {f"t{TIMESTEPS // _BUCKETS * number}": (loss_B * (bucket_B == number)).sum() / (bucket_B == number).sum()
            for number in range(_BUCKETS)}


class NoiseTask:
    """Noised latents of a batch and how the error on them is weighted; on one device."""

    def __init__(self, latents: Path, device: str):
        self._latents_N4hw = load_file(latents)["latents"].to(device)
        self._kept_T, self._weight_T = PLAYGROUND_SPEC.alphas_cumprod_T.to(device), weights_of_timesteps().to(device)

    def draw(self, position_B: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noised latents, their noise, their timesteps."""
        unit_B4hw = self._latents_N4hw[position_B].float()
        timestep_B = draw_timesteps(len(position_B), generator)
        noise_B4hw = torch.randn(unit_B4hw.shape, generator=generator, device=unit_B4hw.device)
        return add_noise(unit_B4hw, noise_B4hw, self._kept_T[timestep_B]), noise_B4hw, timestep_B

    def losses(
        self, predicted_B4hw: torch.Tensor, target_B4hw: torch.Tensor, timestep_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The weighted loss, and the plain errors by timestep."""
        loss_B = (predicted_B4hw.float() - target_B4hw).square().mean(dim=(1, 2, 3))
        return {"loss": (loss_B * self._weight_T[timestep_B]).mean(), **by_bucket(loss_B.detach(), timestep_B)}


def train(options: argparse.Namespace) -> None:
    begin(options)
    data, device = load(options.data), options.device
    seen = data.positions(TRAIN)
    clip, tokenizer = load_clip(options.clip, device)
    captions_NKL = caption_tokens(data, tokenizer, options.data / "captions.safetensors").to(device)
    feed = Feed(data, seen, drawing_weights([data.rows[position] for position in seen]), device)
    task = NoiseTask(options.latents, device)
    config = read_state(options.state)["about"]["unet"] if options.state.exists() else config_of(options.widths)
    unet = make_unet(config)
    if options.start:
        start_from(unet, load_unet(options.start))
    run = TimedRun(unet.to(device), options, options.rate, about={"unet": config},
                   optimizer=None if options.adam else MuonAndAdam)
    empty_L = token_ids(tokenizer, [""])[0].to(device)

    def loss_of_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        position_B = feed.draw(options.batch, generator)
        ids_BL = one_caption(captions_NKL, position_B, generator)
        empty_B1 = torch.rand(options.batch, 1, generator=generator, device=device) < EMPTY_SHARE
        noised_B4hw, noise_B4hw, timestep_B = task.draw(position_B, generator)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                text_BLD = clip.hidden_states(torch.where(empty_B1, empty_L, ids_BL))
            predicted_B4hw = unet(noised_B4hw, timestep_B, encoder_hidden_states=text_BLD, return_dict=False)[0]
        return task.losses(predicted_B4hw, noise_B4hw, timestep_B)

    run.run(loss_of_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, minutes=100)
    parser.add_argument("--latents", type=Path, required=True, help="file of `python -m lab.miniature.latents`")
    parser.add_argument("--clip", type=Path, required=True, help="state of `python -m lab.miniature.train_clip`")
    parser.add_argument("--start", type=Path, help="UNet file of this layout to begin with; default: from scratch")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--adam", action="store_true", help="AdamW alone, in place of Muon")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
