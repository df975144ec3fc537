"""What Train EMMA Module tells on its node and in the console: before its first update what it needs, then how far it is."""

import logging

import comfy.model_management

from ..emma_core.errors import short
from ..emma_core.training.memory import needed, on_machine, resident_bytes
from ..emma_core.training.sizes import checkpoint_bytes
from ..emma_core.training.trainer import Trainer
from .messages import show_on_node


class NodeText:
    """Lines that stay on a node, and one below them that is always the newest; the console gets all of them.

    Args:
        node: its id; None: the console alone.
    """

    def __init__(self, node: str | None):
        self._node, self._lines = node, []

    def add(self, line: str, level: int = logging.INFO) -> None:
        """One that stays."""
        self._lines.append(line)
        self._show(line, level, self._lines)

    def now(self, line: str) -> None:
        """In place of the newest one."""
        self._show(line, logging.INFO, [*self._lines, line])

    def end(self, report: str) -> None:
        """In place of all."""
        self._show(report, logging.INFO, [report])

    def _show(self, told: str, level: int, lines: list[str]) -> None:
        logging.log(level, "Train EMMA Module: %s", told)
        show_on_node("\n".join(lines), self._node)


def foretell(trainer: Trainer, told: NodeText) -> None:
    """What the run will do and need; the time is told with the first update, which is its own trial."""
    train, config = trainer.config.train, trainer.config
    learning = sum(value.numel() for _, value in trainer.student.parameters())
    told.add(f"{train.steps} updates of {train.batch * train.accumulate} pictures, of {len(trainer.data)} there are")
    told.add(f"disk: {checkpoint_bytes(config, learning) / 1e9:.2f} GB of checkpoints in {trainer.folder.name}")
    told.add(*_memory(trainer))


def _memory(trainer: Trainer) -> tuple[str, int]:
    """In words, and how loud they are to be told."""
    device = trainer.accelerator.device
    try:
        found = needed(trainer, trainer.student.denoiser.dtype)
    except Exception as fault:  # of a network or a patch that looks into numbers, which are not there
        return f"memory: not known, as this MODEL computes with numbers alone ({short(str(fault), 100)})", logging.WARNING
    cpu = comfy.model_management.is_device_cpu(device)
    # the copies that train are in this process already
    wanted = found.in_process(resident_bytes() - found.begun) if cpu else found.on_card
    line, enough = on_machine(wanted, comfy.model_management.get_total_memory(device), "machine" if cpu else "card")
    return line, logging.INFO if enough else logging.WARNING
