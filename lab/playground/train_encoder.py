"""`python -m lab.playground.train_encoder --data DIR --out FILE`: the reference encoder, as a classifier.

Heads (not kept): `global` tells vendor, tone and caption; the mean of `local` tells the caption; `face` tells the tone
with a cosine margin, as face recognition does, while an adversary that reads the vendor out of it is opposed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from emma_core.encoders.playground import FACE_DIM, FAMILY, GLOBAL_DIM, INPUT_SIZE_PX, LOCAL_DIM, PlaygroundEncoder

from ..emoji.dataset import EmojiPeople, load
from .training import TimedLog, cosine_rate, set_rate, to_float

BATCH, RATE, WARMUP_STEPS = 64, 2e-3, 50
MARGIN, COSINE_SCALE, ADVERSARY_WEIGHT = 0.2, 12.0, 0.3
LABELS = ("vendor", "tone", "caption")


class _Reversed(torch.autograd.Function):
    """Identity forward, gradient times -ADVERSARY_WEIGHT backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> torch.Tensor:
        return -ADVERSARY_WEIGHT * gradients[0]


class Heads(nn.Module):
    def __init__(self, classes: dict[str, int]):
        super().__init__()
        self.of_global = nn.ModuleDict({label: nn.Linear(GLOBAL_DIM, classes[label]) for label in LABELS})
        self.of_local = nn.Linear(LOCAL_DIM, classes["caption"])
        self.of_face = nn.Linear(FACE_DIM, classes["tone"], bias=False)
        self.adversary = nn.Sequential(nn.Linear(FACE_DIM, 64), nn.ReLU(), nn.Linear(64, classes["vendor"]))

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        face_BC = features["face"][:, 0]
        scores = {f"global {label}": head(features["global"][:, 0]) for label, head in self.of_global.items()}
        scores["local caption"] = self.of_local(features["local"].mean(1))
        scores["face tone"] = F.normalize(face_BC, dim=-1) @ F.normalize(self.of_face.weight, dim=-1).T
        scores["adversary vendor"] = self.adversary(_Reversed.apply(face_BC))
        return scores


def classification_loss(scores: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(())
    for name, score_BK in scores.items():
        label_B = wanted[name.split()[1]]
        if name == "face tone":  # CosFace: the right class must win by a margin
            score_BK = COSINE_SCALE * (score_BK - MARGIN * F.one_hot(label_B, score_BK.shape[1]))
        total = total + F.cross_entropy(score_BK, label_B)
    return total


def labels_of(data: EmojiPeople) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Class numbers of every row, and how many classes there are."""
    names = {label: sorted({getattr(row, label) for row in data.rows}) for label in LABELS}
    numbers = {label: torch.tensor([names[label].index(getattr(row, label)) for row in data.rows]) for label in LABELS}
    return numbers, {label: len(values) for label, values in names.items()}


def augmented(image_B3SS: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moved by up to 8%, scaled by 0.8 to 1.15, half of them mirrored; white beyond the edge.

    The generator is on the pictures' device.
    """
    batch, device = len(image_B3SS), image_B3SS.device

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator, device=device)

    theta_B23 = torch.zeros(batch, 2, 3, device=device)
    scale_B = 1 / between(0.8, 1.15)
    mirror_B = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1] = scale_B * mirror_B, scale_B
    theta_B23[:, 0, 2], theta_B23[:, 1, 2] = between(-0.16, 0.16), between(-0.16, 0.16)
    grid = F.affine_grid(theta_B23, list(image_B3SS.shape), align_corners=False)
    return F.grid_sample(image_B3SS - 1, grid, align_corners=False) + 1


@torch.no_grad()
def accuracy(
    encoder: PlaygroundEncoder, heads: Heads, image: torch.Tensor, wanted: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Share of right answers of each head."""
    right = {name: scores.argmax(1) == wanted[name.split()[1]] for name, scores in heads(encoder(image)).items()}
    return {name: round(hits.float().mean().item(), 3) for name, hits in right.items()}


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    data = load(options.data)
    wanted, classes = labels_of(data)
    size = (INPUT_SIZE_PX, INPUT_SIZE_PX)
    images = torch.cat([F.interpolate(to_float(chunk), size, mode="bilinear", antialias=True)
                        for chunk in (data.images_NHWC[i : i + 64] for i in range(0, len(data.rows), 64))])
    seen = torch.tensor(data.positions("train"))
    heldout = {split: torch.tensor(data.positions(split)) for split in ("heldout-pair", "heldout-triple")}
    encoder = PlaygroundEncoder().to(memory_format=torch.channels_last)
    heads = Heads(classes)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW([{"params": parameters, "base_lr": options.rate}], weight_decay=0.05, fused=True)
    log = TimedLog(options.out.with_suffix(".jsonl"))
    for step in range(options.steps):
        set_rate(optimizer, cosine_rate(step, options.steps, WARMUP_STEPS))
        picked = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
        image = augmented(images[picked], generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            scores = heads(encoder(image))
        loss = classification_loss({name: score.float() for name, score in scores.items()},
                                   {label: numbers[picked] for label, numbers in wanted.items()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            log.write(step=step, loss=round(loss.item(), 4))
        if step % 300 == 299 or step + 1 == options.steps:
            for split, positions in heldout.items():
                labels = {label: numbers[positions] for label, numbers in wanted.items()}
                log.write(step=step, split=split, **accuracy(encoder, heads, images[positions], labels))
    state = {name: tensor.detach().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, options.out, metadata={"family": FAMILY, "steps": str(options.steps)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
