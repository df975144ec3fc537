"""Set-up, test runs and the ComfyUI server behind `run.py` and the host tests. Standard library only.

No part of the node pack: neither `__init__.py` nor `emma_core` imports it.
"""
