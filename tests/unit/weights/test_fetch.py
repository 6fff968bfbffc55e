"""What the worker asks for: at once what lies in directories, by a child process what does not."""

from pathlib import Path

import pytest
from hub_server import HubServer

from serving.adapter_names import NamedAdapter, parse
from serving.errors import ModelError
from serving.weights import fetch as fetch_module
from serving.weights.fetch import fetch

ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"small"}


def put(directory, files):
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return str(directory)


@pytest.fixture
def model(tmp_path):
    return put(tmp_path / "model", {"config.json": b"{}", "model.safetensors": b"weights"})


def test_directories_need_no_child(model, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module.subprocess, "Popen", None)
    french = put(tmp_path / "fr", ADAPTER)
    assert fetch(model, None).adapters == {}
    files = fetch(model, None, [NamedAdapter("french", french)])
    assert (files.directory, files.adapters) == (model, {"french": french})


@pytest.mark.parametrize(
    ("files", "words"),
    [({}, "holds no adapter_config.json"), ({"adapter_config.json": b"{}"}, "holds no adapter_model.safetensors")],
)
def test_a_directory_without_an_adapter_is_refused_by_name(model, tmp_path, files, words):
    with pytest.raises(ModelError, match=f"The adapter french: .* {words}"):
        fetch(model, None, [NamedAdapter("french", put(tmp_path / "fr", files))])


def test_adapters_of_the_hub_are_fetched_for_a_model_in_a_directory(model, tmp_path, monkeypatch):
    hub = HubServer()
    try:
        repository = hub.add("org/french", ADAPTER)
        repository.commit({**ADAPTER, "adapter_model.safetensors": b"newer"}, branch="v2")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        files = fetch(model, None, [parse("french=org/french@v2")])
        assert files.directory == model
        assert Path(files.adapters["french"], "adapter_model.safetensors").read_bytes() == b"newer"
        with pytest.raises(ModelError, match=r"The adapter other: .*org/other"):
            fetch(model, None, [parse("other=org/other")])
    finally:
        hub.stop()
