"""The lists of lanes name tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lanes import NOT_QUICK, SLOW

TESTS = Path(__file__).parent


@pytest.mark.parametrize("file", SLOW)
def test_slow_tests_exist(file):
    text = (TESTS / file).read_text(encoding="utf-8")
    names = {name.partition("[")[0] for name in SLOW[file]}
    missing = [
        name for name in names if not re.search(rf"^(def {name}\(|class {name}\b|{name} = )", text, re.MULTILINE)
    ]
    assert not missing, f"tests/lanes.py names tests of {file} that are not there: {missing}"


def test_files_that_are_not_quick_exist():
    assert not [file for file in NOT_QUICK if not (TESTS / file).is_file()]


def test_the_lanes_are_marks(request):
    marks = {mark.name for item in request.session.items for mark in item.iter_markers()}
    assert "quick" in marks
