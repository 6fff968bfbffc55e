"""A real server whose model is elsewhere: fetched while HTTP is answered, by a process that ends with its server."""

import json
import re
import signal
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from hub_server import TOKEN

from serving.weights.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

pytestmark = pytest.mark.server

SHORT = {"inputs": "a", "parameters": {"max_new_tokens": 8, "ignore_eos": True}}


@pytest.fixture
def start_from(start, hub, tmp_path):
    """Start a server with a model of the hub; its cache outlives it."""

    def start_from(model_id: str, *flags: str, **environ: str):
        small = ["--hostname=127.0.0.1", "--port=0", "--device=cpu", "--kv-cache-memory=16MiB", "--max-batch-size=8"]
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), **environ}
        return start(plain=[f"--model-id={model_id}", *small, *flags], environ=variables)

    return start_from


def downloads(server) -> list[psutil.Process]:
    return [process for process in server.processes() if "download-weights" in process.cmdline()]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


def test_it_answers_503_until_the_model_has_come_and_starts_again_without_the_hub(start_from, hub):
    sha = hub.repositories["org/tiny"].branches["main"]
    hub.gate.clear()
    server = start_from("org/tiny").wait_listening()
    server.wait_line("Downloading .* of org/tiny, in files: 1")
    assert server.get("/health").status_code == 503
    for path in ("/", "/generate", "/generate_stream", "/invocations"):
        response = server.post(path, SHORT)
        assert (response.status_code, response.json()["error_type"]) == (503, "not_ready")
    assert len(downloads(server)) == 1
    hub.gate.set()
    server.wait_line(r"\bReady\b")
    assert downloads(server) == []
    info = server.get("/info").json()
    assert (info["model_id"], info["model_sha"], info["model_pipeline_tag"]) == ("org/tiny", sha, "text-generation")
    text = server.post("/generate", SHORT).json()["generated_text"]
    assert server.post("/", SHORT).json()[0]["generated_text"] == "a" + text
    server.stop()

    hub.seen.clear()
    again = start_from("org/tiny", HF_HUB_OFFLINE="1").wait_ready()
    info = again.get("/info").json()
    assert (info["model_id"], info["model_sha"], info["model_pipeline_tag"]) == ("org/tiny", sha, None)
    assert again.post("/generate", SHORT).json()["generated_text"] == text
    assert hub.seen == []


def test_revision_and_token_reach_the_hub_and_its_tag_decides_about_the_whole_text(start_from, hub):
    repository = hub.repositories["org/tiny"]
    repository.private = True
    repository.pipeline_tag = "summarization"
    sha = repository.commit({**repository.files, "generation_config.json": b"{}"}, branch="v2")
    server = start_from("org/tiny", "--revision=v2", HF_API_TOKEN=TOKEN).wait_ready()
    assert server.get("/info").json()["model_sha"] == sha
    assert not any("without effect" in line for line in server.lines)
    text = server.post("/generate", SHORT).json()["generated_text"]
    assert server.post("/", SHORT).json()[0]["generated_text"] == text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_during_the_download_leaves_nothing_running(start_from, hub, number):
    hub.gate.clear()
    server = start_from("org/tiny").wait_listening()
    server.wait_line("Downloading .* in files: 1")
    family = server.processes()
    for process in family if number is signal.SIGINT else family[:1]:  # Ctrl-C reaches the whole group
        process.send_signal(number)
    assert server.wait_exit(15) == 0
    assert gone(family)
    assert not any(" ERROR " in line for line in server.lines)


def test_a_killed_server_takes_its_download_along(start_from, hub):
    hub.gate.clear()
    server = start_from("org/tiny").wait_listening()
    server.wait_line("Downloading .* in files: 1")
    family = server.processes()
    server.process.kill()
    server.process.wait()
    assert gone(family[1:])


def test_a_model_that_cannot_be_had_ends_the_server_with_one_line(start_from, hub):
    hub.add("org/gated", hub.repositories["org/tiny"].files, gated=True)
    server = start_from("org/gated")
    assert server.wait_exit() not in (0, 2)
    errors = [line for line in server.lines if " ERROR " in line]
    assert len(errors) == 1, server.lines
    assert "gated: ask for access" in errors[0]
    assert not any("Traceback" in line for line in server.lines)


def test_a_killed_download_ends_the_server_with_one_line(start_from, hub):
    hub.gate.clear()
    server = start_from("org/tiny").wait_listening()
    server.wait_line("Downloading .* in files: 1")
    downloads(server)[0].kill()
    assert server.wait_exit() not in (0, 2)
    errors = [line for line in server.lines if " ERROR " in line]
    assert len(errors) == 1, server.lines
    assert re.search("download of org/tiny ended without a word.*signal 9", errors[0])


def test_an_adapter_is_served_merged_into_its_base_with_its_own_tokenizer(start_from, hub, model_directory, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny", "r": 2, "lora_alpha": 64}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(said))
    template = {**json.loads((model_directory / "tokenizer_config.json").read_text()), "chat_template": "adapter's"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(template))
    (adapter / "tokenizer.json").write_bytes((model_directory / "tokenizer.json").read_bytes())
    draw = torch.Generator().manual_seed(1)
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors = {f"{module}.lora_{half}.weight": torch.randn(shape, generator=draw)
               for half, shape in (("A", (2, 32)), ("B", (32, 2)))}  # fmt: skip
    safetensors.torch.save_file(tensors, adapter / ADAPTER_WEIGHTS)
    hub.add("org/adapter", {path.name: path.read_bytes() for path in adapter.iterdir()}, pipeline_tag=None)

    base = start_from("org/tiny").wait_ready()
    served = {}
    for name in ("org/adapter", str(adapter)):
        server = start_from(name).wait_ready()
        served[name] = server.post("/generate", SHORT).json()["generated_text"]
        assert server.get("/info").json()["model_id"] == name
        chat = server.post("/chat_tokenize", {"messages": [{"role": "user", "content": "?"}]}).json()
        assert chat["templated_text"] == "adapter's"
        server.stop()
    assert len(set(served.values())) == 1
    assert base.post("/generate", SHORT).json()["generated_text"] not in served.values()
    assert Path(tmp_path / "hf" / "hub" / "models--org--adapter").is_dir()
