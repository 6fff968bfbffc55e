"""`weir plan org/name` against a hub: what is asked for, and what is said when headers cannot be had or are broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN

from serving.errors import ModelError
from serving.weights.headers import HeaderCheckpoint

ROOT = Path(__file__).parents[3]
CONFIG = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "torch_dtype": "float32", "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": [16, 8],
    "model.norm.weight": [8],
    **{f"model.layers.0.{name}.weight": [8] for name in ("input_layernorm", "post_attention_layernorm")},
    **{f"model.layers.0.self_attn.{name}_proj.weight": [8, 8] for name in "qkvo"},
    **{f"model.layers.0.mlp.{name}_proj.weight": [8, 8] for name in ("gate", "up", "down")},
}


def weights(shapes=SHAPES, **changes):
    """A file's header; nobody asks for what comes after it."""
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({**header, **changes}).encode()
    return len(text).to_bytes(8, "little") + text


def repository(weights):
    return {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights}


@pytest.fixture
def plan(hub, tmp_path):
    def plan(*arguments, **environ):
        clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
        return subprocess.run(
            [sys.executable, "-m", "serving", "plan", *arguments],
            cwd=ROOT,
            env={**clean, "HF_ENDPOINT": hub.url, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return plan


def error(done):
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_a_private_model_is_planned_with_whatever_names_the_token(hub, plan, tmp_path):
    hub.add("org/private", repository(weights()), private=True)
    (tmp_path / "secret").write_text(f"{TOKEN}\n")
    for environ in ({"HF_API_TOKEN": TOKEN}, {"HF_TOKEN": f"@{tmp_path / 'secret'}"}):
        done = plan("org/private", HF_HUB_ENABLE_HF_TRANSFER="1", **environ)
        assert done.returncode == 0, done
        assert "llama, float32" in done.stdout
        assert "HF_TRANSFER" not in done.stderr
    assert all("org/private" in seen.path for seen in hub.seen)
    assert {seen.token for seen in hub.seen if not seen.path.startswith("/cdn/")} == {TOKEN}


def test_refusals_say_in_one_line_what_to_do(hub, plan):
    hub.add("org/private", repository(weights()), private=True)
    hub.add("org/gated", repository(weights()), gated=True)
    hub.add("org/tiny", repository(weights()))
    hub.add("org/data", {"train.csv": b"1"})
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert "keeps it private" in error(plan("org/private"))
    assert "gated: ask for access" in error(plan("org/gated"))
    assert "refuses the token" in error(plan("org/tiny", HF_TOKEN="hf_wrong"))
    assert "no revision 'v9'; see --revision" in error(plan("org/tiny", "--revision=v9"))
    assert "is no branch, tag or commit" in error(plan("org/tiny", "--revision=../../x"))
    assert "holds no config.json" in error(plan("org/data"))
    assert "holds no safetensors weights" in error(plan("org/old"))
    assert "neither a directory nor a model of the hub" in error(plan("not/a/model"))
    assert "cannot be reached" in error(plan("org/tiny", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "cannot be reached" in error(plan("org/tiny", HF_HUB_OFFLINE="1"))


@pytest.mark.parametrize(
    "broken",
    [
        b"short",
        (2).to_bytes(8, "little") + b"[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        weights(x=5),
        weights({**SHAPES, "x": [-1, 8]}),
        weights({**SHAPES, "x": 8}),
        weights({**SHAPES, "x": ["8"]}),
        weights({**SHAPES, "x": [2**40, 2**40]}),
    ],
    ids=["short", "a list", "deep", "no tensor", "negative", "no shape", "text", "huge"],
)
def test_a_broken_header_is_refused_in_one_line(hub, plan, broken):
    hub.add("org/tiny", repository(broken))
    assert "org/tiny has a broken header" in error(plan("org/tiny"))


@pytest.mark.parametrize("shape", [[-1], [2**63], [True], [1.5], "8", None, [2**40, 2**40], [2**62, 0, 2**62]])
def test_shapes_are_checked_before_a_tensor_is_made_of_them(shape):
    with pytest.raises(ModelError, match="broken header: 'x' has the shape"):
        HeaderCheckpoint({"x": ("F32", shape)}, "it")
    assert HeaderCheckpoint({"x": ("F32", [])}, "it").read("x").shape == ()
    assert HeaderCheckpoint({"x": ("F32", [0, 8])}, "it").read("x").shape == (0, 8)
