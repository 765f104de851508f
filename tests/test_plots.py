"""Figures: what is refused, and that each is written. How they look is for eyes."""

from __future__ import annotations

import numpy as np
import pytest

from smoothcache_fx import Calibration
from smoothcache_fx.calibration.site_errors import SiteErrors
from smoothcache_fx.plots import (
    pareto_front,
    plot_costs,
    plot_errors,
    plot_frontier,
    plot_schedules,
    plot_site_errors,
)

PNG = b"\x89PNG"


@pytest.fixture
def calibration():
    """Two groups of three and one sites, six steps, two lags."""
    sites = []
    for name, group, kind in [
        *((f"blocks.{i}.attn", "blocks.*.attn", "attn") for i in range(3)),
        ("blocks.0.mlp", "blocks.*.mlp", "ffn"),
    ]:
        site = SiteErrors.empty(name, group, kind, 1.0, lags=2, steps=6)
        for lag in (1, 2):
            for step in range(lag, 6):
                for seed in (0, 1):
                    site.add(lag, step, 0.1 * lag + 0.01 * step + 0.02 * seed)
        sites.append(site)
    return Calibration(6, 2, sites)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_calibrations_pictures(calibration, tmp_path, suffix):
    for name, draw in (("errors", plot_errors), ("sites", plot_site_errors)):
        path = tmp_path / f"{name}.{suffix}"
        draw(calibration, path)
        assert PNG in path.read_bytes()[:8] if suffix == "png" else "<svg" in path.read_text()


def test_the_heat_maps_lag_must_be_one_that_was_measured(calibration, tmp_path):
    plot_site_errors(calibration, tmp_path / "sites.png", lag=2)
    for lag in (0, 3):
        with pytest.raises(ValueError, match="the calibration has lags 1 to 2"):
            plot_site_errors(calibration, tmp_path / "sites.png", lag=lag)


def test_costs_may_be_unknown(tmp_path):
    plot_costs([1.0, np.nan, 0.2], tmp_path / "costs.png", label="ms", title="t")
    assert (tmp_path / "costs.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no row to draw"):
        plot_schedules({}, tmp_path / "schedules.png")
    with pytest.raises(ValueError, match="no point to draw"):
        plot_frontier([("all", 1.0, 1.0, np.inf)], tmp_path / "frontier.png")


def test_the_pareto_front():
    points = [(1.0, 50.0), (2.0, 40.0), (2.0, 45.0), (1.5, 44.0), (3.0, 40.0), (2.5, 39.0)]
    assert pareto_front(points) == [(1.0, 50.0), (2.0, 45.0), (3.0, 40.0)]
