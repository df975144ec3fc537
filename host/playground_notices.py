"""What the playground says in the log, once each: text past EMMA Connector, sizes and words that it never learnt."""

import logging

import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd

from ..emma_core.base.spec import PLAYGROUND_SPEC
from ..emma_core.playground.words import known_words, size_notice
from .payload import KEY

WRAPPER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
_NAME = "emma_playground"
_PAST_CONNECTOR = (
    "EMMA playground: a prompt goes into the sampler past EMMA Connector. This small model learnt to read ELLA's tokens and "
    "nothing else: the picture will not follow the text. Wire positive and negative through EMMA Connector."
)


def with_notices(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """The MODEL, which looks at what it is given when a sampling begins; its clones share what was told."""
    told: set[str] = set()

    def look(executor, noise, *sampling, **further):
        """OUTER_SAMPLE wrapper; hosts hand on different arguments behind the noise (B, 4, h, w)."""
        for notice in notices(noise.shape, executor.class_obj.conds):
            if notice not in told:
                told.add(notice)
                logging.warning(notice)
        return executor(noise, *sampling, **further)

    model.add_wrapper_with_key(WRAPPER, _NAME, look)
    return model


def with_word_notices(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """The CLIP, which looks at every text that it is given; its clones share what was told."""
    words, told, tokenize = known_words(), set(), clip.tokenizer.tokenize_with_weights

    def look(text: str, *arguments, **options):
        notice = words.notice(text)
        if notice and notice not in told:
            told.add(notice)
            logging.warning(notice)
        return tokenize(text, *arguments, **options)

    clip.tokenizer.tokenize_with_weights = look
    return clip


def notices(shape, conds: dict[str, list[dict]]) -> list[str]:
    """What is to be said of a latent's shape (B, 4, h, w) and of the entries of a sampling."""
    found = []
    if any("cross_attn" in entry and KEY not in entry["model_conds"] for entries in conds.values() for entry in entries):
        found.append(_PAST_CONNECTOR)
    height_px, width_px = (side * PLAYGROUND_SPEC.pixels_per_latent for side in shape[-2:])
    return [*found, *filter(None, [size_notice(width_px, height_px, PLAYGROUND_SPEC.side_px)])]
