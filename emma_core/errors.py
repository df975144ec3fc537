"""The exceptions a user can meet. Each message says what was found, what was wanted and what to do next."""


class EmmaError(Exception):
    """Base of every error this project raises on purpose."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__module__ = "emma_core"  # ComfyUI shows it before the name; it loads packs under the path of their folder


class FileError(EmmaError):
    """A file is missing, damaged, of the wrong kind, or holds unusable numbers."""


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


class EmmaWarning(UserWarning):
    """Something works, but probably not as the user expects."""
