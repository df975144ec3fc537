"""Where files lie in the host: folders are registered once and honour extra_model_paths.yaml."""

import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..emma_core.errors import FileError

SAFETENSORS = {".safetensors", ".sft"}


@dataclass(frozen=True)
class ModelFolder:
    """A kind of model file: its folder keys in the host, and names that are known to work."""

    keys: tuple[str, ...]
    what: str
    known: str
    folders_too: bool = False

    def names(self) -> list[str]:
        """What a combo shows: files below the folders and, where allowed, HF folders (holding a config.json)."""
        found = [name for key in self.keys for name in folder_paths.get_filename_list(key)
                 if os.path.splitext(name)[1].lower() in SAFETENSORS]
        if self.folders_too:
            found = [name for name in found if not self._inside_hf_folder(name)] + self._hf_folders()
        return sorted(set(found), key=str.lower)

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

    def roots(self) -> list[str]:
        """Every folder that is looked into, without repeats."""
        return list(dict.fromkeys(root for key in self.keys for root in folder_paths.get_folder_paths(key)))

    def _hf_folders(self) -> list[str]:
        found = []
        for root in self.roots():
            for folder, subfolders, files in os.walk(root, followlinks=True):
                if folder != root and "config.json" in files:
                    found.append(os.path.relpath(folder, root))
                    subfolders.clear()
        return found

    def _inside_hf_folder(self, name: str) -> bool:
        folder = os.path.dirname(name)
        return bool(folder) and any(os.path.exists(os.path.join(root, folder, "config.json")) for root in self.roots())


ELLA = ModelFolder(("ella",), "the ELLA connector", "ella-sd1.5-tsc-t5xl.safetensors")
MODULE = ModelFolder(("emma",), "the EMMA module", "an EMMA module (.safetensors with `emma` metadata)")
TEXT_ENCODER = ModelFolder(
    ("text_encoders", "ella_encoder"), "the ELLA text encoder",
    "the flan-t5-xl encoder (a single .safetensors file, or the Hugging Face folder with its config.json)",
    folders_too=True,
)
REFERENCE_ENCODER = ModelFolder(
    ("clip_vision",), "the reference encoder", "a reference encoder in safetensors format"
)


def register_folders() -> None:
    """Add ``models/ella``, ``models/emma`` and ``models/ella_encoder``; paths from the user's yaml stay first."""
    for key in ("ella", "emma", "ella_encoder"):
        folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))
        roots, extensions = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = (roots, set(extensions) | SAFETENSORS)
