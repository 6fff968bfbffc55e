"""TGI's own routes: generation whole and streamed, details, headers, tokens, SageMaker's and Vertex' doors.

Knows no refusal but those of its routes' own shapes.
"""

import json
from typing import Any

import requests

from scripts.wire.suite import (
    WEIR,
    Differs,
    Inapplicable,
    Target,
    check,
    demand,
    events,
    frames,
    json_of,
    keys,
    native_error,
    ok,
    same,
    shortest_floats,
    status,
    typed,
)

PROMPT = "What is Deep Learning?"
ENDS = ("length", "eos_token", "stop_sequence")
DETAILS = ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
TOKEN = ["id", "text", "logprob", "special"]
TIMINGS = ("x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token")
FULL_TEXT_PIPELINES = (None, "text-generation")


def _post(target: Target, path: str, inputs: str = PROMPT, /, **parameters: Any) -> requests.Response:
    return ok(target.post(path, {"inputs": inputs, "parameters": parameters}))


def _stream(target: Target, inputs: str = PROMPT, /, **parameters: Any) -> list[dict[str, Any]]:
    return events(_post(target, "/generate_stream", inputs, **parameters))


def _check_token(token: dict[str, Any]) -> None:
    keys(token, TOKEN, "token")
    typed(token["id"], int, "id")
    typed(token["text"], str, "text")
    typed(token["logprob"], (float, int, type(None)), "logprob")
    typed(token["special"], bool, "special")


def _check_details(details: dict[str, Any], count: int) -> None:
    keys(details, DETAILS, "details")
    demand(details["finish_reason"] in ENDS, f"finish_reason is {details['finish_reason']!r}")
    typed(details["generated_tokens"], int, "generated_tokens")
    same(len(details["tokens"]), details["generated_tokens"], "number of tokens")
    demand(1 <= details["generated_tokens"] <= count, f"{details['generated_tokens']} tokens for {count}")
    if details["finish_reason"] == "length":
        same(details["generated_tokens"], count, "tokens of an answer cut for its length")
    for token in details["tokens"]:
        _check_token(token)


@check("1.4")
def an_answer_is_its_text_alone(target: Target) -> None:
    for parameters in ({"max_new_tokens": 3}, {"max_new_tokens": 3, "details": False}):
        answer = target.generate(PROMPT, **parameters)
        keys(answer, ["generated_text"], "answer")
        typed(answer["generated_text"], str, "generated_text")


@check("1.4")
def details_have_their_keys_in_order(target: Target) -> None:
    answer = target.generate(PROMPT, max_new_tokens=5, details=True)
    keys(answer, ["generated_text", "details"], "answer")
    _check_details(answer["details"], 5)
    same(answer["details"]["prefill"], [], "prefill")
    same(answer["details"]["seed"], None, "seed of a greedy answer")


@check("1.4")
def details_of_the_prompt_force_details(target: Target) -> None:
    answer = target.generate(PROMPT, max_new_tokens=2, decoder_input_details=True)
    keys(answer, ["generated_text", "details"], "answer")
    prefill = answer["details"]["prefill"]
    if not prefill:
        raise Inapplicable("no --enable-prefill-logprobs")
    for token in prefill:
        keys(token, ["id", "text", "logprob"], "token of the prompt")
    same(prefill[0]["logprob"], None, "logprob of the prompt's first token")


@check("1.4")
def text_is_the_tokens_without_the_end(target: Target) -> None:
    answer = target.generate(PROMPT, max_new_tokens=24, details=True)
    text = "".join(token["text"] for token in answer["details"]["tokens"] if not token["special"])
    if "\ufffd" in answer["generated_text"]:
        raise Inapplicable("the text was cut inside a character")
    same(answer["generated_text"], text, "generated_text")


@check("5.1")
def greedy_answers_repeat(target: Target) -> None:
    first, second = (target.generate(PROMPT, max_new_tokens=8, details=True) for _ in range(2))
    ids = [[token["id"] for token in answer["details"]["tokens"]] for answer in (first, second)]
    same(ids[0], ids[1], "the second greedy answer")


@check("1.4")
def a_seed_is_told_and_repeats_the_draw(target: Target) -> None:
    asked = {"max_new_tokens": 8, "do_sample": True, "seed": 2**63 + 5, "details": True}
    first, second = (target.generate(PROMPT, **asked) for _ in range(2))
    same(first["details"]["seed"], 2**63 + 5, "seed")
    same(first["generated_text"], second["generated_text"], "the second answer of one seed")


