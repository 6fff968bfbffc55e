"""A real server with real LoRA adapters: named at the start, loaded and unloaded later, answered in one batch."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from models.lora_files import random_adapter, save_adapter
from server.conftest import SMALL, Server

from serving.weights.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

pytestmark = pytest.mark.server

PARAMETERS = {"max_new_tokens": 12, "ignore_eos": True}
PROMPTS = ("a", "the quick brown fox", "x" * 70)


@pytest.fixture(scope="module")
def adapters(model_directory, tmp_path_factory):
    """Three adapters of the small model: directories by their names."""
    home = tmp_path_factory.mktemp("adapters")
    made = {
        name: random_adapter(model_directory, home / name, seed)
        for seed, name in enumerate(("french", "german", "latin"), 1)
    }
    for directory in made.values():
        config = directory / ADAPTER_CONFIG
        said = json.loads(config.read_text())
        config.write_text(json.dumps({**said, "base_model_name_or_path": str(model_directory)}))
    return {name: str(directory) for name, directory in made.items()}


def text(server, prompt: str, adapter: str | None = None) -> str:
    named = {} if adapter is None else {"adapter_id": adapter}
    response = server.post("/generate", {"inputs": prompt, "parameters": {**PARAMETERS, **named}})
    assert response.status_code == 200, response.text
    return response.json()["generated_text"]


def texts(server, adapter: str | None = None) -> list[str]:
    return [text(server, prompt, adapter) for prompt in PROMPTS]


def load(server, name: str, src: str) -> requests.Response:
    return server.post("/adapters", {"name": name, "src": src})


@pytest.fixture(scope="module")
def merged(model_directory, adapters):
    """What servers say that have each adapter, or none, merged into the model."""
    said = {}
    for name, served in {None: str(model_directory), **adapters}.items():
        server = Server([f"--model-id={served}", *SMALL], {})
        try:
            said[name] = texts(server.wait_ready(), None)
        finally:
            server.stop()
    assert len({tuple(each) for each in said.values()}) == 4
    return said


def test_each_answer_is_that_of_a_model_with_its_adapter_merged_whatever_is_in_the_batch(
    start, hub, adapters, merged, tmp_path
):
    german = Path(adapters["german"])
    files = {name: (german / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    hub.add("org/german", {**files, "README.md": b"not needed"}, pipeline_tag=None)
    server = start(
        f"--lora-adapters=french={adapters['french']},german=org/german@main", "--max-lora-adapters=3",
        environ={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")},
    ).wait_ready()  # fmt: skip
    assert load(server, "latin", adapters["latin"]).json() == {"status": "Adapter latin registered"}
    models = [model["id"] for model in server.get("/v1/models").json()["data"]]
    assert models[1:] == ["french", "german", "latin"]
    asked = [(name, at) for at in range(len(PROMPTS)) for name in merged] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: text(server, PROMPTS[each[1]], each[0]), asked))
    assert answers == [merged[name][at] for name, at in asked]


def test_an_adapter_goes_while_it_answers_and_another_takes_its_place(start, adapters, merged):
    server = start("--max-lora-adapters=1").wait_ready()
    assert load(server, "french", adapters["french"]).status_code == 200
    assert load(server, "german", adapters["german"]).status_code == 507
    long = {"inputs": "a", "parameters": {"max_new_tokens": 300, "ignore_eos": True, "adapter_id": "french"}}
    with server.post("/generate_stream", long, stream=True) as stream:
        events = (json.loads(line.removeprefix(b"data:")) for line in stream.iter_lines() if line)
        first = next(events)
        assert requests.delete(server.url + "/adapters/french", timeout=30).status_code == 200
        assert server.post("/generate", long).status_code == 422
        *_, last = events
    assert first["index"] == 1
    assert last["generated_text"].startswith(merged["french"][0])
    assert load(server, "german", adapters["german"]).status_code == 200
    assert texts(server, "german") == merged["german"]
    assert texts(server) == merged[None]


def test_a_device_that_dies_gets_its_adapters_back_and_streams_go_on(start, adapters, merged):
    server = start("--max-lora-adapters=2").wait_ready()
    load(server, "french", adapters["french"])
    long = {"inputs": "a", "parameters": {"max_new_tokens": 2000, "ignore_eos": True, "adapter_id": "french"}}
    with server.post("/generate_stream", long, stream=True) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        server.processes()[2].send_signal(signal.SIGKILL)
        server.wait_line("Ready again")
        *_, last = lines
    assert json.loads(last.removeprefix(b"data:"))["generated_text"].startswith(merged["french"][0])
    assert texts(server, "french") == merged["french"]


def test_what_does_not_fit_the_model_is_refused_without_a_path(start, model_directory, tmp_path):
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    wrong = {f"{module}.lora_A.weight": torch.zeros(2, 99), f"{module}.lora_B.weight": torch.zeros(99, 2)}
    other = save_adapter(tmp_path / "other", wrong)
    high = str(random_adapter(model_directory, tmp_path / "high", 1, rank=9))
    server = start("--max-lora-adapters=2", "--max-lora-rank=8").wait_ready()
    for place in (str(other), high):
        refused = load(server, "french", place)
        assert (refused.status_code, refused.json()["error_type"]) == (424, "adapter_refused")
        assert str(tmp_path) not in refused.text
    assert server.get("/adapters").json() == {"adapters": []}
    broken = start(f"--lora-adapters=french={other}")
    assert broken.wait_exit() not in (0, 2)
    errors = [line for line in broken.lines if " ERROR " in line]
    assert len(errors) == 1, broken.lines
    assert "The adapter french cannot be loaded: " in errors[0]
