"""Encoders that turn reference pictures into the features EMMA modules read."""
