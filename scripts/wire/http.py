"""What holds for every route: methods, statuses, CORS, the key, health, identity, documents, metrics.

Knows no generation.
"""

import re
from urllib.parse import quote

from scripts.wire.suite import (
    TGI,
    WEIR,
    Ask,
    Differs,
    Inapplicable,
    Target,
    check,
    demand,
    empty,
    json_of,
    keys,
    native_error,
    ok,
    plain,
    same,
    status,
    table,
    typed,
)

POSTS = (
    "/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations", "/vertex",
    "/tokenize", "/chat_tokenize",
)  # fmt: skip
GETS = ("/info", "/v1/models", "/metrics", "/api-doc/openapi.json")
PUBLIC = ("/", "/health", "/ping")
INFO_KEYS = (
    "model_id", "model_sha", "model_pipeline_tag", "max_concurrent_requests", "max_best_of", "max_stop_sequences",
    "max_input_tokens", "max_total_tokens", "validation_workers", "max_client_batch_size", "router", "version", "sha",
    "docker_label",
)  # fmt: skip
VARY = "origin, access-control-request-method, access-control-request-headers"
NOT_JSON = "Expected request with `Content-Type: application/json`"
BAD_JSON = "Failed to parse the request body as JSON: "
BAD_TYPE = "Failed to deserialize the JSON body into the target type: "
TOO_LONG = "Failed to buffer the request body: length limit exceeded"
DEFAULT_LIMIT = 2_000_000  # of a body, in bytes
DURATION_BOUNDS = tuple(0.0001 * 1.5**k for k in range(1, 36))
HISTOGRAMS = (
    "tgi_request_duration", "tgi_request_validation_duration", "tgi_request_queue_duration",
    "tgi_request_inference_duration", "tgi_request_mean_time_per_token_duration", "tgi_request_generated_tokens",
    "tgi_request_input_length", "tgi_request_max_new_tokens", "tgi_batch_inference_duration",
    "tgi_batch_forward_duration", "tgi_batch_decode_duration", "tgi_batch_next_size",
)  # fmt: skip
COUNTERS = (
    "tgi_request_count", "tgi_request_success", "tgi_request_failure", "tgi_batch_inference_count",
    "tgi_batch_inference_success",
)  # fmt: skip
GAUGES = ("tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_queue_size")


@check("1.1")
def an_unknown_path_is_an_empty_404(target: Target) -> None:
    for path in ("/nowhere", "/generate/", "/Generate", "/v1", "/v2/models"):
        empty(target.get(path), 404)
        empty(target.post(path, {}), 404)


def _wrong_method(method: str, path: str, allowed: str) -> Ask:
    def ask(target: Target) -> None:
        response = target.ask(method, path)
        empty(response, 405)
        demand(allowed in response.headers.get("allow", ""), f"allow is {response.headers.get('allow')!r}")

    return ask


WRONG_METHODS = table(
    "http", "a_wrong_method_is_an_empty_405_with_allow", "1.1", TGI,
    {
        **{f"GET {path}": _wrong_method("GET", path, "POST") for path in POSTS if path != "/"},
        **{f"POST {path}": _wrong_method("POST", path, "GET") for path in ("/info", "/v1/models", "/metrics")},
        "PUT /": _wrong_method("PUT", "/", "GET"),
        "DELETE /generate": _wrong_method("DELETE", "/generate", "POST"),
        "PATCH /health": _wrong_method("PATCH", "/health", "GET"),
    },
)  # fmt: skip


@check("1.1")
def head_is_answered_wherever_get_is(target: Target) -> None:
    for path in (*PUBLIC, *GETS):
        empty(target.ask("HEAD", path), 200)


@check("1.12")
def health_is_an_empty_200(target: Target) -> None:
    for path in PUBLIC:
        empty(target.get(path), 200)


@check("1.10")
def info_has_its_keys_in_order(target: Target) -> None:
    info = json_of(ok(target.get("/info")))
    same(list(info)[: len(INFO_KEYS)], list(INFO_KEYS), "first keys of /info")


