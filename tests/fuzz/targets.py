"""Every reader of strangers' files: a small valid file for it, and how it is read and used."""

import data_files  # noqa: F401
import judged_files  # noqa: F401
import weight_files  # noqa: F401
from target import TARGETS

__all__ = ["TARGETS"]
