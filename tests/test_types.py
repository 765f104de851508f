"""The types hold: mypy over the package as it is installed, ``passes/`` and ``kernels/`` inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_types(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    package = shutil.copytree(ROOT / "smoothcache_fx", tmp_path / "smoothcache_fx", ignore=ignored)
    for folder in ("passes", "kernels"):
        shutil.copytree(ROOT / folder, package / folder, ignore=ignored)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "smoothcache_fx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