@check("1.4")
def a_draw_without_a_seed_tells_which_it_took(target: Target) -> None:
    for asked in ({"do_sample": True}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}, {"typical_p": 0.5}):
        typed(target.generate(PROMPT, max_new_tokens=2, details=True, **asked)["details"]["seed"], int, f"seed {asked}")


@check("5.1")
def a_temperature_of_one_alone_is_greedy(target: Target) -> None:
    answer = target.generate(PROMPT, max_new_tokens=2, details=True, temperature=1.0)
    same(answer["details"]["seed"], None, "seed")


@check("1.4")
def top_tokens_stand_beside_each_token(target: Target) -> None:
    details = target.generate(PROMPT, max_new_tokens=4, details=True, top_n_tokens=3)["details"]
    keys(details, [*DETAILS, "top_tokens"], "details")
    same(len(details["top_tokens"]), len(details["tokens"]), "number of lists of top tokens")
    for tops, token in zip(details["top_tokens"], details["tokens"], strict=True):
        demand(len(tops) >= 3, f"{len(tops)} top tokens instead of 3")
        for top in tops:
            _check_token(top)
        logprobs = [top["logprob"] for top in tops]
        same(logprobs, sorted(logprobs, reverse=True), "the order of top tokens")
        same(tops[0]["logprob"], token["logprob"], "the greedy token's logprob beside the best one's")


@check("1.4")
def the_losers_of_best_of_stand_in_details(target: Target) -> None:
    if target.limit("max_best_of") < 2:
        raise Inapplicable("max_best_of is 1")
    details = target.generate(PROMPT, max_new_tokens=6, details=True, best_of=2, do_sample=True)["details"]
    keys(details, [*DETAILS, "best_of_sequences"], "details")
    same(len(details["best_of_sequences"]), 1, "number of losers")
    loser = details["best_of_sequences"][0]
    keys(loser, ["generated_text", *DETAILS], "loser")
    demand(loser["seed"] != details["seed"], "both samples have one seed")

    def mean(of: dict[str, Any]) -> float:
        return sum(token["logprob"] or 0.0 for token in of["tokens"]) / len(of["tokens"])

    demand(mean(details) >= mean(loser) - 1e-4, f"the winner's mean is {mean(details)}, the loser's {mean(loser)}")


@check("1.2")
def logprobs_are_the_shortest_float32(target: Target) -> None:
    response = _post(target, "/generate", max_new_tokens=8, details=True, top_n_tokens=2)
    details = json.loads(response.text)["details"]
    if all(type(token["logprob"]) is not float for token in details["tokens"]):
        raise Inapplicable("no logprob with a fraction")
    shortest_floats(response.text)


@check("5.1")
def a_certain_choice_has_logprob_zero_and_the_others_none(target: Target) -> None:
    tokens = target.generate(PROMPT, max_new_tokens=3, details=True, top_k=1)["details"]["tokens"]
    demand(all(token["logprob"] == 0 for token in tokens), f"logprobs {[token['logprob'] for token in tokens]}")


@check("1.4")
def the_prompt_is_returned_on_request(target: Target) -> None:
    bare = target.generate(PROMPT, max_new_tokens=4)["generated_text"]
    full = target.generate(PROMPT, max_new_tokens=4, return_full_text=True)["generated_text"]
    same(full, PROMPT + bare, "full text")
    last = _stream(target, PROMPT, max_new_tokens=4, return_full_text=True)[-1]
    same(last["generated_text"], PROMPT + bare, "full text of a stream")


def _stop_in_the_answer(target: Target) -> tuple[str, str]:
    """A greedy answer, and a text in it that ends where a token does."""
    answer = target.generate(PROMPT, max_new_tokens=12, details=True)
    texts = [token["text"] for token in answer["details"]["tokens"] if not token["special"]]
    stop = "".join(texts[3:5])
    if len(texts) < 6 or not stop.strip() or "\ufffd" in stop:
        raise Inapplicable("the model's answer is too short")
    return answer["generated_text"], stop


