"""What is wired into Train EMMA Module, checked, and as a training set in memory.

Shapes: B rows, N text tokens of width D, K cross-attention tokens of width W, V vectors of a feature, latents 4 x h x w.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from ..emma_core.encoders.base import check_features
from ..emma_core.errors import ConnectorMismatchError, TrainingConfigError, TrainingDataError
from ..emma_core.files.tensor_file import fingerprint_of_weights
from ..emma_core.model.connector import Connector
from ..emma_core.model.own_tokens import OwnTokens
from ..emma_core.training.config import TrainConfig
from ..emma_core.training.parts import encode_references, options_of
from ..emma_core.training.starts import check_start
from .conditioning import check_own_text
from .denoiser import context_width_of, prediction_of
from .families import context_width, own_tokens_of
from .images import rgb_pictures
from .ip_adapter_teacher import LoadedTeacher
from .latents import normal, scaled
from .loaded import LoadedConnector, LoadedEncoder, LoadedModule
from .own_text import OwnTexts
from .payload import KEY
from .text_rows import LENGTHS, text_rows
from .training_folder import FolderSet, TrainingFolder, prepared_folder, text_of

LATENT_PX = 8


@dataclass(frozen=True, eq=False)
class GraphSet:
    """A training set in memory; one text or one reference serves all latents, or any reference any of them.

    Args:
        latents: (4, h, w) each, as the UNet reads them.
        texts: (1, N, D) each.
        features_of_references: name -> (V, D) each.
        own: what goes with texts that are the MODEL's own.
        any_reference: a target may be shown any of the references, as with a teacher that sees them itself.
    """

    latents: tuple[torch.Tensor, ...]
    texts: tuple[torch.Tensor, ...]
    features_of_references: tuple[Mapping[str, torch.Tensor], ...]
    own: OwnTexts | None = None
    any_reference: bool = False

    def __len__(self) -> int:
        return len(self.latents)

    def bucket(self, index: int) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.latents[index].shape[-2:]
        return LATENT_PX * width, LATENT_PX * height

    def group(self, index: int) -> str:
        """All are one group."""
        return ""

    def captions(self, index: int) -> tuple[str, ...]:
        """Texts have no words here, only numbers."""
        return (_names_of(self.texts)[index % len(self.texts)],)

    def references(self, index: int) -> tuple[int, ...]:
        count = len(self.features_of_references)
        return tuple(range(count)) if self.any_reference else (index % count,)

    def variants(self, reference: int) -> int:
        return 1

    def latent(self, index: int, flipped: bool = False) -> torch.Tensor:
        return self.latents[index].flip(-1) if flipped else self.latents[index]

    def text(self, caption: str) -> torch.Tensor:
        return self.texts[_names_of(self.texts).index(caption)]

    def mark(self) -> str:
        """None: a run's folder is found by `fingerprint`."""
        return ""

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
        tensors |= self.own.marks() if self.own else {f"text {index}": value for index, value in enumerate(self.texts)}
        tensors |= {f"reference {index} {name}": value for index, features in enumerate(self.features_of_references)
                    for name, value in features.items()}
        return fingerprint_of_weights(tensors)


@dataclass(frozen=True, eq=False)
class TrainingInputs:
    """What is wired into the node.

    Args:
        model: MODEL.
        ella: ELLA; None: the module acts on the tokens that the MODEL reads anyway.
        latents: LATENTs.
        positive: CONDITIONINGs of T5.
        images: IMAGEs of references.
        encoder: EMMA_ENCODER or CLIP_VISION.
        start: EMMA_MODULE to go on from, or None.
        teacher_model, teacher_positive: MODEL and its CONDITIONINGs, or None and nothing.
        teacher: EMMA_TEACHER, which sees the references itself, or None.
        folder: EMMA_TRAINING_SET in place of latents, positive and images, or None.
    """

    model: Any
    ella: LoadedConnector | None
    latents: Sequence[dict]
    positive: Sequence[list]
    images: Sequence[torch.Tensor]
    encoder: Any
    start: LoadedModule | None = None
    teacher_model: Any = None
    teacher_positive: Sequence[list] = ()
    teacher: LoadedTeacher | None = None
    folder: TrainingFolder | None = None


