"""`python -m lab.miniature.train_ip_adapter --data DIR --latents FILE --clip STATE --base STATE --state FILE --out FILE`

An IP-Adapter (arXiv:2308.06721) on the frozen base: the picture itself, as CLIP's vision tower sees it, is its prompt beside
the words. `--out` is the adapter in the published files' layout (image_proj.*, ip_adapter.*), which diffusers and others load.

Shapes: N pictures, B rows, L tokens of width D, P width of CLIP's projection, latents 4 x h x w.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from emma_core.playground.unet import PlainAttention

from ..weights import save_tensors
from .clip import TinyCLIP, token_ids
from .dataset import TRAIN, load
from .feed import Feed, caption_tokens, drawing_weights, one_caption
from .timed import TimedRun, add_run_arguments, begin
from .train_base import NoiseTask, load_base_unet
from .train_clip import load_clip

BATCH, RATE, TOKENS = 32, 1e-3, 4
DROP_TEXT, DROP_IMAGE, DROP_BOTH = 0.05, 0.05, 0.05  # the paper's


def add_adapter(unet, image_width: int, seed: int) -> None:
    """Puts a fresh adapter into the UNet: its keys and values begin as the text's. All else is frozen."""
    width, generator = unet.config.cross_attention_dim, torch.Generator().manual_seed(seed)
    weights = unet.state_dict()
    layers = [key.removesuffix(".processor") for key in unet.attn_processors if key.endswith("attn2.processor")]
    attention = {f"{2 * index + 1}.to_{part}_ip.weight": weights[f"{layer}.to_{part}.weight"].clone()
                 for index, layer in enumerate(layers) for part in "kv"}
    projection = {
        "proj.weight": torch.randn(TOKENS * width, image_width, generator=generator) * image_width ** -0.5,
        "proj.bias": torch.zeros(TOKENS * width), "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}], low_cpu_mem_usage=False)
    unet.requires_grad_(False)
    for name, processor in unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            processor.requires_grad_(True)
    unet.set_attn_processor({name: processor if name.endswith("attn2.processor") else PlainAttention()
                             for name, processor in unet.attn_processors.items()})
    unet.encoder_hid_proj.requires_grad_(True)


def adapter_tensors(unet) -> dict[str, torch.Tensor]:
    """The adapter under the published files' names."""
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    tensors = {"image_proj.proj.weight": projection.image_embeds.weight, "image_proj.proj.bias": projection.image_embeds.bias,
               "image_proj.norm.weight": projection.norm.weight, "image_proj.norm.bias": projection.norm.bias}
    processors = [one for name, one in unet.attn_processors.items() if name.endswith("attn2.processor")]
    for index, processor in enumerate(processors):
        tensors[f"ip_adapter.{2 * index + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        tensors[f"ip_adapter.{2 * index + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    return tensors


@torch.no_grad()
def image_embeds(clip: TinyCLIP, feed: Feed, count: int, device: str) -> torch.Tensor:
    """(N, P) as transformers' vision tower projects them."""
    chunks = torch.arange(count, device=device).split(256)
    return torch.cat([clip.image_embeds(feed.small(chunk)).float() for chunk in chunks])


def train(options: argparse.Namespace) -> None:
    begin(options)
    data, device = load(options.data), options.device
    seen = data.positions(TRAIN)
    clip, tokenizer = load_clip(options.clip, device)
    captions_NKL = caption_tokens(data, tokenizer, options.data / "captions.safetensors").to(device)
    feed = Feed(data, seen, drawing_weights([data.rows[position] for position in seen]), device)
    task, embeds_NP = NoiseTask(options.latents, device), image_embeds(clip, feed, len(data.rows), device)
    unet = load_base_unet(options.base)
    add_adapter(unet, embeds_NP.shape[1], options.seed)
    run = TimedRun(unet.to(device), options, RATE)
    empty_L = token_ids(tokenizer, [""])[0].to(device)

    def loss_of_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        position_B = feed.draw(options.batch, generator)
        draw_B = torch.rand(options.batch, generator=generator, device=device)
        without_text_B1 = (draw_B < DROP_TEXT + DROP_BOTH)[:, None]
        without_image_B1 = ((draw_B >= DROP_TEXT) & (draw_B < DROP_TEXT + DROP_BOTH + DROP_IMAGE))[:, None]
        ids_BL = torch.where(without_text_B1, empty_L, one_caption(captions_NKL, position_B, generator))
        embeds_BP = embeds_NP[position_B].masked_fill(without_image_B1, 0)
        noised_B4hw, noise_B4hw, timestep_B = task.draw(position_B, generator)
        with torch.autocast(device, torch.bfloat16):
            predicted_B4hw = unet(noised_B4hw, timestep_B, encoder_hidden_states=clip.hidden_states(ids_BL),
                                  added_cond_kwargs={"image_embeds": [embeds_BP[:, None]]}, return_dict=False)[0]
        return task.losses(predicted_B4hw, noise_B4hw, timestep_B)

    run.run(loss_of_batch)
    run.use_average()
    save_tensors(adapter_tensors(unet), options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, minutes=20)
    parser.add_argument("--latents", type=Path, required=True, help="file of `python -m lab.miniature.latents`")
    parser.add_argument("--clip", type=Path, required=True, help="state of `python -m lab.miniature.train_clip`")
    parser.add_argument("--base", type=Path, required=True, help="state of `python -m lab.miniature.train_base`")
    parser.add_argument("--out", type=Path, required=True, help="the adapter's file")
    parser.add_argument("--batch", type=int, default=BATCH)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
