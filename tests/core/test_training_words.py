"""What a run's numbers mean, in words, and how far it is, in lines."""

import pytest

from emma_core.training.config import resolve
from emma_core.training.held_out import Growth
from emma_core.training.progress import SECONDS_BETWEEN, Lines, duration, encoding_progress
from emma_core.training.words import WIDTH, gain_in_words

SMALL = resolve({}, "small-card")


def said(shown, plain=1.0, growth=None, config=SMALL, ended=False) -> str:
    gain = {"with reference": [plain, None, plain, shown, shown], "text only": [plain, None, plain, plain, plain]}
    return gain_in_words(gain, growth, config, ended)


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("shown", "word", "verdict"), [
    (0.80, "better", "takes 20.0% of the error: the module has learnt. Look at the samples"),
    (0.95, "better", "takes 5.0% of the error: the module has learnt a little. Go on"),
    (0.999, "the same", "the module has learnt nothing yet. Try more updates"),
    (1.05, "worse", "takes -5.0% of the error: the module has learnt nothing yet"),
    (1.01, "a little worse", "the module has learnt nothing yet"),
])
def test_errors_are_called_better_or_worse_and_what_to_do_is_said(shown, word, verdict):
    text = said(shown)
    assert f"800 to 999: {shown:.5f} / 1.00000 ({100 * (shown - 1):+.1f}%, {word})" in text
    assert verdict in flat(text) and "200 to 399" not in text, "no row fell there"


def test_held_out_pictures_have_the_last_word():
    text = flat(said(0.8, growth=Growth([(200, 0.05)])))
    assert "takes 20.0% of the error: the module has learnt a little" in text


def test_low_noise_does_not_decide():
    gain = {"with reference": [0.5, 0.5, 0.5, 1.0, 1.0], "text only": [1.0] * 5}
    assert "takes 0.0% of the error" in flat(gain_in_words(gain))


@pytest.mark.parametrize(("gains", "ended", "found"), [
    ([(200, 0.02), (400, 0.05)], False, "That was still growing at the end: more updates"),
    ([(200, 0.05), (400, 0.05), (600, 0.05)], True, "it takes 5.0% after update 600. That has not grown since update 200, so "
                                                    "training ended by itself; with train.patience 0"),
    ([(200, 0.08), (400, 0.05)], False, "It took 8.0% after update 200: fewer updates would do"),
    ([(200, 0.01), (400, 0.01)], False, "much less than on the training pictures, which it has learnt by heart"),
])
def test_what_held_out_pictures_say(gains, ended, found):
    assert found in flat(said(0.9, growth=Growth(gains), ended=ended))


def test_that_nothing_was_held_out_is_said_where_it_was_wanted():
    assert "No pictures were held out" in flat(said(0.9, growth=Growth()))
    assert "held" not in said(0.9, growth=Growth(), config=resolve({}))


def test_every_line_fits_a_node():
    texts = (said(shown, growth=Growth(gains), ended=ended) for shown in (0.5, 0.95, 1.2) for ended in (True, False)
             for gains in ([], [(200, 0.08), (400, 0.01)], [(200, 0.01), (400, 0.12)]))
    assert all(len(line) <= WIDTH for text in texts for line in text.splitlines()[1:])


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_lines_come_first_now_and_then_and_last():
    lines, clock = [], Clock()
    progress = Lines("update", 100, 40, lines.append, clock)
    for _ in range(60):
        clock.now += 1.0
        progress.update(1, "loss 0.1")
    assert lines[0] == "update 41 of 100, loss 0.1, 1 s each, 59 s left"
    assert lines[-1] == "update 100 of 100, loss 0.1, 1 s each"
    assert len(lines) == 2 + int(59 / SECONDS_BETWEEN) and not any("\r" in line for line in lines)


def test_encoding_is_told_in_lines_too():
    lines = []
    tell = encoding_progress(lines.append, bars=False)
    tell("latents", 0, 3)
    for done in (1, 2, 3):
        tell("latents", done, 3)
    tell("texts", 0, 0)
    assert [line.split(",")[0] for line in lines] == ["encoding latents 1 of 3", "encoding latents 3 of 3"]


def test_durations_are_said_as_people_do():
    assert [duration(seconds) for seconds in (7, 99, 300, 7200)] == ["7 s", "99 s", "5 min", "2.0 h"]
