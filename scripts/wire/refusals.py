"""What native routes refuse: each rule, its words, its status, and which rule speaks first.

Knows no answer but a refusal.
"""

from collections.abc import Callable
from typing import Any

from scripts.wire.suite import (
    TGI,
    WEIR,
    Ask,
    Inapplicable,
    Target,
    check,
    events,
    json_of,
    message_of,
    native_error,
    ok,
    same,
    status,
    table,
)

PREFIX = "Input validation error: "
Detail = str | Callable[[Target], str]


def _asked(parameters: dict[str, Any], target: Target) -> dict[str, Any]:
    """The parameters, with those that depend on the server's limits made out."""
    return {name: value(target) if callable(value) else value for name, value in parameters.items()}


def _refused(parameters: dict[str, Any], detail: Detail, *, streams: bool = True, inputs: str = "a") -> Ask:
    def ask(target: Target) -> None:
        expected = PREFIX + (detail if isinstance(detail, str) else detail(target))
        body = {"inputs": inputs, "parameters": _asked(parameters, target)}
        for path in ("/generate", "/"):
            native_error(target.post(path, body), 422, expected, "validation")
        if streams:
            found = events(ok(target.post("/generate_stream", body)))
            same(found, [{"error": expected, "error_type": "validation"}], "events")

    return ask


def _streamed(parameters: dict[str, Any], detail: str) -> Ask:
    def ask(target: Target) -> None:
        found = events(ok(target.post("/generate_stream", {"inputs": "a", "parameters": parameters})))
        same(found, [{"error": PREFIX + detail, "error_type": "validation"}], "events")

    return ask


def _whole(parameters: dict[str, Any], detail: Detail) -> Ask:
    inner = _refused(parameters, detail, streams=False)

    def ask(target: Target) -> None:
        if target.limit("max_best_of") < 2:
            raise Inapplicable("max_best_of is 1")
        inner(target)

    return ask


def _limit(name: str, more: int = 0) -> Callable[[Target], int]:
    return lambda target: target.limit(name) + more


def _too_many_stops(target: Target) -> list[str]:
    return ["x"] * (target.limit("max_stop_sequences") + 1)


def _stops(target: Target) -> str:
    most = target.limit("max_stop_sequences")
    return f"`stop` supports up to {most} stop sequences. Given: {most + 1}"


def _truncate(given: int | None = None) -> Callable[[Target], str]:
    def detail(target: Target) -> str:
        most = target.limit("max_input_tokens")
        said = most + 1 if given is None else given
        return f"`truncate` must be strictly positive and less than {most}. Given: {said}"

    return detail


def _best_of(target: Target) -> str:
    most = target.limit("max_best_of")
    return f"`best_of` must be > 0 and <= {most}. Given: {most + 1}"


TEMPERATURE = "`temperature` must be strictly positive"
TOP_K = "`top_k` must be strictly positive"
TOP_P = "`top_p` must be > 0.0 and < 1.0"
TYPICAL_P = "`typical_p` must be > 0.0 and < 1.0"
REPETITION = "`repetition_penalty` must be strictly positive"
FREQUENCY = "`frequency_penalty` must be >= -2.0 and <= 2.0"
NEW_TOKENS = "`max_new_tokens` must be strictly positive"
SAMPLING = "you must use sampling when `best_of` is > 1"
SEED = "`seed` must not be set when `best_of` > 1"
STREAM_BEST_OF = "`best_of` != 1 is not supported when streaming tokens"
STREAM_DETAILS = "`decoder_input_details` == true is not supported when streaming tokens"

RULES = table(
    "refusals", "a_broken_rule_is_told_in_tgis_words", "1.3", TGI,
    {
        "temperature 0": _refused({"temperature": 0}, TEMPERATURE),
        "temperature -0.5": _refused({"temperature": -0.5}, TEMPERATURE),
        "repetition_penalty 0": _refused({"repetition_penalty": 0.0}, REPETITION),
        "repetition_penalty -1": _refused({"repetition_penalty": -1}, REPETITION),
        "frequency_penalty 2.1": _refused({"frequency_penalty": 2.1}, FREQUENCY),
        "frequency_penalty -2.1": _refused({"frequency_penalty": -2.1}, FREQUENCY),
        "top_k 0": _refused({"top_k": 0}, TOP_K),
        "top_k -1": _refused({"top_k": -1}, TOP_K),
        "top_p 0": _refused({"top_p": 0}, TOP_P),
        "top_p 1.1": _refused({"top_p": 1.1}, TOP_P),
        "top_p -0.1": _refused({"top_p": -0.1}, TOP_P),
        "typical_p 0": _refused({"typical_p": 0}, TYPICAL_P),
        "typical_p 1.1": _refused({"typical_p": 1.1}, TYPICAL_P),
        "max_new_tokens 0": _refused({"max_new_tokens": 0}, NEW_TOKENS),
        "stop, too many": _refused({"stop": _too_many_stops}, _stops),
        "truncate 0": _refused({"truncate": 0}, _truncate(0)),
        "truncate, too much": _refused({"truncate": _limit("max_input_tokens", 1)}, _truncate()),
        "inputs empty": _refused({}, "`inputs` cannot be empty", inputs=""),
        "best_of, too many": _refused({"best_of": _limit("max_best_of", 1)}, _best_of, streams=False),
        "best_of without sampling": _whole({"best_of": 2}, SAMPLING),
        "best_of with a seed": _whole({"best_of": 2, "do_sample": True, "seed": 1}, SEED),
        "best_of in a stream": _streamed({"best_of": 2}, STREAM_BEST_OF),
        "best_of 0 in a stream": _streamed({"best_of": 0}, STREAM_BEST_OF),
        "decoder_input_details in a stream": _streamed({"decoder_input_details": True}, STREAM_DETAILS),
    },
)  # fmt: skip
ORDER = table(
    "refusals", "the_first_broken_rule_speaks", "1.3.1", TGI,
    {
        "best_of, then details": _streamed({"best_of": 2, "decoder_input_details": True}, STREAM_BEST_OF),
        "details, then temperature": _streamed({"decoder_input_details": True, "temperature": 0}, STREAM_DETAILS),
        "best_of's limit, then temperature": _refused(
            {"best_of": _limit("max_best_of", 1), "temperature": 0}, _best_of, streams=False
        ),
        "sampling, then repetition": _whole({"best_of": 2, "repetition_penalty": 0}, SAMPLING),
        "temperature, then repetition": _refused({"temperature": 0, "repetition_penalty": 0}, TEMPERATURE),
        "repetition, then frequency": _refused({"repetition_penalty": 0, "frequency_penalty": 3}, REPETITION),
        "frequency, then top_p": _refused({"frequency_penalty": 3, "top_p": 0}, FREQUENCY),
        "top_p, then typical_p": _refused({"top_p": 0, "typical_p": 0}, TOP_P),
        "typical_p, then top_k": _refused({"typical_p": 0, "top_k": 0}, TYPICAL_P),
        "top_k, then max_new_tokens": _refused({"top_k": 0, "max_new_tokens": 0}, TOP_K),
        "max_new_tokens, then stop": _refused({"max_new_tokens": 0, "stop": _too_many_stops}, NEW_TOKENS),
        "stop, then seed": _whole({"best_of": 2, "top_k": 3, "seed": 1, "stop": _too_many_stops}, _stops),
        "seed, then top_n_tokens": _whole({"best_of": 2, "top_k": 3, "seed": 1, "top_n_tokens": 10**6}, SEED),
        "inputs, then truncate": _refused({"truncate": 0}, "`inputs` cannot be empty", inputs=""),
        "truncate, then length": _refused({"truncate": 0, "max_new_tokens": 10**6}, _truncate(0)),
    },
)  # fmt: skip


