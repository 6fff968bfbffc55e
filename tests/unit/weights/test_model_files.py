"""Which files make a model, judged by their names alone."""

import json

import pytest

from serving.errors import ModelError
from serving.weights.model_files import ModelFiles, collect, description_names, is_adapter, missing_names, weight_names


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ({"model.safetensors"}, ["model.safetensors"]),
        ({"model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"}, ["model.safetensors"]),
        ({"b.safetensors", "a.safetensors", "consolidated.00.safetensors"}, ["a.safetensors", "b.safetensors"]),
        ({"consolidated.safetensors"}, ["consolidated.safetensors"]),
        ({"model.safetensors", "adapter_config.json", "adapter_model.safetensors"}, ["model.safetensors"]),
        ({"adapter_config.json", "adapter_model.safetensors"}, ["adapter_model.safetensors"]),
    ],
)
def test_every_tensor_is_taken_once(names, weights):
    assert weight_names({"config.json", *names}, None, "it") == weights


def test_an_adapter_is_one_that_has_no_model_beside_it():
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert is_adapter(adapter)
    assert is_adapter({"adapter_config.json", "adapter_model.bin"})
    assert is_adapter({*adapter, "config.json"})
    assert not is_adapter({*adapter, "config.json", "model.safetensors"})
    assert not is_adapter({"config.json", "adapter_config.json", "pytorch_model.bin"})
    assert not is_adapter({"config.json"})


@pytest.mark.parametrize("names", [{"config.json", "onnx/model.safetensors"}, {"config.json", "original/weights.pth"}])
def test_other_directories_hold_other_models(names):
    with pytest.raises(ModelError, match=r"holds no \.safetensors"):
        weight_names(names, None, "it")


def test_what_a_directory_lacks_is_named(tmp_path):
    assert missing_names(tmp_path) == ["config.json", "model.safetensors"]
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert missing_names(tmp_path) == ["model.safetensors"]
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "model-1.safetensors").touch()
    assert missing_names(tmp_path) == ["model-2.safetensors"]
    (tmp_path / "model-2.safetensors").touch()
    assert missing_names(tmp_path) == []


def test_an_adapters_own_tokenizer_wins(tmp_path):
    files = ModelFiles(directory="base", adapter_directory=str(tmp_path))
    assert str(files.tokenizer_directory) == "base"
    (tmp_path / "tokenizer.json").touch()
    assert files.tokenizer_directory == tmp_path


def test_code_that_comes_with_a_model_is_fetched_and_other_code_is_not(tmp_path):
    fetched = []

    class Shelf:
        name = "it"
        sizes = dict.fromkeys(("config.json", "model.safetensors", "modeling_own.py", "train/loop.py", "setup.sh"), 1)

        def fetch(self, names):
            fetched.extend(names)
            return tmp_path

    collect(Shelf())
    assert set(fetched) == {"config.json", "model.safetensors", "modeling_own.py"}


@pytest.mark.parametrize("name", ["../../../x.jinja", "../x.jinja", "a/x.jinja", "/x.jinja", "..", ""])
def test_a_named_template_lies_in_its_directory(name):
    kept = "additional_chat_templates/rag.jinja"
    assert description_names({f"additional_chat_templates/{name}", kept}) == [kept]
