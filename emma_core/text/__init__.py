"""Prompts to features: the T5 encoder in every layout that its files come in."""
