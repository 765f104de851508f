"""The examples in the docstrings of all public names run."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smoothcache_fx as smoothcache
from helpers.capture import Stack
from helpers.cases import randomize
from pipelines.build import dit
from zoo.case import timestep

#: The inner compiler is not what they are about, and would take minutes.
UNCOMPILED = re.compile(r"(smoothcache\.(?:compile|compare)\(.*)\)$", re.MULTILINE)


class Model(Stack):
    """Two blocks; the timestep is all that they are conditioned on."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t.unsqueeze(1) * torch.linspace(0.1, 2, x.shape[-1]))


@torch.no_grad()
def sample(model: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))
    for step in range(50):
        x = x - model(x, torch.full((2,), 1 - step / 50)) / 50
    return x


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in smoothcache.__all__:
        value = getattr(smoothcache, name)
        if inspect.isclass(value):
            yield name, value
            for member, function in vars(value).items():
                if not member.startswith("_") and (inspect.isfunction(function) or isinstance(function, classmethod)):
                    yield f"{name}.{member}", getattr(value, member)
        elif inspect.isfunction(value):
            yield name, value
    for name in smoothcache.importers.__all__:
        yield f"importers.{name}", getattr(smoothcache.importers, name)


PUBLIC = dict(public())
WITH_EXAMPLE = [name for name, value in PUBLIC.items() if "Example:" in (inspect.getdoc(value) or "")]


def test_every_public_verb_has_one():
    verbs = {name for name, value in PUBLIC.items() if inspect.isfunction(value) and "." not in name}
    verbs |= {name for name in PUBLIC if name.startswith("importers.")} | {"Schedule", "Calibration.schedule"}
    assert verbs <= set(WITH_EXAMPLE)


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = randomize(Model(), 0).eval()
    names = {
        "smoothcache": smoothcache,
        "model": model,
        "sample": sample,
        "latents": torch.randn(2, 6, 16),
        "timestep": timestep(0.5).expand(2),
        "schedule": smoothcache.Schedule.uniform(50, 2),
    }
    text = UNCOMPILED.sub(r'\1, backend="eager")', inspect.getdoc(PUBLIC[name]))
    if "calibration" in text and "calibration =" not in text:
        names["calibration"] = smoothcache.calibrate(model, sample, steps=50, progress=False)
    if "pipe" in text:
        names["pipe"] = dit()
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    runnable = [example for example in test.examples if doctest.SKIP not in example.options]
    assert runnable or name == "importers.learning_to_cache", "that one needs a file of the authors'"
    for example in runnable:
        if example.want:  # what is printed otherwise is not repeated
            assert repr(eval(example.source, names)) == example.want.strip()
        else:
            exec(compile(example.source, name, "exec"), names)  # noqa: S102