@check("5.4")
def stop_text_ends_an_answer_and_stays_in_it(target: Target) -> None:
    text, stop = _stop_in_the_answer(target)
    answer = target.generate(PROMPT, max_new_tokens=12, details=True, stop=[stop])
    same(answer["details"]["finish_reason"], "stop_sequence", "finish_reason")
    same(answer["generated_text"], text[: text.index(stop) + len(stop)], "generated_text")
    last = _stream(target, PROMPT, max_new_tokens=12, details=True, stop=[stop])[-1]
    same(last["generated_text"], answer["generated_text"], "generated_text of a stream")
    same(last["details"]["finish_reason"], "stop_sequence", "finish_reason of a stream")


@check("9.5", WEIR)
def stop_text_is_found_inside_a_token(target: Target) -> None:
    answer = target.generate(PROMPT, max_new_tokens=12, details=True)
    long = [token["text"] for token in answer["details"]["tokens"][:-1] if len(token["text"]) > 3]
    if not long:
        raise Inapplicable("no long token")
    stop = long[-1][:-1]
    text = answer["generated_text"]
    answer = target.generate(PROMPT, max_new_tokens=12, details=True, stop=[stop])
    same(answer["details"]["finish_reason"], "stop_sequence", "finish_reason")
    same(answer["generated_text"], text[: text.index(stop) + len(stop)], "generated_text")


@check("9.4", WEIR)
def stop_text_is_left_out_on_request(target: Target) -> None:
    text, stop = _stop_in_the_answer(target)
    answer = target.generate(PROMPT, max_new_tokens=12, stop=[stop], include_stop_str_in_output=False)
    same(answer["generated_text"], text[: text.index(stop)], "generated_text")


@check("9.4", WEIR)
def the_end_token_may_be_ignored(target: Target) -> None:
    details = target.generate(PROMPT, max_new_tokens=64, details=True, ignore_eos=True)["details"]
    same((details["finish_reason"], details["generated_tokens"]), ("length", 64), "finish reason and tokens")


@check("9.3", WEIR)
def probabilities_of_one_mean_off(target: Target) -> None:
    plain = target.generate(PROMPT, max_new_tokens=4, details=True)
    _check_details(plain["details"], 4)
    for name in ("top_p", "typical_p"):
        same(target.generate(PROMPT, max_new_tokens=4, details=True, **{name: 1.0}), plain, f"the answer at {name} 1")


@check("9.1", WEIR)
def max_new_tokens_is_exact(target: Target) -> None:
    count = min(1500, target.limit("max_total_tokens") - 100)
    if count <= 1024:
        raise Inapplicable("the context is shorter than a chunk of TGI's")
    details = target.generate("a", max_new_tokens=count, details=True, ignore_eos=True)["details"]
    same(details["generated_tokens"], count, "generated_tokens")


@check("1.3.2")
def truncation_keeps_the_last_tokens(target: Target) -> None:
    long = "one two three four five six seven eight nine ten. " + PROMPT
    cut = _post(target, "/generate", long, max_new_tokens=3, truncate=3)
    same(cut.headers.get("x-prompt-tokens"), "3", "x-prompt-tokens")
    other = _post(
        target, "/generate", "another beginning altogether, and longer. " + PROMPT, max_new_tokens=3, truncate=3
    )
    same(cut.json(), other.json(), "the answer after another beginning")


@check("5.3")
def watermarks_are_taken(target: Target) -> None:
    keys(target.generate(PROMPT, max_new_tokens=2, watermark=True), ["generated_text"], "answer")


# -- Headers


@check("1.4")
def an_answer_has_its_headers(target: Target) -> None:
    response = _post(target, "/generate", "Grüße", max_new_tokens=3, details=True)
    headers = response.headers
    same(headers.get("x-compute-characters"), "5", "x-compute-characters")
    same(headers.get("x-generated-tokens"), str(response.json()["details"]["generated_tokens"]), "x-generated-tokens")
    demand(headers.get("x-compute-type"), "no x-compute-type")
    float(headers["x-compute-time"])
    demand(int(headers["x-prompt-tokens"]) >= 1, "x-prompt-tokens is 0")
    for name in TIMINGS:
        demand(headers.get(name, "").isdigit(), f"{name} is {headers.get(name)!r}")


@check("1.4")
def an_error_has_no_timings(target: Target) -> None:
    response = target.post("/generate", {"inputs": ""})
    native_error(response, 422, "Input validation error: `inputs` cannot be empty", "validation")
    demand("x-total-time" not in response.headers, "x-total-time on an error")


