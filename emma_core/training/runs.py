"""A whole run from its configuration: check the data, encode them, train, save. The command line's front end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..base.parts import AUTOENCODER, REFERENCE_ENCODER, TEXT_ENCODER, UNET, Parts
from ..files.loading_words import loading_in_words
from ..files.picture_file import open_picture, picture_tensor
from ..files.writing import make_folder, write_text
from ..playground import PLAYGROUND
from .acceleration import new_accelerator, new_device
from .beginning import Frozen, begin
from .calibration import calibrate_result
from .checkpoints import last_step
from .checks import check
from .config import TrainConfig
from .examples import Example, describe, read_examples, require
from .identity import check_folder, file_marks
from .lock import alone_in
from .lora_teacher import lora_files
from .own_latents import OwnLatents, own_latents
from .own_text import Stored, own_text, teacher_texts
from .own_text_teacher import encode_for_teacher, own_text_target
from .parts import encode_references, encoders_of, load_parts, loaded_files, options_of, prepare_precision
from .places import place_weights
from .prepare import prepare
from .prepared import Prepared
from .progress import encoding_progress, progress_of
from .reading import ROWS, ask
from .reports import SAMPLES, Reporter
from .sample_prompts import sample_prompts
from .samples import Sampler, SampleReferences, add_thumbnail, pipeline_of_base, references_of
from .shards import Processes
from .student import TeacherTarget
from .teacher import TeacherText
from .teachers import load_teacher
from .trainer import Trainer, gain_of_reference
from .words import gain_in_words

if TYPE_CHECKING:
    from accelerate import Accelerator


def reading_in_words(config: TrainConfig) -> str:
    """How the run begins, told before the base is asked what its cross-attention asks, which may take a while."""
    reading, steps = config.teacher.reading, config.train.steps
    which = f"the first {reading} updates learn" if reading < steps else "all updates learn"
    after = "; those after them are slower, and their loss is a mean squared error" if reading < steps else ""
    return (f"{which} from what the base's cross-attention reads, without the UNet, by the queries of {ROWS} pictures, which "
            f"are asked for first. Their loss is in shares of what captions differ by{after}.")


def run(
    config: TrainConfig, say: Callable[[str], None], bars: bool = True, device: str = "",
    begin_with: Callable[..., Trainer] | None = None,
) -> Path:
    """Train what the configuration says, going on from the run in its folder if there is one.

    Args:
        config: resolved.
        say: told what happens, in lines.
        bars: show progress bars; else how far it is is told in lines.
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
    config = check_folder(folder, config)
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
    tell = say if accelerator.is_main_process else _silent
    if line := loading_in_words(loaded_files(config)):
        tell(line)
    parts = load_parts(config, dtype, accelerator.device)
    data, texts, references = encoded(config, parts, examples, folder, processes, encoding_progress(tell, bars))
    if config.teacher.reading > last_step(folder):
        tell(reading_in_words(config))
    trainer = begin_with(config, parts, data, accelerator, folder)
    resumed = trainer.resume()
    if accelerator.is_main_process:
        write_text(folder / "config.toml", config.to_toml())
        if resumed:
            say(f"going on after update {trainer.step}")
    sampler = Sampler(pipeline_of_base(parts.backbone, texts.tokens, texts.pooled), config.report,
                      [prompt for prompt in texts.tokens if prompt] or [""], references.features, data.bucket(0),
                      references.pictures)
    drawing = sampler if config.report.sample_every and accelerator.is_main_process else None
    if drawing:
        drawing.begin(trainer)
    with progress_of("update", config.train.steps, trainer.step, tell, bars) as progress:
        reporter = Reporter(config, trainer, drawing, progress)
        trainer.run(reporter)
    if accelerator.is_main_process:
        _finish(trainer, reporter, sampler, parts, say)
    return folder / f"{config.output.name}.safetensors"


def _finish(trainer: Trainer, reporter: Reporter, sampler: Sampler, parts: Parts, say: Callable[[str], None]) -> None:
    """The last sheet, the thumbnail, what strength 1 stands for, and what was gained, in words."""
    config, module = trainer.config, trainer.student.module
    sheet = reporter.sample()
    if sheet is not None:
        say(f"samples: {trainer.folder / SAMPLES}; sheets took {reporter.sheet_seconds:.0f} s, training "
            f"{trainer.seconds:.0f} s")
    if module is None:
        return
    if config.output.thumbnail:
        add_thumbnail(trainer, sheet.thumbnail() if sheet is not None else sampler.picture(trainer))
    if config.output.calibrate:
        found = calibrate_result(trainer, sampler, parts)
        reporter.log.write(step=trainer.step, likeness=dict(found.likeness), strength=found.strength)
        say(f"strength 1 stands for {found.strength:g} of what was trained; likeness to references by strength: {found.table}")
    gain = gain_of_reference(trainer)
    reporter.log.write(step=trainer.step, **gain)
    say(gain_in_words(gain, trainer.growth, config, trainer.ended_growing))


