"""The models that the command line works on: made by a user's factory, or by diffusers by name; and where they are."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..compiled.forward import ForwardPlace, forward_of
from ..errors import SmoothCacheError
from ..reports.compare import UNCACHED
from ..runtime.pipelines import denoisers, is_pipeline
from ..schedules.schedule import Schedule

#: Seconds between two lines of progress.
PROGRESS_SECONDS = 3.0


def made_by(factory: str, expected: str) -> tuple[Any, Any]:
    """The two things that a factory returns: ``MODULE:FACTORY`` or ``path/to/file.py:FACTORY``."""
    place, separator, name = factory.rpartition(":")
    if not separator or not place or not name:
        raise ValueError(f"got {factory!r}, expected MODULE:FACTORY or path/to/file.py:FACTORY")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.exists():
            raise ValueError(f"there is no file {place}")
        sys.path.insert(0, str(path.parent))
        place = path.stem
    else:
        sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(place), name, None)
    if not callable(function):
        raise TypeError(f"{place} has no function called {name!r}")
    made = function()
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"{factory} returned {type(made).__name__}, expected a tuple of two: {expected}")
    return made


def from_diffusers(name: str, config: Path | None, dtype: torch.dtype) -> torch.nn.Module:
    """The class ``name`` of diffusers on the meta device, without weights, in eval mode.

    Args:
        name: such as ``FluxTransformer2DModel``.
        config: the JSON file that diffusers saves beside the weights, or its folder; None takes the class's defaults.
        dtype: of all parameters.

    Raises:
        ImportError: diffusers is missing.
        SmoothCacheError: it has no such model, or the model cannot be made of this config.
    """
    made = _diffusers_class(name)
    arguments = {} if config is None else _config(config)
    try:
        with torch.device("meta"):
            model = made.from_config(arguments)
    except Exception as error:  # whatever the class makes of its arguments
        advice = "give the model's own with --config" if config is None else f"is {config} that of a {name}?"
        raise SmoothCacheError(f"{name} cannot be built: {type(error).__name__}: {error}; {advice}") from error
    # What is made from numpy arrays is not on the device yet. diffusers' own `to` has more to say than is needed.
    return torch.nn.Module.to(model, device="meta", dtype=dtype).eval()


def _diffusers_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"{name} is taken for a class of diffusers, which cannot be imported ({error}): pip install "
            '"smoothcache_fx[diffusers]"'
        ) from error
    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, torch.nn.Module) and hasattr(found, "from_config"):
        return found
    close = difflib.get_close_matches(name, [n for n in dir(diffusers) if n.endswith("Model")], n=3)
    raise SmoothCacheError(
        f"diffusers {diffusers.__version__} has no model {name!r}"
        f"{', but ' + ', '.join(close) if close else ''}; expected MODULE:FACTORY, path/to/file.py:FACTORY, or the "
        "name of a model class of diffusers"
    )


def _config(path: Path) -> dict[str, Any]:
    """The arguments in a config file of diffusers: all but what it says of itself (``_class_name`` and the like)."""
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SmoothCacheError(f"{path} is no config of diffusers: it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise SmoothCacheError(f"{path} is no config of diffusers: it holds {type(data).__name__}, expected an object")
    return {key: value for key, value in data.items() if not key.startswith("_")}


def dtype_named(name: str) -> torch.dtype:
    """``float32`` -> ``torch.float32``, for argparse."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"{name!r} is no dtype, expected one such as float32, bfloat16, int64 or bool")
    return found


def shape_given(text: str) -> tuple[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """``NAME=SHAPE[:DTYPE]``, such as ``encoder_attention_mask=1x77:bool``, for argparse; ``scalar`` is a shape."""
    name, equals, rest = text.partition("=")
    shape, colon, dtype = rest.partition(":")
    sizes = () if shape == "scalar" else tuple(shape.split("x"))
    if not name.isidentifier() or not equals or not all(size.isdecimal() for size in sizes) or (colon and not dtype):
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected NAME=SHAPE or NAME=SHAPE:DTYPE, such as hidden_states=1x4096x64, timestep=1, "
            "class_labels=2:int64 or timestep=scalar"
        )
    return name, (tuple(map(int, sizes)), dtype_named(dtype) if dtype else None)


