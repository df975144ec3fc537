"""`python -m lab.miniature.train_clip --data DIR --state FILE`: the tiny CLIP, contrastive, from pictures and their captions.

Plain convolutions learn from few pictures many times faster than the vision tower, a transformer: with `--convolutions` they
take its place, for a text tower that tells things apart. `--text STATE` begins with that text tower, frozen; `--vision-only`
keeps the state's own as it is (a base may have grown up with it). Then the vision tower learns to follow, mostly from batches
of few things, which only style and skin tone tell apart, under captions that mostly name these.

Shapes: B pictures, M texts of N tokens, K captions of each picture, P width of the projection.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from lab.playground.judge import blemished
from lab.playground.train_encoder import augmented

from .captions import captions_of, full_caption
from .clip import Convolutions, TinyCLIP, token_ids, train_tokenizer, trimmed
from .dataset import PAIR, TRAIN, TRIPLE, Pictures, load
from .feed import Feed, caption_tokens, one_caption
from .optimizers import MuonAndAdam
from .timed import TimedRun, add_run_arguments, begin, load_averaged, read_state

BATCH, TEXTS, RATE, TONED_LESS = 96, 288, 1e-3, 4
MOST_SCALE = 4.6052  # CLIP's own bound on the temperature: 1 / 0.01
_CAPTIONS_FOR_TOKENIZER = 12
TOLD_SHARE, TOLD_CAPTIONS, THINGS_OF_BATCH, MIXED_EVERY = 0.75, 4, 16, 4
_TEXTS_AT_ONCE = 256


def saved_or_new_tokenizer(path: Path, data: Pictures):
    """A resumed run must keep its tokenizer: trained again, it might differ."""
    from tokenizers import Tokenizer

    if not path.exists():
        chance = random.Random(0)
        texts = [captions_of(row, chance) for row in data.rows for _ in range(_CAPTIONS_FOR_TOKENIZER)]
        train_tokenizer([*texts, *(name for row in data.rows for name in row.names)]).save(str(path))
    return Tokenizer.from_file(str(path))


def text_tower_of(state: Path) -> dict[str, torch.Tensor]:
    """Averaged weights of a state's text tower, and the temperature, under the names of `TinyCLIP`."""
    saved = read_state(state)
    return {key: value for key, value in {**saved["model"], **saved["average"]}.items() if not key.startswith("vision.")}


def load_clip(state: Path, device: str) -> tuple[TinyCLIP, object]:
    """A trained CLIP, frozen, and its tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(state.with_suffix(".tokenizer.json")))
    return load_averaged(TinyCLIP(tokenizer), state, "cpu").to(device), tokenizer


def contrast(image_BP: torch.Tensor, text_MP: torch.Tensor, ids_MN: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss, both ways. Rows of the same words are each other's right answer as well.

    Args:
        image_BP, text_MP: unit vectors; the first B texts are those of the pictures, the others are wrong answers for them: a
            text costs less to encode than a picture.
        ids_MN: of the texts.
        scale: logarithm of the factor on their products.
    """
    pictures = len(image_BP)
    logit_BM = scale.exp() * image_BP @ text_MP.T
    same_BM = (ids_MN[:pictures, None] == ids_MN).all(-1).float()
    wanted_BM, wanted_BB = (same / same.sum(1, keepdim=True) for same in (same_BM, same_BM[:, :pictures]))
    return (F.cross_entropy(logit_BM, wanted_BM) + F.cross_entropy(logit_BM[:, :pictures].T, wanted_BB)) / 2


@torch.no_grad()
def retrieval(clip: TinyCLIP, tokenizer, feed: Feed, data: Pictures, positions: list[int], device: str) -> float:
    """Share of pictures whose full caption is nearest among those of all ``positions``."""
    wanted = [full_caption(data.rows[position]) for position in positions]
    texts = sorted(set(wanted))
    text_KP = torch.cat([clip.text_features(chunk) for chunk in token_ids(tokenizer, texts).to(device).split(128)])
    position_N = torch.tensor(positions, device=device)
    image_NP = torch.cat([clip.image_features(feed.small(chunk)) for chunk in position_N.split(128)])
    found = (image_NP @ text_KP.T).argmax(1).tolist()
    return sum(texts[number] == text for number, text in zip(found, wanted, strict=True)) / len(wanted)


class TextLearns:
    """Batches of any pictures with one of their captions each; both towers learn."""

    def __init__(self, clip: TinyCLIP, tokenizer, data: Pictures, feed: Feed, options: argparse.Namespace):
        self._clip, self._tokenizer, self._feed, self._options = clip, tokenizer, feed, options
        self._captions_NKL = caption_tokens(data, tokenizer, options.data / "captions.safetensors").to(options.device)

    def loss(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        clip, options = self._clip, self._options
        position_M = self._feed.draw(options.batch + options.texts, generator)
        ids_ML = one_caption(self._captions_NKL, position_M, generator)
        image_B3SS = blemished(augmented(self._feed.small(position_M[:options.batch]), generator), generator)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=MOST_SCALE)
        with torch.autocast(options.device, torch.bfloat16):
            image_BP = clip.image_features(image_B3SS)
            text_MP = clip.text_features(trimmed(ids_ML, self._tokenizer))
        return {"loss": contrast(image_BP, text_MP, ids_ML, clip.logit_scale)}


