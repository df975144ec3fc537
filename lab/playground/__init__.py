"""The first world: how it was trained and judged, and what the second takes of it."""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