@check("1.10")
def info_has_values_of_the_right_types(target: Target) -> None:
    info = target.info
    for name in ("model_id", "router", "version"):
        typed(info[name], str, name)
    for name in ("model_sha", "model_pipeline_tag", "sha", "docker_label"):
        typed(info[name], (str, type(None)), name)
    for name in (name for name in INFO_KEYS if name.startswith("max_") or name == "validation_workers"):
        typed(info[name], int, name)
        demand(info[name] > 0, f"{name} is {info[name]}")
    demand(info["max_input_tokens"] < info["max_total_tokens"], "no room for an answer")


@check("1.11")
def models_lists_the_served_one(target: Target) -> None:
    models = json_of(ok(target.get("/v1/models")))
    keys(models, ["object", "data"], "models")
    same(models["object"], "list", "object")
    first = models["data"][0]
    same(list(first)[:4], ["id", "object", "created", "owned_by"], "first keys of a model")
    same(first["id"], target.info["model_id"], "id")
    same(first["object"], "model", "object of a model")
    typed(first["created"], int, "created")
    same(first["owned_by"], target.info["model_id"], "owned_by")


@check("9.8", WEIR)
def a_model_can_be_asked_for_by_name(target: Target) -> None:
    first = json_of(ok(target.get("/v1/models")))["data"][0]
    # As clients write it: the id may be a path, whose slashes are quoted.
    same(json_of(ok(target.get(f"/v1/models/{quote(first['id'], safe='')}"))), first, "the model")
    unknown = status(target.get("/v1/models/no-such-model"), 404)
    same(json_of(unknown)["error"]["code"], "model_not_found", "code")


# -- CORS


@check("1.2")
def every_answer_may_be_read_by_browsers(target: Target) -> None:
    answers = [target.get("/health"), target.get("/nowhere"), target.post("/generate", {}), target.get("/info")]
    origins = {answer.headers.get("access-control-allow-origin") for answer in answers}
    if origins == {None}:
        raise Inapplicable("the operator named origins")
    same(origins, {"*"}, "access-control-allow-origin")
    for answer in answers:
        same(answer.headers.get("vary"), VARY, "vary")


@check("1.2")
def options_are_answered_directly(target: Target) -> None:
    for path in ("/generate", "/nowhere", "/v1/chat/completions"):
        response = target.ask("OPTIONS", path, headers={"origin": "https://a.example"}, key=False)
        empty(response, 200)
        same(response.headers.get("access-control-allow-methods"), "GET,POST", "access-control-allow-methods")
        allowed = response.headers.get("access-control-allow-headers", "").split(",")
        demand("content-type" in allowed, f"access-control-allow-headers is {allowed}")


@check("9.10", WEIR)
def browsers_may_send_the_key(target: Target) -> None:
    allowed = target.ask("OPTIONS", "/generate", key=False).headers.get("access-control-allow-headers", "")
    demand("authorization" in allowed.split(","), f"access-control-allow-headers is {allowed!r}")


# -- The key


def _with_key(target: Target) -> str:
    if target.api_key is None:
        raise Inapplicable("no --api-key")
    return target.api_key


def _guarded(method: str, path: str) -> Ask:
    def ask(target: Target) -> None:
        key = _with_key(target)
        for wrong in (None, f"Bearer {key}x", "Bearer", f"Basic {key}", key):
            response = target.ask(method, path, json={"inputs": "x"}, key=False, headers={"authorization": wrong})
            status(response, 401)

    return ask


KEY = table(
    "http", "a_route_asks_for_the_key", "1.2", TGI,
    {f"POST {path}": _guarded("POST", path) for path in POSTS if path != "/chat_tokenize"},
)  # fmt: skip
KEY_EVERYWHERE = table(
    "http", "every_other_route_asks_for_the_key", "9.10", WEIR,
    {
        **{f"GET {path}": _guarded("GET", path) for path in (*GETS, "/docs", "/playground")},
        "POST /chat_tokenize": _guarded("POST", "/chat_tokenize"),
        "GET /nowhere": _guarded("GET", "/nowhere"),
        "PUT /health": _guarded("PUT", "/health"),
    },
)  # fmt: skip


