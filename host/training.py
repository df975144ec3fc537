"""Training of modules inside the host: its MODEL, LATENT, CONDITIONING and IMAGE go through the command line's loop.

Shapes: B rows, N text tokens of width D, K cross-attention tokens of width W, V vectors of a feature, latents 4 x h x w,
T timesteps.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..emma_core.base.schedule import TIMESTEPS
from ..emma_core.encoders.base import encode_pictures
from ..emma_core.errors import ConnectorMismatchError, TrainingConfigError, TrainingDataError, TrainingError
from ..emma_core.files.module_file import module_tensors, save_module
from ..emma_core.files.tensor_file import fingerprint_of_weights
from ..emma_core.model.connector import Connector
from ..emma_core.training.config import TrainConfig
from ..emma_core.training.identity import run_identity
from ..emma_core.training.log import Log
from ..emma_core.training.losses import BUCKETS
from ..emma_core.training.parts import encoder_metadata, options_of
from ..emma_core.training.reports import Reporter
from ..emma_core.training.runs import model_spec
from ..emma_core.training.starts import begin_module
from ..emma_core.training.student import Student, TeacherTarget
from ..emma_core.training.trainer import Trainer, gain_of_reference
from .denoiser import HostDenoiser
from .encoders import as_encoder
from .images import rgb_pictures
from .loaded import LoadedConnector, LoadedModule, load_emma_module
from .naming import below, numbered
from .payload import KEY
from .text_rows import LENGTHS, text_rows

LATENT_PX = 8
_FOLDER = "emma_training"
_IDENTITY = "identity.txt"
_SUFFIX = ".safetensors"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class GraphSet:
    """A training set in memory; one text or one reference serves all latents.

    Args:
        latents: (4, h, w) each, as the UNet reads them.
        texts: (1, N, D) each.
        features_of_references: name -> (V, D) each.
    """

    latents: tuple[torch.Tensor, ...]
    texts: tuple[torch.Tensor, ...]
    features_of_references: tuple[Mapping[str, torch.Tensor], ...]

    def __len__(self) -> int:
        return len(self.latents)

    def bucket(self, index: int) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.latents[index].shape[1:]
        return LATENT_PX * width, LATENT_PX * height

    def group(self, index: int) -> str:
        """All are one group."""
        return ""

    def captions(self, index: int) -> tuple[str, ...]:
        """Texts have no words here, only numbers."""
        return (f"conditioning {index % len(self.texts) + 1}",)

    def references(self, index: int) -> tuple[int, ...]:
        return (index % len(self.features_of_references),)

    def variants(self, reference: int) -> int:
        return 1

    def latent(self, index: int, flipped: bool = False) -> torch.Tensor:
        return self.latents[index].flip(-1) if flipped else self.latents[index]

    def text(self, caption: str) -> torch.Tensor:
        return self.texts[int(caption.rpartition(" ")[2]) - 1]

    def features(self, reference: int, variant: int) -> dict[str, torch.Tensor]:
        return dict(self.features_of_references[reference])

    def summary(self) -> dict[str, Any]:
        """Counts, for the module's metadata."""
        sizes = [self.bucket(index) for index in range(len(self))]
        return {"pictures": len(self), "captions": len(self.texts), "references": len(self.features_of_references),
                "sizes_px": {f"{width}x{height}": sizes.count((width, height)) for width, height in sorted(set(sizes))}}

    def fingerprint(self) -> str:
        """Of everything in it."""
        tensors = {f"latent {index}": value for index, value in enumerate(self.latents)}
        tensors |= {f"text {index}": value for index, value in enumerate(self.texts)}
        tensors |= {f"reference {index} {name}": value for index, features in enumerate(self.features_of_references)
                    for name, value in features.items()}
        return fingerprint_of_weights(tensors)


@dataclass(frozen=True, eq=False)
class TrainingInputs:
    """What is wired into the node.

    Args:
        model: MODEL.
        ella: ELLA.
        latents: LATENTs.
        positive: CONDITIONINGs of T5.
        images: IMAGEs of references.
        encoder: EMMA_ENCODER or CLIP_VISION.
        start: EMMA_MODULE to go on from, or None.
        teacher_model, teacher_positive: MODEL and its CONDITIONINGs, or None and nothing.
    """

    model: Any
    ella: LoadedConnector
    latents: Sequence[dict]
    positive: Sequence[list]
    images: Sequence[torch.Tensor]
    encoder: Any
    start: LoadedModule | None = None
    teacher_model: Any = None
    teacher_positive: Sequence[list] = ()


