"""What stands behind `python -m emma_core`."""
