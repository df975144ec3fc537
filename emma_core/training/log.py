"""What a run tells of itself in a file, in JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..files.json_file import JsonFault, loads
from ..files.plain_file import check_plain_file
from ..files.writing import explained


class Log:
    """One JSON line for each report, appended; a resumed run goes on in the same file."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **values: Any) -> None:
        """Append a line.

        Raises:
            WriteError: the file cannot be written.
        """
        with explained(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines that are whole.

        Raises:
            TrainingError: a folder, a pipe or a device stands in its place.
        """
        if not self.path.exists():
            return []
        check_plain_file(self.path, "the log of a training run", TrainingError)
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = loads(line)
            except JsonFault:  # the end of a run that was killed while it wrote
                continue
            found += [entry] if isinstance(entry, dict) else []
        return found