class VisionFollows:
    """Batches of few things in many styles and tones, each fourth one of any; the text tower's features are kept.

    References are shown as they were drawn, so pictures are not blemished here.
    """

    def __init__(self, clip: TinyCLIP, tokenizer, data: Pictures, feed: Feed, options: argparse.Namespace):
        self._clip, self._feed, self._options, self._drawn = clip, feed, options, 0
        chance, seen = random.Random(options.seed), data.positions(TRAIN)
        told = {position: [captions_of(data.rows[position], chance, style_share=TOLD_SHARE, tone_share=TOLD_SHARE)
                           for _ in range(TOLD_CAPTIONS)] for position in seen}
        texts = sorted({text for captions in told.values() for text in captions}, key=lambda text: (len(text), text))
        number = {text: index for index, text in enumerate(texts)}
        self._number_NK = torch.full((len(data.rows), TOLD_CAPTIONS), -1, device=options.device)
        self._number_NK[seen] = torch.tensor([[number[text] for text in told[position]] for position in seen],
                                             device=options.device)
        with torch.no_grad():
            chunks = (token_ids(tokenizer, texts[at:at + _TEXTS_AT_ONCE]) for at in range(0, len(texts), _TEXTS_AT_ONCE))
            self._text_TP = torch.cat([clip.text_features(trimmed(ids.to(options.device), tokenizer)) for ids in chunks])
        of_thing: dict[str, list[int]] = defaultdict(list)
        for position in seen:
            of_thing[data.rows[position].concept].append(position)
        self._things = [torch.tensor(positions, device=options.device) for positions in of_thing.values()]
        self._weights = torch.tensor([len(positions) ** 0.5 for positions in self._things])

    def loss(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        options = self._options
        self._drawn += 1
        mixed = self._drawn % MIXED_EVERY == 0
        position_B = self._feed.draw(options.batch, generator) if mixed else self._of_few_things(generator)
        more = self._feed.draw(options.texts, generator) if mixed else position_B[:0]
        number_M1 = one_caption(self._number_NK[..., None], torch.cat([position_B, more]), generator)
        with torch.autocast(options.device, torch.bfloat16):
            image_BP = self._clip.image_features(augmented(self._feed.small(position_B), generator))
        return {"loss": contrast(image_BP.float(), self._text_TP[number_M1[:, 0]], number_M1, self._clip.logit_scale)}

    def _of_few_things(self, generator: torch.Generator) -> torch.Tensor:
        count = min(THINGS_OF_BATCH, len(self._things))
        things = torch.multinomial(self._weights.to(generator.device), count, generator=generator).tolist()
        each = max(1, self._options.batch // count)
        return torch.cat([self._things[thing][torch.randperm(len(self._things[thing]), generator=generator,
                                                             device=generator.device)[:each]] for thing in things])


def train(options: argparse.Namespace) -> None:
    begin(options)
    data, device = load(options.data), options.device
    kept = options.state.with_suffix(".tokenizer.json")
    if options.text and not kept.exists():
        shutil.copyfile(options.text.with_suffix(".tokenizer.json"), kept)
    tokenizer = saved_or_new_tokenizer(kept, data)
    seen = data.positions(TRAIN)
    feed = Feed(data, seen, [1 / (1 + TONED_LESS * bool(data.rows[position].tone)) for position in seen], device)
    clip = TinyCLIP(tokenizer, Convolutions() if options.convolutions else None).to(device)
    if options.text:
        clip.load_state_dict({**clip.state_dict(), **text_tower_of(options.text)})
    frozen = options.vision_only or options.text
    if frozen:
        for part in (clip.text, clip.logit_scale):
            part.requires_grad_(False)
    run = TimedRun(clip, options, RATE, optimizer=MuonAndAdam if frozen else None)
    task = (VisionFollows if frozen else TextLearns)(clip, tokenizer, data, feed, options)
    run.run(task.loss)
    if options.convolutions:
        clip.eval()  # their batch norms' statistics are of the weights themselves, not of their average
    else:
        run.use_average()
    for split in (PAIR, TRIPLE):
        positions = data.positions(split)[::3]
        found = retrieval(clip, tokenizer, feed, data, positions, device)
        run.log.write(split=split, pictures=len(positions), retrieval=round(found, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, minutes=8)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--texts", type=int, default=TEXTS, help="captions of other pictures, beside those of the batch")
    parser.add_argument("--convolutions", action="store_true", help="in place of the vision tower, to teach the text tower")
    parser.add_argument("--text", type=Path, help="state with the text tower to begin with; it stays as it is")
    parser.add_argument("--vision-only", action="store_true", help="the text tower stays as it is in the state")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