def train(inputs: TrainingInputs, config: TrainConfig) -> tuple[LoadedModule, list[float], str]:
    """Train a module in `output/emma_training/<name>`; the same run, interrupted or with more steps, goes on.

    Returns:
        The module, the loss of every update, and a report.
    Raises:
        TrainingConfigError, TrainingDataError, TrainingError, ConnectorMismatchError: found, wanted and what to do.
        InterruptProcessingException: the host's Cancel; checkpoint and module are saved.
    """
    _check_pair(inputs)
    accelerator = _accelerator(config.train.precision)
    encoder = as_encoder(inputs.encoder)
    data = training_set(inputs, config, encoder)
    # nodes run in inference mode, in which nothing can learn
    with torch.inference_mode(False), torch.enable_grad():
        place = (accelerator.device, _DTYPES[config.train.precision])
        denoiser = HostDenoiser(inputs.model, *place, config.train.gradient_checkpointing)
        _check_width(denoiser, inputs.ella.connector.width)
        teacher, teacher_mark = _teacher(inputs, denoiser, len(data), place)
        comfy.model_management.unload_all_models()  # what trains are copies
        connector = _plain_connector(inputs.ella.connector)
        base_mark = fingerprint_of_weights(denoiser.network.state_dict())
        folder, config = _run_folder(inputs, config, [data.fingerprint(), base_mark, teacher_mark,
                                                      fingerprint_of_weights(connector.state_dict())])
        features = data.features(0, 0)
        described = encoder_metadata(config, encoder.encoder, tuple(features))
        module = begin_module(config, connector, {name: value.shape[-1] for name, value in features.items()}, described,
                              torch.Generator().manual_seed(config.train.seed))
        base = {"name": denoiser.name, "fingerprint": base_mark}
        module.config = module.config.replace(training=_recipe(config, base, data), file_metadata=model_spec(config))
        student = Student(denoiser, connector, module, config.objective, teacher)
        trainer = Trainer(config, student, data, accelerator, folder)
        trainer.resume()
        losses = _run(trainer)
        report = _report(trainer, losses)
    comfy.model_management.soft_empty_cache()
    return load_emma_module(str(folder / f"{config.output.name}{_SUFFIX}")), losses, report


def precision_of(choice: str) -> str:
    """"auto" is bf16 on GPUs that have it, else fp32."""
    if choice != "auto":
        return choice
    device = comfy.model_management.get_torch_device()
    cpu = comfy.model_management.is_device_cpu(device)
    return "bf16" if not cpu and comfy.model_management.should_use_bf16(device) else "fp32"


def training_set(inputs: TrainingInputs, config: TrainConfig, encoder) -> GraphSet:
    """The node's inputs as a training set, checked.

    Raises:
        TrainingDataError: no latents, other channels, other numbers of texts or references.
        ConnectorMismatchError: text of another width than the ELLA reads.
        ImageInputError, ReferenceMismatchError: see the encoders.
    """
    latents = [_normal(row) for latent in inputs.latents for row in _scaled(inputs.model, latent["samples"])]
    if not latents:
        raise TrainingDataError("there are no latents to learn from; wanted one or more. Encode pictures with VAE Encode.")
    texts = _entries(inputs.positive, "positive")
    wanted = inputs.ella.connector.config.text_dim
    for text_1ND in texts:
        if text_1ND.shape[-1] != wanted:
            raise ConnectorMismatchError(
                f"the positive conditioning has width {text_1ND.shape[-1]}, the ELLA reads text features of width {wanted}. "
                "Encode the texts with the CLIP of Load ELLA Text Encoder, not with the checkpoint's CLIP.")
    _check_count("conditioning entries", len(texts), len(latents))
    pictures = [rgb_pictures(image) for image in inputs.images]
    _check_count("reference pictures", sum(map(len, pictures)), len(latents))
    references = [one for image_BHW3 in pictures for one in _encoded(image_BHW3, encoder, config)]
    _check_count("references", len(references), len(latents))
    return GraphSet(tuple(latents), tuple(texts), tuple(references))


