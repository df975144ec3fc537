"""Teachers that are LoRAs on the base: one for all, or one for each group of references.

Shapes: B rows, G rows of one LoRA, K cross-attention tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..base.backbones import Backbone
from ..base.denoiser import NO_EXTRA
from ..base.lora import LoraSwitch
from ..errors import TrainingConfigError
from ..files.plain_file import is_folder, visible
from .config import TeacherConfig
from .draws import BatchRow
from .prepared import Prepared
from .student import TeacherTarget
from .teacher import Teacher, TeacherKind, TeacherText, numbers_beside, told_of_rows


class LoraTeacher(Teacher):
    """The base with a LoRA at a strength, on the base's own weights; of several, each row is told which one is its teacher.

    Args:
        backbone: the base.
        paths: one LoRA, or one for each group of references by the group's name; their order numbers them.
        scale: strength.
        text_is_used: what LoRAs do to text encoders has its effect in the texts that `target_on` is given.
    """

    def __init__(self, backbone: Backbone, paths: Mapping[str, Path], scale: float, text_is_used: bool = False):
        self._base, self._backbone, self.groups = backbone, backbone.twin(), tuple(paths)
        self._loras = LoraSwitch(self._backbone.unet, list(paths.values()), scale, text_is_used)
        self.to(backbone.device, backbone.dtype)

    @torch.no_grad()
    def predict(self, noised_B4hw, timestep_B, context_BKW, reference=None, beside=NO_EXTRA) -> torch.Tensor:
        """As `Teacher.predict`; with several LoRAs ``reference`` holds ``lora_B``, the number of each row's."""
        if len(self.groups) == 1:
            return self._backbone.predict_noise(noised_B4hw, timestep_B, context_BKW, beside)
        lora_B = reference["lora_B"].to(noised_B4hw.device)
        target_B4hw = torch.empty_like(noised_B4hw, dtype=torch.float32)
        for number in lora_B.unique().tolist():
            rows_G = (lora_B == number).nonzero()[:, 0]
            self._loras.use(number)
            target_B4hw[rows_G] = self._backbone.predict_noise(
                noised_B4hw[rows_G], timestep_B.to(rows_G.device)[rows_G], context_BKW[rows_G],
                {name: value[rows_G] for name, value in beside.items()})
        return target_B4hw

    def target_on(self, data: Prepared, texts: Sequence[TeacherText] = ()) -> TeacherTarget:
        """As `Teacher.target_on`; of several LoRAs that of the reference's group teaches a row.

        Raises:
            TrainingConfigError: a group of references without its LoRA.
        """
        lora_of = self._loras_of_references(data)

        def predict(noised_B4hw, timestep_B, context_BKW, rows: Sequence[BatchRow]) -> torch.Tensor:
            numbers = [lora_of.get(row.reference, 0) for row in rows]
            own = [texts[number] for number in numbers] if texts else ()
            context_BKW, beside = told_of_rows(own, rows, context_BKW)
            return self.predict(noised_B4hw, timestep_B, context_BKW, {"lora_B": torch.tensor(numbers)}, beside)

        return TeacherTarget("LoRA", predict, self.bytes_beside)

    def bytes_beside(self, dtype: torch.dtype) -> int:
        """The matrices of all its LoRAs."""
        return numbers_beside(self._backbone, self._base) * dtype.itemsize

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        self._backbone.to(device, dtype)
        return self

    def _loras_of_references(self, data: Prepared) -> dict[int, int]:
        """Reference -> number of its group's LoRA; empty where one LoRA teaches all."""
        if len(self.groups) == 1:
            return {}
        group_of: dict[int, str] = {}
        for example, own, given in zip(data.examples, data.pictures.own, data.pictures.given, strict=True):
            for reference in (own, *given):
                group_of.setdefault(reference, example.group or "")
        lacking = sorted({group_of[reference] for reference in data.variant_keys} - set(self.groups))
        if lacking:
            raise TrainingConfigError(f"teacher.lora has LoRAs for the groups {', '.join(self.groups)}, and none for "
                                      f"{', '.join(lacking)}; wanted <group>.safetensors for each group of references. Add "
                                      "them or leave these pictures out.")
        return {reference: self.groups.index(group_of[reference]) for reference in data.variant_keys}


def lora_files(path: Path) -> dict[str, Path]:
    """A LoRA under the name ""; of a folder, each `<group>.safetensors` under its group.

    Raises:
        TrainingConfigError: a folder without such files.
    """
    if not is_folder(path):
        return {"": path}
    files = {file.stem: file for file in visible(path.glob("*.safetensors"))}
    if not files:
        raise TrainingConfigError(f"teacher.lora = {str(path)!r} is a folder without .safetensors files; wanted a LoRA for "
                                  "each group of references, <group>.safetensors. Put them there, or name one file.")
    return files


def _check(config: TeacherConfig) -> None:
    for path in lora_files(Path(config.lora)).values():
        if not path.is_file():
            raise TrainingConfigError(f"teacher.lora = {str(path)!r} does not exist. Check the path.")


def _load(config: TeacherConfig, backbone: Backbone, text_is_used: bool) -> Teacher:
    return LoraTeacher(backbone, lora_files(Path(config.lora)), config.scale, text_is_used)


KIND = TeacherKind("lora", _check, _load)
