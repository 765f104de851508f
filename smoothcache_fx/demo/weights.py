"""The demo model's weights: where they lie, how they are read and written."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .extras import require
from .model import DiT

WEIGHTS = Path(__file__).with_name("digits_dit.safetensors")


def save_model(model: DiT, path: Path = WEIGHTS) -> None:
    """Write weights as float16, with the configuration in the file's metadata."""
    state = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    require("safetensors.torch").save_file(state, path, metadata={"config": json.dumps(model.config)})


def load_model(device: torch.device | str = "cpu", path: Path = WEIGHTS) -> DiT:
    """The trained model in float32 and eval mode."""
    with require("safetensors").safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}
    model = DiT(**config)
    model.load_state_dict(state)
    return model.eval().to(device)
