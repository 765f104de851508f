"""The demo model's weights: where they lie, how they are read and written."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch

from .extras import require
from .model import DiT

WEIGHTS = Path(__file__).with_name("fashion_dit.safetensors")


def save_model(model: DiT, path: str | PathLike[str] = WEIGHTS) -> None:
    """Write the weights as float16, which halves the file, with the configuration in its metadata."""
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    # Not save_file: it makes files that their owner alone can read.
    data = require("safetensors.torch").save(state, metadata={"config": json.dumps(model.config)})
    Path(path).write_bytes(data)


def load_model(device: torch.device | str = "cpu", path: str | PathLike[str] = WEIGHTS) -> DiT:
    """The trained `DiT`, float32, in eval mode, on ``device``.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if the file was not written by `save_model`, or for another structure of the model.
    """
    safetensors = require("safetensors")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no weights at {str(path)!r}; install the package whole, or train them: "
            "python -m smoothcache_fx.demo.train"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            model = DiT(**config)
            model.load_state_dict({name: file.get_tensor(name).float() for name in model.state_dict()})
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} holds no DiT of this version ({type(error).__name__}: {error}); expected "
            "a file that save_model wrote, train one: python -m smoothcache_fx.demo.train"
        ) from error
    return model.eval().to(device)
