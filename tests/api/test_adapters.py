"""LoRA adapters: how they come and go, and who answers a request that names one."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gevent
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from serving.bridge import State
from serving.errors import NotReady
from serving.plan import StepPlan
from serving.telemetry.tracing import request_attributes

HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
CHAT = {"messages": [{"role": "user", "content": "say:ok"}]}


@pytest.fixture
def place(tmp_path):
    """A function that makes an adapter's directory."""

    def make(name: str) -> str:
        (tmp_path / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name / file).touch()
        return str(tmp_path / name)

    return make


@pytest.fixture
def roomy(serve):
    """A function that makes a server with room for two adapters."""

    def make(*, room: int = 2, **options):
        return serve(said={"max_lora_adapters": room}, pipeline_tag="text2text-generation", **options)

    return make


@pytest.fixture
def french(roomy, place):
    """A server with the adapter `french`."""
    server = roomy()
    assert load(server.client, "french", place("fr")).status_code == 200
    return server


def load(client: FlaskClient, name: str, src: str, **more) -> TestResponse:
    return client.post("/adapters", json={"name": name, "src": src, **more})


def refusal(response: TestResponse) -> tuple[int, str]:
    return response.status_code, response.json["error_type"]


def text(client: FlaskClient, name: str | None = None, **headers) -> str:
    body = {"inputs": "say:ok", "parameters": {} if name is None else {"adapter_id": name}}
    response = client.post("/generate", json=body, headers=headers)
    assert response.status_code == 200, response.json
    return response.json["generated_text"]


# Coming and going


def test_an_adapter_comes_answers_and_goes(roomy, place):
    client = roomy().client
    src = place("fr")
    assert client.get("/adapters").json == {"adapters": []}
    came = load(client, "french", src, preload=True, pin=False)
    assert (came.status_code, came.json) == (200, {"status": "Adapter french registered"})
    described = {"name": "french", "src": src, "preload": True, "pin": True}
    assert client.get("/adapters").json == {"adapters": [described]}
    assert client.get("/adapters/french").json == [described]
    assert text(client, "french") == "fr:ok"
    assert text(client) == "ok"
    went = client.delete("/adapters/french")
    assert (went.status_code, went.json) == (200, {"status": "Adapter french unregistered"})
    assert client.get("/adapters").json == {"adapters": []}
    assert refusal(client.get("/adapters/french")) == (404, "adapter_not_found")
    assert refusal(client.delete("/adapters/french")) == (404, "adapter_not_found")
    assert refusal(client.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": "french"}})) == (
        422,
        "validation",
    )


def test_the_same_once_more_changes_nothing_and_another_place_is_a_conflict(french, place):
    client = french.client
    src = client.get("/adapters").json["adapters"][0]["src"]
    for again in (src, f"{src}/", f"file://{src}", f"{src}/../fr"):
        assert load(client, "french", again).status_code == 200
    assert len(french.runner.adapters) == 1
    other = load(client, "french", place("other"))
    assert refusal(other) == (409, "adapter_conflict")
    assert text(client, "french") == "fr:ok"


def test_it_may_all_stand_in_the_query(roomy, place):
    client = roomy().client
    src = place("fr")
    response = client.post(f"/adapters?name=french&src={src}&preload=false&pin=True")
    assert (response.status_code, response.json) == (200, {"status": "Adapter french registered"})
    assert text(client, "french") == "fr:ok"
    refused = client.post("/adapters?name=french&preload=perhaps&src=/x")
    assert (refused.status_code, refused.content_type) == (422, "text/plain; charset=utf-8")
    assert refused.text.startswith("Failed to deserialize query string: preload: ")
    assert client.post("/adapters?name=x").text == "Failed to deserialize query string: missing field `src`"
    assert client.post("/adapters?name=true&src=/x").status_code == 424, "a name may look like something else"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "a"}, 422),
        ({"src": "/a"}, 422),
        ({"name": 1, "src": "/a"}, 422),
        ({"name": "a", "src": "/a", "preload": "true"}, 422),
        ([], 422),
        ("{", 400),
    ],
)
def test_a_body_of_another_shape_is_refused_in_plain_text(roomy, body, status):
    data = body if isinstance(body, str) else json.dumps(body)
    response = roomy().client.post("/adapters", data=data, content_type="application/json")
    assert (response.status_code, response.content_type) == (status, "text/plain; charset=utf-8")


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a?b", "a#b", "a/../b", "..", "/a", "a/", "a//b", "ä", "a\n", "x" * 201, "-x", "%2e%2e", "a@b"],
)
def test_a_name_has_to_fit_into_a_path(roomy, name):
    response = load(roomy().client, name, "/a")
    assert refusal(response) == (422, "validation")
    assert response.json["error"].startswith("Input validation error: `name` ")


