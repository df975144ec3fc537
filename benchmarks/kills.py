"""Kills and interrupts of trainings: each is started again until it ends, and compared with one that nobody disturbed.

Every training is `python -m emma_core train` on the playground, of a few updates on pictures of 64 px, in a process of its
own that is forked from this one. Half of the signals come at random moments of a sitting, its start and its encoding
included, half soon after a random update; a training is disturbed several times in a row. Compared bit for bit are the module
and all that the last checkpoint holds. Bits of a checkpoint are flipped too, one at a time.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 60 --interrupts 40
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from emma_core.__main__ import main as emma  # noqa: E402
from emma_core.errors import TrainingError  # noqa: E402
from emma_core.training import runs  # noqa: E402, F401  (imported once, for all that are forked)
from emma_core.training.checkpoints import checkpoints, load_checkpoint  # noqa: E402
from emma_core.training.log import Log  # noqa: E402

SETTINGS = ("--data.resolution_px", "64", "--data.bucket_step_px", "8", "--data.workers", "0", "--data.reference_crops", "0",
            "--train.precision", "fp32", "--train.batch", "2", "--train.accumulate", "2", "--train.warmup", "1",
            "--train.average", "0.9", "--train.gradient_checkpointing", "false", "--output.thumbnail", "false",
            "--report.log_every", "1", "--report.save_every", "2", "--report.keep", "3", "--device", "cpu")
IN_A_ROW = 5  # disturbances of one training
BETWEEN_TWO_S, LOOK_S = 0.1, 0.05
AT_ANY_TIME = 0.5  # share of the signals; the others come after an update, as a short training spends most of its time before
KILL, ONCE, TWICE = "SIGKILL", "one SIGINT", "two SIGINTs"


def main() -> None:
    options = parse_options()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit("set OMP_NUM_THREADS=1: sums of several threads need not be the same bits, and threads do not survive "
                         "a fork")
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="emma-kills-") as work:
        folder = Path(work)
        draw_pictures(folder / "data")
        begun = time.monotonic()
        finish(folder, "undisturbed", options.steps)
        length_s, wanted = time.monotonic() - begun, outcome(folder / "undisturbed")
        print(f"undisturbed: {options.steps} updates in {length_s:.1f} s", flush=True)
        flip_bits(checkpoints(folder / "undisturbed")[-1], options.flips, chance)
        left = Counter({KILL: options.kills, ONCE: (options.interrupts + 1) // 2, TWICE: options.interrupts // 2})
        places: dict[str, Counter[str]] = {kind: Counter() for kind in left}
        equal = other = 0
        while kinds := [kind for kind in left if left[kind] > 0]:
            name, kind = f"run-{equal + other}", chance.choice(kinds)
            found = disturbed(folder, name, options.steps, kind, min(left[kind], IN_A_ROW), length_s, chance)
            finish(folder, name, options.steps)
            same = alike(outcome(folder / name), wanted)
            equal, other = equal + same, other + (not same)
            left[kind] -= len(found)
            places[kind].update(found)
            print(f"{name}: {len(found)} x {kind} ({', '.join(found)}): {'equal bit for bit' if same else 'DIFFERENT'}; left: "
                  f"{dict(left)}", flush=True)
        for kind, where in places.items():
            print(f"{kind}: {where.total()} ({', '.join(f'{place}: {count}' for place, count in sorted(where.items()))})")
        print(f"{equal + other} trainings: {equal} equal bit for bit, {other} different")
    sys.exit(bool(other))


def draw_pictures(folder: Path) -> None:
    """Two groups of two pictures with captions."""
    for group, words in {"dark": ("night", "cave"), "light": ("snow", "cloud")}.items():
        (folder / group).mkdir(parents=True)
        for place, word in enumerate(words):
            picture = Image.radial_gradient("L").resize((96, 96)).rotate(45 * place)
            (picture if group == "dark" else ImageOps.invert(picture)).save(folder / group / f"{word}.png")
            (folder / group / f"{word}.txt").write_text(word)


def disturbed(
    folder: Path, name: str, steps: int, kind: str, most: int, length_s: float, chance: random.Random
) -> list[str]:
    """Disturb a training so often, or until it ends before its signal; at which update it stood each time."""
    found: list[str] = []
    while len(found) < most:
        where = disturb(folder, name, steps, kind, length_s, chance)
        if where is None:
            break
        found.append(where)
    return found


def sitting(folder: Path, name: str, steps: int) -> multiprocessing.Process:
    """A training that goes on, in a process that was forked."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, name, steps))
    process.start()
    return process


def train(folder: Path, name: str, steps: int) -> None:
    """What a sitting runs; its words go into a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = open(folder / f"{name}.log", "a")  # noqa: SIM115  (as long as the process lives)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(emma(["train", *SETTINGS, "--train.steps", str(steps), "--data.folder", str(folder / "data"),
                   "--output.folder", str(folder / name)]))


def finish(folder: Path, name: str, steps: int) -> None:
    """Go on to the end."""
    process = sitting(folder, name, steps)
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} ended with {process.exitcode}:\n{(folder / f'{name}.log').read_text()[-2000:]}")


def disturb(folder: Path, name: str, steps: int, kind: str, length_s: float, chance: random.Random) -> str | None:
    """Send the signals at a random moment; at which update the training stands then, None if it had ended."""
    process = sitting(folder, name, steps)
    if chance.random() < AT_ANY_TIME:
        process.join(chance.uniform(0, length_s))
    else:
        wait_for_update(process, folder / name / "log.jsonl", chance.randint(1, steps))
        process.join(chance.uniform(0, length_s / steps / 4))
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL if kind == KILL else signal.SIGINT)
        if kind == TWICE:
            process.join(BETWEEN_TWO_S)
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        process.join()
    else:
        return None
    found = checkpoints(folder / name)
    return f"update {int(found[-1].stem.rpartition('-')[2])}" if found else "no checkpoint yet"


def wait_for_update(process: multiprocessing.Process, log: Path, wanted: int) -> None:
    """Until the log of a training tells of this update, or the training ends."""
    told = Log(log)
    while process.is_alive() and max((line.get("step", 0) for line in told.read()), default=0) < wanted:
        process.join(LOOK_S)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a training leaves, but for the seconds that it took."""
    state = load_checkpoint(checkpoints(folder)[-1])
    state.pop("seconds")
    return {"checkpoint": state, "module": load_file(folder / "emma-module.safetensors")}


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same, tensors bit for bit."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def flip_bits(path: Path, count: int, chance: random.Random) -> None:
    """Single bits of a checkpoint flipped, one after the other: is each noticed?"""
    whole, noticed = path.read_bytes(), 0
    for _ in range(count):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except TrainingError:
            noticed += 1
    path.write_bytes(whole)
    print(f"{count} flips of a bit in a checkpoint of {len(whole):,} bytes: {noticed} refused, {count - noticed} resumed from",
          flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs (default: %(default)s)")
    parser.add_argument("--interrupts", type=int, default=40, help="interrupts, every other one double (default: %(default)s)")
    parser.add_argument("--flips", type=int, default=400, help="bits of a checkpoint (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="updates of a training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
