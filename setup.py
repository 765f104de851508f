"""Builds smoothcache_fx. `passes/` and `kernels/` lie beside `smoothcache_fx/`, and are installed inside."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "smoothcache_fx/_version.py").read_text(), re.MULTILINE)

PLOT = ["matplotlib"]
DEMO = ["safetensors", "tqdm", *PLOT]
DIFFUSERS = ["diffusers"]
# The caches that bench/end_to_end.py compares with.
BENCH = ["cache-dit", "dit-smoothcache", *DIFFUSERS, *PLOT]
TEST = [
    *DEMO,
    *DIFFUSERS,
    "accelerate",
    "dit-smoothcache",
    "hypothesis",
    "mypy",
    "peft",
    "pytest",
    "pytest-xdist",
    # choose(metric="ssim").
    "scikit-image",
    # The noise of Stable Audio's sampler.
    "torchsde",
    "transformers",
    # The test of the wheel builds it in the running environment.
    "setuptools>=70.1",
    "wheel",
]
# Models of other authors that tests/external tries. Their packages ask for far more than the models need, so these
# come without dependencies: pip install --no-deps timm k-diffusion stable-audio-tools f5-tts
EXTERNAL = ["einops", "einx", "loguru", "torch-einops-utils", "torchao", "x-transformers"]

setup(
    name="smoothcache_fx",
    version=VERSION,
    description="SmoothCache for any Diffusion Transformer, as a torch.compile pass",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2411.10510"},
    keywords="diffusion transformer caching torch.compile SmoothCache",
    packages=[
        *find_packages(include=["smoothcache_fx", "smoothcache_fx.*"]),
        "smoothcache_fx.passes",
        "smoothcache_fx.kernels",
    ],
    # A top-level package called `kernels` would shadow the one that diffusers and transformers look for.
    package_dir={"smoothcache_fx.passes": "passes", "smoothcache_fx.kernels": "kernels"},
    package_data={"smoothcache_fx": ["py.typed"], "smoothcache_fx.demo": ["*.safetensors"]},
    install_requires=["torch>=2.11", "numpy", "triton; platform_system == 'Linux'"],
    extras_require={
        "bench": BENCH,
        "demo": DEMO,
        "diffusers": DIFFUSERS,
        "external": EXTERNAL,
        "plot": PLOT,
        "test": TEST,
    },
    entry_points={
        "console_scripts": ["smoothcache = smoothcache_fx.cli.main:main"],
        "torch_dynamo_backends": ["smoothcache = smoothcache_fx.capture.registered:smoothcache_backend"],
    },
)