@pytest.mark.parametrize("name", ["tgi", "demo/model"])
def test_the_models_own_names_are_taken(roomy, name):
    assert refusal(load(roomy().client, name, "/a")) == (422, "validation")


@pytest.mark.parametrize("name", ["org/french", "a.b-c_d:e+f", "0", "x" * 200])
def test_other_names_do(roomy, place, name):
    client = roomy().client
    assert load(client, name, place("fr")).json == {"status": f"Adapter {name} registered"}
    assert client.get(f"/adapters/{name}").json[0]["name"] == name
    assert client.get(f"/v1/models/{name}").json["id"] == name
    assert text(client, name) == "fr:ok"
    assert client.delete(f"/adapters/{name.replace('/', '%2F')}").status_code == 200


@pytest.mark.parametrize(
    "src",
    ["", "fr", "./fr", "s3://bucket/fr", "https://hub/fr", "org/fr", "file://other/fr", "file://[", "/a\0b", "/a\nb"],
)
def test_only_a_directory_of_this_machine_is_a_place(roomy, src):
    response = load(roomy().client, "french", src)
    assert refusal(response) == (422, "validation")
    assert "`src` must be a directory" in response.json["error"]


def test_what_holds_no_adapter_is_refused_alike_whatever_is_there(roomy, tmp_path, place):
    client = roomy().client
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    whole = place("half")
    (Path(whole) / "adapter_model.safetensors").unlink()
    places = [tmp_path / "none", tmp_path / "empty", tmp_path / "file", Path(whole), Path("/" + "x" * 5000)]
    told = {load(client, f"a{number}", str(path)).text for number, path in enumerate(places)}
    assert len(told) == 1
    assert json.loads(told.pop()) == {
        "error": "The adapter cannot be loaded: `src` is no directory that holds adapter_config.json and "
        "adapter_model.safetensors",
        "error_type": "adapter_refused",
    }
    assert client.get("/adapters").json == {"adapters": []}


def test_what_the_device_refuses_is_told_without_paths_and_leaves_nothing(roomy, place):
    reasons = {"bad": "rank 128 is more than 64, says {}/adapter_config.json"}
    server = roomy(room=1, refuses=lambda directory: reasons.get(Path(directory).name, "").format(directory) or None)
    bad = load(server.client, "french", place("bad"))
    assert refusal(bad) == (424, "adapter_refused")
    assert bad.json["error"] == (
        "The adapter cannot be loaded: rank 128 is more than 64, says `src`/adapter_config.json"
    )
    assert server.client.get("/adapters").json == {"adapters": []}
    assert load(server.client, "french", place("good")).status_code == 200
    assert text(server.client, "french") == "good:ok"


def test_beyond_the_room_there_is_none_until_one_goes(roomy, place):
    client = roomy(room=1).client
    assert load(client, "one", place("one")).status_code == 200
    full = load(client, "two", place("two"))
    assert refusal(full) == (507, "no_room_for_adapter")
    assert "--max-lora-adapters" in full.json["error"]
    assert client.delete("/adapters/one").status_code == 200
    assert load(client, "two", place("2")).status_code == 200
    assert text(client, "two") == "2:ok"


def test_without_room_none_is_loaded_and_the_setting_is_named(serve, place):
    response = load(serve().client, "french", place("fr"))
    assert refusal(response) == (424, "adapters_unsupported")
    for name in ("--max-lora-adapters", "MAX_LORA_ADAPTERS", "SAGEMAKER_MAX_NUMBER_OF_ADAPTERS_IN_MEMORY"):
        assert name in response.json["error"]


