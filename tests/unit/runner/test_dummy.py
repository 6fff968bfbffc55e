"""Random weights: what config.json alone may and may not do."""

import io
import json
import sys

import pytest
import torch

from serving.errors import ModelError
from serving.runner.dummy import random_checkpoint


def test_code_that_comes_with_a_model_is_not_run_whatever_stands_on_standard_input(tmp_path, monkeypatch):
    """Unless told, transformers asks there, and takes a `y` for a yes."""
    ran = tmp_path / "ran"
    said = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "own.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(ran)!r}, 'w').close()\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ModelError, match="does not tell the shapes"):
        random_checkpoint(tmp_path, torch.device("cpu"), torch.float32)
    assert not ran.exists()
