"""Which checkpoints, ELLAs and modules go together, told by headers before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import SettingsError
from ..files.module_file import read_module_config
from ..model.module_config import ModuleConfig
from ..playground import PLAYGROUND
from .config import BaseConfig, EllaConfig, spec_of, uses_ella
from .own_text import check_has_own_text
from .spec import BaseSpec


def check_pairing(base: BaseConfig, ella: EllaConfig, modules: Iterable[str] = ()) -> None:
    """Refuse an ELLA on a base that reads more than tokens, a base without text encoders, modules of another kind.

    Args:
        base, ella: what settings name; a base that is not there is told by `check_files`.
        modules: files of modules.
    Raises:
        SettingsError: what was found, and what goes with it.
        FileError: files that are no checkpoint or no module.
    """
    if base.checkpoint != PLAYGROUND and not Path(base.checkpoint).exists():
        return
    spec, on_ella = spec_of(base), uses_ella(base, ella)
    if on_ella and spec.pooled_width:
        raise SettingsError(f"base.checkpoint is of the family {spec.family}, which reads a pooled text vector that no ELLA "
                            "gives. Leave ella.file and ella.text_encoder out: its own text encoders are used.")
    if not on_ella:
        check_has_own_text(Path(base.checkpoint), spec)
    for file in modules:
        check_module(read_module_config(file), Path(file).name, spec, on_ella)


def check_module(module: ModuleConfig, name: str, spec: BaseSpec, on_ella: bool) -> None:
    """Refuse a module that acts on other tokens than there are.

    Raises:
        SettingsError: which tokens it acts on, and which there are.
    """
    if module.source is None and not on_ella:
        raise SettingsError(f"{name} was made for an ELLA, and ella.file is not set. Name its ELLA and text encoder as "
                            f"ella.file and ella.text_encoder, or choose a module for the own tokens of {spec.family}.")
    if module.source is None:
        return
    source = module.source
    if on_ella:
        raise SettingsError(f"{name} acts on the own tokens of {source.family} (width {source.width}), and there is an ELLA. "
                            "Leave ella.file and ella.text_encoder out and name such a checkpoint, or choose a module made for "
                            "this ELLA.")
    if (source.family, source.width, module.time.kind) != (spec.family, spec.context_width, spec.own_tokens.time.kind):
        raise SettingsError(f"{name} acts on the tokens of {source.family} (width {source.width}, {module.time.kind} time); "
                            f"base.checkpoint is {spec.family} (width {spec.context_width}). Choose a module made for "
                            f"{spec.family}, or a checkpoint of {source.family}.")
