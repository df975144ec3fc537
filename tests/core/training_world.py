"""A tiny training set, a tiny frozen denoiser, and runs on them."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_models import SMALL, random_tensor, small_connector
from torch import nn

from emma_core.training.config import TrainConfig, resolve
from emma_core.training.shards import Processes
from emma_core.training.starts import begin_module
from emma_core.training.student import Student
from emma_core.training.trainer import Trainer

LATENT = (4, 4, 4)
CAPTIONS = ("a red cat", "a dog", "the old house", "")
DIMS = {"global": 24, "local": 20}


class TinySet:
    """Random latents in two buckets; the reference of a target tells its colour."""

    def __init__(self, count: int = 6):
        self.latents = [random_tensor(LATENT, 10 + index) + index for index in range(count)]

    def __len__(self):
        return len(self.latents)

    def bucket(self, index):
        return (64, 64) if index % 3 else (96, 64)

    def group(self, index):
        return str(index % 2)

    def captions(self, index):
        return (CAPTIONS[index % 3], CAPTIONS[(index + 1) % 3])

    def references(self, index):
        return (index, (index + 1) % len(self))

    def variants(self, reference):
        return 2

    def mark(self):
        return str(len(self))

    def latent(self, index, flipped=False):
        return self.latents[index].flip(-1) if flipped else self.latents[index]

    def text(self, caption):
        return random_tensor((1, len(caption.split()) + 1, SMALL.text_dim), 99 + len(caption))

    def features(self, reference, variant):
        return {name: random_tensor((vectors, dim), reference * 7 + variant) + reference
                for (name, dim), vectors in zip(DIMS.items(), (1, 5), strict=True)}


class TinyDenoiser(nn.Module):
    """One attention of the latent over the context; frozen."""

    prediction = "eps"

    def __init__(self, width: int, prediction: str = "eps"):
        super().__init__()
        self.prediction = prediction
        self.alphas_cumprod_T = torch.linspace(0.999, 0.005, 1000)
        self.query = nn.Parameter(random_tensor((4, width), 1), requires_grad=False)
        self.value = nn.Parameter(random_tensor((width, 4), 2) / width ** 0.5, requires_grad=False)

    def predict_noise(self, noised_B4hw, timestep_B, context_BKW):
        pixels_BP4 = noised_B4hw.flatten(2).transpose(1, 2)
        weight_BPK = (pixels_BP4 @ self.query @ context_BKW.transpose(1, 2) / 8).softmax(-1)
        return noised_B4hw * 0.5 + (weight_BPK @ context_BKW @ self.value).transpose(1, 2).unflatten(2, noised_B4hw.shape[2:])


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first run's device and precision for the life of a process: not inside, and not of inside."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def tiny_config(**changes) -> TrainConfig:
    """`section__key=value`; eight steps of four on the CPU, in float32."""
    usual = {"train.steps": 8, "train.batch": 4, "train.rate": 1e-2, "train.warmup": 2, "train.precision": "fp32",
             "module.condition": "object", "report.save_every": 100, "objective.drop_reference": 0.2}
    return resolve({}, changes={**usual, **{key.replace("__", "."): value for key, value in changes.items()}})


def tiny_trainer(folder, config: TrainConfig, data=None, what: str = "module", accelerator=None, **parts) -> Trainer:
    """A run from its beginning, the same for the same configuration."""
    connector = small_connector()
    module = None
    if what == "module":
        generator = torch.Generator().manual_seed(config.train.seed)
        module = begin_module(config, connector, DIMS, {"family": "tiny"}, generator)
    denoiser = parts.pop("denoiser", None) or TinyDenoiser(connector.width)
    student = Student(denoiser, connector, module, config.objective, **parts)
    return Trainer(config, student, data or TinySet(), accelerator or Accelerator(cpu=True), folder)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of what learns."""
    return {name: value.detach().clone() for name, value in trainer.student.learning.state_dict().items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def write_shard(path: Path, files: dict[str, bytes | str]) -> Path:
    """A tar file of these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def in_processes(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What ``work`` gives or raises in each of the processes, which are threads here."""
    values, found, barrier = [None] * count, [None] * count, threading.Barrier(count, timeout=60)

    def run(rank: int) -> None:
        def exchange(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            told = list(values)
            barrier.wait()
            return told

        try:
            found[rank] = work(Processes(rank, count, exchange))
        except Exception as fault:
            found[rank] = fault

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def interrupted_at(trainer, step: int) -> None:
    """Run it until after this update, as Ctrl-C would end it."""
    def stop(progress):
        if progress.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(stop)