@check("1.6")
def a_stream_has_its_headers(target: Target) -> None:
    response = _post(target, "/generate_stream", "Grüße", max_new_tokens=2)
    frames(response)
    same(response.headers.get("x-accel-buffering"), "no", "x-accel-buffering")
    same(response.headers.get("x-compute-characters"), "5", "x-compute-characters")
    demand(response.headers.get("x-compute-type"), "no x-compute-type")
    for name in (*TIMINGS, "x-compute-time", "x-prompt-tokens", "x-generated-tokens"):
        demand(name not in response.headers, f"{name} on a stream")


# -- Streams


@check("1.6")
def events_have_their_keys_in_order(target: Target) -> None:
    found = _stream(target, PROMPT, max_new_tokens=5, details=True)
    for index, event in enumerate(found, 1):
        keys(event, ["index", "token", "generated_text", "details"], "event")
        same(event["index"], index, "index")
        _check_token(event["token"])
    for event in found[:-1]:
        same((event["generated_text"], event["details"]), (None, None), "text and details before the last event")
    details = found[-1]["details"]
    keys(details, ["finish_reason", "generated_tokens", "seed", "input_length"], "details")
    same(details["generated_tokens"], len(found), "generated_tokens")
    demand(details["finish_reason"] in ENDS, f"finish_reason is {details['finish_reason']!r}")
    typed(details["input_length"], int, "input_length")


@check("1.6")
def the_last_event_has_details_only_on_request(target: Target) -> None:
    last = _stream(target, PROMPT, max_new_tokens=2)[-1]
    same(last["details"], None, "details")
    typed(last["generated_text"], str, "generated_text")


@check("1.6")
def a_stream_says_what_the_whole_answer_says(target: Target) -> None:
    whole = target.generate(PROMPT, max_new_tokens=10, details=True)
    found = _stream(target, PROMPT, max_new_tokens=10, details=True)
    same(found[-1]["generated_text"], whole["generated_text"], "generated_text")
    same([event["token"]["id"] for event in found], [token["id"] for token in whole["details"]["tokens"]], "ids")


@check("1.6")
def top_tokens_stand_in_events(target: Target) -> None:
    for event in _stream(target, PROMPT, max_new_tokens=3, top_n_tokens=2):
        keys(event, ["index", "token", "top_tokens", "generated_text", "details"], "event")
        demand(len(event["top_tokens"]) >= 2, "fewer top tokens than asked for")


@check("1.6")
def an_error_in_a_stream_is_an_event_under_status_200(target: Target) -> None:
    found = events(target.post("/generate_stream", {"inputs": "a", "parameters": {"top_k": 0}}))
    expected = {"error": "Input validation error: `top_k` must be strictly positive", "error_type": "validation"}
    same(found, [expected], "events")


@check("9.13", WEIR)
def an_error_in_a_stream_is_a_status_on_request(target: Target) -> None:
    body = {"inputs": "a", "parameters": {"top_k": 0}}
    response = target.post("/generate_stream", body, headers={"x-strict-status": "true"})
    native_error(response, 422, "Input validation error: `top_k` must be strictly positive", "validation")


# -- The compatible route, SageMaker's and Vertex'


def _full_text(target: Target, inputs: str) -> str:
    return inputs if target.info["model_pipeline_tag"] in FULL_TEXT_PIPELINES else ""


@check("1.5")
def the_compatible_route_answers_a_list(target: Target) -> None:
    text = target.generate(PROMPT, max_new_tokens=4)["generated_text"]
    response = _post(target, "/", max_new_tokens=4)
    same(json_of(response), [{"generated_text": _full_text(target, PROMPT) + text}], "answer")
    demand("x-total-time" in response.headers, "no timings")
    bare = _post(target, "/", max_new_tokens=4, return_full_text=False)
    same(json_of(bare), [{"generated_text": text}], "answer without the prompt")


@check("1.5")
def the_compatible_route_streams_on_request(target: Target) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}
    text = target.generate(PROMPT, max_new_tokens=4)["generated_text"]
    found = events(ok(target.post("/", {**body, "stream": True})))
    same(found[-1]["generated_text"], _full_text(target, PROMPT) + text, "generated_text")
    same(type(ok(target.post("/", {**body, "stream": False})).json()), list, "type of an answer that is no stream")


