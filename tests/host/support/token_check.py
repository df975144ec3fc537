"""Compares what enters a UNet's cross-attention with the connector's answer at the timestep the UNet saw.

Shapes: B rows of one UNet call, S context tokens, W token width.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import comfy.samplers
import pytest
import torch

TOLERANCE = 1e-4
_COUNTS = pytest.StashKey[dict]()


@dataclass(frozen=True)
class Call:
    """One call of a UNet (or ControlNet): `groups` names the conditioning of each equal part of the rows."""

    timestep_B: torch.Tensor
    groups: tuple[int, ...]
    context_BSW: torch.Tensor


class CallSpy:
    """Records the calls of a diffusion model while the context is open, at the input of its first attn2.to_k."""

    listening = True  # of all spies: what a test evaluates for itself is none of their business

    def __init__(self, network: torch.nn.Module):
        self._network = network
        self._to_k = next(layer for name, layer in network.named_modules() if name.endswith("attn2.to_k"))
        self._handles = []
        self._entered: tuple[torch.Tensor, tuple[int, ...]]
        self.calls: list[Call] = []

    def __enter__(self) -> CallSpy:
        self._handles = [self._network.register_forward_pre_hook(self._at_network, with_kwargs=True),
                         self._to_k.register_forward_pre_hook(self._at_to_k)]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _at_network(self, _, arguments, options):
        timestep_B = options["timesteps"] if "timesteps" in options else arguments[1]
        groups = options.get("transformer_options", {}).get("cond_or_uncond", (0,))
        self._entered = (timestep_B.clone(), tuple(groups))

    def _at_to_k(self, _, arguments):
        timestep_B, groups = self._entered
        if not CallSpy.listening:
            return
        self.calls.append(Call(timestep_B, groups, arguments[0].clone()))


class Answer:
    """What one conditioning entry should give: the connector's tokens, then what was appended to them."""

    def __init__(self, connector, text, references=None, appended=None):
        self._connector, self._text_FND, self._references, self._appended = connector, text, references, appended
        self._known = {}

    def followed_by(self, appended_1SW: torch.Tensor) -> Answer:
        """The same entry with more tokens behind."""
        assert self._appended is None
        return Answer(self._connector, self._text_FND, self._references, appended_1SW)

    def at(self, timestep: float, row: int = 0) -> torch.Tensor:
        """(S, W) for a row (frame) at a timestep."""
        if timestep not in self._known:
            with torch.inference_mode():
                tokens_BKW = self._connector.tokens(self._text_FND, torch.tensor([timestep]), self._references)
            if self._appended is not None:
                rows = max(len(tokens_BKW), len(self._appended))
                parts = (tokens_BKW.expand(rows, -1, -1), self._appended.expand(rows, -1, -1))
                tokens_BKW = torch.cat(parts, dim=1)
            self._known[timestep] = tokens_BKW
        tokens_BSW = self._known[timestep]
        return tokens_BSW[row if tokens_BSW.shape[0] > 1 else 0]


class Constant:
    """An entry that is not EMMA's: the same at every timestep."""

    def __init__(self, context_1SW: torch.Tensor):
        self._context_SW = context_1SW[0]

    def at(self, timestep: float, row: int = 0) -> torch.Tensor:
        return self._context_SW


@dataclass
class Verdict:
    """How many calls had the right context, and which (group, entry) answers were met."""

    right: int = 0
    total: int = 0
    met: Counter = field(default_factory=Counter)
    timesteps: list[float] = field(default_factory=list)


