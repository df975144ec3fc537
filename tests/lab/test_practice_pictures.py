"""Practice pictures: what the trainer reads, from one emoji set."""

from collections import Counter

import pytest
from emoji_packages import PEOPLE, write_packages

from emma_core.errors import FileError
from lab.emoji.people import TONES
from lab.emoji.practice import write_practice_pictures

pytest.importorskip("resvg_py", reason="the renderer comes with requirements/dev.txt")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return write_packages(tmp_path_factory.mktemp("packages"))


def test_every_picture_has_a_text_that_names_neither_tone_nor_set(packages, tmp_path):
    written = write_practice_pictures(packages, tmp_path / "pictures", "noto")
    texts = {path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in written}
    assert len(written) == len(PEOPLE) and len(texts) == len(PEOPLE) and "man cook" in texts
    assert len(list((tmp_path / "pictures").iterdir())) == 2 * len(written)
    tones = Counter(next(tone for tone in sorted(TONES.values(), key=len, reverse=True) if path.stem.endswith(tone))
                    for path in written)
    assert max(tones.values()) - min(tones.values()) <= 1 and len(tones) == len(TONES)


def test_as_many_as_asked_for_are_spread_over_all_people(packages, tmp_path):
    few = write_practice_pictures(packages, tmp_path / "few", "noto", count=4)
    every = write_practice_pictures(packages, tmp_path / "every", "noto")
    assert [path.name for path in few] == [path.name for path in every[::2]]


def test_a_folder_that_holds_something_is_refused(packages, tmp_path):
    (tmp_path / "mine.png").touch()
    with pytest.raises(FileError, match="is not empty; .* Name a new folder"):
        write_practice_pictures(packages, tmp_path)
