"""What every test starts from: one thread, fixed seeds, and no graphs of an earlier test."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# CI must fail on the same example twice; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# pytest listens to every logger that does not propagate. A listener on this one makes Dynamo trace all that
# it does, which takes time and fills the report of a failure with thousands of lines.
logging.getLogger("torch.__trace").propagate = True

torch.set_num_threads(1)  # the models are tiny: a second thread waits for the first, and longer where others run


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    """Seeds are fixed, and Dynamo knows nothing of what earlier tests compiled."""
    random.seed(0)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