@check("1.2")
def health_needs_no_key(target: Target) -> None:
    _with_key(target)
    for path in PUBLIC:
        for method in ("GET", "HEAD"):
            empty(target.ask(method, path, key=False), 200)


@check("9.10", WEIR)
def a_missing_key_is_told_in_json(target: Target) -> None:
    _with_key(target)
    response = target.post("/generate", {"inputs": "x"}, key=False)
    native_error(response, 401, json_of(response)["error"], "unauthorized")
    same(response.headers.get("www-authenticate"), "Bearer", "www-authenticate")
    chat = target.post("/v1/chat/completions", {}, key=False)
    demand(str(json_of(chat)["error"]), "a chat's 401 says nothing")


@check("9.10", WEIR)
def the_key_is_compared_with_its_case(target: Target) -> None:
    key = _with_key(target)
    if key.swapcase() == key:
        raise Inapplicable("the key has no letters")
    status(target.get("/info", headers={"authorization": f"Bearer {key.swapcase()}"}), 401)
    ok(target.get("/info", headers={"authorization": f"bearer {key}"}))


# -- Bodies that the framework refuses


def _framework(path: str, body: bytes, kind: str | None, expected: int, prefix: str) -> Ask:
    return lambda target: plain(target.post_bytes(path, body, kind), expected, prefix)


FRAMEWORK = table(
    "http", "a_body_that_cannot_be_read", "1.2", TGI,
    {
        **{f"{path}: no content type": _framework(path, b"{}", None, 415, NOT_JSON) for path in POSTS},
        **{f"{path}: text": _framework(path, b"{}", "text/plain", 415, NOT_JSON)
           for path in POSTS if path != "/invocations"},  # which takes it: see sagemaker.py
        **{f"{path}: form": _framework(path, b"a=b", "application/x-www-form-urlencoded", 415, NOT_JSON)
           for path in POSTS},
        **{f"{path}: cut": _framework(path, b'{"inputs": "a', "application/json", 400, BAD_JSON) for path in POSTS},
        **{f"{path}: empty": _framework(path, b"", "application/json", 400, BAD_JSON) for path in POSTS},
        **{f"{path}: words": _framework(path, b"words", "application/json", 400, BAD_JSON) for path in POSTS},
        **{f"{path}: {{}}": _framework(path, b"{}", "application/json", 422, BAD_TYPE) for path in POSTS},
        **{f"{path}: []": _framework(path, b"[]", "application/json", 422, BAD_TYPE) for path in POSTS},
        **{f"{path}: null": _framework(path, b"null", "application/json", 422, BAD_TYPE) for path in POSTS},
        "missing field": _framework("/generate", b"{}", "application/json", 422, BAD_TYPE + "missing field `inputs`"),
        "/invocations fits nothing": _framework(
            "/invocations", b'{"inputs": 1}', "application/json", 422,
            BAD_TYPE + "data did not match any variant of untagged enum SagemakerRequest",
        ),
    },
)  # fmt: skip


@check("1.2")
def other_json_types_are_taken(target: Target) -> None:
    body = b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}'
    for kind in ("application/json; charset=utf-8", "application/vnd.mine+json", "Application/JSON"):
        keys(json_of(ok(target.post_bytes("/generate", body, kind))), ["generated_text"], "answer")


def _types(body: str, *, taken: bool) -> Ask:
    def ask(target: Target) -> None:
        response = target.post_bytes("/generate", body.encode())
        if taken:
            keys(json_of(ok(response)), ["generated_text"], "answer")
        else:
            plain(response, 422, BAD_TYPE)

    return ask


