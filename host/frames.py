"""Which prompt, reference or strength each row of a latent batch has, where there is one for each frame."""

from collections.abc import Sequence

from ..emma_core.errors import ReferenceMismatchError
from ..emma_core.model.assembly import Assembly


def frames_of_rows(
    frames: int, rows: int, window: Sequence[int] | None, assembly: Assembly, prompts: int = 1
) -> Sequence[int]:
    """The frame of each row of the batch.

    Args:
        frames: how many the conditioning holds; 1 serves all rows.
        rows: of the batch.
        window: which frames the rows are, in a context window; None: rows are frames.
        assembly: whose references or strengths they are, for the message.
        prompts: how many of them there are.
    Raises:
        ReferenceMismatchError: the batch has another number of frames.
    """
    if frames == 1:
        return [0] * rows
    if window is not None and len(window) == rows and max(window) < frames:
        return window
    if frames == rows:
        return range(rows)
    raise _wrong_batch(frames, rows, assembly, prompts)


def _wrong_batch(frames: int, rows: int, assembly: Assembly, prompts: int) -> ReferenceMismatchError:
    if prompts > 1:
        return ReferenceMismatchError(
            f"this conditioning holds {frames} prompts, the latent batch has {rows} pictures. Wire the count of "
            "Encode Prompt List into the batch size of the latent, or write another number of prompts."
        )
    if any(reference.features_rows > 1 for reference in assembly.references):
        return ReferenceMismatchError(
            f"this conditioning holds {frames} per-frame references, the latent batch has {rows} frames. "
            "Encode one reference per frame, or combine them ('concat' or 'average') into one for all frames."
        )
    return ReferenceMismatchError(
        f"this conditioning holds {frames} per-frame strengths, the latent batch has {rows} frames. Give one "
        "strength per frame, or a single one for all frames."
    )
