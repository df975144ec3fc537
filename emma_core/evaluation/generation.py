"""Drawing the pictures: base, ELLA, modules and encoders, as the configuration names them.

Shapes: pictures H x W, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..assembly import Assembly, Reference, check_fits
from ..encoders.base import ReferenceEncoder, encode_pictures
from ..encoders.loading import encoder_kind, load_encoder
from ..errors import EmmaError, ReferenceMismatchError
from ..gated_resampler import GatedResampler
from ..generate import SD15_LATENT_SCALE, Pipeline, Request, Sampling, generate, sd15_scheduler
from ..module_file import load_module
from ..playground import PLAYGROUND_DIR
from ..reference_features import check_encoder, check_for_module, combine_features, encode_options
from ..training.config import OptimisationConfig, TrainConfig
from ..training.parts import load_parts, prepare_precision
from .config import MASK_ALWAYS, MASK_NEVER, EvalConfig, EvaluationError, Row
from .plan import Files, Job, sha256_of
from .references import ReferencePicture

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SAME_SCHEDULE = 1e-4  # of alphas_cumprod: what the rounding of published schedules explains


def files_of(config: EvalConfig) -> Files:
    """Digests of everything that takes part in drawing, without loading it.

    Raises:
        EvaluationError: a file or folder that does not exist.
    """
    own = config.on_playground
    base = {"base.checkpoint": PLAYGROUND_DIR / "unet.safetensors" if own else config.base.checkpoint,
            "base.vae": config.base.vae or (PLAYGROUND_DIR / "autoencoder.safetensors" if own else ""),
            "base.lora": config.base.lora, "ella.file": config.ella.file or PLAYGROUND_DIR / "ella.safetensors",
            "ella.text_encoder": config.ella.text_encoder or PLAYGROUND_DIR / "t5.safetensors"}
    modules = {f"modules.files {Path(file).stem}": file for file in config.modules.files}
    encoders = {f"encoder.files {number}": file for number, file in enumerate(encoder_files(config), 1)}
    return Files(*({name: _digest(name, path) for name, path in group.items() if path} for group in (base, modules, encoders)))


def encoder_files(config: EvalConfig) -> tuple[str, ...]:
    """Those named, else the playground's own."""
    if config.encoder.files or not config.modules.files:
        return config.encoder.files
    return (str(PLAYGROUND_DIR / "encoder.safetensors"),)


def precision_on(config: EvalConfig, device: torch.device) -> str:
    """The precision that the device has."""
    return prepare_precision(_as_training(config), device)[0].train.precision


class Drawer:
    """Draws pictures of jobs; the references of one call after another may be the same, and are encoded once.

    Raises:
        EmmaError: a file that cannot be used, parts that do not fit together, see the loaders.
    """

    def __init__(self, config: EvalConfig, device: torch.device):
        training, dtype = prepare_precision(_as_training(config), device)
        self._config, self._device = config, device
        self._autocast_dtype = _AUTOCAST.get(training.train.precision)
        self._parts = load_parts(training, dtype, device)
        self._connector = self._parts.connector.to(device)
        self._encoders = [_load_encoder(file, config.encoder.open_clip_model, device) for file in encoder_files(config)]
        self._modules = [load_module(file, device=device) for file in config.modules.files]
        for module in self._modules:
            check_fits(self._connector, module)
        self._encoder_of = [encoder_for(module, self._encoders) for module in self._modules]
        self._shown: ReferencePicture | None = None
        self._known: dict[Row, Assembly] = {}
        self._features: dict[int, dict[str, torch.Tensor]] = {}

    def draw(self, jobs: Sequence[Job]) -> list[Image.Image]:
        """The pictures of jobs that show one reference, or none.

        Raises:
            EvaluationError, ImageInputError: the reference cannot be used.
            ReferenceMismatchError: it does not fit a module.
        """
        requests = [Request(job.prompt, self._assembly(job), self._config.sampling.negative, job.seed) for job in jobs]
        sampling = Sampling(self._config.sampling.steps, self._config.sampling.guidance, *self._config.size_px)
        with self._autocast():
            pictures_BHW3 = generate(self._pipeline(), requests, sampling)
        levels = (pictures_BHW3.float() * 255).round().byte().numpy()
        return [Image.fromarray(picture) for picture in levels]

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self._device.type, self._autocast_dtype, enabled and self._autocast_dtype is not None)

    def _pipeline(self) -> Pipeline:
        backbone = self._parts.backbone

        def texts(prompts: Sequence[str]) -> list[torch.Tensor]:
            with self._autocast(False):  # T5 has a precision of its own
                return [features.float() for features in self._parts.text_encoder.encode(prompts)]

        def decode(latent_B4hw: torch.Tensor) -> torch.Tensor:
            with self._autocast(False):  # the autoencoder is in float32, as fp16 overflows in it
                return backbone.decode(latent_B4hw.float() * SD15_LATENT_SCALE)

        return Pipeline(texts, self._connector, backbone.predict_noise, decode,
                        scheduler_for(backbone.alphas_cumprod_T, backbone.prediction))

    def _assembly(self, job: Job) -> Assembly:
        if job.reference is None:
            return Assembly()
        if self._shown != job.reference:
            self._shown, self._known, self._features = job.reference, {}, {}
        if job.row not in self._known:
            self._known[job.row] = Assembly(
                Reference(self._modules[index], self._features_for(index, job.reference), strength)
                for index, strength in enumerate(job.row.strengths) if strength)
        return self._known[job.row]

    def _features_for(self, index: int, reference: ReferencePicture) -> dict[str, torch.Tensor]:
        """What module `index` reads of the reference."""
        if index not in self._features:
            module, encoder = self._modules[index], self._encoder_of[index]
            options = encode_options(module.config)
            mask_1HW = None
            if _is_masked(self._config.references.mask, module):
                mask_1HW = _tensor(reference.mask_picture())
            try:
                features, _ = encode_pictures(encoder, _tensor(reference.picture()), mask_1HW, options)
            except EvaluationError:
                raise
            except EmmaError as found:
                raise EvaluationError(f"the reference {reference.name} cannot be used for {module.name}: {found}") from found
            description = {**encoder.description, "layer": options.layer}
            combined = combine_features(features, "concat", description)
            check_for_module(combined, module.config)
            self._features[index] = {name: tensor.to(self._device) for name, tensor in combined.features.items()}
        return self._features[index]


