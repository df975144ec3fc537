"""Training of modules inside the host: its MODEL, LATENT, CONDITIONING and IMAGE go through the command line's loop.

Shapes: B rows, K cross-attention tokens of width W, latents 4 x h x w.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..emma_core.errors import TrainingError
from ..emma_core.files.module_file import module_tensors, save_module
from ..emma_core.files.tensor_file import fingerprint_of_weights
from ..emma_core.files.writing import make_folder, write_text
from ..emma_core.model.connector import Connector
from ..emma_core.model.own_tokens import OwnTokens
from ..emma_core.training.acceleration import new_accelerator, new_device
from ..emma_core.training.beginning import Frozen, begin
from ..emma_core.training.config import TrainConfig
from ..emma_core.training.identity import run_identity
from ..emma_core.training.lock import alone_in
from ..emma_core.training.log import Log
from ..emma_core.training.losses import TIMESTEPS
from ..emma_core.training.places import place_weights
from ..emma_core.training.progress import Lines
from ..emma_core.training.reports import SAMPLES, Reporter, sheet_name
from ..emma_core.training.samples import add_thumbnail
from ..emma_core.training.sizes import cache_bytes, check_room, checkpoint_bytes, numbers_of_blocks
from ..emma_core.training.student import OwnText, TeacherTarget
from ..emma_core.training.trainer import Trainer, gain_of_reference
from ..emma_core.training.words import gain_in_words
from .denoiser import HostDenoiser
from .encoders import as_encoder
from .families import own_tokens_of
from .foretelling import NodeText, foretell
from .latents import normal
from .loaded import LoadedModule, load_emma_module
from .naming import below, numbered
from .sheets import GraphSampler, sampler_for
from .training_folder import FolderSet, TrainingFolder
from .training_set import (
    GraphSet,
    TrainingInputs,
    check_inputs,
    source_of,
    teacher_contexts,
    teacher_texts,
    training_set,
)

_FOLDER = "emma_training"
_IDENTITY = "identity.txt"
_SUFFIX = ".safetensors"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Trained:
    """What comes out of a run.

    Args:
        module: as it was saved.
        losses: of every update.
        report: in words.
        sheet: the last sample sheet; None: there is none.
    """

    module: LoadedModule
    losses: list[float]
    report: str
    sheet: Path | None

    @property
    def shown(self) -> dict | None:
        """For `ui` of a node's output: the sheet where it lies, as Save Image shows its pictures."""
        if self.sheet is None:
            return None
        folder = self.sheet.parent.relative_to(Path(folder_paths.get_output_directory()))
        return {"images": [{"filename": self.sheet.name, "subfolder": folder.as_posix(), "type": "output"}]}


def train(inputs: TrainingInputs, config: TrainConfig, node: str | None = None) -> Trained:
    """Train a module in `output/emma_training/<name>`; the same run, interrupted or with more steps, goes on.

    Args:
        node: id of the node that shows what the run needs and how far it is.
    Raises:
        TrainingConfigError, TrainingDataError, TrainingError, ConnectorMismatchError: found, wanted and what to do.
        InterruptProcessingException: the host's Cancel; checkpoint and module are saved.
    """
    wanted = below(Path(folder_paths.get_output_directory()) / _FOLDER, config.output.folder)
    encoder, accelerator = as_encoder(inputs.encoder), _accelerator(config.train.precision)
    check_inputs(inputs)
    _check_room(wanted, inputs, config)
    data = training_set(inputs, config, encoder)
    if inputs.folder is not None:
        config = _with_folder(config, inputs.folder)
    images = data.reference_images() if inputs.folder is not None else inputs.images
    seen = inputs.teacher.tokens(images) if inputs.teacher else []
    # nodes run in inference mode, in which nothing can learn
    with torch.inference_mode(False), torch.enable_grad():
        place = (accelerator.device, _DTYPES[config.train.precision])
        denoiser = HostDenoiser(inputs.model, *place, config.train.gradient_checkpointing)
        teacher, teacher_mark = _teacher(inputs, data, place)
        comfy.model_management.unload_all_models()  # what trains are copies
        source, own, source_mark = _source(inputs, data, denoiser)
        if inputs.teacher:
            seen = [normal(one) for one in seen]
            teacher, teacher_mark = inputs.teacher.target(denoiser, seen, own, place), inputs.teacher.mark(seen)
        base_mark = fingerprint_of_weights(denoiser.network.state_dict())
        folder, config = _run_folder(wanted, inputs, config, [data.fingerprint(), base_mark, teacher_mark, source_mark])
        base = {"name": denoiser.name, "fingerprint": base_mark}
        places = place_weights(data).get if inputs.folder is not None and config.objective.place_weight else None
        frozen = Frozen(denoiser, source, base, encoder.encoder.description, teacher, places, own)
        with alone_in(folder):
            trainer = begin(config, frozen, data, accelerator, folder)
            sampler = None
            if inputs.folder is not None and config.report.sample_every:
                sampler = sampler_for(inputs.model, inputs.folder, config, data, denoiser, own)
            comfy.model_management.unload_all_models()  # what read the texts
            told = NodeText(node)
            foretell(trainer, told)
            trainer.resume()
            losses, sheet = _run(trainer, told, sampler)
        report = _report(trainer, losses)
        told.end(report)
    comfy.model_management.soft_empty_cache()
    return Trained(load_emma_module(str(folder / f"{config.output.name}{_SUFFIX}")), losses, report, sheet)


