"""How the shipped playground was trained and is judged."""
