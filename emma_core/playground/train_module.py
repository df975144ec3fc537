"""`python -m emma_core.playground.train_module --condition style`: one EMMA module on the frozen, shipped playground.

Only the module learns. Captions name neither style nor tone, so what the loss gains comes from the reference. A run
can be stopped and called again: it goes on from its last checkpoint in --work. A new module starts with blocks copied
from ELLA's and gates shut, so that it does nothing yet.

Shapes: B pictures, latents 4 x h x w.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..connector import Connector
from ..emoji.dataset import EmojiPeople, load
from ..encoders.playground import FACE_DIM, GLOBAL_DIM
from ..gated_resampler import GatedResampler
from ..module_config import FeatureSpec, ModuleConfig
from ..module_file import save_module
from ..training.draws import captions_of_few_lengths
from . import PLAYGROUND_DIR
from .frozen import FrozenBase, features_of, latents_of
from .pairs import CONDITIONS, ReferencePicker
from .text import wordings
from .training import AveragedWeights, Log, cosine_rate, load_checkpoint, save_checkpoint, set_rate
from .unet import TIMESTEPS, add_noise, alphas_cumprod

FEATURES = {"style": {"global": FeatureSpec(GLOBAL_DIM, 4)}, "face": {"face": FeatureSpec(FACE_DIM, 4)}}
TITLES = {"style": "EMMA playground style", "face": "EMMA playground face"}
BATCH, RATE, GATE_RATE_FACTOR, WARMUP, AVERAGE_DECAY = 32, 2e-3, 5.0, 0.03, 0.995
DROP_TEXT, DROP_REFERENCE, DROP_BOTH = 0.05, 0.05, 0.05
NOISE_POWER = 0.4  # timestep = 999 * u^0.4: most of them high, where the picture's colours and shapes are decided
LEAST_PLACE_WEIGHT = 0.2
LARGEST_WEIGHT = 60.0
BUCKETS, REPORT_STEPS, CHECKPOINT_SECONDS = 5, 50, 120.0


@dataclass(frozen=True)
class Batch:
    """Positions of targets and references in the data, prompts, and strength 0 where the reference is dropped."""

    targets: list[int]
    references: list[int]
    prompts: list[str]
    strength_B: torch.Tensor
    timestep_B: torch.Tensor
    noise_B4hw: torch.Tensor


def new_module(condition: str, connector: Connector, encoder: dict, training: dict) -> GatedResampler:
    """A module that starts as copies of the connector's blocks, with A = F = 0 and g = 1: exactly ELLA."""
    module = GatedResampler(ModuleConfig(
        condition=condition, width=connector.width, heads=connector.config.heads, layers=connector.layers,
        features=FEATURES[condition], time_width=connector.time_width, encoder=encoder,
        ella={"sha256": connector.sha256, "latents": connector.latents}, training=training,
        file_metadata={"modelspec.title": TITLES[condition], "modelspec.license": "Apache-2.0",
                       "modelspec.description": f"EMMA {condition} module of the emoji playground"},
    ))
    with torch.no_grad():
        for own, source in zip(module.blocks, connector.connector.perceiver_blocks, strict=True):
            weights = own.state_dict()
            for name, value in source.state_dict().items():
                weights[name].copy_(value)
    return module


def make_optimizer(module: GatedResampler, rate: float) -> torch.optim.Optimizer:
    """AdamW; the global gates A and F, which start at 0, learn faster and are not pulled back to 0."""
    gates = [value for name, value in module.named_parameters() if name.endswith(("attn_gate", "ffn_gate"))]
    others = [value for name, value in module.named_parameters() if not name.endswith(("attn_gate", "ffn_gate"))]
    return torch.optim.AdamW([
        {"params": others, "base_lr": rate, "weight_decay": 0.01},
        {"params": gates, "base_lr": rate * GATE_RATE_FACTOR, "weight_decay": 0.0},
    ], lr=rate, fused=True)


