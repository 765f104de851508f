"""A representative dozen of diffusers' transformers: ``bench/coverage.py`` runs all of them."""

from __future__ import annotations

import pytest

from zoo.case import denoisers
from zoo.catalog import CASES, NOT_RUN
from zoo.check import check
from zoo.guess import guess

DOZEN = ["SD3Transformer2DModel", "FluxTransformer2DModel"]


@pytest.mark.parametrize("name", DOZEN)
def test_every_branch_is_a_site_and_the_trajectory_is_the_oracles(name):
    assert not check(CASES[name]).problems()


def test_a_class_that_the_zoo_does_not_know_is_tried_by_guess():
    assert not check(guess("OvisImageTransformer2DModel")).problems()


def test_a_guess_that_does_not_run_says_what_was_tried():
    with pytest.raises(ValueError, match="not in the zoo, and could not be called by guess: image: .*; tokens: "):
        guess("PriorTransformer")


def test_the_zoo_knows_classes_that_diffusers_has():
    assert set(CASES) <= set(denoisers())
    assert not set(CASES) & set(NOT_RUN)
