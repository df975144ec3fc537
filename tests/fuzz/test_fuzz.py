"""Damaged and hostile files through every reader: each is loaded right or refused by one of our errors.

`python run.py test tests/fuzz --inputs 15000` for hours of it. What must not be is kept in the folder that the message names,
and `--fuzz-seed` with the number makes it again.
"""

from __future__ import annotations

from collections import Counter

import pytest
from pool import GOOD, MOST_SECONDS, Fuzzer
from targets import TARGETS
from worker import ROOM, TIMES

_FEWEST = 2  # of a reader: the valid file, and one that is damaged


@pytest.fixture(scope="module")
def fuzzer(request, tmp_path_factory):
    with Fuzzer(tmp_path_factory.mktemp("fuzz"), request.config.getoption("--fuzz-seed")) as fuzzer:
        yield fuzzer


@pytest.mark.timeout(0)
@pytest.mark.parametrize("target", TARGETS)
def test_every_damaged_file_is_loaded_right_or_refused_in_words(fuzzer, request, target, record_property):
    share = TARGETS[target].share / sum(each.share for each in TARGETS.values())
    count = max(_FEWEST, round(request.config.getoption("--inputs") * share))
    found = list(fuzzer.outcomes(target, count))
    for kind, many in Counter(one.kind for one in found).items():
        record_property(kind, many)
    slowest, most = max(one.seconds for one in found[1:]), max(one.taken for one in found[1:])
    print(f"{target}: {dict(Counter(one.kind for one in found))}, slowest {slowest:.1f} s, most memory {most / 1e6:.0f} MB")
    faults = "\n".join(str(one) for one in found if one.kind not in GOOD)
    assert not faults, (f"of {len(found)} inputs some were not loaded or refused in {MOST_SECONDS:g} s, {TIMES} times their "
                        f"bytes and {ROOM // 1_000_000} MB:\n{faults}")
