"""Evaluation of EMMA modules as the paper does it: prompts x reference pictures, scored by CLIP and DINO from local files."""