def value_given(text: str) -> tuple[str, Any]:
    """``NAME=JSON``, such as ``height=32``, for argparse."""
    name, equals, value = text.partition("=")
    try:
        if name.isidentifier() and equals:
            return name, json.loads(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=JSON, such as height=32 or return_dict=false")


def meta_inputs(
    model: torch.nn.Module,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]],
    values: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Keyword arguments of the model's ``forward``: meta tensors of the given shapes, and the values as they are.

    Args:
        shapes: by name of the parameter, with the dtype; None is ``dtype``.
        values: non-tensor arguments, by name.

    Raises:
        SmoothCacheError: a required parameter is missing, or one is given that ``forward`` does not have.
    """
    given = {
        **{name: torch.empty(shape, dtype=own or dtype, device="meta") for name, (shape, own) in shapes.items()},
        **values,
    }
    taken = inspect.signature(model.forward).parameters
    named = [p for p in taken.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in given]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    unknown = [] if open_ended else sorted(set(given) - {p.name for p in named})
    if missing or unknown:
        wrong = [f"needs {', '.join(missing)}"] * bool(missing) + [f"has no {', '.join(unknown)}"] * bool(unknown)
        raise SmoothCacheError(
            f"{type(model).__name__}.forward {' and '.join(wrong)}: give --input NAME=SHAPE[:DTYPE] for a tensor, "
            f"--value NAME=JSON for what is none. {_taken(model, given)}"
        )
    return given


def uncallable(model: torch.nn.Module, inputs: Mapping[str, Any], error: Exception) -> SmoothCacheError:
    """What to say of a model on the meta device that could not be captured with these inputs.

    A plain call, which computes nothing there, fails with one line; Dynamo's message has thirty.
    """
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as plain:  # noqa: BLE001 - whatever forward makes of them, to be told
        error = plain
    return SmoothCacheError(
        f"{type(model).__name__} cannot be called with these inputs: {type(error).__name__}: {error}. "
        f"{_taken(model, inputs)}"
    )


def _taken(model: torch.nn.Module, given: Mapping[str, Any]) -> str:
    """The parameters of the model's ``forward``, and which are given or required."""
    listed = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        needed = parameter.default is parameter.empty
        mark = " (given)" if parameter.name in given else " (required)" if needed else ""
        listed.append(f"{parameter.name}{mark}")
    return f"It takes {', '.join(listed)}"


@contextlib.contextmanager
def progress(
    model_or_pipeline: Any, wanted: bool | None, schedules: Mapping[str, Schedule] | None = None
) -> Iterator[None]:
    """Say on stderr every few seconds where a calibrated or compiled model is: ``step 34, trajectory 2, 12 s``.

    A thread reads the model's clock, so nothing is put on the model, and ``forward`` may be called in any way.

    Args:
        wanted: None says it only if stderr is a terminal. There it is one line that is written over.
        schedules: by name; what runs is then called by its name, or uncached.
    """
    terminal = sys.stderr.isatty()
    if not (terminal if wanted is None else wanted):
        yield
        return
    models = denoisers(model_or_pipeline).values() if is_pipeline(model_or_pipeline) else [model_or_pipeline]
    start, done = time.monotonic(), threading.Event()
    before, after = ("\r", "\x1b[K") if terminal else ("", "\n")

    def say() -> None:
        while not done.wait(PROGRESS_SECONDS):
            line = f"{_place(models, schedules)}, {time.monotonic() - start:.0f} s"
            print(f"{before}{line}{after}", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, name="smoothcache progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(before + after if terminal else "", end="", file=sys.stderr, flush=True)


def _place(models: Iterable[torch.nn.Module], schedules: Mapping[str, Schedule] | None) -> str:
    """Where the models are in their sampling, from the clock that calibration or compilation has given them."""
    sessions = []
    for model in models:
        compiled = forward_of(model)
        session = getattr(ForwardPlace(model).forward, "recorder", None) if compiled is None else compiled.session
        if session is not None and session.clock.latest.step >= 0:
            sessions.append(session)
    if not sessions:
        return "before the first call"
    # Of a pipeline's denoisers, the one that was called last: an idle one stays where it was.
    session = max(sessions, key=lambda session: (session.clock.latest.trajectory, session.clock.latest.step))
    clock = session.clock
    place = f"step {clock.latest.step + 1}, trajectory {max(1, clock.trajectories)}"
    if schedules is None:
        return place
    return f"{next((name for name, s in schedules.items() if s is session.schedule), UNCACHED)}: {place}"
