"""What the loader of the text encoder offers."""

import torch

DTYPES = {"auto": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
EMPTY_PROMPT_LENGTHS = {"natural length": 1, "padded to 128": 128}  # in tokens
