"""Clients that people use, as they are, against a real server with the demo model.

Each has a script in `clients/` whose `can_...` functions are the calls that are covered. A client that is not among
our own requirements lives in an environment of its own under `.venv-clients/`, made once.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from environments import python_with
from server.conftest import ROOT, SMALL, Server

KEY = "Geheim-7"
PERMITS = 4  # as many as the largest crowd of a script; so that one can also be too many
SCRIPTS = ROOT / "tests" / "server" / "clients"
TABLE = ROOT / "docs" / "clients.md"
# None: our own environment has it.
REQUIREMENTS: dict[str, tuple[str, ...] | None] = {
    "huggingface_hub": None,
    "openai": None,
    "text_generation": ("text-generation>=0.7,<0.8", "huggingface-hub<1"),
    "langchain": ("langchain-openai>=1.0,<2", "langchain-huggingface>=1.0,<2"),
    "litellm": ("litellm>=1.80,<2", "mcp>=2,<3"),  # it imports mcp as soon as a request has tools
}
# What a client would fetch from elsewhere, or send there.
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LANGSMITH_TRACING": "false",
}


def python_of(client: str) -> str:
    """The Python that has a client: ours, or one of its own."""
    requirements = REQUIREMENTS[client]
    return sys.executable if requirements is None else python_with(client, requirements)


def calls_of(client: str) -> dict[str, str]:
    """The functions of a client's script, and what each says that it covers."""
    tree = ast.parse((SCRIPTS / f"with_{client}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("can_")]
    return {function.name: ast.get_docstring(function) or "" for function in functions}


@pytest.fixture(scope="module")
def guarded_server():
    server = Server([*SMALL, f"--api-key={KEY}", f"--max-concurrent-requests={PERMITS}"], {})
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.mark.server
@pytest.mark.timeout(600)  # the first time its environment is made
@pytest.mark.parametrize("client", REQUIREMENTS)
def test_a_client_finds_what_it_expects(guarded_server, client, tmp_path):
    command = [python_of(client), SCRIPTS / f"with_{client}.py", guarded_server.url, KEY]
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LANG": "C.UTF-8", **QUIET}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert not outcome["failed"], "\n".join(f"{name}:\n{error}" for name, error in outcome["failed"].items())
    assert done.returncode == 0, done.stderr
    assert outcome["done"] == list(calls_of(client))


def test_the_documented_table_names_every_call():
    rows = re.findall(r"^\| `(\w+)` +\| (.+?) +\| `(can_\w+)` +\|$", TABLE.read_text(), re.MULTILINE)
    documented = {(client, name): call.strip("`") for client, call, name in rows}
    covered = {(client, name): call for client in REQUIREMENTS for name, call in calls_of(client).items()}
    assert documented == covered


def test_every_script_is_run():
    assert {path.stem for path in Path(SCRIPTS).glob("with_*.py")} == {f"with_{client}" for client in REQUIREMENTS}
