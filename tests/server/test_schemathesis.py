"""What the OpenAPI document of a running server says is true of the server: property-based, from the document alone.

At a tenth of its scale in an ordinary run; `make test-soak` runs it whole.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.server, pytest.mark.soak]

SCALE = float(os.environ.get("WEIR_TEST_SCALE", "1"))
EXAMPLES = max(5, round(5 * SCALE))  # of a route; what covers each bound of the schemas comes on top
HALF = "^/(v1/|chat_tokenize)"  # of the work, for two processes
METHODS = {"get", "head", "post", "put", "delete", "patch", "options", "trace"}
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "missing_required_header",
    "unsupported_method",
    "ignored_auth",
)


def start_run(url: str, directory: Path, *options: str) -> subprocess.Popen[str]:
    # One worker each: with threads, Python 3.11 counts the depth of its syntax trees wrongly.
    command = [
        Path(sys.executable).with_name("schemathesis"), "run", f"{url}/api-doc/openapi.json", "--no-color",
        "--workers=1", f"--max-examples={EXAMPLES}", "--phases=examples,coverage,fuzzing", "--seed=5",
        f"--checks={','.join(CHECKS)}", "--request-timeout=60", "--no-shrink", "--warnings=off", *options,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_document_is_true(start, tmp_path):
    # Short answers: nothing here depends on their length.
    server = start("--max-total-tokens=48", "--max-concurrent-requests=64").wait_ready()
    worker = server.processes()[1].pid
    document = server.get("/api-doc/openapi.json").json()
    operations = sum(len(METHODS & item.keys()) for item in document["paths"].values())
    halves = [start_run(server.url, tmp_path, f"--{kind}-path-regex={HALF}") for kind in ("include", "exclude")]
    tested = 0
    for half in halves:
        told, _ = half.communicate(timeout=250 * max(1.0, SCALE))
        assert half.returncode == 0, told[-12_000:]
        tested += int(re.findall(r"Tested: (\d+)", told)[0])
    assert tested == operations - 1  # it does not ask for the document itself again
    assert server.processes()[1].pid == worker
    assert server.get("/health").status_code == 200
    server.stop()
    assert not [line for line in server.remaining_lines() if "Traceback" in line or " ERROR " in line]


def test_a_document_that_is_not_true_is_found_out(start, tmp_path):
    server = start("--max-total-tokens=48").wait_ready()
    document = server.get("/api-doc/openapi.json").json()
    schema = document["paths"]["/info"]["get"]["responses"]["200"]["content"]["application/json"]
    schema["schema"] = {"type": "array"}
    (tmp_path / "wrong.json").write_text(json.dumps(document))
    command = [
        Path(sys.executable).with_name("schemathesis"), "run", tmp_path / "wrong.json", f"--url={server.url}",
        "--include-path=/info", "--phases=fuzzing", "--max-examples=1", "--no-color", f"--checks={','.join(CHECKS)}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout
    assert "is not of type" in done.stdout or "schema" in done.stdout.lower()