def test_the_key_is_asked_for(serve):
    client = serve(api_key="key").client
    for response in (client.get("/adapters"), client.post("/adapters"), client.delete("/adapters/a")):
        assert response.status_code == 401


def test_while_the_model_loads_and_while_the_server_drains_none_comes_or_goes(serve, place):
    gate = threading.Event()
    src = place("fr")
    server = serve(ready=False, start_gate=gate, said={"lora_adapters": (f"french={src}",)})
    client = server.client

    def answers() -> set[tuple[int, str]]:
        named = client.post("/invocations", json=CHAT, headers={HEADER: "french"})
        return {
            refusal(response)
            for response in (
                load(client, "french", src),
                client.get("/adapters"),
                client.get("/adapters/french"),
                client.delete("/adapters/french"),
                named,
            )
        }

    assert answers() == {(503, "not_ready")}
    gate.set()
    server.wait()
    assert text(client, "french") == "fr:ok"
    server.bridge.drain(0)
    assert answers() == {(503, "shutting_down")}


def test_one_that_two_ask_for_at_once_is_loaded_once(roomy, place):
    server = roomy(room=1, delay_s=0.05)
    src = place("fr")
    asked = [gevent.spawn(load, server.app.test_client(), "french", src) for _ in range(3)]
    gevent.joinall(asked, raise_error=True)
    assert [each.value.status_code for each in asked] == [200, 200, 200]
    assert list(server.runner.adapters.values()) == [src]


def test_one_that_is_unloaded_while_its_files_are_looked_at_takes_no_place_for_good(roomy, place, monkeypatch):
    monkeypatch.setattr("serving.api.adapters._read", lambda directory: time.sleep(0.2) or True)
    server = roomy(room=1)
    asked = gevent.spawn(load, server.app.test_client(), "french", place("fr"))
    gevent.sleep(0.05)
    assert server.client.delete("/adapters/french").status_code == 404
    asked.join()
    assert asked.value.status_code == 200
    assert server.client.delete("/adapters/french").status_code == 200
    assert load(server.client, "german", place("de")).status_code == 200
    assert text(server.client, "german") == "de:ok"


def test_who_asks_while_the_device_dies_over_it_waits_with_the_first(roomy, place):
    deaths = [True]
    server = roomy(room=1, delay_s=0.05, dies_on=lambda plan: bool(plan.adapters) and bool(deaths) and deaths.pop())
    start_runner_again, gate = server.start_runner_again, threading.Event()

    def slowly():
        gate.wait()
        return start_runner_again()

    server.start_runner_again = slowly
    src = place("fr")
    first = gevent.spawn(load, server.app.test_client(), "french", src)
    begun = server.adapters.begin("french", src)
    server.wait(State.RECOVERING)
    second = gevent.spawn(server.bridge.load_adapter, begun.number, src)
    refused = load(server.client, "french", src)
    assert refusal(refused) == (503, "not_ready")
    gate.set()
    gevent.joinall([first, second], raise_error=True)
    assert first.value.status_code == 200
    assert text(server.client, "french") == "fr:ok"


def test_one_that_is_unloaded_while_it_loads_is_not_there(roomy, place):
    server = roomy(room=1, delay_s=0.1)
    asked = gevent.spawn(load, server.app.test_client(), "french", place("fr"))
    gevent.sleep(0.05)
    assert server.client.delete("/adapters/french").status_code == 200
    asked.join()
    assert refusal(asked.value) == (424, "adapter_refused")
    assert server.client.get("/adapters").json == {"adapters": []}
    assert load(server.client, "other", place("other")).status_code == 200, "its place is free"


def test_who_gives_up_waiting_leaves_nothing_behind(roomy, place):
    server = roomy(room=1, delay_s=0.1)
    asked = gevent.spawn(load, server.app.test_client(), "french", place("fr"))
    gevent.sleep(0.05)
    asked.kill()
    assert server.client.get("/adapters").json == {"adapters": []}
    assert load(server.client, "other", place("other")).status_code == 200
    assert text(server.client, "other") == "other:ok"