def _parameter(spelled: str) -> str:
    return f'{{"inputs": "a", "parameters": {{"max_new_tokens": 1, {spelled}}}}}'


REFUSED_TYPES = {
    "inputs a number": '{"inputs": 1}',
    "inputs a list": '{"inputs": ["a"]}',
    "inputs null": '{"inputs": null}',
    "inputs twice": '{"inputs": "a", "inputs": "b"}',
    "parameters null": '{"inputs": "a", "parameters": null}',
    "parameters a list": '{"inputs": "a", "parameters": ["top_k"]}',
    **{spelled: _parameter(spelled) for spelled in (
        '"stop": null', '"stop": "a"', '"stop": [1]', '"top_k": 1.0', '"top_k": "1"', '"top_k": true',
        '"top_k": 2147483648', '"seed": -1', '"seed": 18446744073709551616', '"seed": 1.5', '"best_of": -1',
        '"top_p": "0.5"', '"top_p": true', '"temperature": []', '"do_sample": 1', '"do_sample": "true"',
        '"do_sample": null', '"details": null', '"watermark": null', '"decoder_input_details": null',
        '"truncate": -1', '"truncate": 1.0', '"top_n_tokens": -1', '"adapter_id": 1', '"seed": 1, "seed": 2',
    )},
}  # fmt: skip
TAKEN_TYPES = {
    "an unknown field": '{"inputs": "a", "unknown": {"a": [1]}, "parameters": {"max_new_tokens": 1, "unknown": 1}}',
    **{spelled: _parameter(spelled) for spelled in (
        '"temperature": 1', '"top_k": null', '"top_p": null', '"seed": null', '"seed": 18446744073709551615',
        '"best_of": null', '"return_full_text": null', '"truncate": null', '"top_n_tokens": null', '"grammar": null',
        '"adapter_id": null', '"typical_p": null', '"repetition_penalty": null', '"frequency_penalty": null',
        '"stop": []', '"frequency_penalty": -1',
    )},
}  # fmt: skip
TYPES = table(
    "http", "types_are_strict", "1.2", TGI, {name: _types(body, taken=False) for name, body in REFUSED_TYPES.items()}
) + table(
    "http", "types_are_taken", "1.2", TGI, {name: _types(body, taken=True) for name, body in TAKEN_TYPES.items()}
)  # fmt: skip


@check("1.3")
def parameters_may_be_left_out(target: Target) -> None:
    # An answer without them fills the context: its beginning will do.
    with target.post("/generate_stream", {"inputs": "Weir"}, stream=True) as response:
        first = next(ok(response).iter_lines(), b"")
    demand(first.startswith(b'data: {"index":1,'), f"the stream begins with {first[:100]!r}")


@check("1.2")
def a_body_over_the_limit_is_a_413(target: Target) -> None:
    response = target.post_bytes("/generate", b'{"inputs": "%b"}' % (b"a" * DEFAULT_LIMIT))
    if response.status_code == 422:
        raise Inapplicable("the operator allows longer bodies than the default")
    plain(response, 413, TOO_LONG)


# -- Documents and metrics


@check("1.1")
def docs_is_a_page(target: Target) -> None:
    response = target.get("/docs")
    status(response, 303)
    demand(response.headers.get("location", "").endswith("/docs/"), f"location is {response.headers.get('location')!r}")
    page = ok(target.get("/docs/"))
    demand(page.headers.get("content-type", "").startswith("text/html"), "the page is no HTML")


@check("1.1")
def the_openapi_document_names_the_routes(target: Target) -> None:
    document = ok(target.get("/api-doc/openapi.json")).json()
    demand(str(document["openapi"]).startswith("3."), f"openapi is {document['openapi']!r}")
    paths = set(POSTS) | {"/health", "/info", "/metrics", "/v1/models"}
    missing = paths - {"/vertex"} - set(document["paths"])
    demand(not missing, f"it lacks {sorted(missing)}")


