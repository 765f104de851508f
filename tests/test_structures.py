"""Unusual blocks: each branch is a site, nothing else is, and trajectories are the oracle's."""

from __future__ import annotations

import pytest
import torch

from helpers.checks import check_all_compute, check_sites, check_trajectory
from helpers.structures import CASES

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@each_case
def test_every_branch_is_a_site_and_nothing_else(case):
    check_sites(case)


@each_dtype
@each_case
def test_the_trajectory_is_the_oracles(case, dtype):
    check_trajectory(case, dtype)


@each_dtype
@each_case
def test_all_compute_is_the_plain_model_bit_for_bit(case, dtype):
    check_all_compute(case, dtype, plain_backend="aot_eager" if case.name == "flex_attention" else None)
