"""Files that are not what a loader wants, each with what its refusal must say."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CHECKPOINT = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
              "first_stage_model.encoder.conv_in.weight": torch.zeros(4, 3, 3, 3)}

# Every loader must refuse these; ``name`` is the file's.
NOT_SAFETENSORS = [
    pytest.param(lambda path, whole: None, "does not exist", id="missing"),
    pytest.param(lambda path, whole: path.mkdir(), "is a folder", id="folder"),
    pytest.param(lambda path, whole: path.write_bytes(b""), "{name} holds only 0 bytes", id="empty"),
    pytest.param(lambda path, whole: path.write_bytes(whole[:5]), "{name} holds only 5 bytes", id="a few bytes"),
    pytest.param(lambda path, whole: path.write_bytes(whole[:100]), "{name} is truncated: 100 bytes, its header",
                 id="truncated header"),
    pytest.param(lambda path, whole: path.write_bytes(whole[:-100]), "{name} is truncated or damaged",
                 id="truncated weights"),
    pytest.param(lambda path, whole: path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>"),
                 "{name} is not a safetensors file .*<!DOCTYP", id="web page"),
    pytest.param(lambda path, whole: torch.save({"a": torch.zeros(3)}, path), "{name} is a pickled PyTorch file",
                 id="pickle"),
    pytest.param(lambda path, whole: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False),
                 "{name} is a pickled PyTorch file", id="old pickle"),
]


def rewrite(source: Path, target: Path, change, metadata) -> Path:
    """The tensors of ``source``, changed in place by ``change``, as the file ``target``."""
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target, metadata=metadata)
    return target
