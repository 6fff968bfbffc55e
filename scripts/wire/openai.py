"""OpenAI's routes: chats and completions, whole and streamed, and what they refuse.

Knows no tools and no formats of answers.
"""

import time
from typing import Any

import requests

from scripts.wire.suite import (
    WEIR,
    Ask,
    Inapplicable,
    Target,
    check,
    demand,
    events,
    json_of,
    keys,
    message_of,
    ok,
    same,
    shortest_floats,
    status,
    table,
    typed,
)

PROMPT = "What is Deep Learning?"
MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT = ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
CHOICE = ["index", "message", "logprobs", "finish_reason"]
CHUNK_CHOICE = ["index", "delta", "logprobs", "finish_reason"]
USAGE = ["prompt_tokens", "completion_tokens", "total_tokens"]
TGIS_ENDS = ("length", "stop", "stop_sequence")
OPENAIS_ENDS = ("length", "stop")
CHAT_PATH, COMPLETIONS_PATH = "/v1/chat/completions", "/v1/completions"


def _chat(target: Target, **asked: Any) -> requests.Response:
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, **asked}
    response = target.post(CHAT_PATH, body)
    if response.status_code == 422 and "template not found" in response.text:
        raise Inapplicable("the model has no chat template")
    return ok(response)


def _completion(target: Target, **asked: Any) -> requests.Response:
    return ok(target.post(COMPLETIONS_PATH, {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, **asked}))


def _check_head(answer: dict[str, Any], kind: str, target: Target) -> None:
    same(answer["object"], kind, "object")
    typed(answer["id"], str, "id")
    typed(answer["created"], int, "created")
    demand(abs(answer["created"] - time.time()) < 24 * 3600, f"created is {answer['created']}")
    same(answer["model"], target.info["model_id"], "model")
    demand(answer["system_fingerprint"].startswith(f"{target.info['version']}-"), "system_fingerprint has no version")


