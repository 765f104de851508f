"""Settings of the packages that tests here use."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def settings_of_k_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plain model is to run uncompiled, and not to look for flash-attention inside of every attention."""
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")
    monkeypatch.setenv("K_DIFFUSION_USE_FLASH_2", "0")