def _accelerator(precision: str):
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as found:
        raise TrainingError(f"training needs the package accelerate, which cannot be imported ({found}). Run `pip install "
                            "accelerate` in ComfyUI's Python, and start ComfyUI again.") from found
    # it would keep the first run's precision for the life of the process
    AcceleratorState._reset_state(reset_partial_state=True)
    cpu = comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device())
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)


def _plain_connector(connector: Connector) -> Connector:
    """A float32 copy without the host's casting layers, whose outputs carry gradients."""
    plain = Connector(connector.config)
    plain.load_state_dict({name: _normal(value) for name, value in connector.state_dict().items()})
    plain.sha256, plain.name = connector.sha256, connector.name
    return plain.eval().requires_grad_(False)


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy on the CPU that autograd takes, also of an inference tensor."""
    with torch.inference_mode(False):
        return tensor.detach().clone().to("cpu", torch.float32)


def _scaled(model, samples_B4hw: torch.Tensor) -> torch.Tensor:
    if samples_B4hw.ndim != 4 or samples_B4hw.shape[1] != 4:
        raise TrainingDataError(f"latents of shape {tuple(samples_B4hw.shape)}; wanted (pictures, 4, height, width). Encode "
                                "the pictures with the VAE of an SD1.5 checkpoint.")
    if not torch.isfinite(samples_B4hw).all():
        raise TrainingDataError("a latent holds NaN or infinite values; wanted numbers. A VAE in float16 is a common cause: "
                                "start ComfyUI with --fp32-vae and encode again.")
    return model.model.process_latent_in(samples_B4hw.float())


def _entries(conditionings: Sequence[list], what: str) -> list[torch.Tensor]:
    """(1, N, D) of every row of every entry."""
    found = []
    for text_BND, options in (entry for conditioning in conditionings for entry in conditioning):
        if text_BND is None or KEY in options.get("model_conds", {}):
            kind = "no text features" if text_BND is None else "tokens of EMMA Connector"
            raise ConnectorMismatchError(f"the {what} conditioning holds {kind}; wanted what a CLIP Text Encode node gives. "
                                         "Wire that node into Train EMMA Module.")
        found += map(_normal, text_rows(text_BND, options.get(LENGTHS)))
    return found


def _check_count(what: str, found: int, latents: int) -> None:
    if found not in (1, latents):
        raise TrainingDataError(f"{found} {what} for {latents} latents; wanted 1 for all, or {latents}. Give each latent its "
                                "own, in the same order.")


def _check_pair(inputs: TrainingInputs) -> None:
    if (inputs.teacher_model is None) == (not inputs.teacher_positive):
        return
    lacking = "teacher_positive" if inputs.teacher_model is not None else "teacher_model"
    raise TrainingConfigError(f"a teacher needs both teacher_model and teacher_positive; {lacking} is not wired. Wire it, or "
                              "remove the other.")


def _check_width(denoiser: HostDenoiser, width: int) -> None:
    if denoiser.context_width != width:
        raise ConnectorMismatchError(f"this MODEL ({denoiser.name}) has a cross-attention of width {denoiser.context_width}; "
                                     f"the ELLA makes tokens of width {width}. Use a checkpoint of the family this ELLA was "
                                     "made for.")


def _encoded(image_BHW3: torch.Tensor, encoder, config: TrainConfig) -> list[dict[str, torch.Tensor]]:
    options = options_of(config)

    def after_chunk(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    features, _ = encode_pictures(encoder.encoder, image_BHW3, None, options, encoder.cache, encoder.encoder.at_once(),
                                  after_chunk)
    rows = len(next(iter(features.values())))
    return [{name: _normal(features[name][row]) for name in options.features} for row in range(rows)]


def _teacher(
    inputs: TrainingInputs, denoiser: HostDenoiser, latents: int, place: tuple[torch.device, torch.dtype]
) -> tuple[TeacherTarget | None, str]:
    """The teacher's prediction under its own conditioning as a target, and a mark of both."""
    if inputs.teacher_model is None:
        return None, ""
    teacher = HostDenoiser(inputs.teacher_model, *place)
    if teacher.prediction != denoiser.prediction:
        raise TrainingConfigError(f"the teacher predicts {teacher.prediction}, the MODEL {denoiser.prediction}; wanted the "
                                  "same. Use two checkpoints of one kind.")
    contexts = _entries(inputs.teacher_positive, "teacher's")
    _check_count("entries of the teacher's conditioning", len(contexts), latents)
    for context_1KW in contexts:
        if context_1KW.shape[-1] != teacher.context_width:
            raise TrainingConfigError(f"the teacher's conditioning has width {context_1KW.shape[-1]}, its MODEL reads "
                                      f"{teacher.context_width}. Encode it with the CLIP of the teacher's checkpoint.")

    def target(noised_B4hw, timestep_B, plain_BKW, rows) -> torch.Tensor:
        # one by one: texts of unequal lengths cannot stand in one batch
        return torch.cat([
            teacher.predict_noise(noised_B4hw[row:row + 1], timestep_B[row:row + 1],
                                  contexts[one.target % len(contexts)].to(noised_B4hw.device))
            for row, one in enumerate(rows)
        ])

    conditioning = fingerprint_of_weights({str(index): value for index, value in enumerate(contexts)})
    return target, f"{fingerprint_of_weights(teacher.network.state_dict())} {conditioning}"


