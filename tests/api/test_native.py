"""TGI's own routes answer in TGI's own shapes."""

import json

import pytest

GREETING = {"inputs": "Hello", "parameters": {"max_new_tokens": 2}}
TOKENS = [
    {"id": 220, "text": " ", "logprob": -3.265625, "special": False},
    {"id": 86, "text": "w", "logprob": -2.140625, "special": False},
]


def body(response):
    assert response.content_type == "application/json"
    return response.get_data().decode()


def test_generate_answers_compact_json_with_unescaped_text(client):
    response = client.post("/generate", json={"inputs": "say:hé <&>"})
    assert response.status_code == 200
    assert body(response) == '{"generated_text":"hé <&>"}'


def test_details_have_the_original_keys_in_the_original_order(client):
    response = client.post("/generate", json={"inputs": "say:a", "parameters": {"details": True, "top_n_tokens": 1}})
    assert body(response) == (
        '{"generated_text":"a","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null,"prefill":[],'
        '"tokens":[{"id":64,"text":"a","logprob":-1.578125,"special":false},'
        '{"id":257,"text":"</s>","logprob":-0.015625,"special":true}],'
        '"top_tokens":[[{"id":64,"text":"a","logprob":-1.578125,"special":false}],'
        '[{"id":257,"text":"</s>","logprob":-0.015625,"special":true}]]}}'
    )


def test_prompt_details_bring_details_along_and_start_without_a_logprob(client):
    response = client.post("/generate", json={"inputs": "Hi", "parameters": {"decoder_input_details": True}})
    details = response.json["details"]
    assert [token["text"] for token in details["prefill"]] == ["<s>", "H", "i"]
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in details["prefill"][1:])
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]


def test_prompt_details_stay_empty_unless_the_operator_allows_them(serve):
    server = serve(prefill_logprobs=False)
    response = server.client.post("/generate", json={"inputs": "Hi", "parameters": {"decoder_input_details": True}})
    assert response.json["details"]["prefill"] == []


def test_whole_answers_tell_what_they_cost(client):
    headers = client.post("/generate", json={"inputs": "é!", "parameters": {"max_new_tokens": 5}}).headers
    assert headers["x-compute-type"] == "1-fake"
    assert headers["x-compute-characters"] == "2"
    assert headers["x-prompt-tokens"] == "4"
    assert headers["x-generated-tokens"] == "5"
    assert float(headers["x-compute-time"]) > 0
    for name in ("total", "validation", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0
    assert int(headers["x-time-per-token"]) >= 0


def test_a_length_ends_exactly_where_it_was_asked_to(client):
    details = client.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 3, "details": True}}).json
    assert details["details"]["finish_reason"] == "length"
    assert details["details"]["generated_tokens"] == len(details["details"]["tokens"]) == 3


def test_without_a_length_the_answer_may_fill_the_context(client):
    response = client.post("/generate", json={"inputs": "x" * 50, "parameters": {"details": True, "ignore_eos": True}})
    assert response.json["details"]["generated_tokens"] == 64 - 51
    assert response.json["details"]["finish_reason"] == "length"


@pytest.mark.parametrize(("path", "listed"), [("/generate", False), ("/", True), ("/invocations", True)])
@pytest.mark.parametrize("said", [None, True, False])
def test_the_prompt_stands_before_the_answer_where_the_original_puts_it(client, path, listed, said):
    response = client.post(path, json={"inputs": "Hello", "parameters": {"return_full_text": said}})
    answer = response.json[0] if listed else response.json
    full = listed if said is None else said
    assert answer == {"generated_text": "Hello world" if full else " world"}


@pytest.mark.parametrize(("tag", "text"), [("text-generation", "Hello world"), ("summarization", " world")])
def test_the_hubs_pipeline_tag_decides_whether_the_prompt_is_repeated(serve, tag, text):
    assert serve(pipeline_tag=tag).client.post("/", json={"inputs": "Hello"}).json == [{"generated_text": text}]


def test_stop_text_stays_and_a_token_is_never_altered(client):
    parameters = {"stop": ["el"], "details": True}
    response = client.post("/generate", json={"inputs": "say:hello", "parameters": parameters}).json
    assert response["generated_text"] == "hel"
    assert response["details"]["finish_reason"] == "stop_sequence"
    assert [token["text"] for token in response["details"]["tokens"]] == ["h", "e", "l"]


def test_stop_text_can_be_left_out_on_request(client):
    parameters = {"stop": ["el"], "include_stop_str_in_output": False}
    assert client.post("/generate", json={"inputs": "say:hello", "parameters": parameters}).json == {
        "generated_text": "h"
    }


def test_stop_token_ids_end_like_an_end_of_sequence(client):
    parameters = {"stop_token_ids": [75], "details": True}
    response = client.post("/generate", json={"inputs": "say:help", "parameters": parameters}).json
    assert response["details"]["finish_reason"] == "eos_token"
    assert response["generated_text"] == "he"


def test_an_empty_stop_string_stops_nothing(client):
    response = client.post("/generate", json={"inputs": "say:abc", "parameters": {"stop": [""]}})
    assert response.json == {"generated_text": "abc"}


def test_parameters_that_are_not_there_mean_sampling_and_empty_ones_do_not(serve):
    seen = []
    server = serve(bad_choice=lambda row, choice: seen.append(server.runner.rows[row.sequence_id].sampling) or choice)
    for request in ({"inputs": "x"}, {"inputs": "x", "parameters": {}}):
        server.client.post("/generate", json=request)
    assert [sampling.do_sample for sampling in (seen[0], seen[-1])] == [True, False]


