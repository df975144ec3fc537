"""Puts the repository on sys.path, so that `lab` and `emma_core` are importable."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: on small tensors more threads are slower
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