def training_set(inputs: TrainingInputs, config: TrainConfig, encoder: LoadedEncoder) -> GraphSet | FolderSet:
    """The node's inputs, see `check_inputs`, as a training set; everything is checked before a reference is encoded.

    Raises:
        TrainingDataError: no latents, other channels, other numbers of texts or references.
        TrainingConfigError: a teacher that does not fit its text, a module to start from that is of another size.
        ConnectorMismatchError: the text has another width than the ELLA.
        ImageInputError, ReferenceMismatchError: see the encoders.
    """
    if inputs.folder is not None:
        inputs = replace(inputs, positive=[text_of(inputs.folder.clip, "")])
    if inputs.start is not None:
        start = inputs.start.module
        check_start(start.config, start.name, config, source_of(inputs))
    if inputs.folder is not None:
        return _folder_set(inputs, config, encoder)
    latents = [normal(row) for latent in inputs.latents for row in scaled(inputs.model, latent["samples"])]
    if not latents:
        raise TrainingDataError("there are no latents to learn from; wanted one or more. Encode pictures with VAE Encode.")
    texts, own = (_texts(inputs, len(latents)), None) if inputs.ella else _own_texts(inputs, latents)
    teacher_contexts(inputs, len(latents))
    pictures = [rgb_pictures(image) for image in inputs.images]
    any_reference = inputs.teacher is not None
    if not any_reference:
        _check_count("reference pictures", sum(map(len, pictures)), len(latents))
    check_features(encoder.encoder, options_of(config))
    references = [one for image_BHW3 in pictures for one in _encoded(image_BHW3, encoder, config)]
    if not any_reference:
        _check_count("references", len(references), len(latents))
    return GraphSet(tuple(latents), tuple(texts), tuple(references), own, any_reference)


def source_of(inputs: TrainingInputs) -> Connector | OwnTokens:
    """What gives the tokens that the module acts on.

    Raises:
        ConnectorMismatchError: see `own_tokens_of`.
    """
    if inputs.ella is not None:
        return inputs.ella.connector
    return own_tokens_of(inputs.model, [entry for conditioning in inputs.positive for entry in conditioning])


def teacher_contexts(inputs: TrainingInputs, latents: int) -> list[torch.Tensor]:
    """(1, K, W) of each entry of the teacher's conditioning; none without a teacher.

    Raises:
        TrainingConfigError: another width than the teacher reads.
        TrainingDataError: neither one entry for all latents nor one for each.
    """
    if inputs.teacher_model is None:
        return []
    contexts = _entries(inputs.teacher_positive, "teacher's")
    _check_count("entries of the teacher's conditioning", len(contexts), latents)
    width = context_width(inputs.teacher_model.model)
    for context_1KW in contexts:
        if context_1KW.shape[-1] != width:
            raise TrainingConfigError(f"the teacher's conditioning has width {context_1KW.shape[-1]}, its MODEL reads {width}. "
                                      "Encode it with the CLIP of the teacher's checkpoint.")
    return contexts


def check_inputs(inputs: TrainingInputs) -> None:
    """What can be refused before anything is read.

    Raises:
        TrainingDataError: nothing to learn from; latents beside a folder.
        TrainingConfigError: a MODEL of another kind, half a teacher, a teacher that does not fit the MODEL.
        ConnectorMismatchError: the MODEL has another width than the ELLA.
    """
    _check_models(inputs)
    _check_data(inputs)


def _check_data(inputs: TrainingInputs) -> None:
    wired = {"latents": inputs.latents, "positive": inputs.positive, "reference_image": inputs.images}
    if inputs.folder is not None and any(wired.values()):
        both = ", ".join(name for name, values in wired.items() if values)
        raise TrainingDataError(f"training_set and {both} are wired; wanted training_set alone, which brings all of them. "
                                "Remove the other wires.")
    lacking = [name for name, values in wired.items() if not values]
    if inputs.folder is None and lacking:
        raise TrainingDataError(f"nothing to learn from: {', '.join(lacking)} not wired. Wire Load Training Folder into "
                                "training_set, or all of latents, positive and reference_image.")


def _folder_set(inputs: TrainingInputs, config: TrainConfig, encoder: LoadedEncoder) -> FolderSet:
    """A folder encoded; of its texts, the empty one is in ``positive``."""
    folder, own = inputs.folder, None
    teacher_contexts(inputs, len(folder.examples))
    check_features(encoder.encoder, options_of(config))
    if inputs.ella is not None:
        _texts(inputs, 1)
    else:
        captions = folder.captions()
        rows = [text_of(folder.clip, caption)[0] for caption in captions]
        check_own_text(inputs.model, source_of(inputs), rows)
        own = OwnTexts(inputs.model, rows, [], captions)
    found = prepared_folder(folder, config, encoder, inputs.model, own)
    return found if own is None else replace(found, own=replace(own, latents=found.latents))


