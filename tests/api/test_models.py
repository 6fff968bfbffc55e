"""OpenAI's list of models."""

import pytest


def test_the_served_model_is_listed(client):
    response = client.get("/v1/models")
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert list(response.json) == ["object", "data"]
    assert response.json["object"] == "list"
    (model,) = response.json["data"]
    assert list(model) == ["id", "object", "created", "owned_by"]
    assert model.pop("created") > 0
    assert model == {"id": "demo/model", "object": "model", "owned_by": "demo/model"}


@pytest.mark.parametrize("name", ["demo/model", "demo%2Fmodel", "tgi"])
def test_a_model_is_found_by_its_name(client, name):
    assert client.get(f"/v1/models/{name}").json == client.get("/v1/models").json["data"][0]


def test_a_model_in_a_directory_is_found_by_its_path(serve):
    server = serve(model_id="/opt/ml/model")
    assert server.client.get("/v1/models//opt/ml/model").json["id"] == "/opt/ml/model"


@pytest.mark.parametrize("name", ["demo", "model", "gpt-4", "demo/model/", "a/b/c", "x" * 3000])
def test_another_name_is_unknown(client, name):
    response = client.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json == {
        "error": {
            "message": f"The model `{name[:200]}` does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        },
        "error_type": "model_not_found",
    }


def test_no_name_at_all_is_no_route(client):
    assert (client.get("/v1/models/").status_code, client.get("/v1/models/").data) == (404, b"")


def test_a_name_may_hold_a_line_break(client):
    assert client.get("/v1/models/a%0Ab").json["error"]["code"] == "model_not_found"