def test_what_waits_for_an_adapter_ends_with_the_server(roomy, place):
    server = roomy(delay_s=0.3)
    asked = gevent.spawn(load, server.app.test_client(), "french", place("fr"))
    gevent.sleep(0.05)
    server.bridge.close()
    asked.join(5)
    assert refusal(asked.value) == (503, "shutting_down")


# At the start


def test_those_named_at_the_start_are_there(serve, place):
    server = serve(said={"lora_adapters": (f"french={place('fr')}", f"org/b={place('b')}")})
    assert [model["id"] for model in server.client.get("/v1/models").json["data"]] == ["demo/model", "french", "org/b"]
    assert text(server.client, "org/b") == "b:ok"
    assert load(server.client, "french", server.adapters.find("french").place).status_code == 200
    assert refusal(load(server.client, "french", place("other"))) == (409, "adapter_conflict")
    assert refusal(load(server.client, "more", place("more"))) == (507, "no_room_for_adapter")


def test_one_that_the_device_refuses_ends_the_start(serve, place):
    src = place("fr")
    server = serve(ready=False, said={"lora_adapters": (f"french={src}",)}, refuses=lambda directory: "another base")
    server.wait(State.FAILED)
    assert str(server.bridge.failure) == "The adapter french cannot be loaded: another base"


# Who answers


def test_the_model_of_openais_routes_names_an_adapter(french):
    client = french.client
    chat = client.post("/v1/chat/completions", json={**CHAT, "model": "french"}).json
    assert (chat["model"], chat["choices"][0]["message"]["content"]) == ("french", "fr:ok")
    completion = client.post("/v1/completions", json={"prompt": "say:ok", "model": "french"}).json
    assert (completion["model"], completion["choices"][0]["text"]) == ("french", "fr:ok")
    for own in ("", None, "tgi", "demo/model"):
        chat = client.post("/v1/chat/completions", json={**CHAT, "model": own}).json
        assert (chat["model"], chat["choices"][0]["message"]["content"]) == ("demo/model", "ok")
        completion = client.post("/v1/completions", json={"prompt": "say:ok", "model": own}).json
        assert (completion["model"], completion["choices"][0]["text"]) == ("demo/model", "ok")


def test_a_streams_events_bear_the_adapters_name(french, events):
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "say:ok"})):
        *chunks, done = events(french.client.post(path, json={**body, "model": "french", "stream": True}))
        assert done == "[DONE]"
        assert {chunk["model"] for chunk in chunks} == {"french"}
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(each["delta"]["content"] if "delta" in each else each["text"] for each in choices) == "fr:ok"


