"""What notebooks show: well-formed tables with a coloured cell a step."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from smoothcache_fx import Calibration, Schedule
from smoothcache_fx.calibration.site_errors import SiteErrors
from smoothcache_fx.graphs.html import COMPUTED, REUSED, UNKNOWN
from smoothcache_fx.reports.prediction import Prediction


def strips(found: str) -> list[list[tuple[str, str]]]:
    """The boxes of each strip: what they say and their colours."""
    table = ElementTree.fromstring(found)
    assert table.tag == "table"
    rows = []
    for row in table.iter("tr"):
        boxes = [(box.get("title"), box.get("style").rsplit("background:")[1]) for box in row.iter("span")]
        rows += [boxes] if boxes else []
    return rows


def test_a_schedule():
    schedule = Schedule(4, {"attn": [1, 0, 0, 1], "<b>.*": [1, 1, 0, 0]}, order=1)
    found = schedule._repr_html_()
    colours = [[colour for _, colour in strip] for strip in strips(found)]
    assert colours == [[COMPUTED, REUSED, REUSED, COMPUTED], [COMPUTED, COMPUTED, REUSED, REUSED]]
    assert strips(found)[0][1][0] == "step 1: reused"
    assert "2/4" in found and "&lt;b&gt;.*" in found and "up to 4 variants" in found and "forecasts of order 1" in found
    assert ElementTree.fromstring(Schedule(3, {})._repr_html_()) is not None


def test_a_calibration():
    site = SiteErrors.empty("blocks.0.attn", "blocks.*.attn", "attn", 1.0, lags=1, steps=4)
    for step, error in ((1, 0.1), (2, 0.4), (3, 0.2)):
        site.add(1, step, error)
    found = Calibration(4, 1, [site])._repr_html_()
    ((first, *others),) = strips(found)
    assert first == ("step 0: nan", UNKNOWN) and others[1] == ("step 2: 0.4000", COMPUTED)
    assert len({colour for _, colour in others}) == 3 and "0.2000" in found and "4 steps, 1 sites" in found


def test_a_prediction():
    prediction = Prediction(2, 1.5, 1.25, 3 * 2**20, (1.0, 0.0, np.nan))
    found = prediction._repr_html_()
    assert [colour for _, colour in strips(found)[0]] == [COMPUTED, REUSED, UNKNOWN]
    assert "1.25 to 1.50" in found and "3.0 MiB" in found
