"""Models as their authors' packages have them: sites, cached trajectories, and nothing changed without a cache."""

from __future__ import annotations

import pytest
import torch

from external import audio, image, sequence
from helpers.checks import check_all_compute, check_sites, check_trajectory

MODELS = [*audio.CASES, *image.CASES, *sequence.CASES]
each_model = pytest.mark.parametrize(
    "make", MODELS, ids=lambda make: f"{make.__module__.split('.')[-1]}-{make.__name__}"
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@each_model
def test_every_branch_is_a_site(make):
    check_sites(make())


@each_dtype
@each_model
def test_the_trajectory_is_the_oracles(make, dtype):
    check_trajectory(make(), dtype)


@each_dtype
@each_model
def test_all_compute_is_the_plain_model_bit_for_bit(make, dtype):
    check_all_compute(make(), dtype)
