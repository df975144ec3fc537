"""The preset `distil`: an IP-Adapter and a folder of pictures are all that it needs, prompts of its own are there."""

from __future__ import annotations

from collections import Counter

import pytest

from emma_core.errors import TrainingConfigError
from emma_core.training.checks import check
from emma_core.training.config import TeacherConfig, resolve
from emma_core.training.own_latents import prompts_of


def test_prompts_are_shipped_many_and_varied():
    prompts = prompts_of(TeacherConfig())
    assert len(prompts) >= 100 and len(set(prompts)) == len(prompts)
    assert all(3 <= len(prompt.split()) <= 20 for prompt in prompts)
    things = Counter(word for prompt in prompts for word in set(prompt.split()) if len(word) > 4)
    assert max(things.values()) <= len(prompts) / 10, things.most_common(3)


def test_named_prompts_win(tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\n\na dog\n")
    assert prompts_of(TeacherConfig(prompts=str(tmp_path / "mine.txt"))) == ["a cat", "a dog"]


def test_it_wants_a_teacher_and_nothing_else(tmp_path):
    config = resolve({}, "distil", {"output.folder": str(tmp_path)})
    assert config.teacher.own_latents and not config.data.reference_crops and not config.data.reference_flip
    with pytest.raises(TrainingConfigError, match="needs a teacher: .* Set teacher.lora or teacher.ip_adapter"):
        check(config)