def _check_models(inputs: TrainingInputs) -> None:
    if (inputs.teacher_model is None) != (not inputs.teacher_positive):
        lacking = "teacher_positive" if inputs.teacher_model is not None else "teacher_model"
        raise TrainingConfigError(f"a teacher needs both teacher_model and teacher_positive; {lacking} is not wired. Wire it, "
                                  "or remove the other.")
    if inputs.teacher is not None:
        if inputs.teacher_model is not None:
            raise TrainingConfigError("teacher and teacher_model are both wired; one of them gives the target. Remove the "
                                      "other.")
        inputs.teacher.check(inputs.model)
    prediction = prediction_of(inputs.model)
    width, tokens = (context_width_of(inputs.model), inputs.ella.connector.width) if inputs.ella else (0, 0)
    if width != tokens:
        name = type(inputs.model.model).__name__
        raise ConnectorMismatchError(f"this MODEL ({name}) has a cross-attention of width {width}; the ELLA makes tokens of "
                                     f"width {tokens}. Use a checkpoint of the family this ELLA was made for.")
    if inputs.teacher_model is not None and prediction_of(inputs.teacher_model) != prediction:
        raise TrainingConfigError(f"the teacher predicts {prediction_of(inputs.teacher_model)}, the MODEL {prediction}; wanted "
                                  "the same. Use two checkpoints of one kind.")


def _texts(inputs: TrainingInputs, latents: int) -> list[torch.Tensor]:
    texts, wanted = _entries(inputs.positive, "positive"), inputs.ella.connector.config.text_dim
    for text_1ND in texts:
        if text_1ND.shape[-1] != wanted:
            raise ConnectorMismatchError(
                f"the positive conditioning has width {text_1ND.shape[-1]}, the ELLA reads text features of width {wanted}. "
                "Encode the texts with the CLIP of Load ELLA Text Encoder, not with the checkpoint's CLIP.")
    _check_count("conditioning entries", len(texts), latents)
    return texts


def teacher_texts(inputs: TrainingInputs, latents: Sequence[torch.Tensor]) -> OwnTexts:
    """The teacher's conditioning as its MODEL is told it, pooled vectors and sizes too."""
    rows = _rows_of(inputs.teacher_positive)
    return OwnTexts(inputs.teacher_model, rows, latents, _names_of(rows))


def _own_texts(inputs: TrainingInputs, latents: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], OwnTexts]:
    check_own_text(inputs.model, source_of(inputs), [entry for conditioning in inputs.positive for entry in conditioning])
    rows = _rows_of(inputs.positive)
    _check_count("conditioning entries", len(rows), len(latents))
    own = OwnTexts(inputs.model, rows, latents, _names_of(rows))
    return [own.tokens(index).float() for index in range(len(rows))], own


def _names_of(texts: Sequence[Any]) -> list[str]:
    return [f"conditioning {number}" for number in range(1, len(texts) + 1)]


def _rows_of(conditionings: Sequence[list]) -> list[list]:
    entries = [entry for conditioning in conditionings for entry in conditioning]
    return [_row_of(entry, row) for entry in entries for row in range(entry[0].shape[0])]


def _row_of(entry: list, row: int) -> list:
    """One text of an entry, with its own pooled vector."""
    tokens_CSD, options = entry
    alone = {name: value[row:row + 1] if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(tokens_CSD) > 1
             else value for name, value in options.items()}
    return [tokens_CSD[row:row + 1], alone]


def _entries(conditionings: Sequence[list], what: str) -> list[torch.Tensor]:
    """(1, N, D) of every row of every entry."""
    found = []
    for text_BND, options in (entry for conditioning in conditionings for entry in conditioning):
        if text_BND is None or KEY in options.get("model_conds", {}):
            kind = "no text features" if text_BND is None else "tokens of EMMA Connector"
            raise ConnectorMismatchError(f"the {what} conditioning holds {kind}; wanted what a CLIP Text Encode node gives. "
                                         "Wire that node into Train EMMA Module.")
        found += map(normal, text_rows(text_BND, options.get(LENGTHS)))
    return found


def _check_count(what: str, found: int, latents: int) -> None:
    if found not in (1, latents):
        raise TrainingDataError(f"{found} {what} for {latents} latents; wanted 1 for all, or {latents}. Give each latent its "
                                "own, in the same order.")


def _encoded(image_BHW3: torch.Tensor, encoder, config: TrainConfig) -> list[dict[str, torch.Tensor]]:
    def after_chunk(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    found = encode_references(config, encoder.encoder, image_BHW3, cache=encoder.cache, at_once=encoder.encoder.at_once(),
                              after_chunk=after_chunk)
    return [{name: normal(tensor) for name, tensor in features.items()} for features in found]
