"""A whole run from its configuration: check the data, encode them, train, save. The command line's front end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base.backbones import Backbone
from ..base.parts import AUTOENCODER, REFERENCE_ENCODER, TEXT_ENCODER, UNET, Parts
from ..drawing import thumbnails
from ..encoders.base import encode_pictures
from ..errors import TrainingConfigError
from ..files.picture_file import open_picture, picture_tensor
from .config import TrainConfig
from .draws import BatchRow
from .examples import Example, describe, read_examples, require
from .identity import check_folder
from .own_latents import OwnLatents, check_own_latents, own_latents
from .parts import encoder_metadata, encoders_of, load_parts, options_of, prepare_precision
from .places import place_weights
from .prepare import Prepared, prepare
from .reports import Reporter, bucket_name
from .samples import Sampler
from .shards import Processes
from .starts import begin_module
from .student import Student, TeacherTarget
from .teachers import IpAdapterTeacher, LoraTeacher, load_teacher
from .trainer import Trainer, gain_of_reference

if TYPE_CHECKING:
    from accelerate import Accelerator

_SAMPLE_REFERENCES = 2  # shown if the configuration names none


def dry_run(config: TrainConfig) -> str:
    """What would be trained on, and every problem in the data."""
    examples, problems = read_examples(config.data)
    return describe(examples, problems, config.data)


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
        begin_with: makes the trainer in place of `begin`.
    Returns:
        The module's (or the connector's) file.
    Raises:
        TrainingConfigError, TrainingDataError, TrainingError, FileError: see the parts.
    """
    from accelerate import Accelerator, PartialState

    if not config.output.folder:
        raise TrainingConfigError("output.folder is not set. Name a folder for checkpoints, samples and the result.")
    folder = Path(config.output.folder)
    config, dtype = prepare_precision(config, PartialState(cpu=device == "cpu").device)
    check_folder(folder, config)
    precision = config.train.precision
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device == "cpu")
    processes = Processes.of_run()
    examples, problems = read_examples(config.data, processes)
    if accelerator.is_main_process:
        say(describe(examples, problems, config.data))
    require(examples, problems)
    folder.mkdir(parents=True, exist_ok=True)
    parts = load_parts(config, dtype, accelerator.device)
    data, texts, references = encoded(config, parts, examples, folder, processes, bars and accelerator.is_main_process)
    trainer = (begin_with or begin)(config, parts, data, accelerator, folder)
    resumed = trainer.resume()
    if accelerator.is_main_process:
        (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        if resumed:
            say(f"going on after update {trainer.step}")
    with _bar(trainer, bars and accelerator.is_main_process) as bar:
        sampler = Sampler(parts.backbone, config.report, texts, references, data.bucket(0))
        reporter = Reporter(config, trainer, sampler if config.report.sample_every else None, bar)
        trainer.run(reporter)
    if trainer.student.module is not None and accelerator.is_main_process:
        if config.output.thumbnail:
            module = trainer.student.module
            metadata = {**module.config.file_metadata, thumbnails.KEY: thumbnails.data_uri(sampler.picture(trainer))}
            module.config = module.config.replace(file_metadata=metadata)
            trainer.save_result()
        gain = gain_of_reference(trainer)
        reporter.log.write(step=trainer.step, **gain)
        say(gain_in_words(gain))
    return folder / f"{config.output.name}.safetensors"


def gain_in_words(gain: Mapping[str, list[float | None]]) -> str:
    """What the reference takes from the error on the training pictures, by timestep."""
    lines = ["error on training pictures, with reference / text only, by timestep:"]
    for index, (shown, plain) in enumerate(zip(gain["with reference"], gain["text only"], strict=True)):
        if shown is not None and plain:
            lines.append(f"  {bucket_name(index)}: {shown:.5f} / {plain:.5f} ({100 * (shown / plain - 1):+.1f}%)")
    return "\n".join(lines)


def begin(config: TrainConfig, parts: Parts, data: Prepared | OwnLatents, accelerator: Accelerator, folder: Path) -> Trainer:
    """A trainer at its first update; the encoders are let go, as everything they give is cached, and the UNet comes."""
    module = None
    if config.what == "module":
        features = data.features(data.references(0)[0], 0)
        dims = {name: tensor.shape[-1] for name, tensor in features.items()}
        described = encoder_metadata(config, parts.reference_encoder, tuple(features))
        generator = torch.Generator().manual_seed(config.train.seed)
        module = begin_module(config, parts.connector, dims, described, generator)
        module.config = module.config.replace(training=recipe(config, parts, data), file_metadata=model_spec(config))
    parts.reference_encoder = parts.text_encoder = None
    parts.place(UNET, AUTOENCODER)
    places = place_weights(data).get if config.objective.place_weight else None
    teacher = teacher_target(config, parts.backbone, data if isinstance(data, Prepared) else data.prepared)
    student = Student(parts.backbone, parts.connector, module, config.objective, teacher, places)
    return Trainer(config, student, data, accelerator, folder)


def teacher_target(config: TrainConfig, backbone: Backbone, data: Prepared) -> TeacherTarget | None:
    """The teacher's prediction as a target, or None without a teacher; it sees each row's reference whole, as it is.

    Raises:
        TrainingConfigError, FileError: see `load_teacher`; a group of references without its LoRA.
    """
    teacher = load_teacher(config.teacher, config.base, backbone)
    if teacher is None:
        return None
    teacher.to(backbone.device, backbone.dtype)
    known: dict[int, torch.Tensor] = {}
    lora_of = _loras_of_references(teacher.groups, data) if isinstance(teacher, LoraTeacher) else {}

    def vectors(reference: int) -> torch.Tensor:
        if reference not in known:
            picture_1HW3 = picture_tensor(open_picture(data.pictures.pictures[reference]))
            known[reference] = teacher.encode_reference(picture_1HW3)["ip_adapter"].cpu()
        return known[reference]

    def target(noised_B4hw, timestep_B, context_BKW, rows: Sequence[BatchRow]) -> torch.Tensor:
        shown = None
        if isinstance(teacher, IpAdapterTeacher):
            shown = {"ip_adapter": torch.cat([vectors(row.reference) for row in rows]),
                     "present_B": torch.tensor([row.strength > 0 for row in rows])}
        elif lora_of:
            shown = {"lora_B": torch.tensor([lora_of[row.reference] for row in rows])}
        return teacher.predict(noised_B4hw, timestep_B, context_BKW, shown)

    return target


def _loras_of_references(groups: Sequence[str], data: Prepared) -> dict[int, int]:
    """Reference -> number of its group's LoRA; empty where one LoRA teaches all.

    Raises:
        TrainingConfigError: a group without a LoRA.
    """
    if len(groups) == 1:
        return {}
    group_of: dict[int, str] = {}
    for example, own, given in zip(data.examples, data.pictures.own, data.pictures.given, strict=True):
        for reference in (own, *given):
            group_of.setdefault(reference, example.group or "")
    lacking = sorted({group_of[reference] for reference in data.variant_keys} - set(groups))
    if lacking:
        raise TrainingConfigError(f"teacher.lora has LoRAs for the groups {', '.join(groups)}, and none for "
                                  f"{', '.join(lacking)}; wanted <group>.safetensors for each group of references. Add them or "
                                  "leave these pictures out.")
    return {reference: groups.index(group_of[reference]) for reference in data.variant_keys}


def recipe(config: TrainConfig, parts: Parts, data: Prepared | OwnLatents) -> dict[str, Any]:
    """How the module is trained, for its metadata: no paths."""
    train, objective = config.train, config.objective
    teachers = {"LoRA": config.teacher.lora, "IP-Adapter": config.teacher.ip_adapter}
    teacher = next((kind for kind, path in teachers.items() if path), None)
    return {
        "base": {"name": parts.backbone.name, "sha256": parts.backbone.sha256}, "data": data.summary(),
        "recipe": {
            "batch": train.batch * train.accumulate, "rate": train.rate, "gate_rate": train.gate_rate, "decay": train.decay,
            "warmup": train.warmup, "schedule": train.schedule, "precision": train.precision, "average": train.average,
            "seed": train.seed, "blocks": config.module.blocks,
            **{name: value for name, value in vars(objective).items() if value},
            **({"teacher": teacher} if teacher else {}),
        },
    }


def model_spec(config: TrainConfig) -> dict[str, str]:
    """ModelSpec entries that model managers show."""
    output = config.output
    entries = {"title": output.title or output.name, "author": output.author, "license": output.license,
               "description": f"EMMA {config.module.condition} module"}
    return {f"modelspec.{key}": value for key, value in entries.items() if value}


def encoded(
    config: TrainConfig, parts: Parts, examples: Sequence[Example], folder: Path, processes: Processes, bars: bool
) -> tuple[Prepared | OwnLatents, Mapping[str, torch.Tensor], list[Mapping[str, torch.Tensor]]]:
    """The data, encoded by all processes; texts and references of the sample pictures."""
    if config.teacher.own_latents:
        check_own_latents(config)
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
        features, _ = encode_pictures(parts.reference_encoder, picture_tensor(open_picture(Path(path))), None, options)
        references.append({name: tensor[0] for name, tensor in features.items()})
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

