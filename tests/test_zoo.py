"""A representative dozen of diffusers' transformers: ``bench/coverage.py`` runs all of them."""

from __future__ import annotations

import pytest

from zoo.case import denoisers
from zoo.catalog import CASES, NOT_RUN
from zoo.check import check
from zoo.guess import guess

#: One for each way in which such models are built.
DOZEN = [
    "SD3Transformer2DModel",  # joint attention, the last block ends the text
    "Flux2Transformer2DModel",  # single streams with one projection in and one out
    "CogView4Transformer2DModel",  # one feed-forward called for image and text
    "WanTransformer3DModel",  # float32 stream with casts
    "HunyuanVideo15Transformer3DModel",  # a graph per block after a break, text refiner
    "MochiTransformer3DModel",  # sizes that depend on data
    "SanaWMTransformer3DModel",  # linear attention with a recurrence, permuted feed-forward
    "MotifVideoTransformer3DModel",  # cross-attention on attention's output
    "NucleusMoEImageTransformer2DModel",  # routed experts
    "Cosmos3OmniTransformer",  # packed tokens without a batch
    "StableAudioDiTModel",  # no gates, projections around it
    "ZImageTransformer2DModel",  # lists in and out, tanh gates, post-norms
]


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