def test_another_model_is_unknown_as_soon_as_there_are_adapters(french):
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "say:ok"})):
        unknown = french.client.post(path, json={**body, "model": "german"})
        assert unknown.status_code == 404
        assert unknown.json["error"] == {
            "message": "The model `german` does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        assert french.client.post(path, json={**body, "model": "german", "stream": True}).status_code == 404
    french.client.delete("/adapters/french")
    answer = french.client.post("/v1/chat/completions", json={**CHAT, "model": "german"})
    assert (answer.status_code, answer.json["model"]) == (200, "german")


def test_one_that_is_on_its_way_is_not_the_base_model(roomy, place):
    server = roomy(delay_s=0.1)
    asked = gevent.spawn(load, server.app.test_client(), "french", place("fr"))
    gevent.sleep(0.05)
    early = server.client.post("/v1/chat/completions", json={**CHAT, "model": "french"})
    assert early.status_code == 404
    asked.join()
    late = server.client.post("/v1/chat/completions", json={**CHAT, "model": "french"})
    assert late.json["choices"][0]["message"]["content"] == "fr:ok"


def test_an_unknown_adapter_is_named_and_never_the_base_model(french, events):
    for adapter in ("german", ""):
        body = {"inputs": "say:ok", "parameters": {"adapter_id": adapter}}
        response = french.client.post("/generate", json=body)
        assert refusal(response) == (422, "validation")
        assert response.json["error"] == f"Input validation error: unknown adapter `{adapter}`"
        assert events(french.client.post("/generate_stream", json=body))[0]["error_type"] == "validation"
    assert text(french.client, None) == "ok"


def test_the_platforms_header_wins_over_the_body(french, place):
    client = french.client
    load(client, "german", place("de"))
    for body, answer in (
        ({"inputs": "say:ok", "parameters": {"adapter_id": "german"}}, lambda told: told[0]["generated_text"]),
        ({"inputs": "say:ok", "parameters": {"adapter_id": "nobody"}}, lambda told: told[0]["generated_text"]),
        ({"inputs": "say:ok"}, lambda told: told[0]["generated_text"]),
        ({**CHAT, "model": "german"}, lambda told: told["choices"][0]["message"]["content"]),
        ({**CHAT, "model": "nobody"}, lambda told: told["choices"][0]["message"]["content"]),
        ({"prompt": "say:ok", "model": ""}, lambda told: told["choices"][0]["text"]),
    ):
        response = client.post("/invocations", json=body, headers={HEADER: "french"})
        assert answer(response.json) == "fr:ok"
        if "choices" in response.json:
            assert response.json["model"] == "french"
    for headers in ({HEADER: "nobody"}, {HEADER: "nobody", "X-Amzn-SageMaker-Custom-Attributes": "route=/generate"}):
        refused = client.post("/invocations", json={"inputs": "say:ok"}, headers=headers)
        assert refusal(refused) == (404, "adapter_not_found")


def test_the_header_holds_for_every_line_and_for_other_routes(french):
    lines = "\n".join(json.dumps({"inputs": f"say:{word}"}) for word in ("a", "b"))
    answered = french.client.post(
        "/invocations", data=lines, content_type="application/jsonlines", headers={HEADER: "french"}
    )
    assert [json.loads(line)[0]["generated_text"] for line in answered.text.splitlines()] == ["fr:a", "fr:b"]
    headers = {HEADER: "french", "X-Amzn-SageMaker-Custom-Attributes": "route=/vertex"}
    instances = {"instances": [{"inputs": "say:ok"}, CHAT]}
    assert french.client.post("/invocations", json=instances, headers=headers).json["predictions"] == ["fr:ok"] * 2


def test_all_answers_of_one_request_are_the_adapters(french):
    chat = french.client.post("/v1/chat/completions", json={**CHAT, "model": "french", "n": 3}).json
    assert [choice["message"]["content"] for choice in chat["choices"]] == ["fr:ok"] * 3
    best = {"adapter_id": "french", "best_of": 2, "do_sample": True, "details": True}
    told = french.client.post("/generate", json={"inputs": "say:ok", "parameters": best}).json
    assert [told["generated_text"], told["details"]["best_of_sequences"][0]["generated_text"]] == ["fr:ok"] * 2
    several = {"prompt": ["say:a", "say:b"], "model": "french"}
    choices = french.client.post("/v1/completions", json=several).json["choices"]
    assert [choice["text"] for choice in choices] == ["fr:a", "fr:b"]


def test_a_session_keeps_what_each_adapter_computed_apart(french):
    begun = french.client.post(
        "/invocations", json={"requestType": "NEW_SESSION"}, headers={"X-Amzn-SageMaker-Session-Id": "NEW_SESSION"}
    )
    session = begun.headers["X-Amzn-SageMaker-New-Session-Id"].partition(";")[0]
    headers = {"X-Amzn-SageMaker-Session-Id": session}
    body = {"inputs": "a long beginning that is cached say:ok"}
    told = [
        french.client.post("/invocations", json=body, headers=headers | more).json[0]["generated_text"]
        for more in ({}, {HEADER: "french"}, {}, {HEADER: "french"})
    ]
    assert told == ["ok", "fr:ok", "ok", "fr:ok"]


def test_a_request_that_is_answered_already_keeps_an_adapter_that_goes(roomy, place, events):
    server = roomy(room=1, delay_s=0.02)
    load(server.client, "french", place("fr"))
    body = {"inputs": "say:" + "x" * 20, "parameters": {"adapter_id": "french"}}
    stream = gevent.spawn(lambda: events(server.app.test_client().post("/generate_stream", json=body)))
    gevent.sleep(0.1)
    assert server.client.delete("/adapters/french").status_code == 200
    full = load(server.client, "german", place("de"))
    assert refusal(full) == (507, "no_room_for_adapter")
    assert "that requests still use" in full.json["error"]
    stream.join()
    assert stream.value[-1]["generated_text"] == "fr:" + "x" * 20
    assert load(server.client, "german", place("german")).status_code == 200
    assert text(server.client, "german") == "german:ok"


def test_the_name_of_a_loaded_adapter_is_noted_and_no_other(roomy, place):
    noted = []
    journal = SimpleNamespace(add=noted.append)
    client = roomy(journal=journal).client
    load(client, "french", place("fr"))
    for name in (None, "french", "nobody"):
        body = {"inputs": "say:ok", "parameters": {"adapter_id": name}}
        client.post("/generate", json=body).close()
    assert [record.fields().get("adapter") for record in noted] == [None, "french", None]
    named = request_attributes(noted[1])
    assert (named["gen_ai.response.model"], request_attributes(noted[0])["gen_ai.response.model"]) == (
        "french",
        "demo/model",
    )


# When the device dies


def die(server) -> None:
    """The device dies, and another one takes its place."""
    dead = server.runner
    dead.kill()
    with gevent.Timeout(10):
        while server.runner is dead or server.bridge.state is not State.READY:
            gevent.sleep(0.005)


def test_a_new_device_gets_them_back_and_streams_go_on(roomy, place, events):
    server = roomy(delay_s=0.02)
    src = place("fr")
    load(server.client, "french", src)
    load(server.client, "german", place("de"))
    server.client.delete("/adapters/german")
    body = {"inputs": "say:" + "x" * 20, "parameters": {"adapter_id": "french"}}
    stream = gevent.spawn(lambda: events(server.app.test_client().post("/generate_stream", json=body)))
    gevent.sleep(0.15)
    die(server)
    assert list(server.runner.adapters.values()) == [src]
    stream.join()
    assert stream.value[-1]["generated_text"] == "fr:" + "x" * 20
    assert text(server.client, "french") == "fr:ok"


def test_one_that_a_new_device_refuses_is_gone_by_name_too(roomy, place):
    broken = set()
    server = roomy(refuses=lambda directory: "its files changed" if Path(directory).name in broken else None)
    for name in ("fr", "de"):
        load(server.client, name, place(name))
    broken.add("fr")
    die(server)
    with gevent.Timeout(5):
        while len(server.client.get("/adapters").json["adapters"]) > 1:
            gevent.sleep(0.005)
    assert refusal(server.client.post("/invocations", json=CHAT, headers={HEADER: "fr"})) == (404, "adapter_not_found")
    assert text(server.client, "de") == "de:ok"


def test_a_device_that_dies_while_it_loads_one_is_started_again_and_tries_once_more(roomy, place):
    deaths = []

    def dies_on(plan: StepPlan) -> bool:
        poison = any("poison" in adapter.directory for adapter in plan.adapters)
        unlucky = any("unlucky" in adapter.directory for adapter in plan.adapters) and "unlucky" not in deaths
        deaths.extend(["poison"] * poison + ["unlucky"] * unlucky)
        return poison or unlucky

    server = roomy(dies_on=dies_on)
    assert load(server.client, "unlucky", place("unlucky")).status_code == 200
    poisonous = load(server.client, "poison", place("poison"))
    assert refusal(poisonous) == (424, "adapter_refused")
    assert "died" in poisonous.json["error"]
    assert deaths == ["unlucky", "poison", "poison"]
    server.wait()
    assert text(server.client, "unlucky") == "unlucky:ok"
    assert [each["name"] for each in server.client.get("/adapters").json["adapters"]] == ["unlucky"]


def test_when_the_engine_is_gone_nobody_waits_for_an_adapter(roomy, place):
    server = roomy(dies_on=lambda plan: bool(plan.adapters))

    def none_left():
        raise NotReady

    server.start_runner_again = none_left
    assert refusal(load(server.client, "french", place("fr"))) == (503, "not_ready")
    server.wait(State.FAILED)
