"""Models of diffusers' transformers: the ways in which they are built, and, in the slow lane, every class."""

from __future__ import annotations

import pytest

from zoo.case import denoisers
from zoo.catalog import CASES, NOT_RUN
from zoo.check import check
from zoo.guess import guess

#: Ways of building that none of ``models.py`` has.
UNLIKE_OTHERS = [
    "MochiTransformer3DModel",  # sizes that depend on data
    "SanaWMTransformer3DModel",  # linear attention with a recurrence, permuted feed-forward
    "ZImageTransformer2DModel",  # lists in and out, tanh gates, post-norms
]


@pytest.mark.parametrize("name", UNLIKE_OTHERS)
def test_every_branch_is_a_site_and_the_trajectory_is_the_oracles(name):
    assert not check(CASES[name]).problems()


#: Not all of its attention can be in sites: ``docs/limits.md``.
NOT_COVERED = "WanAnimate2Transformer3DModel"
EVERY_CLASS = [
    pytest.param(name, marks=pytest.mark.xfail(reason="its attention takes Python objects"))
    if name == NOT_COVERED
    else name
    for name in sorted(set(CASES) - set(NOT_RUN))
]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", EVERY_CLASS)
def test_every_class_on_every_backend(name, backend):
    assert not check(CASES[name], backend=backend).problems()


def test_a_class_that_the_zoo_does_not_know_is_tried_by_guess():
    assert not check(guess("OvisImageTransformer2DModel")).problems()


def test_a_guess_that_does_not_run_says_what_was_tried():
    with pytest.raises(ValueError, match="not in the zoo, and could not be called by guess: image: .*; tokens: "):
        guess("PriorTransformer")


def test_the_zoo_knows_classes_that_diffusers_has():
    assert set(CASES) <= set(denoisers())
    assert not set(CASES) & set(NOT_RUN)
