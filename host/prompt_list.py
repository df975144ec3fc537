"""A list of prompts as one CONDITIONING, a text for each picture of the batch.

Shapes: F prompts, N tokens, D text width.
"""

import logging

import comfy.model_management
import comfy.utils
import torch

from ..emma_core.errors import ConnectorMismatchError, TextInputError
from .text_encoder import EllaT5Model
from .text_rows import padded_texts

_CLOSING_MARKS = tuple(",.;:!?")


def prompt_lines(text: str, prefix: str = "", suffix: str = "") -> list[str]:
    """One prompt per line that is not empty, between prefix and suffix.

    Raises:
        TextInputError: no line with text.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise TextInputError("the list holds no prompts; wanted one per line. Write at least one line.")
    prefix, suffix = prefix.strip(), suffix.strip()
    before = f"{prefix} " if prefix else ""
    after = suffix if suffix.startswith(_CLOSING_MARKS) or not suffix else f" {suffix}"
    return [f"{before}{line}{after}" for line in lines]


def encode_prompts(clip, prompts: list[str]) -> list:
    """CONDITIONING with one text per row, each encoded as CLIP Text Encode would.

    ELLA's texts keep their lengths. CLIP's consist of chunks: the shorter ones get empty chunks behind, as a batch has one
    length.

    Raises:
        ConnectorMismatchError: no CLIP, or texts of another encoder that have unequal lengths.
    """
    if clip is None:
        raise ConnectorMismatchError("there is no CLIP; wanted that of Load ELLA Text Encoder or of a checkpoint. The "
                                     "checkpoint file may hold none: load its CLIP with a node of its own.")
    tokens = [clip.tokenize(prompt) for prompt in prompts]
    is_ella = isinstance(clip.cond_stage_model, EllaT5Model)
    if not is_ella:
        tokens = _with_equal_chunks(tokens, clip.tokenize(""))
    progress = comfy.utils.ProgressBar(len(prompts))
    scheduled = []
    for one in tokens:
        comfy.model_management.throw_exception_if_processing_interrupted()
        scheduled.append(clip.encode_from_tokens_scheduled(one, show_pbar=False))
        progress.update(1)
    # several entries for a prompt where hooks of the CLIP change over the sampling: the same parts for all prompts
    return [_as_one_entry(entries, is_ella) for entries in zip(*scheduled, strict=True)]


def _with_equal_chunks(tokens: list[dict], empty: dict) -> list[dict]:
    """The host's tokens {encoder: chunks} of all prompts, with as many chunks as the longest has."""
    most = {name: max(len(one[name]) for one in tokens) for name, chunks in empty.items() if isinstance(chunks, list)}
    filled = [{**one, **{name: one[name] + empty[name][:1] * (count - len(one[name])) for name, count in most.items()}}
              for one in tokens]
    if filled != tokens:
        logging.warning("EMMA: the list has prompts that CLIP reads in several chunks; the shorter prompts get empty chunks, "
                        "which changes them a little. Shorten the long ones (below 76 tokens) to avoid that.")
    return filled


def _as_one_entry(entries: tuple, is_ella: bool) -> list:
    texts_1ND = [text_1ND for text_1ND, _ in entries]
    options = dict(entries[0][1])
    pooled = [one.get("pooled_output") for _, one in entries]
    if all(isinstance(one, torch.Tensor) for one in pooled):
        options["pooled_output"] = torch.cat(pooled)
    counts = {text_1ND.shape[1] for text_1ND in texts_1ND}
    if not is_ella and len(counts) > 1:
        raise ConnectorMismatchError(f"this text encoder gives the prompts {', '.join(map(str, sorted(counts)))} tokens, and a "
                                     "batch needs one length. Use the CLIP of Load ELLA Text Encoder or of the checkpoint.")
    padded_FND, lengths = padded_texts(texts_1ND)
    return [padded_FND, {**options, **(lengths if is_ella else {})}]