def _check_room(wanted: Path, inputs: TrainingInputs, config: TrainConfig) -> None:
    """Refuse a disk that cannot hold what the run writes, before anything is encoded."""
    cache = 0
    if inputs.folder is not None:
        config = _with_folder(config, inputs.folder)
        cache = cache_bytes(config, inputs.folder.examples)
    check_room(wanted, cache + checkpoint_bytes(config, numbers_of_blocks(config, source_of(inputs))))


def _with_folder(config: TrainConfig, folder: TrainingFolder) -> TrainConfig:
    """With how a folder is read; where it lies is no part of the run, whose mark tells its contents."""
    data = replace(folder.data, folder="")
    return replace(config, data=data, encoder=replace(config.encoder, masked=folder.masked))


def precision_of(choice: str) -> str:
    """"auto" is bf16 on GPUs that have it, else fp32."""
    if choice != "auto":
        return choice
    device = comfy.model_management.get_torch_device()
    cpu = comfy.model_management.is_device_cpu(device)
    return "bf16" if not cpu and comfy.model_management.should_use_bf16(device) else "fp32"


def _accelerator(precision: str):
    cpu = comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device())
    try:
        new_device(cpu)
    except ImportError as found:
        raise TrainingError(f"training needs the package accelerate, which cannot be imported ({found}). Run `pip install "
                            "accelerate` in ComfyUI's Python, and start ComfyUI again.") from found
    return new_accelerator(precision, cpu)


def _source(
    inputs: TrainingInputs, data: GraphSet | FolderSet, denoiser: HostDenoiser
) -> tuple[Connector | OwnTokens, OwnText | None, str]:
    """What gives the tokens, what goes with them if they are the MODEL's own, and a mark of it."""
    if data.own is None:
        connector = _plain_connector(inputs.ella.connector)
        return connector, None, fingerprint_of_weights(connector.state_dict())
    source = own_tokens_of(inputs.model, data.own.entries)
    time_T = source.time.last * denoiser.sigma_T if source.time.kind == "flow" else torch.arange(TIMESTEPS).float()
    return source, data.own.own_text(time_T), f"{source.source} {source.time} {source.shift}"


def _plain_connector(connector: Connector) -> Connector:
    """A float32 copy without the host's casting layers, whose outputs carry gradients."""
    plain = Connector(connector.config)
    plain.load_state_dict({name: normal(value) for name, value in connector.state_dict().items()})
    plain.sha256, plain.name = connector.sha256, connector.name
    return plain.eval().requires_grad_(False)


