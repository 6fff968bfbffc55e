"""Adapters as peft saves them, with random matrices."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from serving.weights.adapter_file import PREFIX
from serving.weights.checkpoint import SafetensorsCheckpoint


def save_adapter(directory, tensors, across=False, **said):
    """Write an adapter's directory; `across` is what peft calls fan_in_fan_out."""
    directory.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": "unused", "lora_alpha": 2, **said}
    (directory / "adapter_config.json").write_text(json.dumps({**said, "fan_in_fan_out": across}))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def drawn(shapes, seed, rank=3, share=1.0, spread=1 / 8):
    """Matrices for a share of the weights of these shapes, by the weights' names."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        if torch.rand(1, generator=draw) < share:
            module = PREFIX + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn((rank, inputs), generator=draw) * spread
            tensors[f"{module}.lora_B.weight"] = torch.randn((outputs, rank), generator=draw) * spread
    return tensors


def random_adapter(base, directory, seed, **how):
    """An adapter for all projections of a checkpoint with Llama's names; see `drawn`."""
    found = SafetensorsCheckpoint(Path(base)).shapes()
    return save_adapter(directory, drawn({k: v for k, v in found.items() if k.endswith("_proj.weight")}, seed, **how))
