"""`python -m lab.playground.train_base`: T5, ELLA connector and UNet, jointly from scratch.

Captions name gender and role only. The run ends after --minutes, whatever else the machine does. It can be stopped and
called again: it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.files.connector_file import load_connector
from emma_core.model.connector import Connector, ConnectorConfig
from emma_core.playground import load_unet
from emma_core.playground.autoencoder import Autoencoder
from emma_core.training.draws import captions_of_few_lengths

from ..emoji.dataset import EmojiPeople, load
from .text import by_length, captions_of, make_t5, train_tokenizer, wordings, wordings_of_category
from .timed_run import BATCH, Predicted, TimedRun, noised
from .training import to_float
from .unet import make_unet

CONNECTOR = ConnectorConfig(
    width=128, latents=16, layers=4, heads=4, text_dim=128, time_channels=128, time_width=128
)
RATE = 1e-3
EMPTY_SHARE, CATEGORY_SHARE = 0.1, 0.1


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
    return torch.cat(parts) * autoencoder.latent_scale


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


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load(options.data)
    seen = data.positions("train")
    autoencoder = Autoencoder(PLAYGROUND_SPEC.latent_scale)
    autoencoder.load_state_dict(load_file(options.autoencoder))
    latents = unit_latents(autoencoder.eval(), data)
    tokenizer = saved_or_new_tokenizer(options.out / "tokenizer.json", data, options.start)
    eos = tokenizer.token_to_id("</s>")
    length_of = functools.cache(lambda caption: len(tokenizer.encode(caption).ids))
    base = base_of_files(options.start) if options.start else Base(tokenizer.get_vocab_size())

    def predict(chance: random.Random, generator: torch.Generator) -> Predicted:
        picked = chance.choices(seen, k=BATCH)
        choices = [captions_of(data.rows[row], EMPTY_SHARE, CATEGORY_SHARE, chance) for row in picked]
        ids = [[*tokenizer.encode(caption).ids, eos] for caption in captions_of_few_lengths(choices, length_of, chance)]
        noised_B4hw, noise_B4hw, timestep_B = noised(latents[picked], generator)
        return Predicted(base(ids, noised_B4hw, timestep_B), noise_B4hw, timestep_B)

    TimedRun(base, options.out / "base.pt", options.minutes, options.rate, options.seed).run(predict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
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
