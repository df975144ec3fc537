"""A LoRA as a teacher: how much of its style a module takes over, from prompts and reference pictures alone.

A LoRA is trained on the playground's UNet with one vendor's pictures. Then `python -m emma_core train` distils it: the
targets are samples of the playground itself, the prediction of base + LoRA is what the module learns, and the references are
the vendor's pictures. On prompts of held-out pictures a judge says how often it sees that vendor: with the text alone, by the
LoRA, by the module. Inputs are made as `module_learning.py` says; needs peft.

    python benchmarks/teacher.py --data emoji --pictures pictures --judge judge.safetensors --out teacher
"""

import argparse
import dataclasses
import random
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402

from emma_core.__main__ import main as emma  # noqa: E402
from emma_core.base.backbones import load_backbone  # noqa: E402
from emma_core.base.config import BaseConfig  # noqa: E402
from emma_core.base.lora import merge_lora  # noqa: E402
from emma_core.base.pipeline import Sampling  # noqa: E402
from emma_core.base.schedule import TIMESTEPS, add_noise  # noqa: E402
from emma_core.base.spec import PLAYGROUND_SPEC  # noqa: E402
from emma_core.files.module_file import load_module  # noqa: E402
from emma_core.playground import PLAYGROUND_DIR, load_autoencoder  # noqa: E402
from lab.emoji.dataset import EmojiPeople, load  # noqa: E402
from lab.playground.evaluate import Generation, Line, Trial, hits_of, save_sheet  # noqa: E402
from lab.playground.judge import load_judge  # noqa: E402
from lab.playground.text import wordings  # noqa: E402
from lab.playground.train_base import unit_latents  # noqa: E402
from lab.playground.train_encoder import LABELS, labels_of  # noqa: E402
from lab.playground.world import load_world  # noqa: E402

RANK, BATCH, RATE = 16, 16, 2e-3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"]


def train_lora(data: EmojiPeople, vendor: str, steps: int, out: Path) -> Path:
    """A LoRA on the playground's UNet, from the vendor's pictures of the train split."""
    world, chance, generator = load_world(), random.Random(0), torch.Generator().manual_seed(0)
    unet = load_backbone(BaseConfig()).unet
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="gaussian"))
    learning = [value for value in unet.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE)
    latents = unit_latents(load_autoencoder(PLAYGROUND_SPEC.latent_scale, PLAYGROUND_DIR / "autoencoder.safetensors"), data)
    positions = [position for position in data.positions("train") if data.rows[position].vendor == vendor]
    connector = world.pipeline.connector
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = chance.choices(positions, k=BATCH)
        noise = torch.randn((BATCH, *latents.shape[1:]), generator=generator)
        timestep_B = torch.randint(TIMESTEPS, (BATCH,), generator=generator)
        with torch.no_grad():
            texts = [world.pipeline.encode_text([chance.choice(wordings(data.rows[row]))])[0] for row in rows]
            tokens = [connector.tokens(text, timestep) for text, timestep in zip(texts, timestep_B.split(1), strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            kept_B = PLAYGROUND_SPEC.alphas_cumprod_T[timestep_B]
            predicted = unet(add_noise(latents[rows], noise, kept_B), timestep_B, torch.cat(tokens), return_dict=False)[0]
        loss = (predicted.float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"LoRA step {step}: {loss.item():.4f}", flush=True)
    StableDiffusionPipeline.save_lora_weights(out, get_peft_model_state_dict(unet), weight_name="lora.safetensors")
    return out / "lora.safetensors"


def distil(options: argparse.Namespace, lora: Path, data: EmojiPeople) -> Path:
    """The module that the command line trains from the LoRA, prompts, and a folder of the vendor's pictures."""
    references, prompts = options.out / "references", options.out / "prompts.txt"
    shutil.rmtree(references, ignore_errors=True)
    references.mkdir(parents=True)
    for position in data.positions("train"):
        row = data.rows[position]
        if row.vendor == options.vendor:
            name = f"{row.caption.replace(' ', '-')}-{row.tone}.png"
            shutil.copyfile(options.pictures / "pictures" / row.vendor / name, references / name)
    prompts.write_text("\n".join(sorted({row.caption for row in data.rows})), encoding="utf-8")
    run = options.out / "run"
    code = emma([
        "train", "--preset", "small-card", "--data.folder", str(references), "--data.resolution_px", "128",
        "--data.reference_crops", "0", "--output.folder", str(run), "--output.name", "distilled",
        "--teacher.lora", str(lora), "--teacher.own_latents", "true", "--teacher.prompts", str(prompts),
        "--train.steps", str(options.steps), "--train.batch", str(BATCH), "--train.accumulate", "1",
        "--train.precision", "bf16", "--train.gradient_checkpointing", "false", "--train.rate", str(options.rate),
        "--objective.drop_reference", "0", "--objective.drop_both", "0", "--report.save_every", "1000", "--device", "cpu",
    ])
    if code:
        sys.exit(code)
    return run / "distilled.safetensors"


@torch.no_grad()
def score(options: argparse.Namespace, lora: Path, module: Path, data: EmojiPeople) -> None:
    """Share of pictures in which the judge sees the vendor, and the caption."""
    world, judge, chance = load_world(), load_judge(options.judge), random.Random(5)
    teacher = load_backbone(BaseConfig())
    merge_lora(teacher.unet, lora)
    heldout = [p for p in range(len(data.rows)) if data.rows[p].split != "train" and data.rows[p].vendor != options.vendor]
    references = [p for p in data.positions("train") if data.rows[p].vendor == options.vendor]
    targets = chance.sample(heldout, options.judged)
    shown = chance.choices(references, k=len(targets))
    trials = [Trial(target, reference, reference, reference, seed)
              for seed, (target, reference) in enumerate(zip(targets, shown, strict=True))]
    distilled = dataclasses.replace(world, modules={**world.modules, "style": load_module(module)})
    taught = dataclasses.replace(world, pipeline=dataclasses.replace(world.pipeline, predict_noise=teacher.predict_noise))
    numbers, _ = labels_of(data)
    wanted = {label: numbers[label][targets] for label in LABELS}
    wanted["vendor"] = numbers["vendor"][references[:1]].expand(len(targets))
    rows = {"text only": (world, {}), "teacher (LoRA)": (taught, {}), "distilled module": (distilled, {"style": 1.0}),
            "distilled module, strength 1.5": (distilled, {"style": 1.5})}
    print("| | vendor | caption |\n| --- | --- | --- |")
    for name, (drawn_by, strengths) in rows.items():
        pictures = Generation(drawn_by, data, Sampling()).pictures(trials, Line(name, strengths))
        hits = hits_of(judge, pictures, wanted)
        save_sheet(pictures, options.out / f"{name.replace(',', '').replace(' ', '-')}.png")
        print(f"| {name} | {hits['vendor'].mean():.2f} | {hits['caption'].mean():.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vendor", default="twemoji")
    parser.add_argument("--lora-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--judged", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    data, lora, started = load(options.data), options.out / "lora.safetensors", time.monotonic()
    if not lora.exists():
        train_lora(data, options.vendor, options.lora_steps, options.out)
    trained = time.monotonic()
    module = distil(options, lora, data)
    print(f"LoRA {trained - started:.0f} s, module {time.monotonic() - trained:.0f} s")
    score(options, lora, module, data)


if __name__ == "__main__":
    main()
