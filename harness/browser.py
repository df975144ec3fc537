"""Finds a Chromium and makes the environment that drives it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .environment import BASE_VENV, ROOT, STAMP_NAME, InstallStep, SetupError, ensure_base_environment, ensure_environment
from .hosts import HOST_VENVS, create_overlay

BROWSER_VENV = HOST_VENVS / "browser"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> Path | None:
    """CHROMIUM_PATH, else the first Chromium on PATH, else None.

    Raises SetupError if CHROMIUM_PATH is no file.
    """
    chosen = os.environ.get("CHROMIUM_PATH")
    if chosen:
        if not Path(chosen).is_file():
            raise SetupError(f"CHROMIUM_PATH is {chosen}, which is no file: set it to Chromium's program, or unset it.")
        return Path(chosen)
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    return Path(found) if found else None


def ensure_browser_environment() -> Path:
    """Make or update the environment of the browser tests, over `.venv`; returns its interpreter."""
    base_python = ensure_base_environment()
    steps = [InstallStep("what drives a browser", ("-r", str(ROOT / "requirements" / "browser.txt")))]
    base_stamp = (BASE_VENV / STAMP_NAME).read_text(encoding="utf-8")
    return ensure_environment(
        BROWSER_VENV, steps, create=lambda: create_overlay(base_python, BROWSER_VENV), depends_on=[base_stamp]
    )
