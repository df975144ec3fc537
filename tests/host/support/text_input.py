"""What enters the text input of any of the host's models, and the equations' answer to it.

Shapes: B rows of one call, S text tokens, D their width.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from token_check import Verdict, same

_LITERAL = Path(__file__).resolve().parents[2] / "core" / "literal_equations.py"


@dataclass(frozen=True)
class TextCall:
    """One call of a diffusion model: its context and what else it is told, by equal parts of the rows (``groups``).

    ``sigma_B`` is of the rows of one group, or one for all.
    """

    sigma_B: torch.Tensor
    timestep_B: torch.Tensor
    groups: tuple[int, ...]
    context_BSD: torch.Tensor
    others: dict[str, Any]

    def of_group(self, group: int) -> torch.Tensor:
        """(S, D) of the first row of a group."""
        rows = self.context_BSD.shape[0] // len(self.groups)
        return self.context_BSD[self.groups.index(group) * rows]


class TextSpy:
    """Records the calls of a diffusion model of any kind while it is open."""

    def __init__(self, network: torch.nn.Module):
        self._network = network
        self.calls: list[TextCall] = []

    def __enter__(self) -> TextSpy:
        self._handle = self._network.register_forward_pre_hook(self._at_network, with_kwargs=True)
        return self

    def __exit__(self, *exception) -> None:
        self._handle.remove()

    def _at_network(self, _, arguments, options):
        transformer = options["transformer_options"]
        others = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in options.items()
                  if name not in ("context", "transformer_options", "control")}
        rows = len(arguments[0])
        self.calls.append(TextCall(transformer["sigmas"].clone(), arguments[1].clone().expand(rows),
                                   tuple(transformer["cond_or_uncond"]), options["context"].clone(), others))


def literal_equations() -> ModuleType:
    """The transcription of the equations that the core's tests use; it imports torch alone."""
    spec = importlib.util.spec_from_file_location("literal_equations", _LITERAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LiteralAnswer:
    """What the tokens of one entry must be, by the equations and the host's own percents.

    Args:
        references: of the assembly that was connected.
        sampling: the host's model_sampling.
        time: "ddpm" or "flow".
        weights_of: a module -> its weights under their names in the file.
    """

    def __init__(self, references, sampling, time: str, weights_of):
        self._equations, self._sampling, self._time = literal_equations(), sampling, time
        self._members = [(reference, self._plain(reference.module, weights_of)) for reference in references]

    def _plain(self, module, weights_of):
        plain = self._equations.TokenModule(module.config)
        plain.load_state_dict({name: value.float() for name, value in weights_of(module).items()})
        return plain

    def at(self, plain_SD: torch.Tensor, sigma: float, timestep: float, kept_S: torch.Tensor | None = None,
           row: int = 0) -> torch.Tensor:
        """(S, D) from the tokens as they were; ``kept_S`` is False where one is padding."""
        kept_S = torch.ones(len(plain_SD), dtype=torch.bool) if kept_S is None else kept_S
        time = timestep if self._time == "ddpm" else 1000 * sigma
        assembly = [self._equations.Used(plain, _row(reference.features, row), _row_strength(reference, row))
                    for reference, plain in self._members if self._acts(reference, sigma)]
        with torch.no_grad():
            found_1SD = self._equations.tokens_with_modules(plain_SD[kept_S][None].float(), time, assembly)
        answer_SD = plain_SD.clone()
        answer_SD[kept_S] = found_1SD[0].to(plain_SD.dtype)
        return answer_SD

    def _acts(self, reference, sigma: float) -> bool:
        first, last = (self._sampling.percent_to_sigma(percent) for percent in (reference.start_percent, reference.end_percent))
        return first >= sigma >= last


def _row(features, row: int):
    return {name: tensor[row % len(tensor)][None].float() for name, tensor in features.items()}


def _row_strength(reference, row: int) -> float:
    strength = torch.as_tensor(reference.strength).flatten()
    return float(strength[row % len(strength)])


class TextEntry:
    """One entry of a conditioning: its tokens (C, S, D) as they were, and the answer to them; without one they stay.

    Args:
        plain_CSD: as they enter the model without us; one text for all rows, or one for each.
        answer: of the references it carries.
        kept_S: False where a token is padding.
    """

    def __init__(self, plain_CSD: torch.Tensor, answer: LiteralAnswer | None = None, kept_S: torch.Tensor | None = None):
        self._plain_CSD, self._answer, self._kept_S = plain_CSD, answer, kept_S
        self._known: dict[tuple, torch.Tensor] = {}

    def holds(self, found_SD: torch.Tensor, sigma: float, timestep: float, row: int) -> bool:
        """Whether these are its tokens; those without references bit for bit."""
        plain_SD = self._plain_CSD[row % len(self._plain_CSD)]
        if self._answer is None:
            return torch.equal(found_SD, plain_SD.to(found_SD))
        key = (sigma, timestep, row)
        if key not in self._known:
            self._known[key] = self._answer.at(plain_SD, sigma, timestep, self._kept_S, row)
        return same(found_SD, self._known[key])


def judge_text(calls: list[TextCall], entries: dict[int, list[TextEntry]], frames=None) -> Verdict:
    """Each row must hold the tokens of one of its group's entries.

    Args:
        calls: what a `TextSpy` saw.
        entries: of each group (0 positive, 1 negative).
        frames: for each call, the frame of each of its rows; None: row number.
    """
    verdict = Verdict(total=len(calls))
    for number, call in enumerate(calls):
        rows, right = call.context_BSD.shape[0] // len(call.groups), True
        for index, found_SD in enumerate(call.context_BSD):
            group, row = call.groups[index // rows], index % rows
            row = frames[number][row] if frames else row
            moment = (float(call.sigma_B[index % len(call.sigma_B)]), float(call.timestep_B[index]), row)
            met = next((entry for entry, one in enumerate(entries[group]) if one.holds(found_SD, *moment)), None)
            right &= met is not None
            verdict.met.update([(group, met)])
        verdict.right += right
        verdict.timesteps.append(float(call.timestep_B[0]))
    return verdict


def check_text(calls: list[TextCall], entries: dict[int, list[TextEntry]], frames=None) -> Verdict:
    """`judge_text`, and fail unless all calls are right and every entry was met."""
    verdict = judge_text(calls, entries, frames)
    wanted = {(group, entry) for group, of_group in entries.items() for entry in range(len(of_group))}
    assert verdict.total and verdict.right == verdict.total, f"{verdict.right} of {verdict.total} calls had the right tokens"
    assert set(verdict.met) == wanted, f"entries met: {sorted(verdict.met)}, wanted {sorted(wanted)}"
    return verdict


def wire_own(tiny, pack_import, family, model, positive=None, negative=None):
    """EMMA Connector without an ELLA, one reference: (MODEL, positive, negative), and the entries they must give."""
    module = tiny.token_module(family)
    assembly = tiny.assemble((module, tiny.reference(module)))
    positive, negative = positive or family.conditioning(4), negative or family.conditioning(8)
    connected = tiny.connecting.connect(model, None, positive, negative, assembly, None, None)
    answer = LiteralAnswer(assembly.references, model.get_model_object("model_sampling"), family.time,
                           pack_import("emma_core.files.module_file").module_tensors)
    return connected, {0: [TextEntry(text, answer) for text, _ in positive], 1: [TextEntry(text) for text, _ in negative]}
