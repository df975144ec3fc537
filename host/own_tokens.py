"""References on the tokens that a model reads anyway: whatever the conditioning holds when the model is evaluated.

Shapes: F frames with a reference of their own (or 1), B rows of the latent batch, C texts of a conditioning, P pairs of a text
and a frame, S tokens, D their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.model_management
import comfy.utils
import torch

from ..emma_core.model.addition import Addition
from ..emma_core.model.assembly import Assembly, terms_over_schedule
from ..emma_core.model.own_tokens import OwnTokens
from ..emma_core.model.source_spec import SourceSpec
from .evaluation import Evaluation
from .families import Family, ModelTime, time_of
from .frames import frames_of_rows
from .payload import HostAssembly, TokenCache, chunk_with

# of the tokens of a schedule that are computed together: SDXL's for 26 timesteps, Wan's for 2
ELEMENTS_AT_ONCE = 1 << 22
KEPT_TEXTS = 4


@dataclass(frozen=True, eq=False)
class _KnownText:
    """Tokens that were met before, what of them is no padding (None: all), and what was made of them."""

    tokens_CSD: torch.Tensor
    kept_CS: torch.Tensor | None
    cache: TokenCache = field(default_factory=TokenCache)


@dataclass(frozen=True)
class _Pairs:
    """Texts and frames that belong together, and which pair each row of the batch is."""

    texts: Sequence[int]
    frames: Sequence[int]
    of_rows: Sequence[int]


class OwnTokensPayload:
    """What one conditioning entry carries: references only. Its tokens are read from the entry at every evaluation.

    Args:
        family: of the model.
        assembly: references.
        addition: where they are added up.
    """

    def __init__(self, family: Family, assembly: HostAssembly, addition: Addition | None = None):
        self._family = family
        self.assembly = Assembly(assembly.references, addition)
        self.patchers = list(assembly.patchers)
        self._known: list[_KnownText] = []

    @property
    def evaluates_more(self) -> bool:
        """Whether there may be differences to add to what the tokens predict."""
        return self.assembly.adds_predictions

    def contexts(self, tokens_CSD: torch.Tensor, mask_CS: torch.Tensor | None, evaluation: Evaluation) -> list[torch.Tensor]:
        """The tokens at this evaluation's time; then, for each difference to add to what they predict, the tokens for it.

        Args:
            tokens_CSD: of the entry, as they come.
            mask_CS: 0 where a token is padding; or None.
            evaluation: when, and for which rows.
        Returns:
            In the dtype and on the device of the entry's: (C, S, D) each where these serve all rows, else (B, S, D).
        Raises:
            ConnectorMismatchError: the model's sampling or the tokens are not those that the modules were made for.
            ReferenceMismatchError: references or strengths for another number of frames.
        """
        time = time_of(evaluation.sampling)
        time_B, schedule = evaluation.times(time.of_sigma)
        pairs = self._pairs(tokens_CSD.shape[0], evaluation)
        known = self._text(tokens_CSD, mask_CS)

        def at(moment: float) -> list[torch.Tensor]:
            return self._at(known, pairs, moment, schedule, time, time_B.device)

        moments = time_B.tolist()
        if self.assembly.rows == 1 and len(set(moments)) == 1:
            return at(moments[0])
        rows = [[copy_PSD[pair] for copy_PSD in at(moment)] for moment, pair in zip(moments, pairs.of_rows, strict=True)]
        return [torch.stack([row[number if number < len(row) else 0] for row in rows])
                for number in range(max(map(len, rows)))]

    def _pairs(self, texts: int, evaluation: Evaluation) -> _Pairs:
        """As the host repeats texts over a batch, so it is here: row b has text b mod C."""
        frames = frames_of_rows(self.assembly.rows, evaluation.rows, evaluation.frames, self.assembly)
        of_rows = [row % texts for row in range(evaluation.rows)]
        if self.assembly.rows == 1:
            return _Pairs(range(texts), [0] * texts, of_rows)
        if texts == 1:
            return _Pairs([0] * self.assembly.rows, range(self.assembly.rows), frames)
        return _Pairs(of_rows, frames, range(evaluation.rows))

    def _text(self, tokens_CSD: torch.Tensor, mask_CS: torch.Tensor | None) -> _KnownText:
        """By its values: nodes and context windows make new tensors of the same text."""
        kept_CS = kept_tokens(tokens_CSD, mask_CS)
        for known in self._known:
            if _equal(known.tokens_CSD, tokens_CSD) and _equal(known.kept_CS, kept_CS):
                return known
        self._known = [*self._known[1 - KEPT_TEXTS:], _KnownText(tokens_CSD.clone(), kept_CS)]
        return self._known[-1]

    def _at(
        self, known: _KnownText, pairs: _Pairs, moment: float, schedule: Sequence[float], time: ModelTime, device: torch.device
    ) -> list[torch.Tensor]:
        """(P, S, D) each."""
        size = max(1, ELEMENTS_AT_ONCE // (len(pairs.texts) * known.tokens_CSD[0].numel()))
        steps = tuple(schedule) if self.assembly.counts_steps else ()
        chunk = chunk_with(moment, schedule, size)
        key = (chunk, steps, tuple(pairs.texts), tuple(pairs.frames), time.spec, time.shift, str(device))
        made = known.cache.of(key, lambda: self._compute(known, pairs, chunk, steps, time, device))
        return made[chunk.index(moment)]

    def _compute(self, known, pairs: _Pairs, chunk, steps, time: ModelTime, device: torch.device) -> list[list[torch.Tensor]]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        tokens_CSD, kept_CS = known.tokens_CSD, known.kept_CS
        of_pairs = list(pairs.texts)
        kept_PS = None if kept_CS is None else kept_CS[of_pairs].to(device)
        source = OwnTokens(SourceSpec(self._family.name, tokens_CSD.shape[-1]), time.spec, kept_PS, time.shift)
        assembly = self.assembly.of_rows(pairs.frames).on_schedule(source.strength_timestep(torch.tensor(steps)).tolist())
        with torch.no_grad():
            terms = terms_over_schedule(source, tokens_CSD[of_pairs].to(device), torch.tensor(chunk, device=device), assembly)
        return [[copy_PSD.to(tokens_CSD.device) for copy_PSD in one.copies()] for one in terms]


def kept_tokens(tokens_CSD: torch.Tensor, mask_CS: torch.Tensor | None) -> torch.Tensor | None:
    """False where a token is padding: by its mask, or a row of zeros beside others. None: all are kept.

    Some models read padding as zeros and need them so (Anima, Wan); a text that is nothing but zeros was zeroed by a node.
    """
    filled_CS = (tokens_CSD != 0).any(-1)
    kept_CS = filled_CS | ~filled_CS.any(1, keepdim=True)
    if mask_CS is not None and mask_CS.ndim == 2 and mask_CS.shape[1] == tokens_CSD.shape[1]:
        kept_CS = kept_CS & (comfy.utils.repeat_to_batch_size(mask_CS, kept_CS.shape[0]).to(kept_CS.device) != 0)
    return None if bool(kept_CS.all()) else kept_CS


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