class Batches:
    """Draws batches; `state` is all there is to its randomness."""

    def __init__(
        self, condition: str, data: EmojiPeople, latent_size: torch.Size, length_of: Callable[[str], int], seed: int
    ):
        self.length_of = length_of
        self.condition, self.rows, self.latent_size = condition, data.rows, latent_size
        self.seen = data.positions("train")
        self.picker = ReferencePicker(data.rows, self.seen)
        self.chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Batch:
        targets = self.chance.choices(self.seen, k=BATCH)
        references = [self.picker.pick(self.condition, self.rows[target], self.chance) for target in targets]
        drops = [self.chance.random() for _ in targets]
        without_text = DROP_TEXT + DROP_BOTH
        without_reference = (DROP_TEXT, without_text + DROP_REFERENCE)
        choices = [[""] if drop < without_text else wordings(self.rows[target])
                   for target, drop in zip(targets, drops, strict=True)]
        prompts = captions_of_few_lengths(choices, self.length_of, self.chance)
        strength = [float(not without_reference[0] <= drop < without_reference[1]) for drop in drops]
        timestep_B = ((TIMESTEPS - 1) * torch.rand(BATCH, generator=self.generator) ** NOISE_POWER).round().long()
        noise_B4hw = torch.randn((BATCH, *self.latent_size), generator=self.generator)
        return Batch(targets, references, prompts, torch.tensor(strength), timestep_B, noise_B4hw)

    @property
    def state(self) -> dict:
        return {"chance": self.chance.getstate(), "generator": self.generator.get_state()}

    @state.setter
    def state(self, value: dict) -> None:
        self.chance.setstate(value["chance"])
        self.generator.set_state(value["generator"])


def loss_weight(timestep_B: torch.Tensor) -> torch.Tensor:
    """(B,) error of the picture instead of the noise, 1/SNR, where noise prevails no more than LARGEST_WEIGHT."""
    kept_B = alphas_cumprod()[timestep_B]
    return ((1 - kept_B) / kept_B).clamp(max=LARGEST_WEIGHT)


def place_weights(condition: str, data: EmojiPeople, latents_P4hw: torch.Tensor) -> torch.Tensor:
    """(P, 1, h, w) of mean 1: where a condition shows. Tone shows where a vendor's drawings of a role differ by tone.

    The least loss is the same with any weights; its gradient tells more about the reference.
    """
    weight_P1hw = torch.ones_like(latents_P4hw[:, :1])
    if condition != "face":
        return weight_P1hw
    groups: dict[tuple[str, str], list[int]] = {}
    for position in data.positions("train"):
        groups.setdefault((data.rows[position].caption, data.rows[position].vendor), []).append(position)
    for positions in groups.values():
        if len(positions) > 1:
            variance_1hw = latents_P4hw[positions].var(dim=0).mean(dim=0, keepdim=True)
            weight_P1hw[positions] = LEAST_PLACE_WEIGHT + (1 - LEAST_PLACE_WEIGHT) * variance_1hw / variance_1hw.mean()
    return weight_P1hw


class ModuleTraining:
    """Frozen base, module, optimizer and averages: one `step` is one update."""

    def __init__(self, condition: str, data: EmojiPeople, folder: Path, rate: float = RATE, seed: int = 0):
        self.base = FrozenBase(folder)
        self.latents = latents_of(data, folder)
        self.place_weights = place_weights(condition, data, self.latents)
        self.features, encoder = features_of(data, folder)
        self.module = new_module(condition, self.base.connector, encoder, {})
        self.optimizer = make_optimizer(self.module, rate)
        self.average = AveragedWeights(self.module, AVERAGE_DECAY)
        self.batches = Batches(condition, data, self.latents.shape[1:], self.base.text_tokens, seed)
        self.steps = 0

    def losses(self, batch: Batch, with_reference: bool = True) -> torch.Tensor:
        """(B,) squared error of the predicted noise, its mean weighted by place."""
        unit_B4hw = self.latents[batch.targets]
        features = {name: self.features[name][batch.references] for name in self.module.config.features}
        strength_B = batch.strength_B if with_reference else torch.zeros_like(batch.strength_B)
        context_BKW = self.base.tokens(batch.prompts, batch.timestep_B, self.module, features, strength_B)
        noised_B4hw = add_noise(unit_B4hw, batch.noise_B4hw, batch.timestep_B)
        predicted_B4hw = self.base.predict_noise(noised_B4hw, batch.timestep_B, context_BKW)
        error_B4hw = F.mse_loss(predicted_B4hw, batch.noise_B4hw, reduction="none")
        return (error_B4hw * self.place_weights[batch.targets]).mean((1, 2, 3))

    def step(self, rate_factor: float) -> tuple[Batch, torch.Tensor]:
        """One update; returns what it was made of and the losses (B,)."""
        set_rate(self.optimizer, rate_factor)
        batch = self.batches.draw()
        loss_B = self.losses(batch)
        self.optimizer.zero_grad()
        (loss_B * loss_weight(batch.timestep_B)).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        self.steps += 1
        self.average.update(self.module, self.steps)
        return batch, loss_B.detach()

    def save(self, path: Path, spent_seconds: float) -> None:
        save_checkpoint(path, module=self.module.state_dict(), optimizer=self.optimizer.state_dict(),
                        average=self.average.values, batches=self.batches.state, steps=self.steps, spent=spent_seconds)

    def resume(self, path: Path) -> float:
        """Goes on from a checkpoint; returns the seconds spent until then."""
        state = load_checkpoint(path)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.values, self.batches.state, self.steps = state["average"], state["batches"], state["steps"]
        return state["spent"]

    def export(self, path: Path, gate_scale: float) -> None:
        """The averaged weights as a module file in float16; training itself has a gate scale of 1."""
        recipe = {"steps": self.steps, "base": "EMMA playground", "data": "emoji people", "batch": BATCH,
                  "recipe": "frozen base, noise loss weighted toward high noise, averaged weights"}
        module = GatedResampler(self.module.config.replace(training=recipe, gate_scale=gate_scale))
        module.load_state_dict(self.module.state_dict())
        self.average.copy_to(module)
        save_module(module, path, torch.float16)


