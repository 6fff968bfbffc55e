"""The whole contract, put to real servers with the demo model; and the suite itself can fail."""

import http.server
import json
import subprocess
import sys
import threading

import pytest
import requests
from server.conftest import ROOT, SMALL, Server

from scripts import conformance
from scripts.wire.suite import Differs, Target, json_of, shortest_floats, verdicts

KEY = "Geheim-7"


def outcomes(url: str, key: str | None = None, *, tgi: bool = False) -> dict[str, tuple[str, str]]:
    target = Target(url, key)
    return {
        verdict.check.name: (verdict.outcome, verdict.reason)
        for verdict in verdicts(target, conformance.all_checks(), tgi=tgi)
    }


@pytest.fixture(scope="module")
def found():
    """What came of every row: with a key and the prompt's log probabilities, and without both."""
    both = []
    for flags, key in (([f"--api-key={KEY}", "--enable-prefill-logprobs"], KEY), ([], None)):
        server = Server([*SMALL, *flags], {})
        try:
            both.append(outcomes(server.wait_ready().url, key))
        finally:
            server.stop()
    return both


@pytest.mark.server
def test_no_row_fails(found):
    for rows in found:
        failed = {name: reason for name, (outcome, reason) in rows.items() if outcome == "FAIL"}
        assert not failed, json.dumps(failed, indent=1)


@pytest.mark.server
def test_every_row_applies_to_one_of_the_servers(found):
    skipped = [{name: reason for name, (outcome, reason) in rows.items() if outcome == "skip"} for rows in found]
    assert not skipped[0].keys() & skipped[1].keys(), skipped


class Wrong(http.server.BaseHTTPRequestHandler):
    """Answers everything with the same status and body."""

    answer = (200, "application/json", b"{}")

    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        status, kind, body = self.answer
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def wrong_server():
    """Start a server that answers everything with this."""
    servers = []

    def start(*answer):
        handler = type("Answering", (Wrong,), {"answer": answer})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def compact(value):
    return json.dumps(value, separators=(",", ":")).encode()


INFO = {
    "model_id": "m", "model_sha": None, "model_pipeline_tag": None, "max_concurrent_requests": 1, "max_best_of": 2,
    "max_stop_sequences": 4, "max_input_tokens": 9, "max_total_tokens": 10, "validation_workers": 1,
    "max_client_batch_size": 4, "router": "r", "version": "1", "sha": None, "docker_label": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ((200, "application/json", b"{}"), {"http.head_is"}),
        ((200, "application/json", compact(INFO)), {"http.head_is", "http.info_has"}),
        ((404, "text/plain", b""), {"http.an_unknown_path"}),
        ((500, "application/json", b'{"error":"Internal server error","error_type":"internal"}'), set()),
        ((200, "text/event-stream", b"data: [DONE]\n\n"), {"http.head_is"}),
        ((200, "text/plain", b""), {"http.head_is", "http.health_", "sagemaker.ping_is"}),
        ((422, "text/html", b"no"), {"guidance.a_bad_grammar_is_refused"}),
    ],
    ids=["empty object", "info", "not found", "fault", "stream", "empty", "refusal"],
)
def test_rows_hold_on_no_server_that_answers_everything_alike(wrong_server, answer, right):
    """`right` names the rows that such an answer does satisfy."""
    passed = {name for name, (outcome, _) in outcomes(wrong_server(*answer), KEY).items() if outcome == "pass"}
    assert not {name for name in passed if not name.startswith(tuple(right))}


@pytest.mark.parametrize("text", ["[-0.6196289]", "[0.1, 1e-7, -0.0]", '{"a":3.4028235e38}'])
def test_floats_of_fewest_digits_are_taken(text):
    shortest_floats(text)


@pytest.mark.parametrize("text", ["[-0.6196289, -0.6196289062]", "[0.10000000149011612]", "[1e39]", "[]", "[1]"])
def test_other_floats_or_none_differ(text):
    with pytest.raises(Differs):
        shortest_floats(text)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/conformance.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def answered(body: str) -> requests.Response:
    response = requests.Response()
    response.headers["content-type"] = "application/json"
    response._content = body.encode()
    return response


def test_any_character_may_stand_at_either_end_of_a_text_beside_floats_in_any_spelling():
    assert json_of(answered('{"text":"\\u0000a\\u0000","logprob":-1.50}')) == {"text": "\0a\0", "logprob": -1.5}


@pytest.mark.parametrize("body", ['{"a": 1.5}', '{"a":"\\u00e9"}', '{"a":1.5 }'])
def test_spaces_and_needless_escapes_differ(body):
    with pytest.raises(Differs, match="spelling"):
        json_of(answered(body))


def test_the_command_says_what_failed_and_ends_with_one_json_line(wrong_server):
    url = wrong_server(200, "application/json", compact(INFO))
    done = run("--url", url, "--only", "http.info_has", "--only", "http.health_is_an_empty_200")
    assert done.returncode == 1, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert (outcome["passed"], outcome["failed"], outcome["skipped"]) == (2, 1, 0)
    assert list(outcome["failures"]) == ["http.health_is_an_empty_200"]
    assert "FAIL  http.health_is_an_empty_200  (TGI's, section 1.12)" in done.stdout


def test_rows_of_ours_are_skipped_for_a_tgi(wrong_server):
    url = wrong_server(200, "application/json", b"{}")
    skipped = {name for name, (_, reason) in outcomes(url, tgi=True).items() if reason == "not TGI's"}
    assert skipped == {check.name for check in conformance.all_checks() if check.holds == "weir"}
    assert len(skipped) > 20


def test_no_two_rows_have_one_name():
    names = [check.name for check in conformance.all_checks()]
    assert len(names) == len(set(names)) > 250


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--url"),
        (["--url", "http://127.0.0.1:9"], "No server answers"),
        (["--url", "http://127.0.0.1:9", "--only", "nonsense"], "No check matches nonsense"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
