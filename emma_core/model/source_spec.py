"""What a module acts on, as its metadata declare it: the tokens of an ELLA, or those that a checkpoint reads anyway."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModuleFileError, short
from .strength_keyframes import LAST_TIMESTEP

ELLA, TOKENS = "ella", "tokens"
_LARGEST_WIDTH = 1 << 20
# the last timestep of each way of counting time: DDPM's 0 to 999, and sigma x 1000 of flow models
LAST_OF_TIME = {"ddpm": LAST_TIMESTEP, "flow": 1000}


@dataclass(frozen=True)
class SourceSpec:
    """A checkpoint's own tokens as the stream that a module acts on.

    ``family`` names the models whose tokens they are ("sdxl"), ``width`` is the tokens'; ``unknown`` keeps keys of newer
    writers.
    """

    family: str
    width: int
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.family or not 1 <= self.width <= _LARGEST_WIDTH:
            raise ModuleFileError(f"the source is of family {self.family!r} and width {self.width}; wanted a name, and 1 to "
                                  f"{_LARGEST_WIDTH}. Correct the metadata.")

    def to_entry(self, inner: int) -> dict[str, Any]:
        """The source as a file's metadata names it; ``inner`` is the width inside the blocks."""
        return {**self.unknown, "kind": TOKENS, "width": self.width, "inner": inner, "family": self.family}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], inner: int) -> "SourceSpec | None":
        """The source that a file's metadata names; None for ELLA's tokens.

        Raises:
            ModuleFileError: a kind that is not known, or another inner width than the module's.
        """
        kind = entry["kind"]
        if kind == ELLA:
            return None
        if kind != TOKENS:
            raise ModuleFileError(f"its source is {kind!r}; this version of ComfyUI-EMMA knows {ELLA} and {TOKENS}. Update "
                                  "ComfyUI-EMMA.")
        if type(entry["width"]) is not int or type(entry["inner"]) is not int or not isinstance(entry["family"], str):
            raise TypeError("width and inner are whole numbers, family is text")
        if entry["inner"] != inner:
            raise ModuleFileError(f"its source has the inner width {entry['inner']}, its blocks {inner}. Correct the metadata.")
        unknown = {key: value for key, value in entry.items() if key not in ("kind", "width", "inner", "family")}
        return cls(entry["family"], entry["width"], unknown)


@dataclass(frozen=True)
class TimeSpec:
    """How a module's own time embedding counts: ``ddpm`` timesteps 0 to 999, or ``flow`` sigma x 1000."""

    kind: str

    def __post_init__(self):
        if self.kind not in LAST_OF_TIME:
            raise ModuleFileError(f"its time is {self.kind!r}; this version of ComfyUI-EMMA knows {', '.join(LAST_OF_TIME)}. "
                                  "Update ComfyUI-EMMA.")

    @property
    def last(self) -> int:
        """The timestep of pure noise."""
        return LAST_OF_TIME[self.kind]

    def to_entry(self) -> dict[str, Any]:
        """The time as a file's metadata names it."""
        return {"kind": self.kind, "last": self.last}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "TimeSpec":
        """The time that a file's metadata names.

        Raises:
            ModuleFileError: a kind that is not known, or a range that is not this kind's.
        """
        time = cls(short(entry["kind"]))
        if entry["last"] != time.last:
            raise ModuleFileError(f"its time is {time.kind} up to {entry['last']}; this version of ComfyUI-EMMA knows it up to "
                                  f"{time.last}. Update ComfyUI-EMMA.")
        return time