def _run_folder(inputs: TrainingInputs, config: TrainConfig, marks: Sequence[str]) -> tuple[Path, TrainConfig]:
    """The folder of this very run, or a new one: another run's is never touched; and the configuration that names it."""
    if inputs.start is not None:
        marks = [*marks, fingerprint_of_weights(module_tensors(inputs.start.module))]
    identity = hashlib.sha256(json.dumps([run_identity(config), *marks]).encode()).hexdigest()
    wanted = below(Path(folder_paths.get_output_directory()) / _FOLDER, config.output.folder)
    for folder in numbered(wanted):
        mark = folder / _IDENTITY
        if not folder.exists():
            folder.mkdir(parents=True)
            mark.write_text(identity, encoding="utf-8")
        if mark.is_file() and mark.read_text(encoding="utf-8") == identity:
            break
    if inputs.start is not None:
        path = folder / f"start{_SUFFIX}"
        save_module(inputs.start.module, path)
        config = replace(config, module=replace(config.module, start=str(path)))
    return folder, replace(config, output=replace(config.output, folder=str(folder), name=wanted.name))


def _recipe(config: TrainConfig, base: Mapping[str, str], data: GraphSet) -> dict[str, Any]:
    """How the module is trained, for its metadata."""
    names = ("rate", "gate_rate", "decay", "warmup", "schedule", "precision", "average", "seed")
    return {"base": dict(base), "data": data.summary(),
            "recipe": {"batch": config.train.batch * config.train.accumulate,
                       **{name: getattr(config.train, name) for name in names},
                       **{name: value for name, value in vars(config.objective).items() if value}}}


def _run(trainer: Trainer) -> list[float]:
    """The loss of every update, those of earlier sittings too."""
    progress = comfy.utils.ProgressBar(trainer.config.train.steps)
    log, tell = Log(trainer.folder / "losses.jsonl"), Reporter(trainer.config, trainer)

    def after_step(done) -> None:
        log.write(step=done.step, loss=done.loss)
        tell(done)
        progress.update_absolute(done.step)
        comfy.model_management.throw_exception_if_processing_interrupted()

    trainer.run(after_step)
    known = {line["step"]: line["loss"] for line in log.read()}
    return [known[step] for step in sorted(known) if step <= trainer.step]


def _report(trainer: Trainer, losses: Sequence[float]) -> str:
    """What was trained, and what the reference gains, timesteps apart."""
    lines = [f"{trainer.step} updates in {trainer.seconds:.0f} s on {len(trainer.data)} pictures", f"folder: {trainer.folder}"]
    lines += [f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last"] if losses else []
    gain = gain_of_reference(trainer)
    for index in range(BUCKETS):
        told = [f"{name} {means[index]:.4f}" for name, means in gain.items() if means[index] is not None]
        if told:
            lines.append(f"loss at timesteps {index * TIMESTEPS // BUCKETS} to {(index + 1) * TIMESTEPS // BUCKETS - 1}: "
                         f"{', '.join(told)}")
    return "\n".join(lines)