@check("6", WEIR)
def the_playground_is_a_page(target: Target) -> None:
    page = ok(target.get("/playground"))
    demand(page.headers.get("content-type", "").startswith("text/html"), "the page is no HTML")


def _exposition(target: Target) -> dict[str, dict[str, float]]:
    """The samples of each family, after something happened."""
    target.generate(max_new_tokens=4)
    target.post("/generate", {"inputs": "a", "parameters": {"top_k": 0}})
    response = ok(target.get("/metrics"))
    same(response.headers.get("content-type"), "text/plain; charset=utf-8", "content-type")
    families: dict[str, dict[str, float]] = {}
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        lines = block.split("\n")
        helped, kind = re.fullmatch(r"# HELP (\w+) .+", lines[0]), re.fullmatch(r"# TYPE (\w+) (\w+)", lines[1])
        if helped is None or kind is None or helped[1] != kind[1]:
            raise Differs(f"a family begins with {lines[:2]}")
        families[f"{kind[1]} {kind[2]}"] = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines[2:]
        }
    return families


@check("4")
def metrics_have_their_names_and_types(target: Target) -> None:
    families = _exposition(target)
    expected = [*(f"{name} counter" for name in COUNTERS), *(f"{name} gauge" for name in GAUGES),
                *(f"{name} histogram" for name in HISTOGRAMS), "tgi_request_skipped_tokens summary"]  # fmt: skip
    missing = [family for family in expected if family not in families]
    demand(not missing, f"missing: {missing}")
    names = {name.partition("{")[0] for samples in families.values() for name in samples}
    suffixed = [name for name in names if name.endswith(("_total", "_created"))]
    demand(not suffixed, f"names with a suffix: {suffixed}")


@check("4")
def metrics_have_their_labels(target: Target) -> None:
    families = _exposition(target)
    demand('tgi_request_failure{err="validation"}' in families["tgi_request_failure counter"], "no err label")
    demand('tgi_batch_inference_count{method="prefill"}' in families["tgi_batch_inference_count counter"], "no method")
    quantiles = re.findall(r'quantile="([\d.]+)"', " ".join(families["tgi_request_skipped_tokens summary"]))
    same([float(quantile) for quantile in quantiles], [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0], "quantiles")


@check("4")
def histograms_have_their_buckets(target: Target) -> None:
    families = _exposition(target)

    def bounds(name: str) -> list[float]:
        inside = " ".join(families[f"{name} histogram"])
        return [float(bound) for bound in re.findall(rf'{name}_bucket{{le="([\d.e+-]+)"}}', inside)]

    for name in ("tgi_request_duration", "tgi_request_queue_duration"):
        found = bounds(name)
        close = len(found) == len(DURATION_BOUNDS) and all(
            abs(one - other) < 1e-4 * other for one, other in zip(found, DURATION_BOUNDS, strict=True)
        )
        demand(close, f"buckets of {name} are {found}")
    for name, last in (("tgi_request_input_length", "max_input_tokens"),
                       ("tgi_request_generated_tokens", "max_total_tokens"),
                       ("tgi_request_max_new_tokens", "max_total_tokens")):  # fmt: skip
        found = bounds(name)
        same(len(found), 100, f"number of buckets of {name}")
        demand(abs(found[-1] - target.limit(last)) < 1, f"the last bucket of {name} is {found[-1]}")
    same(bounds("tgi_batch_next_size"), [float(size) for size in range(1, 1025)], "buckets of tgi_batch_next_size")


@check("4")
def a_request_is_counted_once(target: Target) -> None:
    def count() -> float:
        return _exposition(target)["tgi_request_count counter"]["tgi_request_count"]

    first = count()
    same(count() - first, 2.0, "requests counted for two of them")


@check("4", WEIR)
def metrics_know_what_tgi_does_not(target: Target) -> None:
    names = " ".join(_exposition(target))
    for name in ("weir_time_to_first_token", "weir_inter_token", "weir_kv_blocks_used", "weir_prefix_hit_tokens"):
        demand(name in names, f"no {name}")
