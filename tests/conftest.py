"""What every test starts from: one thread, fixed seeds, and no graphs of an earlier test."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from lanes import NOT_QUICK, SLOW

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip tests that would begin later than this")
    parser.addoption("--turn", type=int, default=0, help="where to begin, so that runs with --minutes take turns")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        names = {getattr(item, "originalname", None), item.name, item.nodeid.split("::")[1].partition("[")[0]}
        if names & set(SLOW.get(file, ())):
            item.add_marker(pytest.mark.slow)
        elif file not in NOT_QUICK and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
    if turn := config.getoption("--turn"):
        # Steps of about a golden section of the list: any few turns in a row begin far from each other.
        start = int(turn * 0.618 * len(items)) % max(1, len(items))
        items[:] = items[start:] + items[:start]


_began = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - _began > 60 * minutes:
        pytest.skip("out of time: another turn begins elsewhere")
