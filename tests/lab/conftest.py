"""Puts the repository on sys.path, so that `lab` and `emma_core` are importable."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: on small tensors more threads are slower
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="session")
def miniature_packages(tmp_path_factory) -> Path:
    """A node_modules folder of a few emoji."""
    from miniature_packages import write_packages

    return write_packages(tmp_path_factory.mktemp("node_modules"))


@pytest.fixture(scope="session")
def miniature_data(miniature_packages, tmp_path_factory) -> Path:
    """The second world's data set made of them."""
    from lab.miniature.dataset import build

    out = tmp_path_factory.mktemp("data")
    build(miniature_packages, out)
    return out