def scheduler_for(alphas_cumprod_T: torch.Tensor, prediction: str) -> DDIMScheduler:
    """SD1.5's scheduler, with another schedule or prediction where the checkpoint has one."""
    scheduler = sd15_scheduler()
    changes: dict = {"prediction_type": "v_prediction"} if prediction == "v" else {}
    kept_T = alphas_cumprod_T.detach().double().cpu()
    if not torch.allclose(kept_T, scheduler.alphas_cumprod.double(), rtol=0, atol=_SAME_SCHEDULE):
        before_T = torch.cat([kept_T.new_ones(1), kept_T[:-1]])
        changes["trained_betas"] = (1 - kept_T / before_T).tolist()
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler


def encoder_for(module: GatedResampler, encoders: Sequence[ReferenceEncoder]) -> ReferenceEncoder:
    """The first encoder that the module was trained with.

    Raises:
        ReferenceMismatchError: none of them is; what was found and what is needed.
    """
    reasons = []
    for encoder in encoders:
        try:
            check_encoder(encoder.description, module.config, before=True)
        except ReferenceMismatchError as found:
            reasons.append(str(found))
            continue
        if set(module.config.features) <= set(encoder.feature_names):
            return encoder
        reasons.append(f"it gives {', '.join(encoder.feature_names)}, not {', '.join(module.config.features)}.")
    raise ReferenceMismatchError(f"none of the {len(encoders)} encoders is the one of {module.name}: {' '.join(reasons)}")


def _as_training(config: EvalConfig) -> TrainConfig:
    """What training's loaders need to know; "ella" is their word for: no reference encoder of theirs."""
    return TrainConfig(what="ella", base=config.base, ella=config.ella,
                       train=OptimisationConfig(precision=config.sampling.precision))


def _load_encoder(file: str, open_clip_model: str, device: torch.device) -> ReferenceEncoder:
    kind = encoder_kind(file)
    encoder = load_encoder(file, (open_clip_model or None) if kind == "open_clip" else None, kind)
    encoder.model.to(device)
    return encoder


def _is_masked(choice: str, module: GatedResampler) -> bool:
    return choice == MASK_ALWAYS or (choice != MASK_NEVER and bool(module.config.encoder.get("masked")))


def _tensor(picture: Image.Image) -> torch.Tensor:
    """RGB as (1, H, W, 3), grey as (1, H, W), in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]


def _digest(name: str, path: str | Path) -> str:
    if not Path(path).exists():
        raise EvaluationError(f"{name.split()[0]} = {str(path)!r} does not exist. Check the path; nothing is downloaded.")
    return sha256_of(path)