class Buckets:
    """Mean loss in each of BUCKETS equal parts of the timesteps."""

    def __init__(self):
        self.sums, self.counts = torch.zeros(BUCKETS), torch.zeros(BUCKETS)

    def add(self, timestep_B: torch.Tensor, loss_B: torch.Tensor) -> None:
        bucket_B = timestep_B * BUCKETS // TIMESTEPS
        self.sums.index_add_(0, bucket_B, loss_B)
        self.counts.index_add_(0, bucket_B, torch.ones_like(loss_B))

    def means(self) -> list[float | None]:
        """None where no row fell."""
        pairs = zip(self.sums.tolist(), self.counts.tolist(), strict=True)
        return [round(total / count, 4) if count else None for total, count in pairs]


@torch.no_grad()
def gain_of_reference(training: ModuleTraining, batches: int = 4) -> dict[str, list[float | None]]:
    """Losses with and without the reference on the same noise, per bucket; training's randomness stays as it was."""
    state = training.batches.state
    with_reference, without = Buckets(), Buckets()
    for _ in range(batches):
        batch = training.batches.draw()
        with_reference.add(batch.timestep_B, training.losses(batch))
        without.add(batch.timestep_B, training.losses(batch, with_reference=False))
    training.batches.state = state
    return {"with_reference": with_reference.means(), "without": without.means()}


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    training = ModuleTraining(options.condition, load(options.data), options.playground, options.rate, options.seed)
    checkpoint = options.work / f"{options.condition}.pt"
    spent = training.resume(checkpoint) if checkpoint.exists() else 0.0
    log = Log(options.work / f"{options.condition}.jsonl")
    started, saved, limit, buckets = time.monotonic() - spent, time.monotonic(), options.minutes * 60, Buckets()
    while (spent := time.monotonic() - started) < limit:
        batch, loss_B = training.step(cosine_rate(int(1000 * spent / limit), 1000, int(WARMUP * 1000)))
        buckets.add(batch.timestep_B, loss_B)
        if training.steps % REPORT_STEPS == 0:
            log.write(step=training.steps, share=round(spent / limit, 3), losses=buckets.means(),
                      gates=gates_of(training.module))
            buckets = Buckets()
        if training.steps % (REPORT_STEPS * 4) == 0:
            log.write(step=training.steps, **gain_of_reference(training))
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            training.save(checkpoint, spent)
            saved = time.monotonic()
    training.save(checkpoint, spent)
    training.export(options.out or options.playground / f"emma-{options.condition}.safetensors", options.gate_scale)
    log.write(step=training.steps, done=True, **gain_of_reference(training, batches=8))


def gates_of(module: GatedResampler) -> dict[str, list[float]]:
    """The global gates A and F of each block."""
    return {"A": [round(block.attn_gate.item(), 3) for block in module.blocks],
            "F": [round(block.ffn_gate.item(), 3) for block in module.blocks]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--condition", choices=CONDITIONS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m emma_core.emoji build`")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint (a run goes on from it) and log")
    parser.add_argument("--out", type=Path, help="module file to write; default: into the playground folder")
    parser.add_argument("--playground", type=Path, default=PLAYGROUND_DIR, help="folder of the frozen base")
    parser.add_argument("--minutes", type=float, default=25, help="wall-clock time of the whole run")
    parser.add_argument("--gate-scale", type=float, default=1.0,
                        help="lambda of eqs. (3) to (8) in the file: strength 1 then means this strength. To change it "
                             "afterwards, call again with --minutes 0")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
