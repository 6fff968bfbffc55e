"""Random weights in a model's shapes, for measuring speed without a checkpoint (`--load-format dummy`).

Knows no layer of ours: transformers says which tensors an architecture has.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from serving.weights.checkpoint import DummyCheckpoint


def random_checkpoint(directory: Path, device: torch.device, dtype: torch.dtype) -> DummyCheckpoint:
    """A checkpoint for the config.json in `directory`; only shapes are taken, nothing is allocated before a read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        # What is in memory may be stacked and named otherwise than what lies in files.
        files = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tensor.shape for name, tensor in files.items()}
    return DummyCheckpoint(shapes, device, dtype)