def _silent(line: str) -> None:
    """For processes that are not the first."""


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
    taught = _teacher_texts(config, parts, data, folder) if teacher is None else []
    own_texts: Stored | None = None
    if teacher is None and config.teacher.own_text:
        cache = _cache_of(config, folder)  # which `encoded` has filled, usually
        own_texts = encode_for_teacher(config, parts, data, cache, processes=Processes.of_run())
        teacher = own_text_target(parts.backbone, own_texts)
    parts.reference_encoder = parts.text_encoder = None
    parts.place(UNET, AUTOENCODER)
    if teacher is None and (named := load_teacher(config.teacher, parts.backbone, parts.on_own_tokens)):
        teacher = named.target_on(data.reference_set, taught)
    base = {"name": parts.backbone.name, "sha256": parts.backbone.sha256}
    places = place_weights(data).get if config.objective.place_weight else None
    own = own_text(parts.backbone.spec, data) if parts.on_own_tokens else None
    reads = own_texts is not None and config.teacher.reading > last_step(folder)
    reading = ask(config, parts.backbone, data, own_texts, parts.device) if reads else None
    frozen = Frozen(parts.backbone, parts.connector, base, encoder, teacher, places, own, reading, file_marks(config))
    return begin(config, frozen, data, accelerator, folder)


def _teacher_texts(config: TrainConfig, parts: Parts, data: Prepared | OwnLatents, folder: Path) -> list[TeacherText]:
    """How teachers read captions on a checkpoint's own tokens; nothing with an ELLA, whose tokens they share."""
    if not parts.on_own_tokens:
        return []
    if not config.teacher.lora:
        return [TeacherText(own_text(parts.backbone.spec, data))]
    parts.place(TEXT_ENCODER)
    mark = encoders_of(parts, config).texts_settings
    return teacher_texts(lora_files(Path(config.teacher.lora)).values(), config.teacher.scale, parts.text_encoder,
                         parts.backbone.spec, data, _cache_of(config, folder), mark, processes=Processes.of_run())


def _cache_of(config: TrainConfig, folder: Path) -> Path:
    return Path(config.data.cache) if config.data.cache else folder / "cache"


@dataclass(frozen=True)
class SampleTexts:
    """Prompts of the sample pictures, encoded, "" among them; ``pooled`` is empty where the base reads no such vectors."""

    tokens: Mapping[str, torch.Tensor]
    pooled: Mapping[str, torch.Tensor]


def encoded(
    config: TrainConfig, parts: Parts, examples: Sequence[Example], folder: Path, processes: Processes,
    progress: Callable[[str, int, int], None],
) -> tuple[Prepared | OwnLatents, SampleTexts, SampleReferences]:
    """The data, encoded by all processes; texts and references of the sample pictures."""
    options = options_of(config) if config.what == "module" else None
    cache = _cache_of(config, folder)
    encoders = encoders_of(parts, config)
    prepared = prepare(examples, config.data, config.encoder, encoders, options, cache, progress, processes)
    data: Prepared | OwnLatents = prepared
    if config.teacher.own_latents:
        parts.place(UNET, TEXT_ENCODER)
        data = own_latents(config, parts.backbone, parts.connector, encoders.encode_texts, prepared, cache, progress,
                           processes, encoders.encode_pooled)
    if config.teacher.own_text:
        parts.place()  # its text encoder comes alone
        encode_for_teacher(config, parts, data, cache, progress, processes)
    parts.place(TEXT_ENCODER)
    named = config.report.sample_prompts or sample_prompts(
        config.module.condition, config.base.checkpoint == PLAYGROUND, _captions_of(data)) or data.captions(0)[:1]
    prompts = list(dict.fromkeys(("", *named)))
    texts = SampleTexts(dict(zip(prompts, encoders.encode_texts(prompts), strict=True)),
                        dict(zip(prompts, encoders.encode_pooled(prompts), strict=False)))
    if options is None:
        return data, texts, SampleReferences([], [])
    if not config.report.sample_references:
        return data, texts, references_of(prepared, data)
    parts.place(REFERENCE_ENCODER)
    pictures = [picture_tensor(open_picture(Path(path))) for path in config.report.sample_references]
    features = [one for picture in pictures for one in encode_references(config, parts.reference_encoder, picture)]
    return data, texts, SampleReferences(features, [picture[0] for picture in pictures])


def _captions_of(data: Prepared | OwnLatents) -> set[str]:
    return {caption for index in range(len(data)) for caption in data.captions(index)}
