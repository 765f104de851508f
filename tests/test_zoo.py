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
    "ZImageTransformer2DModel",  # lists in and out, tanh gates, post-norms
]


@pytest.mark.parametrize("name", UNLIKE_OTHERS)
def test_every_branch_is_a_site_and_the_trajectory_is_the_oracles(name):
    assert not check(CASES[name]).problems()


#: Its attention takes Python objects, so that no graph holds it: ``docs/limits.md``.
NOT_COVERED = "WanAnimate2Transformer3DModel"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", sorted(set(CASES) - {NOT_COVERED}))
def test_every_class_on_every_backend(name, backend):
    assert not check(CASES[name], backend=backend).problems()


def test_attention_that_no_graph_holds_is_told():
    outcome = check(CASES[NOT_COVERED])
    assert outcome.found == {kind: count for kind, count in outcome.listed.items() if kind != "attn"}
    blocks = outcome.model_share / outcome.block_share
    assert outcome.breaks and outcome.lost_share == pytest.approx(blocks - outcome.model_share, rel=0.02)


def test_a_class_that_the_zoo_does_not_know_is_tried_by_guess():
    assert not check(guess("OvisImageTransformer2DModel")).problems()


def test_a_guess_that_does_not_run_says_what_was_tried():
    with pytest.raises(ValueError, match="not in the zoo, and could not be called by guess: image: .*; tokens: "):
        guess("PriorTransformer")


def test_the_zoo_knows_classes_that_diffusers_has():
    assert set(CASES) <= set(denoisers())
    assert not set(CASES) & set(NOT_RUN)
