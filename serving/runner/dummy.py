"""Random weights in a model's shapes, for measuring speed without a checkpoint (`--load-format dummy`).

Knows no layer of ours: transformers says which tensors an architecture has.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serving.weights.checkpoint import DummyCheckpoint


def random_checkpoint(directory: Path, device: torch.device, dtype: torch.dtype) -> DummyCheckpoint:
    """A checkpoint for the config.json in `directory`; only shapes are taken, nothing is allocated before a read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return DummyCheckpoint(shapes, device, dtype)
