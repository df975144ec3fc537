"""The conditions there are: what a module takes from a reference, and what it reads for it."""

from collections.abc import Mapping
from dataclasses import dataclass

CUSTOM = "custom"  # of a module that says for itself what it reads


@dataclass(frozen=True)
class Condition:
    """What every module of one condition has in common.

    Args:
        features: feature name -> tokens per vector.
        is_subject: the reference says what is drawn, not how.
    """

    features: Mapping[str, int]
    is_subject: bool = False


# paper, section 3; style as in IP-Adapter (arXiv 2308.06721, section 3.2.1)
CONDITIONS = {
    "style": Condition({"global": 4}),
    "object": Condition({"global": 1, "local": 1}, is_subject=True),
    "portrait": Condition({"global": 1, "local": 1}, is_subject=True),
    "face": Condition({"face": 4}),
}