@check("1.3")
def too_many_top_tokens(target: Target) -> None:
    response = status(target.post("/generate", {"inputs": "a", "parameters": {"top_n_tokens": 100_000}}), 422)
    error = str(json_of(response)["error"])
    most = error.partition("<= ")[2].partition(".")[0]
    same(error, f"{PREFIX}`top_n_tokens` must be >= 0 and <= {int(most)}. Given: 100000", "error")
    ok(target.post("/generate", {"inputs": "a", "parameters": {"top_n_tokens": int(most), "max_new_tokens": 1}}))


def _text_of(target: Target, count: int) -> str:
    """A text of exactly `count` tokens."""

    def length(words: int) -> int:
        return len(ok(target.post("/tokenize", {"inputs": " a" * words})).json())

    start = length(10)
    text = " a" * (count - start + 10)
    if len(ok(target.post("/tokenize", {"inputs": text})).json()) != count:
        raise Inapplicable(f"no simple text of {count} tokens")
    return text


@check("1.3.2")
def prompt_and_answer_together_are_too_long(target: Target) -> None:
    most, prompt = target.limit("max_total_tokens"), target.limit("max_input_tokens")
    count = most - prompt + 1
    if count > 1024:
        raise Inapplicable("max_total_tokens is far beyond max_input_tokens")
    body = {"inputs": _text_of(target, prompt), "parameters": {"max_new_tokens": count}}
    expected = (
        f"{PREFIX}`inputs` tokens + `max_new_tokens` must be <= {most}. "
        f"Given: {prompt} `inputs` tokens and {count} `max_new_tokens`"
    )
    native_error(target.post("/generate", body), 422, expected, "validation")
    ok(target.post("/generate", {**body, "parameters": {"max_new_tokens": count - 1}}))


@check("1.3.2")
def the_prompt_alone_is_too_long(target: Target) -> None:
    most, prompt = target.limit("max_total_tokens"), target.limit("max_input_tokens")
    text = _text_of(target, prompt + 1)
    expected = f"{PREFIX}`inputs` must have less than {prompt} tokens. Given: {prompt + 1}"
    native_error(target.post("/generate", {"inputs": text}), 422, expected, "validation")
    if most == prompt + 1:
        longer = {"inputs": _text_of(target, most + 1)}
        expected = (
            f"{PREFIX}`inputs` tokens + `max_new_tokens` must be <= {most}. "
            f"Given: {most + 1} `inputs` tokens and 0 `max_new_tokens`"
        )
        native_error(target.post("/generate", longer), 422, expected, "validation")


@check("9.1", WEIR)
def the_real_number_of_new_tokens_is_checked(target: Target) -> None:
    most, count = target.limit("max_total_tokens"), 10_000_000
    response = status(target.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": count}}), 422)
    message = message_of(json_of(response))
    start = f"{PREFIX}`inputs` tokens + `max_new_tokens` must be <= {most}. Given: "
    same(message[: len(start)], start, "the message's beginning")
    same(message.rpartition(" and ")[2], f"{count} `max_new_tokens`", "the message's end")


@check("9.9", WEIR)
def an_unknown_adapter_is_refused(target: Target) -> None:
    response = target.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "no-such-adapter"}})
    status(response, 422)
    same(json_of(response)["error_type"], "validation", "error_type")


@check("9.4", WEIR)
def our_own_parameters_have_bounds(target: Target) -> None:
    for parameters in ({"min_p": 1.5}, {"min_p": -0.1}, {"stop_token_ids": [2**32 - 1]}):
        response = status(target.post("/generate", {"inputs": "a", "parameters": parameters}), 422)
        same(json_of(response)["error_type"], "validation", f"error_type of {parameters}")