def judge(calls: list[Call], answers: dict[int, list], frames=None) -> Verdict:
    """Compare calls with the entries of each group; a row is right if it equals one of its group's entries.

    Args:
        calls: what a `CallSpy` saw.
        answers: group (0 positive, 1 negative, ...) -> its `Answer`s.
        frames: for each call, the frame of each of its rows; None: row number.
    """
    verdict = Verdict(total=len(calls))
    for number, call in enumerate(calls):
        rows = call.timestep_B.shape[0] // len(call.groups)
        found = []
        for index, (timestep, context_SW) in enumerate(zip(call.timestep_B.tolist(), call.context_BSW, strict=True)):
            group, row = call.groups[index // rows], index % rows
            frame = frames[number][row] if frames else row
            found.append(next(((group, entry) for entry, answer in enumerate(answers[group])
                               if same(context_SW, answer.at(timestep, frame))), None))
        verdict.right += None not in found
        verdict.met.update(found)
        verdict.timesteps.append(call.timestep_B[0].item())
    return verdict


def same(found_SW: torch.Tensor, wanted_SW: torch.Tensor) -> bool:
    """Equal shapes, and equal to TOLERANCE of the largest value."""
    if found_SW.shape != wanted_SW.shape:
        return False
    return bool((found_SW - wanted_SW).abs().max() <= TOLERANCE * wanted_SW.abs().max())


def check(calls: list[Call], answers: dict[int, list], frames=None) -> Verdict:
    """`judge`, and fail unless all calls are right and every entry was met."""
    verdict = judge(calls, answers, frames)
    wanted = {(group, entry) for group, entries in answers.items() for entry in range(len(entries))}
    assert verdict.total and verdict.right == verdict.total, f"{verdict.right} of {verdict.total} calls had the right tokens"
    assert set(verdict.met) == wanted, f"entries met: {sorted(verdict.met)}, wanted {sorted(wanted)}"
    return verdict


@pytest.fixture
def spy(model):
    """The calls of the UNet of this file's MODEL."""
    with CallSpy(model.model.diffusion_model) as spy:
        yield spy


def added_up(calc_cond_batch, model, conds, *rest) -> list[torch.Tensor]:
    """e = e_T + sum_m (e_Tm - e_T), each e an ordinary evaluation of all lists, in which one entry has one more reference."""
    payloads = [entry["model_conds"]["emma"].cond for entries in conds for entry in entries or ()
                if "emma" in entry["model_conds"]]

    def evaluate(**chosen):
        def swapped(entry):
            carrier = entry["model_conds"].get("emma")
            if carrier is None or not hasattr(carrier.cond, "alone"):
                return entry
            alone = carrier.cond.alone[chosen["number"] if carrier.cond is chosen.get("payload") else 0]
            return {**entry, "model_conds": {**entry["model_conds"], "emma": type(carrier)(alone)}}

        return calc_cond_batch(model, [entries and [swapped(entry) for entry in entries] for entries in conds], *rest)

    base = evaluate()
    total = list(base)
    for payload in dict.fromkeys(payloads):
        for number in range(1, len(getattr(payload, "alone", [None]))):
            for index, predicted in enumerate(evaluate(payload=payload, number=number)):
                total[index] = total[index] + predicted - base[index]
    return total


@pytest.fixture
def added_literally(monkeypatch):
    """Whatever is sampled: every answer of the host's evaluation is compared with `added_up`."""
    calc_cond_batch = comfy.samplers.calc_cond_batch

    def checked(model, conds, *rest):
        found = calc_cond_batch(model, conds, *rest)
        CallSpy.listening = False
        try:
            wanted = added_up(calc_cond_batch, model, conds, *rest)
        finally:
            CallSpy.listening = True
        for one, other in zip(found, wanted, strict=True):
            assert same(one.flatten(1), other.flatten(1)), "the predictions do not add up"
        return found

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", checked)


@pytest.fixture
def count_timesteps(request):
    """`count_timesteps(family, verdict)`: adds to the table at the end of the run."""
    counts = request.config.stash.setdefault(_COUNTS, {})

    def add(family: str, verdict: Verdict) -> None:
        right, total = counts.get(family, (0, 0))
        counts[family] = (right + verdict.right, total + verdict.total)

    return add


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash.get(_COUNTS, {})
    if not counts:
        return
    terminalreporter.section("timestep right / all model evaluations")
    for family, (right, total) in counts.items():
        terminalreporter.write_line(f"{family:24} {right}/{total}")
    right, total = (sum(column) for column in zip(*counts.values(), strict=True))
    terminalreporter.write_line(f"timestep right {right}/{total}")
