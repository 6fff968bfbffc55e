"""The tensors that a configuration asks for, and random ones in their place (`--load-format dummy`).

Knows no layer of ours: transformers says which tensors an architecture has.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.core_model_loading import revert_weight_conversion

from serving.errors import ModelError
from serving.weights.checkpoint import DummyCheckpoint


def random_checkpoint(directory: Path, device: torch.device, dtype: torch.dtype) -> DummyCheckpoint:
    """A checkpoint for the config.json in `directory`; only shapes are taken, nothing is allocated before a read.

    Raises:
        ModelError: transformers does not know such a model, or not without code that comes with it.
    """
    try:
        return DummyCheckpoint(file_shapes(directory), device, dtype)
    except ValueError as error:
        line = str(error).strip().splitlines()[0]
        raise ModelError(f"--load-format dummy: transformers does not tell the shapes of this model: {line}") from error


def file_shapes(directory: Path) -> Mapping[str, torch.Size]:
    """The name and shape of every tensor in the files of a model with the config.json in `directory`."""
    # Said, since transformers asks on standard input where it is not.
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_config(config, trust_remote_code=False)
        # What is in memory may be stacked and named otherwise than what lies in files.
        files = revert_weight_conversion(model, model.state_dict())
    return {name: tensor.shape for name, tensor in files.items()}
