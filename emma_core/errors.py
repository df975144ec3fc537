"""The exceptions a user can meet. Each message says what was found, what was wanted and what to do next."""

import re
import reprlib

_LONGEST_LINE = 2000  # of a message
_LONGEST_NAME = 120  # of what a file calls something
# what moves a terminal's cursor or turns its text around, and halves of surrogate pairs, which no terminal can write
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Text that may hold words of a stranger's file, safe to show: control characters escaped, long lines cut in the middle."""
    escaped = _escaped(str(text))
    if len(escaped) <= _LONGEST_LINE:
        return escaped
    return "\n".join(_cut(line, _LONGEST_LINE) for line in escaped.split("\n"))


def short(found: object, most: int = _LONGEST_NAME) -> str:
    """A name or a value of a file on one line, cut in the middle; what is no text as Python writes it."""
    text = found if isinstance(found, str) else reprlib.repr(found)
    return _cut(_escaped(text).replace("\n", "\\n").replace("\t", "\\t"), most)


def quoted(found: object) -> str:
    """A value of a file as Python writes it, of a text its quotes too, cut to a few words."""
    return _escaped(reprlib.repr(found))


def _escaped(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _cut(line: str, most: int) -> str:
    if len(line) <= most:
        return line
    begin, end = line[:most * 2 // 3], line[len(line) - most // 6:]
    return f"{begin} ... ({len(line) - len(begin) - len(end)} more characters) ... {end}"


class EmmaError(Exception):
    """Base of every error this project raises on purpose. Its message is fit to be shown, whatever file it quotes."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__module__ = "emma_core"  # ComfyUI shows it before the name; it loads packs under the path of their folder


class FileError(EmmaError):
    """A file is missing, damaged, of the wrong kind, or holds unusable numbers."""


class WriteError(FileError):
    """A file or a folder cannot be written; ``reason`` says why, ``remedy`` what to do, ``full`` that room would help."""

    def __init__(self, what: str, reason: str, remedy: str, full: bool = False):
        super().__init__(f"{what} cannot be written: {reason}. {remedy}.")
        self.reason, self.remedy, self.full = reason, remedy, full


class ConnectorFileError(FileError):
    """A file that should hold an ELLA connector does not."""


class ModuleFileError(FileError):
    """A file that should hold an EMMA module does not, or holds one that this version cannot read."""


class TextEncoderFileError(FileError):
    """A file or folder that should hold a T5 text encoder does not."""


class EncoderFileError(FileError):
    """A file that should hold a reference encoder does not."""


class ReferenceFileError(FileError):
    """A file that should hold encoded reference features does not."""


class ScoringFileError(FileError):
    """A file that should hold a scoring model does not."""


class ReferenceMismatchError(EmmaError):
    """Reference features do not belong to the module, the encoder or the batch they are used with."""


class ConnectorMismatchError(EmmaError):
    """A connector, a module, a text encoding or a diffusion model do not fit together."""


class ImageInputError(EmmaError):
    """A picture or a mask cannot be used as it is."""


class TextInputError(EmmaError):
    """A text that was typed into a node cannot be read."""


class UnconnectedModelError(EmmaError):
    """EMMA conditioning reached a MODEL that was not connected through EMMA Connector."""


class SettingsError(EmmaError):
    """Settings of a command name something unknown, or hold a value that cannot be used."""


class TrainingConfigError(SettingsError):
    """Settings of a training run do not go together, or not with its files."""


class TrainingDataError(EmmaError):
    """Pictures, captions or references of a training set cannot be used; every problem is listed."""


class TrainingError(EmmaError):
    """Training cannot go on: a non-finite loss, a checkpoint of another run, a full disk."""


class EvaluationError(EmmaError):
    """An evaluation cannot be done as it is configured: its references, prompts, rows, or scoring models."""


class EmmaWarning(UserWarning):
    """Something works, but probably not as the user expects."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))
