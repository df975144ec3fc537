"""What our conditioning carries into the sampler, and the tokens it answers with.

Shapes: F frames or pictures of a batch (or 1), B rows of the latent batch, N text tokens, D text width, T timesteps,
K latent tokens, W token width.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import torch

from ..emma_core.errors import UnconnectedModelError
from ..emma_core.model.addition import Addition, TokenTerms, joined
from ..emma_core.model.assembly import Assembly, Reference, check_counts, terms_over_schedule
from .frames import frames_of_rows
from .loaded import LoadedConnector, LoadedModule
from .text_rows import text_rows

KEY = "emma"
ROWS_AT_ONCE = 512
KEPT_CHUNKS = 4
MIDDLE_TIMESTEP = 499


class TokenCache:
    """Tokens by timestep. A schedule is computed in fixed chunks, so the answer never depends on what ran before."""

    def __init__(self):
        self._chunks: OrderedDict[tuple, Any] = OrderedDict()

    def of(self, key: tuple, compute: Callable[[], Any]) -> Any:
        """What was computed for a chunk: ``key`` names its timesteps and whatever else the tokens depend on."""
        if key not in self._chunks:
            self._chunks[key] = compute()
            while len(self._chunks) > KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(key)
        return self._chunks[key]


@dataclass(frozen=True, eq=False)
class HostAssembly:
    """The EMMA_ASSEMBLY that travels through the graph: references, and the models that read them."""

    references: tuple[Reference, ...] = ()
    patchers: tuple[comfy.model_patcher.ModelPatcher, ...] = ()

    def __repr__(self) -> str:
        """Short: the host shows what is wired into a node that failed."""
        return f"<EMMA_ASSEMBLY of {len(self.references)} references: {', '.join(one.module.name for one in self.references)}>"

    def with_reference(self, module: LoadedModule, reference: Reference) -> "HostAssembly":
        """This assembly and one more reference."""
        patchers = dict.fromkeys((*self.patchers, module.patcher))
        return HostAssembly((*self.references, reference), tuple(patchers))


_payloads: "weakref.WeakSet[EmmaPayload]" = weakref.WeakSet()


class EmmaPayload:
    """One conditioning entry: its text, its references, its connector, and the placeholder that stands for them.

    Args:
        ella: the connector.
        text_FND: T5 features.
        assembly: references; empty for the negative.
        addition: where the references are added up.
        lengths: tokens of each text, where they are unequal; what is behind them is padding.
    Raises:
        ConnectorMismatchError: text or modules do not fit the connector.
        ReferenceMismatchError: unequal numbers of prompts and per-frame references.
    """

    def __init__(
        self, ella: LoadedConnector, text_FND: torch.Tensor, assembly: HostAssembly, addition: Addition | None = None,
        lengths: Sequence[int] | None = None,
    ):
        self.connector = ella.connector
        self.texts_1ND = text_rows(text_FND, lengths)
        self.assembly = Assembly(assembly.references, addition)
        self.patchers = [ella.patcher, *assembly.patchers]
        self.cache = TokenCache()
        self.frames = max(len(self.texts_1ND), self.assembly.rows)
        self._check_rows()
        comfy.model_management.load_models_gpu(self.patchers)
        device = comfy.model_management.get_torch_device()
        # ELLA's own tokens at a middle timestep: sensible numbers for stock nodes that look at them
        first = Assembly(self.assembly.of_row(0).references)
        [terms] = self._terms_of(self.texts_1ND[0], first, (MIDDLE_TIMESTEP,), device)
        self.placeholder_1KW = terms.tokens_BKW.to(comfy.model_management.intermediate_device(), torch.float32)
        _payloads.add(self)

    @property
    def evaluates_more(self) -> bool:
        """Whether there may be differences to add to what the tokens predict."""
        return self.assembly.adds_predictions

    def tokens(
        self, timestep_B: torch.Tensor, schedule: Sequence[float], frame_indices: Sequence[int] | None
    ) -> list[torch.Tensor]:
        """Tokens for a batch at its timesteps; then, for each difference to add to what they predict, the tokens for it.

        Args:
            timestep_B: timestep of each row of the latent batch.
            schedule: timesteps that the sampler announced, so that they are computed together; may be empty.
            frame_indices: which frames the rows are, in a context window; None: rows are frames.
        Returns:
            (1, K, W) each where one answer serves all rows, else (B, K, W).
        Raises:
            ReferenceMismatchError: prompts, per-frame references or strengths for another number of frames.
        """
        timesteps, device = timestep_B.tolist(), timestep_B.device
        frames = frames_of_rows(self.frames, len(timesteps), frame_indices, self.assembly, len(self.texts_1ND))
        if self.frames == 1 and len(set(timesteps)) == 1:
            return self._at(timesteps[0], schedule, device).copies()
        rows = [[copy_FKW[frame] for copy_FKW in self._at(timestep, schedule, device).copies()]
                for timestep, frame in zip(timesteps, frames, strict=True)]
        return [torch.stack([row[number if number < len(row) else 0] for row in rows])
                for number in range(max(map(len, rows)))]

    def _check_rows(self) -> None:
        counts = [("references or strengths", reference.rows) for reference in self.assembly.references]
        check_counts([("prompts", len(self.texts_1ND)), *counts], self.frames, f"{self.frames} frames", "frame")

    def _at(self, timestep: float, schedule: Sequence[float], device: torch.device) -> TokenTerms:
        chunk = chunk_with(timestep, schedule, max(1, ROWS_AT_ONCE // self.frames))
        steps = tuple(schedule) if self.assembly.counts_steps else ()
        terms_T = self.cache.of((chunk, steps, str(device)), lambda: self._compute(chunk, steps, device))
        return terms_T[chunk.index(timestep)]

    def _compute(self, timesteps: tuple[float, ...], steps: tuple[float, ...], device: torch.device) -> list[TokenTerms]:
        assembly = self.assembly.on_schedule(steps)
        if len(self.texts_1ND) == 1:
            return self._terms_of(self.texts_1ND[0], assembly, timesteps, device)
        # one by one: their lengths differ, and each gets the tokens that it has alone, bit for bit
        each = [self._terms_of(text_1ND, assembly.of_row(row), timesteps, device)
                for row, text_1ND in enumerate(self.texts_1ND)]
        return [joined(of_rows) for of_rows in zip(*each, strict=True)]

    def _terms_of(
        self, text_1ND: torch.Tensor, assembly: Assembly, timesteps: tuple[float, ...], device: torch.device
    ) -> list[TokenTerms]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        timestep_T = torch.tensor(timesteps, dtype=torch.float32, device=device)
        with torch.no_grad():
            return terms_over_schedule(self.connector, text_1ND.to(device), timestep_T, assembly)


def holds_placeholder(context_BSW: torch.Tensor) -> bool:
    """Whether the placeholder of any connected conditioning begins somewhere in this context."""
    for payload in list(_payloads):
        first_W = payload.placeholder_1KW[0, 0]
        if first_W.shape[0] == context_BSW.shape[-1]:
            # the host may have moved or cast the context
            same_SW = context_BSW[0] == first_W.to(context_BSW.device, context_BSW.dtype)
            if bool(same_SW.all(-1).any()):
                return True
    return False


def chunk_with(timestep: float, schedule: Sequence[float], size: int) -> tuple[float, ...]:
    """The part of the schedule that holds this timestep, or the timestep alone."""
    if timestep not in schedule:
        return (timestep,)
    start = schedule.index(timestep) // size * size
    return tuple(schedule[start:start + size])


class CONDEmma(comfy.conds.CONDConstant):
    """Carries an `EmmaPayload` in ``model_conds``; our wrapper takes it out before the host processes it."""

    def process_cond(self, batch_size, **kwargs):
        """Reached only on a MODEL without our wrapper.

        Raises:
            UnconnectedModelError: always.
        """
        raise UnconnectedModelError(
            "this conditioning comes from EMMA Connector, but the MODEL that samples it does not: its tokens would stay "
            "at one timestep and the references would be lost. Wire the MODEL output of EMMA Connector into the "
            "sampler (LoRA, ControlNet and other patches may come before or after it)."
        )

    def can_concat(self, other):
        return True
