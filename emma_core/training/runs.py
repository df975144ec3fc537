"""A whole run from its configuration: check the data, encode them, train, save. The command line's front end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..base.parts import AUTOENCODER, REFERENCE_ENCODER, TEXT_ENCODER, UNET, Parts
from ..drawing import thumbnails
from ..files.picture_file import open_picture, picture_tensor
from ..files.writing import make_folder, write_text
from ..model.gated_resampler import GatedResampler
from .acceleration import new_accelerator, new_device
from .beginning import Frozen, begin
from .checks import check
from .config import TrainConfig
from .examples import Example, describe, read_examples, require
from .identity import check_folder, file_marks
from .lock import alone_in
from .own_latents import OwnLatents, own_latents
from .parts import encode_references, encoders_of, load_parts, options_of, prepare_precision
from .places import place_weights
from .prepare import prepare
from .prepared import Prepared
from .reports import Reporter, bucket_name
from .samples import Sampler
from .shards import Processes
from .student import TeacherTarget
from .teachers import load_teacher
from .trainer import Trainer, gain_of_reference

if TYPE_CHECKING:
    from accelerate import Accelerator

_SAMPLE_REFERENCES = 2  # shown if the configuration names none


def run(
    config: TrainConfig, say: Callable[[str], None], bars: bool = True, device: str = "",
    begin_with: Callable[..., Trainer] | None = None,
) -> Path:
    """Train what the configuration says, going on from the run in its folder if there is one.

    Args:
        config: resolved.
        say: told what happens, in lines.
        bars: show progress bars.
        device: "" is what accelerate chooses.
        begin_with: makes the trainer, with the arguments of `begin_run`.
    Returns:
        The module's (or the connector's) file.
    Raises:
        TrainingConfigError, TrainingDataError, TrainingError, FileError: see the parts.
    """
    check(config)
    folder, cpu = Path(config.output.folder), device == "cpu"
    config, dtype = prepare_precision(config, new_device(cpu))
    check_folder(folder, config)
    accelerator = new_accelerator(config.train.precision, cpu)
    processes = Processes.of_run()
    examples, problems = read_examples(config.data, processes)
    if accelerator.is_main_process:
        say(describe(examples, problems, config.data))
    require(examples, problems)
    make_folder(folder)
    with alone_in(folder) if accelerator.is_main_process else nullcontext():
        bars = bars and accelerator.is_main_process
        return _run(config, dtype, accelerator, processes, examples, say, bars, begin_with or begin_run)


def _run(
    config: TrainConfig, dtype: torch.dtype, accelerator: Accelerator, processes: Processes, examples: Sequence[Example],
    say: Callable[[str], None], bars: bool, begin_with: Callable[..., Trainer],
) -> Path:
    """As `run`, with settings and data that were checked, in a folder of its own."""
    folder = Path(config.output.folder)
    parts = load_parts(config, dtype, accelerator.device)
    data, texts, references = encoded(config, parts, examples, folder, processes, bars)
    trainer = begin_with(config, parts, data, accelerator, folder)
    resumed = trainer.resume()
    if accelerator.is_main_process:
        write_text(folder / "config.toml", config.to_toml())
        if resumed:
            say(f"going on after update {trainer.step}")
    with _bar(trainer, bars) as bar:
        sampler = Sampler(parts.backbone, config.report, texts, references, data.bucket(0))
        reporter = Reporter(config, trainer, sampler if config.report.sample_every else None, bar)
        trainer.run(reporter)
    module = trainer.student.module
    if module is not None and accelerator.is_main_process:
        if config.output.thumbnail:
            _add_thumbnail(trainer, module, sampler.picture(trainer))
        gain = gain_of_reference(trainer)
        reporter.log.write(step=trainer.step, **gain)
        say(gain_in_words(gain))
    return folder / f"{config.output.name}.safetensors"


def _add_thumbnail(trainer: Trainer, module: GatedResampler, picture_HW3: torch.Tensor) -> None:
    """Save the module once more, with a picture in its metadata."""
    metadata = {**module.config.file_metadata, thumbnails.KEY: thumbnails.data_uri(picture_HW3)}
    module.config = module.config.replace(file_metadata=metadata)
    trainer.save_result()


def gain_in_words(gain: Mapping[str, list[float | None]]) -> str:
    """What the reference takes from the error on the training pictures, by timestep."""
    lines = ["error on training pictures, with reference / text only, by timestep:"]
    for index, (shown, plain) in enumerate(zip(gain["with reference"], gain["text only"], strict=True)):
        if shown is not None and plain:
            lines.append(f"  {bucket_name(index)}: {shown:.5f} / {plain:.5f} ({100 * (shown / plain - 1):+.1f}%)")
    return "\n".join(lines)


def begin_run(
    config: TrainConfig, parts: Parts, data: Prepared | OwnLatents, accelerator: Accelerator, folder: Path,
    teacher: TeacherTarget | None = None,
) -> Trainer:
    """`begin` of loaded parts; the encoders are let go, as everything they give is cached, and the UNet comes.

    Args:
        teacher: in place of the one that the configuration names.
    Raises:
        TrainingConfigError, FileError: see `begin` and `load_teacher`.
    """
    encoder = parts.reference_encoder.description if parts.reference_encoder else {}
    parts.reference_encoder = parts.text_encoder = None
    parts.place(UNET, AUTOENCODER)
    if teacher is None and (named := load_teacher(config.teacher, parts.backbone)):
        teacher = named.target_on(data.reference_set)
    base = {"name": parts.backbone.name, "sha256": parts.backbone.sha256}
    places = place_weights(data).get if config.objective.place_weight else None
    frozen = Frozen(parts.backbone, parts.connector, base, encoder, teacher, places, files=file_marks(config))
    return begin(config, frozen, data, accelerator, folder)


def encoded(
    config: TrainConfig, parts: Parts, examples: Sequence[Example], folder: Path, processes: Processes, bars: bool
) -> tuple[Prepared | OwnLatents, Mapping[str, torch.Tensor], list[Mapping[str, torch.Tensor]]]:
    """The data, encoded by all processes; texts and references of the sample pictures."""
    options = options_of(config) if config.what == "module" else None
    cache = Path(config.data.cache) if config.data.cache else folder / "cache"
    encoders = encoders_of(parts, config)
    prepared = prepare(examples, config.data, config.encoder, encoders, options, cache, _progress(bars), processes)
    data: Prepared | OwnLatents = prepared
    if config.teacher.own_latents:
        parts.place(UNET, TEXT_ENCODER)
        data = own_latents(config, parts.backbone, parts.connector, encoders.encode_texts, prepared, cache, _progress(bars),
                           processes)
    parts.place(TEXT_ENCODER)
    prompts = tuple(dict.fromkeys(("", *(config.report.sample_prompts or data.captions(0)[:1]))))
    texts = {prompt: features.cpu() for prompt, features in zip(prompts, parts.text_encoder.encode(prompts), strict=True)}
    if options is None:
        return data, texts, []
    if not config.report.sample_references:
        indices: dict[int, None] = {}
        for index in range(len(data)):
            indices[data.references(index)[0]] = None
            if len(indices) == _SAMPLE_REFERENCES:
                break
        return data, texts, [data.features(index, 0) for index in indices]
    references = []
    parts.place(REFERENCE_ENCODER)
    for path in config.report.sample_references:
        references += encode_references(config, parts.reference_encoder, picture_tensor(open_picture(Path(path))))
    return data, texts, references


def _progress(bars: bool) -> Callable[[str, int, int], None] | None:
    if not bars:
        return None
    from tqdm import tqdm

    shown: dict[str, tqdm] = {}

    def tell(what: str, done: int, total: int) -> None:
        if total and what not in shown:
            shown[what] = tqdm(total=total, desc=f"encoding {what}", unit="")
        if what in shown:
            shown[what].update(done - shown[what].n)
            if done >= total:
                shown.pop(what).close()

    return tell


def _bar(trainer: Trainer, shown: bool):
    from tqdm import tqdm

    return tqdm(total=trainer.config.train.steps, initial=trainer.step, desc="training", unit="update", disable=not shown,
                dynamic_ncols=True)

