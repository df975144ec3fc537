"""`python -m emma_core.playground.train_base`: T5, ELLA connector and UNet, jointly from scratch.

Captions name gender and role only. The error is weighted by 1/SNR within bounds, and timesteps are drawn toward the
noisy end: unweighted, the error there is so small that the base hardly learns to begin a picture, and how a
picture begins decides its style.

The rate falls with the wall clock: the run ends after --minutes, whatever else the machine does. It can be stopped and
called again: it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from ..connector import Connector, ConnectorConfig
from ..connector_file import load_connector
from ..emoji.dataset import EmojiPeople, load
from ..training.draws import captions_of_few_lengths
from . import load_unet
from .autoencoder import LATENT_SCALE, Autoencoder
from .text import by_length, captions_of, make_t5, train_tokenizer, wordings, wordings_of_category
from .training import AveragedWeights, Log, cosine_rate, load_checkpoint, save_checkpoint, set_rate, to_float
from .unet import TIMESTEPS, add_noise, alphas_cumprod, make_unet

CONNECTOR = ConnectorConfig(
    width=128, latents=16, layers=4, heads=4, text_dim=128, time_channels=128, time_width=128
)
BATCH, RATE, WARMUP, AVERAGE_DECAY = 32, 1e-3, 0.03, 0.998
EMPTY_SHARE, CATEGORY_SHARE = 0.1, 0.1
TIMESTEP_POWER, LEAST_WEIGHT, MOST_WEIGHT = 0.7, 5.0, 50.0
BUCKETS = 5
CHECKPOINT_SECONDS = 240.0


class Base(nn.Module):
    """The three parts that learn together."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.t5 = make_t5(vocabulary)
        self.connector = Connector(CONNECTOR)
        self.unet = make_unet()

    def forward(self, ids: list[list[int]], noised_B4hw: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        parts = []
        for rows_G, ids_GN in by_length(ids):
            text_GND = self.t5(input_ids=ids_GN).last_hidden_state
            parts.append((rows_G, self.connector.tokens(text_GND, timestep_B[rows_G])))
        order_B = torch.cat([rows_G for rows_G, _ in parts]).argsort()
        context_BKW = torch.cat([tokens_GKW for _, tokens_GKW in parts])[order_B]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.unet(noised_B4hw, timestep_B, encoder_hidden_states=context_BKW, return_dict=False)[0]
        return predicted.float()


@torch.no_grad()
def unit_latents(autoencoder: Autoencoder, data: EmojiPeople) -> torch.Tensor:
    """Latents (pictures, 4, h, w) of deviation 1."""
    parts = [autoencoder.encode(to_float(data.images_NHWC[start:start + 64])) for start in range(0, len(data.rows), 64)]
    return torch.cat(parts) * LATENT_SCALE


def saved_or_new_tokenizer(path: Path, data: EmojiPeople, start: Path | None) -> Tokenizer:
    """A resumed run, and one that starts from files, must keep its tokenizer: trained again, it might differ."""
    if not path.exists() and start:
        shutil.copyfile(start / path.name, path)
    elif not path.exists():
        texts = [text for row in data.rows for text in wordings(row)]
        train_tokenizer([*texts, *wordings_of_category()]).save(str(path))
    return Tokenizer.from_file(str(path))


def base_of_files(folder: Path) -> Base:
    """The base of a playground folder."""
    t5 = {key: tensor.float() for key, tensor in load_file(folder / "t5.safetensors").items()}
    base = Base(t5["shared.weight"].shape[0])
    base.t5.load_state_dict({**t5, "encoder.embed_tokens.weight": t5["shared.weight"]})
    base.unet.load_state_dict(load_unet(folder / "unet.safetensors").state_dict())
    base.connector.load_state_dict(load_connector(folder / "ella.safetensors").state_dict())
    return base


def draw_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) with more of the noisy ones."""
    return (torch.rand(count, generator=generator) ** TIMESTEP_POWER * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)


def weights_of_timesteps() -> torch.Tensor:
    """(T,) weights of the squared error, 1 on average over what `draw_timesteps` gives."""
    kept_T = alphas_cumprod()
    weight_T = ((1 - kept_T) / kept_T).clamp(LEAST_WEIGHT, MOST_WEIGHT)
    edge_T1 = (torch.arange(TIMESTEPS + 1) / TIMESTEPS) ** (1 / TIMESTEP_POWER)
    return weight_T / (weight_T * edge_T1.diff()).sum()


def bucket_losses(loss_B: torch.Tensor, timestep_B: torch.Tensor) -> list[tuple[int, float]]:
    """(bucket, loss) of each row, the timesteps cut into BUCKETS equal parts."""
    return [(int(timestep) * BUCKETS // TIMESTEPS, float(loss))
            for timestep, loss in zip(timestep_B, loss_B, strict=True)]


def mean_of_buckets(losses: list[tuple[int, float]]) -> list[float]:
    """Mean loss of each bucket; 0 for one without rows."""
    totals = [[value for bucket, value in losses if bucket == wanted] for wanted in range(BUCKETS)]
    return [round(sum(values) / max(1, len(values)), 4) for values in totals]


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load(options.data)
    seen = data.positions("train")
    autoencoder = Autoencoder()
    autoencoder.load_state_dict(load_file(options.autoencoder))
    latents = unit_latents(autoencoder.eval(), data)
    tokenizer = saved_or_new_tokenizer(options.out / "tokenizer.json", data, options.start)
    eos = tokenizer.token_to_id("</s>")
    length_of = functools.cache(lambda caption: len(tokenizer.encode(caption).ids))
    base = base_of_files(options.start) if options.start else Base(tokenizer.get_vocab_size())
    optimizer = torch.optim.AdamW(
        [{"params": list(base.parameters()), "base_lr": options.rate}], lr=options.rate, weight_decay=0.01, fused=True
    )
    average = AveragedWeights(base, AVERAGE_DECAY)
    step, spent = 0, 0.0
    checkpoint = options.out / "base.pt"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        base.load_state_dict(state["base"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, step, spent = state["average"], state["step"], state["spent"]
    chance = random.Random(options.seed + step)
    generator = torch.Generator().manual_seed(options.seed + step)
    weight_T = weights_of_timesteps()
    log = Log(options.out / "base.jsonl")
    started, saved, recent = time.monotonic() - spent, time.monotonic(), []
    while (spent := time.monotonic() - started) < options.minutes * 60:
        share = spent / (options.minutes * 60)
        set_rate(optimizer, cosine_rate(int(share * 1000), 1000, int(WARMUP * 1000)))
        picked = chance.choices(seen, k=BATCH)
        choices = [captions_of(data.rows[row], EMPTY_SHARE, CATEGORY_SHARE, chance) for row in picked]
        ids = [[*tokenizer.encode(caption).ids, eos] for caption in captions_of_few_lengths(choices, length_of, chance)]
        unit_B4hw = latents[picked]
        timestep_B = draw_timesteps(BATCH, generator)
        noise_B4hw = torch.randn(unit_B4hw.shape, generator=generator)
        predicted_B4hw = base(ids, add_noise(unit_B4hw, noise_B4hw, timestep_B), timestep_B)
        loss_B = F.mse_loss(predicted_B4hw, noise_B4hw, reduction="none").mean((1, 2, 3))
        optimizer.zero_grad()
        (loss_B * weight_T[timestep_B]).mean().backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        step += 1
        average.update(base, step)
        recent += bucket_losses(loss_B.detach(), timestep_B)
        if step % 100 == 0:
            log.write(step=step, share=round(share, 3), loss=round(sum(v for _, v in recent) / len(recent), 4),
                      buckets=mean_of_buckets(recent))
            recent = []
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            _save(checkpoint, base, optimizer, average, step, spent)
    _save(checkpoint, base, optimizer, average, step, spent)
    log.write(step=step, done=True)


def _save(path: Path, base: Base, optimizer, average: AveragedWeights, step: int, spent: float) -> None:
    save_checkpoint(path, base=base.state_dict(), optimizer=optimizer.state_dict(), average=average.values, step=step,
                    spent=spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m emma_core.emoji build`")
    parser.add_argument("--autoencoder", type=Path, required=True, help="file of train_autoencoder")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, tokenizer and log")
    parser.add_argument("--start", type=Path, help="playground folder whose base is trained further; default: from scratch")
    parser.add_argument("--minutes", type=float, default=75, help="wall-clock time of the whole run")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