def _check_usage(usage: dict[str, Any]) -> None:
    keys(usage, USAGE, "usage")
    same(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"], "total_tokens")
    demand(usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0, f"usage is {usage}")


# -- Chats


@check("2.6")
def a_chat_has_its_keys_in_order(target: Target) -> None:
    response = _chat(target)
    answer = json_of(response)
    keys(answer, CHAT, "answer")
    _check_head(answer, "chat.completion", target)
    (choice,) = answer["choices"]
    keys(choice, CHOICE, "choice")
    same((choice["index"], choice["logprobs"]), (0, None), "index and logprobs")
    keys(choice["message"], ["role", "content"], "message")
    same(choice["message"]["role"], "assistant", "role")
    typed(choice["message"]["content"], str, "content")
    demand(choice["finish_reason"] in TGIS_ENDS, f"finish_reason is {choice['finish_reason']!r}")
    _check_usage(answer["usage"])
    demand("x-total-time" in response.headers, "no timings")


@check("2.6")
def a_chat_cut_for_its_length_says_so(target: Target) -> None:
    answer = _chat(target, max_tokens=1).json()
    same(answer["usage"]["completion_tokens"], 1, "completion_tokens")
    same(answer["choices"][0]["finish_reason"], "length", "finish_reason")


@check("2.6")
def chunks_have_their_keys_in_order(target: Target) -> None:
    found = events(_chat(target, stream=True), done=True)
    for chunk in found:
        keys(chunk, CHAT, "chunk")
        _check_head(chunk, "chat.completion.chunk", target)
        same(chunk["usage"], None, "usage")
        (choice,) = chunk["choices"]
        keys(choice, CHUNK_CHOICE, "choice")
        same(choice["delta"]["role"], "assistant", "role")
        typed(choice["delta"]["content"], str, "content")
    ends = [chunk["choices"][0]["finish_reason"] for chunk in found]
    same(ends[:-1], [None] * (len(ends) - 1), "finish reasons before the last")
    demand(ends[-1] in TGIS_ENDS, f"finish_reason is {ends[-1]!r}")
    same(len({chunk["id"] for chunk in found}), 1, "number of ids in a stream")


@check("2.6")
def a_streamed_chat_says_what_the_whole_says(target: Target) -> None:
    whole = _chat(target, max_tokens=12).json()["choices"][0]["message"]["content"]
    found = events(_chat(target, max_tokens=12, stream=True), done=True)
    same("".join(chunk["choices"][0]["delta"]["content"] for chunk in found), whole, "the text of the stream")


@check("2.6")
def usage_comes_last_where_it_is_asked_for(target: Target) -> None:
    found = events(_chat(target, stream=True, stream_options={"include_usage": True}), done=True)
    same(found[-1]["choices"], [], "choices of the last chunk")
    _check_usage(found[-1]["usage"])
    same({str(chunk["usage"]) for chunk in found[:-1]}, {"None"}, "usage of the others")


@check("2.6")
def logprobs_stand_in_a_chat(target: Target) -> None:
    response = _chat(target, logprobs=True, top_logprobs=2)
    answer = json_of(response)
    content = answer["choices"][0]["logprobs"]["content"]
    same(len(content), answer["usage"]["completion_tokens"], "number of tokens")
    for token in content:
        same(list(token)[:2], ["token", "logprob"], "first keys of a token")
        demand(len(token["top_logprobs"]) >= 2, "fewer alternatives than asked for")
        for top in token["top_logprobs"]:
            same(list(top)[:2], ["token", "logprob"], "first keys of an alternative")
    shortest_floats(response.text)


@check("2.6")
def logprobs_stand_in_chunks(target: Target) -> None:
    found = events(_chat(target, stream=True, logprobs=True, top_logprobs=1), done=True)
    tokens = [token for chunk in found for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    demand(tokens, "no logprobs")


@check("2.1")
def the_model_is_the_served_one_or_an_echo(target: Target) -> None:
    served = target.info["model_id"]
    for asked in ({}, {"model": None}, {"model": "tgi"}, {"model": served}):
        same(_chat(target, **asked).json()["model"], served, f"model for {asked}")


@check("2.1")
def a_temperature_of_zero_is_greedy(target: Target) -> None:
    texts = [_chat(target, max_tokens=10).json()["choices"][0]["message"]["content"] for _ in range(2)]
    same(texts[0], texts[1], "the second answer")


@check("2.1")
def a_seed_repeats_a_chat(target: Target) -> None:
    asked = {"temperature": 1.0, "seed": 11, "max_tokens": 8}
    texts = [_chat(target, **asked).json()["choices"][0]["message"]["content"] for _ in range(2)]
    same(texts[0], texts[1], "the second answer of one seed")


def _message(**message: Any) -> Ask:
    def ask(target: Target) -> None:
        response = target.post(CHAT_PATH, {"messages": [message], "max_tokens": 2})
        if response.status_code == 422 and "emplate" in response.text:
            raise Inapplicable(f"the model's template refuses it: {response.text[:100]}")
        typed(json_of(ok(response))["choices"][0]["message"]["content"], str, "content")

    return ask


MESSAGES_TAKEN = table(
    "openai", "a_message_is_taken", "2.3", "tgi",
    {
        "text": _message(role="user", content="Hi"),
        "parts": _message(role="user", content=[{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]),
        "a name": _message(role="user", content="Hi", name="me"),
        "empty": _message(role="user", content=""),
        "calls": _message(role="assistant", content=None, tool_calls=[
            {"id": "0", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        "an unknown field": _message(role="user", content="Hi", unknown=1),
    },
)  # fmt: skip


def _accepted(**asked: Any) -> Ask:
    return lambda target: typed(_chat(target, **asked).json()["choices"][0]["message"]["content"], str, "content")


ACCEPTED = table(
    "openai", "a_shape_of_openais_is_taken", "9.4", WEIR,
    {
        "stop as a string": _accepted(stop="never"),
        "stop null": _accepted(stop=None),
        "logit_bias": _accepted(logit_bias={"5": -100, "6": 1.5}),
        "stream_options null": _accepted(stream_options=None),
        "both names of max_tokens": _accepted(max_tokens=4, max_completion_tokens=3),
        "response_format text": _accepted(response_format={"type": "text"}),
        "tools empty": _accepted(tools=[]),
        "parallel_tool_calls": _accepted(parallel_tool_calls=False),
        "user": _accepted(user="me"),
        "top_p 1": _accepted(top_p=1, temperature=0.5),
        "penalties": _accepted(frequency_penalty=0.5, presence_penalty=-2),
        "null everywhere": _accepted(top_p=None, seed=None, logprobs=None, top_logprobs=None, tools=None,
                                     tool_choice=None, response_format=None, logit_bias=None, n=None, model=None),
        "min_p": _accepted(min_p=0.1, temperature=0.5),
        "ignore_eos": _accepted(ignore_eos=True),
        "stop_token_ids": _accepted(stop_token_ids=[1]),
        "include_stop_str_in_output": _accepted(include_stop_str_in_output=True),
        "metadata, store, service_tier": _accepted(metadata={"a": "b"}, store=False, service_tier="auto"),
    },
)  # fmt: skip


@check("9.4", WEIR)
def the_newer_name_of_max_tokens_wins(target: Target) -> None:
    answer = _chat(target, max_tokens=6, max_completion_tokens=2, ignore_eos=True).json()
    same(answer["usage"]["completion_tokens"], 2, "completion_tokens")


@check("9.4", WEIR)
def n_makes_so_many_choices(target: Target) -> None:
    if target.limit("max_best_of") < 2:
        raise Inapplicable("max_best_of is 1")
    answer = _chat(target, n=2, temperature=1.0, seed=3).json()
    same([choice["index"] for choice in answer["choices"]], [0, 1], "indices")
    found = events(_chat(target, n=2, temperature=1.0, seed=3, stream=True), done=True)
    texts = {
        index: "".join(c["delta"]["content"] for chunk in found for c in chunk["choices"] if c["index"] == index)
        for index in (0, 1)
    }
    same([choice["message"]["content"] for choice in answer["choices"]], [texts[0], texts[1]], "texts of the stream")


@check("9.5", WEIR)
def stop_text_is_left_out_of_a_chat(target: Target) -> None:
    text = str(_chat(target, max_tokens=16).json()["choices"][0]["message"]["content"])
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    if len(stop) < 3 or "\ufffd" in text:
        raise Inapplicable("the model's answer is too short")
    expected = text[: text.index(stop)]
    answer = _chat(target, max_tokens=16, stop=stop).json()["choices"][0]
    same((answer["message"]["content"], answer["finish_reason"]), (expected, "stop"), "content and finish_reason")
    found = events(_chat(target, max_tokens=16, stop=stop, stream=True), done=True)
    same("".join(chunk["choices"][0]["delta"]["content"] for chunk in found), expected, "the text of the stream")


@check("9.8", WEIR)
def every_answer_has_an_id_of_its_own(target: Target) -> None:
    ids = [_chat(target).json()["id"] for _ in range(2)] + [_completion(target).json()["id"] for _ in range(2)]
    same(len(set(ids)), 4, "number of ids")
    demand(all(ids), "an empty id")


# -- Completions


def _check_completion_choice(choice: dict[str, Any], ends: tuple[str, ...]) -> None:
    keys(choice, ["index", "text", "logprobs", "finish_reason"], "choice")
    typed(choice["text"], str, "text")
    same(choice["logprobs"], None, "logprobs")
    demand(choice["finish_reason"] in ends, f"finish_reason is {choice['finish_reason']!r}")


@check("2.2")
def a_completion_has_its_keys_in_order(target: Target) -> None:
    response = _completion(target)
    answer = json_of(response)
    keys(answer, ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"], "answer")
    _check_head(answer, "text_completion", target)
    (choice,) = answer["choices"]
    _check_completion_choice(choice, TGIS_ENDS)
    _check_usage(answer["usage"])
    demand("x-prompt-tokens" in response.headers, "no timings")


@check("2.2")
def a_completion_goes_on_where_generate_does(target: Target) -> None:
    text = target.generate(PROMPT, max_new_tokens=6)["generated_text"]
    same(_completion(target).json()["choices"][0]["text"], text, "text")


@check("2.2")
def several_prompts_have_a_choice_each(target: Target) -> None:
    prompts = [PROMPT, "Weir is"][: target.limit("max_client_batch_size")]
    answer = _completion(target, prompt=prompts).json()
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    same([choice["index"] for choice in choices], list(range(len(prompts))), "indices")
    alone = [_completion(target, prompt=prompt).json() for prompt in prompts]
    same([c["text"] for c in choices], [one["choices"][0]["text"] for one in alone], "texts beside those alone")
    same(answer["usage"]["prompt_tokens"], sum(one["usage"]["prompt_tokens"] for one in alone), "prompt_tokens")


@check("2.2")
def a_completion_streams(target: Target) -> None:
    found = events(_completion(target, stream=True), done=True)
    for chunk in found:
        same(
            sorted(set(chunk) - {"usage"}),
            sorted(["object", "id", "created", "choices", "model", "system_fingerprint"]),
            "keys of a chunk, sorted",
        )
        same(chunk["object"], "text_completion", "object")
        for choice in chunk["choices"]:
            keys(choice, ["index", "text", "logprobs", "finish_reason"], "choice")
    text = "".join(choice["text"] for chunk in found for choice in chunk["choices"])
    demand(text.startswith(_completion(target).json()["choices"][0]["text"]), "another text than the whole answer's")


@check("2.2")
def several_prompts_stream_by_index(target: Target) -> None:
    if target.limit("max_client_batch_size") < 2:
        raise Inapplicable("max_client_batch_size is 1")
    found = events(_completion(target, prompt=[PROMPT, "Weir is"], stream=True), done=True)
    same({choice["index"] for chunk in found for choice in chunk["choices"]}, {0, 1}, "indices")


@check("2.2")
def too_many_prompts_are_refused(target: Target) -> None:
    most = target.limit("max_client_batch_size")
    response = status(target.post(COMPLETIONS_PATH, {"prompt": ["a"] * (most + 1), "max_tokens": 1}), 422)
    body = json_of(response)
    same(message_of(body), f"Number of prompts exceeds the maximum allowed batch size of {most}", "message")
    same(body["error_type"], "batch size exceeded", "error_type")


@check("2.2")
def a_suffix_is_refused(target: Target) -> None:
    response = status(target.post(COMPLETIONS_PATH, {"prompt": "a", "suffix": "b", "max_tokens": 1}), 422)
    body = json_of(response)
    same(message_of(body), "Suffix is not supported and can be achieved by preprocessing the prompt.", "message")
    same(body["error_type"], "suffix not supported", "error_type")


@check("2.2")
def no_prompt_is_refused(target: Target) -> None:
    response = status(target.post(COMPLETIONS_PATH, {"prompt": [], "max_tokens": 1}), 422)
    same(response.headers.get("content-type"), "text/plain; charset=utf-8", "content-type")
    demand("Empty array detected. Do not use an empty array for the prompt." in response.text, response.text[:200])


@check("9.6", WEIR)
def a_completion_may_be_of_token_ids(target: Target) -> None:
    ids = [piece["id"] for piece in target.post("/tokenize", {"inputs": PROMPT}).json()]
    expected = _completion(target).json()["choices"][0]["text"]
    same(_completion(target, prompt=ids).json()["choices"][0]["text"], expected, "text")
    same(_completion(target, prompt=[ids]).json()["choices"][0]["text"], expected, "text of a list of lists")


@check("9.4", WEIR)
def a_completion_may_have_what_openais_has(target: Target) -> None:
    text = _completion(target).json()["choices"][0]["text"]
    same(_completion(target, echo=True).json()["choices"][0]["text"], PROMPT + text, "text with echo")
    logprobs = _completion(target, logprobs=2).json()["choices"][0]["logprobs"]
    same(list(logprobs), ["tokens", "token_logprobs", "top_logprobs", "text_offset"], "keys of logprobs")
    same("".join(logprobs["tokens"]), text, "the tokens' texts")
    if target.limit("max_best_of") >= 2:
        same(len(_completion(target, n=2, temperature=1).json()["choices"]), 2, "number of choices")


@check("2.2", WEIR)
def the_finish_of_a_streamed_completion_is_openais(target: Target) -> None:
    found = events(_completion(target, stream=True, stream_options={"include_usage": True}), done=True)
    same(found[-1]["choices"], [], "choices of the last chunk")
    _check_usage(found[-1]["usage"])
    ends = [choice["finish_reason"] for chunk in found for choice in chunk["choices"]]
    demand(ends[-1] in OPENAIS_ENDS, f"finish_reason is {ends[-1]!r}")


# -- Refusals


def _refused(path: str, body: dict[str, Any], message: str, kind: str) -> Ask:
    def ask(target: Target) -> None:
        for stream in (False, True):
            response = status(target.post(path, {**body, "stream": stream}), 422)
            answer = json_of(response)
            keys(answer, ["error", "error_type"], "error")
            keys(answer["error"], ["message", "type", "param", "code"], "error")
            same(answer["error"]["message"], message, "message")
            same(answer["error"]["type"], "invalid_request_error", "type")
            same(answer["error_type"], kind, "error_type")

    return ask


_CHAT = {"messages": MESSAGES, "max_tokens": 2}
_PROMPT = {"prompt": "a", "max_tokens": 2}
_RULE = "Input validation error: `top_p` must be > 0.0 and < 1.0"
REFUSALS = table(
    "openai", "a_refusal_has_openais_shape_and_a_status_in_streams_too", "9.13", WEIR,
    {
        "chat, top_p": _refused(CHAT_PATH, {**_CHAT, "top_p": 0}, _RULE, "validation"),
        "completion, top_p": _refused(COMPLETIONS_PATH, {**_PROMPT, "top_p": 0}, _RULE, "validation"),
        "chat by SageMaker's door": _refused("/invocations", {**_CHAT, "top_p": 0}, _RULE, "validation"),
        "completion by SageMaker's door": _refused("/invocations", {**_PROMPT, "top_p": 0}, _RULE, "validation"),
        "chat, max_tokens": _refused(
            CHAT_PATH, {**_CHAT, "max_tokens": 0},
            "Input validation error: `max_new_tokens` must be strictly positive", "validation",
        ),
    },
)  # fmt: skip


@check("2.6")
def a_refused_chat_tells_the_rule(target: Target) -> None:
    response = status(target.post(CHAT_PATH, {**_CHAT, "top_p": 0}), 422)
    same(message_of(json_of(response)), _RULE, "message")
    same(json_of(response)["error_type"], "validation", "error_type")