@pytest.mark.parametrize(
    ("parameters", "samples"),
    [
        ({}, False),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.5}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.5}, True),
        ({"top_p": 1.0}, False),
        ({"typical_p": 0.5}, True),
        ({"typical_p": 1}, False),
        ({"do_sample": True}, True),
    ],
)
def test_a_seed_is_told_when_tokens_are_drawn_and_only_then(client, parameters, samples):
    wanted = {**parameters, "seed": 2**64 - 1, "details": True}
    response = client.post("/generate", json={"inputs": "x", "parameters": wanted})
    assert response.json["details"]["seed"] == (2**64 - 1 if samples else None)


def test_drawn_seeds_differ(client):
    seeds = {
        client.post("/generate", json={"inputs": "x", "parameters": {"do_sample": True, "details": True}}).json[
            "details"
        ]["seed"]
        for _ in range(3)
    }
    assert len(seeds) == 3


def test_truncation_keeps_the_last_tokens(client):
    parameters = {"truncate": 2, "decoder_input_details": True}
    response = client.post("/generate", json={"inputs": "abcde", "parameters": parameters})
    assert [token["text"] for token in response.json["details"]["prefill"]] == ["d", "e"]
    assert response.headers["x-prompt-tokens"] == "2"


def spreading(row, choice):
    """A choice whose logprob depends on the sequence, so that one of several answers is the best."""
    return type(choice)(token_id=choice.token_id, logprob=-float(row.sequence_id % 3 + 1), top=choice.top)


def test_best_of_gives_the_likeliest_answer_and_lists_the_others(serve):
    server = serve(bad_choice=spreading)
    parameters = {"best_of": 3, "do_sample": True, "details": True, "max_new_tokens": 2, "return_full_text": True}
    response = server.client.post("/generate", json={"inputs": "Hello", "parameters": parameters})
    details = response.json["details"]
    assert list(details)[-1] == "best_of_sequences"
    losers = details["best_of_sequences"]
    assert [details["tokens"][0]["logprob"], *(loser["tokens"][0]["logprob"] for loser in losers)] == [-1, -2, -3]
    assert list(losers[0]) == [
        "generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens",
    ]  # fmt: skip
    assert losers[0]["generated_text"] == response.json["generated_text"] == "Hello w"
    assert len({details["seed"], *(loser["seed"] for loser in losers)}) == 3
    assert response.headers["x-generated-tokens"] == "2"


def test_best_of_without_details_drops_the_others(client):
    response = client.post("/generate", json={"inputs": "Hello", "parameters": {"best_of": 2, "do_sample": True}})
    assert response.json == {"generated_text": " world"}


def test_best_of_zero_is_one_when_not_streaming(client):
    assert client.post("/generate", json={"inputs": "Hello", "parameters": {"best_of": 0}}).status_code == 200


def test_the_final_event_of_a_stream_has_text_and_details(client, events):
    request = {"inputs": "Hello", "parameters": {"max_new_tokens": 2, "details": True, "do_sample": True, "seed": 7}}
    response = client.post("/generate_stream", json=request)
    assert response.status_code == 200
    assert events(response) == [
        {"index": 1, "token": TOKENS[0], "generated_text": None, "details": None},
        {
            "index": 2,
            "token": TOKENS[1],
            "generated_text": " w",
            "details": {"finish_reason": "length", "generated_tokens": 2, "seed": 7, "input_length": 6},
        },
    ]


def test_stream_events_are_framed_and_ordered_as_the_original_does(client):
    request = {"inputs": "Hello", "parameters": {"max_new_tokens": 1, "top_n_tokens": 1}}
    response = client.post("/generate_stream", json=request)
    token = json.dumps(TOKENS[0], separators=(",", ":"))
    assert response.get_data().decode() == (
        f'data: {{"index":1,"token":{token},"top_tokens":[{token}],"generated_text":" ","details":null}}\n\n'
    )
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-compute-type"] == "1-fake"
    assert response.headers["x-compute-characters"] == "5"
    assert "x-total-time" not in response.headers


def test_the_compatible_route_streams_on_request_and_repeats_the_prompt_at_the_end(client, events):
    *_, last = events(client.post("/", json={**GREETING, "stream": True}))
    assert last["generated_text"] == "Hello w"
    *_, last = events(client.post("/generate_stream", json=GREETING))
    assert last["generated_text"] == " w"


def test_an_incomplete_character_shows_with_the_token_that_completes_it(client, events):
    shown = events(client.post("/generate_stream", json={"inputs": "say:é"}))
    assert [event["token"]["text"] for event in shown] == ["", "é", "</s>"]


def test_keep_alive_comments_fill_silence(serve):
    server = serve(keep_alive_s=0.02, delay_s=0.1)
    body = server.client.post("/generate_stream", json={"inputs": "say:a"}).get_data()
    assert body.startswith(b":\n\n")
    assert b'"generated_text":"a"' in body


def test_long_texts_go_the_same_way(client):
    response = client.post("/generate", json={"inputs": "a" * 30_000, "parameters": {"max_new_tokens": 1}})
    assert "Given: 30001 `inputs` tokens and 1 `max_new_tokens`" in response.json["error"]
