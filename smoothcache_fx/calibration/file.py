"""The file of a calibration: JSON, one line per site."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import CalibrationError
from ..schedules.files import check_header, read_object
from .effects import Effects
from .measurements import GRAINS, Measurements
from .site_errors import SiteErrors

FORMAT = "smoothcache_fx.calibration"
VERSION = 2
KEYS = ("steps", "lags", "sites", "history_bytes", "metadata", "effects", "sensitivity")
#: Fields that a file has only where they are not the default.
OPTIONAL = ("timesteps", "noise_levels", "grain", "interpolated")


def write(calibration: Measurements, path: str | PathLike[str]) -> None:
    """As `Calibration.save`."""
    try:
        metadata = json.dumps(calibration.metadata, allow_nan=False)
    except (TypeError, ValueError) as reason:
        raise CalibrationError(f"metadata holds what JSON cannot: {reason}; keep plain values in it") from reason
    effects, sensitivity = calibration.effects, calibration.sensitivity
    lines = [
        f'  "format": {json.dumps(FORMAT)}',
        f'  "version": {VERSION}',
        f'  "steps": {calibration.steps}',
        f'  "lags": {calibration.lags}',
        f'  "history_bytes": {calibration.history_bytes}',
        f'  "metadata": {metadata}',
        f'  "effects": {json.dumps(None if effects is None else effects.to_json())}',
        f'  "sensitivity": {json.dumps({key: values.tolist() for key, values in sensitivity.items()})}',
    ]
    for name in OPTIONAL:
        if (value := getattr(calibration, name)) not in (None, False, GRAINS[0]):
            lines.append(f'  "{name}": {json.dumps(value)}')
    sites = ",\n".join(f"    {json.dumps(site.to_json())}" for site in calibration.sites)
    lines.append(f'  "sites": [\n{sites}\n  ]')
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(path: str | PathLike[str]) -> dict[str, Any]:
    """The file's content by field, not looked into; CalibrationError if it is no calibration's file."""
    data = read_object(path, CalibrationError, "calibration")
    if data.get("format") == FORMAT and data.get("version") == 1:
        data = {"effects": None, "sensitivity": {}, **data}
    keys = KEYS + tuple(key for key in OPTIONAL if key in data)
    check_header(data, path, format=FORMAT, version=VERSION, keys=keys, error=CalibrationError)
    return {key: data[key] for key in keys}


def fields_of(content: dict[str, Any]) -> dict[str, Any]:
    """What a `Calibration` is made of, from what `read` returned; CalibrationError for what it cannot be."""
    if not isinstance(content["sites"], list):
        raise CalibrationError(f"sites is a {type(content['sites']).__name__}, expected a list")
    return {
        **content,
        "sites": [SiteErrors.from_json(site) for site in content["sites"]],
        "effects": None if content["effects"] is None else Effects.from_json(content["effects"]),
    }
