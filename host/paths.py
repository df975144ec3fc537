"""Where files lie in the host: folders are registered once and honour extra_model_paths.yaml."""

import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..emma_core.encoders.kinds import KINDS
from ..emma_core.errors import FileError
from ..emma_core.files.plain_file import WEIGHT_SUFFIXES, state_of
from ..emma_core.playground import PLAYGROUND_DIR

SAFETENSORS = frozenset({".safetensors", ".sft"})


@dataclass(frozen=True)
class ModelFolder:
    """A kind of model file: its folder keys in the host, and names that are known to work."""

    keys: tuple[str, ...]
    what: str
    known: str
    folder_marks: tuple[str, ...] = ()
    files_of_folders: bool = False
    suffixes: frozenset[str] = SAFETENSORS

    def names(self) -> list[str]:
        """What a combo shows: files below the folders, and folders that hold one of the marks.

        The files of such folders are shown only with ``files_of_folders``.
        """
        found = [name for key in self.keys for name in folder_paths.get_filename_list(key)
                 if os.path.splitext(name)[1].lower() in self.suffixes]
        if not self.files_of_folders:
            found = [name for name in found if not self._inside_marked(name)]
        return sorted({*found, *self._marked()}, key=str.lower)

    def path(self, name: str | None) -> str:
        """Absolute path of a name from `names`.

        Raises:
            FileError: naming every folder looked into and file names known to work.
        """
        for root in self.roots():
            path = os.path.normpath(os.path.join(root, name or ""))
            if name and os.path.exists(path) and Path(path).is_relative_to(os.path.normpath(root)):
                return path
        raise FileError(
            f"{name or 'no file'} was not found for {self.what}; looked into {', '.join(self.roots())}. Put {self.known} "
            "into one of these folders, then press R in the editor to refresh the lists."
        )

    def state(self, name: str | None) -> str:
        """What changes when the file or folder of this name is replaced, for `fingerprint_inputs`; loading it tells faults."""
        try:
            return state_of(self.path(name))
        except FileError:
            return "missing"

    def roots(self) -> list[str]:
        """Every folder that is looked into, without repeats."""
        return list(dict.fromkeys(root for key in self.keys for root in folder_paths.get_folder_paths(key)))

    def _marked(self) -> list[str]:
        found: list[str] = []
        for root in self.roots() if self.folder_marks else ():
            for folder, subfolders, files in os.walk(root, followlinks=True):
                if folder != root and not set(self.folder_marks).isdisjoint(files):
                    found.append(os.path.relpath(folder, root))
                    subfolders.clear()
        return found

    def _inside_marked(self, name: str) -> bool:
        folder = os.path.dirname(name)
        return bool(folder) and any(os.path.exists(os.path.join(root, folder, mark))
                                    for root in self.roots() for mark in self.folder_marks)


ELLA = ModelFolder(("ella",), "the ELLA connector", "ella-sd1.5-tsc-t5xl.safetensors")
MODULE = ModelFolder(("emma",), "the EMMA module", "an EMMA module (.safetensors with `emma` metadata)")
TEXT_ENCODER = ModelFolder(
    ("text_encoders", "ella_encoder"), "the ELLA text encoder",
    "the flan-t5-xl encoder (a single .safetensors file, or the Hugging Face folder with its config.json)",
    folder_marks=("config.json",),
)
REFERENCE_ENCODER = ModelFolder(
    tuple(kind.folder for kind in KINDS if kind.folder), "the reference encoder",
    "the encoder that the EMMA module names (CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors for the released conditions, "
    "adaface_ir101_webface12m.ckpt for faces, or the file of an open_clip model)",
    folder_marks=("config.json", *(kind.declared_by for kind in KINDS if kind.declared_by)), files_of_folders=True,
    suffixes=WEIGHT_SUFFIXES,
)
IP_ADAPTER = ModelFolder(("ipadapter",), "the IP-Adapter",
                         "ip-adapter_sd15.safetensors or ip-adapter-plus_sdxl_vit-h.safetensors")
REFERENCE = ModelFolder(("emma_references",), "the encoded reference", "a file that Save Reference wrote")
_OWN_FOLDERS = {"ella": SAFETENSORS, "emma": SAFETENSORS, "ella_encoder": SAFETENSORS, "emma_references": SAFETENSORS,
                "ipadapter": SAFETENSORS, "open_clip": WEIGHT_SUFFIXES, "adaface": WEIGHT_SUFFIXES}


def playground_state() -> str:
    """As `ModelFolder.state`, of the shipped files."""
    return state_of(PLAYGROUND_DIR)


def register_folders() -> None:
    """Add the pack's own folders below ``models``; paths from the user's yaml stay first."""
    for key, suffixes in _OWN_FOLDERS.items():
        folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))
        roots, extensions = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = (roots, set(extensions) | set(suffixes))
