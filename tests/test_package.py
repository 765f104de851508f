"""The wheel: built, installed where neither the source tree nor an editable install is seen, and run."""

from __future__ import annotations

import email
import json
import os
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "smoothcache_fx", "passes", "kernels"]
#: Where each top-level source folder goes in the wheel.
PACKAGES = {
    "smoothcache_fx": "smoothcache_fx",
    "passes": "smoothcache_fx/passes",
    "kernels": "smoothcache_fx/kernels",
}


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output; a failure shows all that it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    arguments = list(map(str, command))
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources: builds leave folders behind, and take files from those they find."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    wheels = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels]
    run(*build, source, cwd=wheels)
    (built,) = wheels.iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel, and with this environment's packages behind it."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    interpreter = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", interpreter]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    # Folders named in a .pth file are searched, but .pth files in them (of editable installs) are not run.
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    where = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(where, "outer.pth").write_text("\n".join(packages) + "\n")
    return interpreter


def run_script(python: Path, script: str, folder: Path) -> dict:
    """The JSON that `script` prints last, run in an empty folder and isolated from the user's settings."""
    path = folder / "script.py"
    path.write_text(script)
    return json.loads(run(python, "-I", path, cwd=folder).splitlines()[-1])


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    assert top == {"smoothcache_fx", f"smoothcache_fx-{version()}.dist-info"}, "no top-level passes or kernels"
    for folder, place in PACKAGES.items():
        for source in (ROOT / folder).rglob("*.py"):
            assert f"{place}/{source.relative_to(ROOT / folder).as_posix()}" in names
    assert {f"smoothcache_fx/demo/fashion_{name}.safetensors" for name in ("dit", "judge")} <= names
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if "test" in name.lower()]


def version() -> str:
    return runpy.run_path(str(ROOT / "smoothcache_fx/_version.py"))["__version__"]


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        data = email.message_from_bytes(archive.read(f"smoothcache_fx-{version()}.dist-info/METADATA"))
    assert (data["Name"].replace("-", "_"), data["Version"]) == ("smoothcache_fx", version())
    assert data["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (data["License-Expression"], data["License"])
    assert set(data.get_all("Provides-Extra")) == {"bench", "demo", "diffusers", "external", "plot", "test"}
    core = [line.replace('"', "'") for line in data.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(core) == ["numpy", "torch>=2.11", "triton; platform_system == 'Linux'"]


def test_imports_come_from_the_installed_wheel(python, tmp_path):
    script = """
import importlib.metadata, json, sys
import smoothcache_fx, smoothcache_fx.capture.registered
import smoothcache_fx.demo, smoothcache_fx.kernels, smoothcache_fx.passes
import torch._dynamo
modules = (smoothcache_fx, smoothcache_fx.passes, smoothcache_fx.kernels, smoothcache_fx.demo)
(entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="smoothcache")
print(json.dumps({
    "files": [module.__file__ for module in modules],
    "version": importlib.metadata.version("smoothcache_fx"),
    "backend": entry.load() is smoothcache_fx.capture.registered.smoothcache_backend,
    "listed": "smoothcache" in torch._dynamo.list_backends(),
    "finders": [str(finder) for finder in sys.meta_path if "editable" in str(finder)],
    "path": sys.path,
}))
"""
    found = run_script(python, script, tmp_path)
    installed = python.parents[1].resolve()
    for file in found["files"]:
        assert installed in Path(file).resolve().parents, "imported from elsewhere"
    assert found["version"] == version()
    assert found["backend"] and found["listed"]
    assert found["finders"] == [] and str(ROOT) not in found["path"]


def test_the_folder_of_kernels_may_be_imported_by_its_bare_name():
    """transformers does so where Python starts in the repository's root, as with ``python -m pytest``."""
    script = """
import smoothcache_fx.kernels, torch
ours = smoothcache_fx.kernels.residual_store.residual_store
import kernels
assert kernels is not smoothcache_fx.kernels and torch.ops.smoothcache.residual_store.default is ours._opoverload
print(kernels.__file__)
"""
    found = run(sys.executable, "-c", script, cwd=ROOT)
    assert Path(found.strip()) == ROOT / "kernels/__init__.py"


def test_the_installed_wheel_compiles_and_caches(python, tmp_path):
    script = """
import json
import torch
import smoothcache_fx as smoothcache

torch.manual_seed(0)

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))

    def forward(self, x):
        return x + self.mlp(self.norm(x))

model = Block().eval().requires_grad_(False)
xs = torch.randn(4, 2, 5, 8).unbind()
fresh = [model(x) for x in xs]
branches = [full - x for full, x in zip(fresh, xs)]
schedule = smoothcache.Schedule.uniform(4, 2)
assert smoothcache.compile(model, schedule, backend="eager") is model
outputs = [model(x) for x in xs]
# Steps 0 and 2 are computed, 1 and 3 add the branch of the step before.
expected = [fresh[0], xs[1] + branches[0], fresh[2], xs[3] + branches[2]]
print(json.dumps({
    "row": [int(computed) for computed in schedule.compute["ffn"]],
    "cached": [float((out - want).abs().max()) for out, want in zip(outputs, expected)],
    "uncached": [float((out - want).abs().max()) for out, want in zip(outputs, fresh)],
}))
"""
    found = run_script(python, script, tmp_path)
    assert found["row"] == [1, 0, 1, 0]
    assert max(found["cached"]) < 1e-5
    assert min(found["uncached"][1::2]) > 1e-2 and max(found["uncached"][::2]) < 1e-5, found
