"""What a sitting left on the disk, told from the files that are there."""

from __future__ import annotations

from pathlib import Path

from ..files.plain_file import is_file
from .checkpoints import checkpoints
from .config import TrainConfig


class Sitting:
    """The files of a run's folder, from the beginning of a sitting on."""

    def __init__(self, config: TrainConfig):
        self._folder, self._result = Path(config.output.folder), f"{config.output.name}.safetensors"
        self._before = self._stamps()

    def ended_early(self) -> str:
        """What can be gone on from, in words: only files that are there now count as saved."""
        now = self._stamps()
        new = [path.name for path, stamp in now.items() if self._before.get(path) != stamp]
        found = [path.name for path in checkpoints(self._folder)]
        if not new:
            kept = f"the run goes on from {found[-1]}, of an earlier sitting" if found else "there is nothing else"
            return (f"stopped; no module and no checkpoint was saved in this sitting, and what was encoded is kept: {kept}. "
                    "Start again with the same folder.")
        kept = f"the run goes on from {found[-1]}" if found else "the run begins anew"
        return f"stopped; {', '.join(new)} saved in {self._folder}. Start again with the same folder: {kept}."

    def _stamps(self) -> dict[Path, tuple[int, int]]:
        paths = [*checkpoints(self._folder)[-1:], self._folder / self._result]
        return {path: (found.st_ino, found.st_mtime_ns) for path in paths if is_file(path) and (found := path.stat())}
