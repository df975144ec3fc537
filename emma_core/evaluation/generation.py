"""Drawing the pictures of an evaluation: references and modules as its jobs name them.

Shapes: pictures H x W.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..base.config import encoder_files
from ..base.pairing import check_pairing
from ..base.pipeline import Request, Sampling
from ..base.text_to_image import TextToImage
from ..errors import EmmaError, EvaluationError
from ..files.picture_file import picture_tensor
from ..files.plain_file import is_there
from ..model.addition import ADDITIONS
from ..model.assembly import Assembly, Reference
from ..model.gated_resampler import GatedResampler
from ..playground import PLAYGROUND_DIR
from .config import MASK_ALWAYS, MASK_NEVER, EvalConfig, ResultRow
from .plan import DrawingJob, Files, sha256_of
from .references import ReferencePicture


def files_of(config: EvalConfig) -> Files:
    """Digests of everything that takes part in drawing, without loading it.

    Raises:
        EvaluationError: a file or folder that does not exist.
    """
    own = config.on_playground
    base = {"base.checkpoint": PLAYGROUND_DIR / "unet.safetensors" if own else config.base.checkpoint,
            "base.vae": config.base.vae or (PLAYGROUND_DIR / "autoencoder.safetensors" if own else ""),
            "base.lora": config.base.lora,
            "ella.file": config.ella.file or (PLAYGROUND_DIR / "ella.safetensors" if own else ""),
            "ella.text_encoder": config.ella.text_encoder or (PLAYGROUND_DIR / "t5.safetensors" if own else "")}
    modules = {f"modules.files {Path(file).stem}": file for file in config.modules.files}
    named = encoder_files(config.encoder, bool(config.modules.files))
    encoders = {f"encoder.files {number}": file for number, file in enumerate(named, 1)}
    for name, path in (base | modules | encoders).items():
        if path and not is_there(path):  # before gigabytes of the others are read
            raise EvaluationError(f"{name.split()[0]} = {str(path)!r} does not exist. Check the path; nothing is downloaded.")
    check_pairing(config.base, config.ella, config.modules.files)
    return Files(*({name: sha256_of(path) for name, path in group.items() if path} for group in (base, modules, encoders)))


class Drawer:
    """Draws pictures of jobs; the references of one call after another may be the same, and are encoded once.

    Raises:
        EmmaError: a file that cannot be used, parts that do not fit together, see `TextToImage`.
    """

    def __init__(self, config: EvalConfig, device: torch.device):
        self._config = config
        encoders = encoder_files(config.encoder, bool(config.modules.files))
        self._machine = TextToImage(config.base, config.ella, encoders, config.encoder.open_clip_model,
                                    config.sampling.precision, device)
        self._modules = [self._machine.load_module(file) for file in config.modules.files]
        self._shown: ReferencePicture | None = None
        self._known: dict[ResultRow, Assembly] = {}
        self._features: dict[int, dict[str, torch.Tensor]] = {}

    def draw(self, jobs: Sequence[DrawingJob]) -> list[Image.Image]:
        """The pictures of jobs that show one reference, or none.

        Raises:
            EvaluationError, ImageInputError: the reference cannot be used.
            ReferenceMismatchError: it does not fit a module.
        """
        requests = [Request(job.prompt, self._assembly(job), self._config.sampling.negative, job.seed) for job in jobs]
        sampling = Sampling(self._config.sampling.steps, self._config.sampling.guidance, *self._config.size_px)
        return self._machine.draw(requests, sampling)

    def _assembly(self, job: DrawingJob) -> Assembly:
        if job.reference is None:
            return Assembly()
        if self._shown != job.reference:
            self._shown, self._known, self._features = job.reference, {}, {}
        if job.row not in self._known:
            references = (Reference(self._modules[index], self._features_for(index, job.reference), strength)
                          for index, strength in enumerate(job.row.strengths) if strength)
            self._known[job.row] = Assembly(references, ADDITIONS[self._config.modules.adding])
        return self._known[job.row]

    def _features_for(self, index: int, reference: ReferencePicture) -> dict[str, torch.Tensor]:
        """What module `index` reads of the reference."""
        if index not in self._features:
            module = self._modules[index]
            masked = _is_masked(self._config.references.mask, module)
            mask_1HW = picture_tensor(reference.mask_picture()) if masked else None
            try:
                self._features[index] = self._machine.features(module, picture_tensor(reference.picture()), mask_1HW)
            except EvaluationError:
                raise
            except EmmaError as found:
                raise EvaluationError(f"the reference {reference.name} cannot be used for {module.name}: {found}") from found
        return self._features[index]


def _is_masked(choice: str, module: GatedResampler) -> bool:
    return choice == MASK_ALWAYS or (choice != MASK_NEVER and bool(module.config.encoder.get("masked")))