@check("1.7")
def sagemakers_door_takes_every_shape(target: Target) -> None:
    parameters = {"max_new_tokens": 3}
    compat = {"inputs": PROMPT, "parameters": parameters}
    same(ok(target.post("/invocations", compat)).json(), ok(target.post("/", compat)).json(), "a generate request")
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    same(json_of(ok(target.post("/invocations", chat)))["object"], "chat.completion", "object of a chat")
    completion = {"prompt": PROMPT, "max_tokens": 3}
    same(json_of(ok(target.post("/invocations", completion)))["object"], "text_completion", "object of a completion")


@check("1.7")
def sagemakers_door_streams_every_shape(target: Target) -> None:
    compat = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}, "stream": True}
    same(events(ok(target.post("/invocations", compat)))[0]["index"], 1, "index of a generate request's first event")
    for body in ({"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": PROMPT}):
        found = events(ok(target.post("/invocations", {**body, "max_tokens": 3, "stream": True})), done=True)
        demand(found, "no event")


@check("1.7")
def inputs_win_over_messages_and_those_over_a_prompt(target: Target) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "x", "max_tokens": 2}
    same(json_of(ok(target.post("/invocations", chat)))["object"], "chat.completion", "object")
    all_three = {**chat, "inputs": "a", "parameters": {"max_new_tokens": 2}}
    same(type(ok(target.post("/invocations", all_three)).json()), list, "type of the answer")


@check("1.8")
def vertex_answers_in_order(target: Target) -> None:
    instances = [
        {"inputs": PROMPT, "parameters": {"max_new_tokens": 3, "seed": 7}},
        {"inputs": "Weir is", "parameters": {"max_new_tokens": 3, "seed": 7}},
    ]
    both = json_of(ok(target.post("/vertex", {"instances": instances})))
    keys(both, ["predictions"], "answer")
    swapped = json_of(ok(target.post("/vertex", {"instances": instances[::-1]})))
    same(both["predictions"], swapped["predictions"][::-1], "predictions the other way round")
    for prediction in both["predictions"]:
        typed(prediction, str, "prediction")
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    same(len(json_of(ok(target.post("/vertex", {"instances": [chat]})))["predictions"]), 1, "answers to a chat")


@check("1.8")
def vertex_refuses_nothing_to_do(target: Target) -> None:
    response = status(target.post("/vertex", {"instances": []}), 422)
    same(json_of(response), {"error": "Input validation error", "error_type": "Input validation error"}, "error")


# -- Tokens


@check("1.9")
def tokens_have_byte_offsets(target: Target) -> None:
    text = "Grüße aus dem Wehr: 水 and 🦦!"
    pieces = json_of(ok(target.post("/tokenize", {"inputs": text})))
    encoded, end = text.encode(), 0
    for piece in pieces:
        keys(piece, ["id", "text", "start", "stop"], "token")
        slice_ = encoded[piece["start"] : piece["stop"]].decode(errors="replace")
        same(piece["text"], slice_, "text")
        if (piece["start"], piece["stop"]) != (0, 0):
            demand(piece["start"] <= end or encoded[end : piece["start"]].isspace(), f"a gap before {piece}")
            end = piece["stop"]
    same(end, len(encoded), "the last offset")


@check("1.9")
def tokenizing_ignores_truncation_and_takes_nothing(target: Target) -> None:
    cut = target.post("/tokenize", {"inputs": PROMPT, "parameters": {"truncate": 1}})
    same(json_of(ok(cut)), json_of(ok(target.post("/tokenize", {"inputs": PROMPT}))), "tokens with truncate")
    typed(json_of(ok(target.post("/tokenize", {"inputs": ""}))), list, "tokens of nothing")


@check("1.9")
def a_chat_can_be_tokenized(target: Target) -> None:
    body = {"messages": [{"role": "user", "content": "What is Deep Learning?"}]}
    response = target.post("/chat_tokenize", body)
    if response.status_code == 422 and "template not found" in response.text:
        raise Inapplicable("the model has no chat template")
    answer = json_of(ok(response))
    keys(answer, ["tokenize_response", "templated_text"], "answer")
    if PROMPT not in answer["templated_text"]:
        raise Differs(f"templated_text is {answer['templated_text']!r}")
    for piece in answer["tokenize_response"]:
        keys(piece, ["id", "text", "start", "stop"], "token")
    same("".join(piece["text"] for piece in answer["tokenize_response"]), answer["templated_text"], "the tokens' texts")
