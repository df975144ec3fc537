"""Other node packs in this process, as the host loads them, for as long as a test module needs them.

They are looked for in the folders of COMFYUI_PEERS, the host's custom_nodes and ~/peers; nothing is fetched.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from emma_harness.hosts import peer_roots

PACK = Path(os.path.abspath(__file__)).parents[3]


def peer_folder(name: str, host_path: Path) -> Path:
    """Where this pack lies; skips the test if it is nowhere."""
    roots = peer_roots(host_path)
    found = next((root / name for root in roots if (root / name / "__init__.py").is_file()), None)
    if found is None:
        pytest.skip(f"{name} is in none of {', '.join(map(str, roots))}; name its parent folder in COMFYUI_PEERS")
    return found


@contextmanager
def loaded(host_nodes, host_path: Path, *names: str) -> Iterator[list[types.ModuleType]]:
    """The packs of these names, loaded one after the other; afterwards the host is as it was.

    Skips the test where a pack is missing, or where this host cannot import it (with the host's reason).
    """
    folders = [peer_folder(name, host_path) for name in names]
    with unchanged_host(host_nodes):
        yield [load_pack(host_nodes, folder) for folder in folders]


def load_pack(host_nodes, folder: Path) -> types.ModuleType:
    """The root module of a pack, its nodes registered."""
    reasons = _Warnings()
    logging.getLogger().addHandler(reasons)
    try:
        done = asyncio.run(host_nodes.load_custom_node(str(folder), ignore=set(host_nodes.NODE_CLASS_MAPPINGS)))
    finally:
        logging.getLogger().removeHandler(reasons)
    if not done:
        pytest.skip(f"this host cannot import {folder.name}: {reasons.last}")
    return sys.modules[str(folder).replace(".", "_x_")]


def load_our_pack_again(host_nodes, folder: Path):
    """`pack_import` of a second copy of our pack, loaded now: after what was loaded before."""
    link = folder / "ComfyUI-EMMA"
    link.symlink_to(PACK, target_is_directory=True)
    name = load_pack(host_nodes, link).__name__
    return lambda module: importlib.import_module(f"{name}.{module}")


@contextmanager
def unchanged_host(host_nodes) -> Iterator[None]:
    """Puts back what packs exchange in the host's modules and classes, and its lists of nodes and folders."""
    import folder_paths

    modules = [module for name, module in sys.modules.items()
               if isinstance(module, types.ModuleType) and name.partition(".")[0] in ("comfy", "nodes", "folder_paths")]
    owners = dict.fromkeys([*modules, *(value for module in modules for value in vars(module).values()
                                        if isinstance(value, type) and value.__module__.partition(".")[0] == "comfy")])
    attributes = {owner: dict(vars(owner)) for owner in owners}
    registries = [host_nodes.NODE_CLASS_MAPPINGS, host_nodes.NODE_DISPLAY_NAME_MAPPINGS, host_nodes.EXTENSION_WEB_DIRS,
                  host_nodes.LOADED_MODULE_DIRS, folder_paths.folder_names_and_paths]
    contents = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for owner, before in attributes.items():
            for name in [name for name in vars(owner) if name not in before]:
                delattr(owner, name)
            for name, value in before.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
        for registry, before in zip(registries, contents, strict=True):
            registry.clear()
            registry.update(before)


class _Warnings(logging.Handler):
    """The last line of warning."""

    last = "no reason given"

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.last = record.getMessage().strip().splitlines()[-1]
