"""`/vertex` answers a batch of texts and chats."""

import pytest

CHAT = {"messages": [{"role": "user", "content": "say:chat"}]}


def test_predictions_are_texts_in_the_order_of_the_instances(client):
    instances = [{"inputs": "say:long one"}, CHAT, {"inputs": "say:b", "parameters": {"max_new_tokens": 1}}]
    response = client.post("/vertex", json={"instances": instances})
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert response.text == '{"predictions":["long one","chat","b"]}'


def test_only_length_and_seed_count_and_tokens_are_drawn(serve):
    seen = []
    server = serve(bad_choice=lambda row, choice: seen.append(server.runner.rows[row.sequence_id].sampling) or choice)
    parameters = {"max_new_tokens": 1, "seed": 7, "do_sample": False, "temperature": 0, "details": True, "truncate": 0}
    response = server.client.post("/vertex", json={"instances": [{"inputs": "x", "parameters": parameters}]})
    assert response.json == {"predictions": [" "]}
    assert (seen[0].do_sample, seen[0].seed, seen[0].temperature) == (True, 7, 1.0)


def test_an_empty_batch_is_refused(client):
    response = client.post("/vertex", json={"instances": []})
    assert response.status_code == 422
    assert response.json == {"error": "Input validation error", "error_type": "Input validation error"}


def test_an_instance_that_fails_fails_them_all_with_its_own_error(serve):
    server = serve(permits=4)
    bad = {"inputs": "x", "parameters": {"max_new_tokens": 0}}
    response = server.client.post("/vertex", json={"instances": [{"inputs": "x"}, bad]})
    assert response.status_code == 422
    assert response.json == {
        "error": "Input validation error: `max_new_tokens` must be strictly positive",
        "error_type": "validation",
    }
    assert server.bridge.open_requests == 0


def test_every_instance_takes_a_permit(serve):
    server = serve(permits=2)
    response = server.client.post("/vertex", json={"instances": [{"inputs": "x"}] * 3})
    assert (response.status_code, response.json["error_type"]) == (429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    assert server.bridge.open_requests == 0


def test_a_template_that_refuses_says_so(serve):
    response = serve(template=None).client.post("/vertex", json={"instances": [CHAT]})
    assert response.json == {"error": "Template error: template not found", "error_type": "template_error"}


def test_a_generation_that_is_given_up_is_told_as_such(serve):
    server = serve(bad_choice=lambda row, choice: None)
    response = server.client.post("/vertex", json={"instances": [{"inputs": "x"}, {"inputs": "y"}]})
    assert (response.status_code, response.json["error_type"]) == (424, "generation")
    assert server.bridge.open_requests == 0


@pytest.mark.parametrize("body", [{}, {"instances": None}, {"instances": [{}]}, {"instances": ["x"]}, []])
def test_other_shapes_are_refused_by_the_framework(client, body):
    response = client.post("/vertex", json=body)
    assert (response.status_code, response.content_type) == (422, "text/plain; charset=utf-8")
    assert response.text.startswith("Failed to deserialize the JSON body into the target type: ")