def _teacher(
    inputs: TrainingInputs, data: GraphSet | FolderSet, place: tuple[torch.device, torch.dtype]
) -> tuple[TeacherTarget | None, str]:
    """The teacher's prediction under its own conditioning as a target, and a mark of both."""
    if inputs.teacher_model is None:
        return None, ""
    teacher, contexts = HostDenoiser(inputs.teacher_model, *place), teacher_contexts(inputs, len(data))
    own = teacher_texts(inputs, data.latents) if data.own else None

    def of_row(target: int, device: torch.device) -> tuple[torch.Tensor, dict]:
        index = target % len(contexts)
        if own is None:
            return contexts[index].to(device), {}
        beside = own.beside(index, data.latents[target])
        return own.tokens(index).to(device), {name: value.to(device) if isinstance(value, torch.Tensor) else value
                                              for name, value in beside.items()}

    def predict(noised_B4hw, timestep_B, plain_BKW, rows) -> torch.Tensor:
        # one by one: texts of unequal lengths cannot stand in one batch
        return torch.cat([teacher.predict_noise(noised_B4hw[row:row + 1], timestep_B[row:row + 1],
                                                *of_row(one.target, noised_B4hw.device)) for row, one in enumerate(rows)])

    conditioning = fingerprint_of_weights({str(index): value for index, value in enumerate(contexts)})
    mark = f"{fingerprint_of_weights(teacher.network.state_dict())} {conditioning}"
    return TeacherTarget(f"MODEL ({teacher.name})", predict, lambda dtype: teacher.numbers * dtype.itemsize), mark


def _run_folder(
    wanted: Path, inputs: TrainingInputs, config: TrainConfig, marks: Sequence[str]
) -> tuple[Path, TrainConfig]:
    """The folder of this very run, or a new one: another run's is never touched; and the configuration that names it."""
    if inputs.start is not None:
        marks = [*marks, fingerprint_of_weights(module_tensors(inputs.start.module))]
    identity = hashlib.sha256(json.dumps([run_identity(config), *marks]).encode()).hexdigest()
    for folder in numbered(wanted):
        mark = folder / _IDENTITY
        if not folder.exists():
            make_folder(folder)
            write_text(mark, identity)
        if mark.is_file() and mark.read_text(encoding="utf-8") == identity:
            break
    if inputs.start is not None:
        path = folder / f"start{_SUFFIX}"
        save_module(inputs.start.module, path)
        config = replace(config, module=replace(config.module, start=str(path)))
    return folder, replace(config, output=replace(config.output, folder=str(folder), name=wanted.name))


def _run(trainer: Trainer, told: NodeText, sampler: GraphSampler | None) -> tuple[list[float], Path | None]:
    """The loss of every update, those of earlier sittings too, and the last sample sheet."""
    steps = trainer.config.train.steps
    progress, lines = comfy.utils.ProgressBar(steps), Lines("update", steps, trainer.step, told.now)
    log = Log(trainer.folder / "losses.jsonl")
    tell = Reporter(trainer.config, trainer, sampler, lines, ends=(comfy.model_management.InterruptProcessingException,))
    if sampler:
        sampler.begin(trainer)

    def after_step(done) -> None:
        log.write(step=done.step, loss=done.loss)
        tell(done)
        sheet = tell.drawn_at(done.step)
        progress.update_absolute(done.step, preview=("JPEG", sheet.image(), None) if sheet else None)
        comfy.model_management.throw_exception_if_processing_interrupted()

    trainer.run(after_step)
    told = [(line.get("step"), line.get("loss")) for line in log.read()]
    known = {step: loss for step, loss in told if type(step) is int and type(loss) is float}  # of lines that are whole
    losses = [known[step] for step in sorted(known) if step <= trainer.step]
    sheet = tell.sample()
    if sheet is None:
        return losses, None
    if trainer.config.output.thumbnail:
        add_thumbnail(trainer, sheet.thumbnail())
    return losses, trainer.folder / SAMPLES / sheet_name(sheet.step)


def _report(trainer: Trainer, losses: Sequence[float]) -> str:
    """What was trained, and what the reference gains, timesteps apart."""
    lines = [f"{trainer.step} updates in {trainer.seconds:.0f} s on {len(trainer.data)} pictures", f"folder: {trainer.folder}"]
    lines += [f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last"] if losses else []
    lines += [gain_in_words(gain_of_reference(trainer), trainer.growth, trainer.config, trainer.ended_growing)]
    return "\n".join(lines)
