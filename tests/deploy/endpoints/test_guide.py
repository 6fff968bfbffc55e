"""docs/sagemaker.md: what it shows can be typed."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from deploy.endpoints.conftest import ROOT, environ_of, event_stream

GUIDE = (ROOT / "docs/sagemaker.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.M | re.S)
COMMANDS = [
    shlex.split(command)
    for language, block in BLOCKS
    if not language
    for command in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:80])
def test_every_command_is_one_that_the_scripts_take(command, run, load):
    python, script, *arguments = command
    assert python == "python"
    name = re.fullmatch(r"sagemaker/(\w+)\.py", script)[1]
    if name == "deploy":
        flags = arguments.index("--") if "--" in arguments else len(arguments)
        assert json.loads(run(name, *arguments[:flags], "--dry-run", *arguments[flags:]).out)
    else:
        load(name).argument_parser().parse_args(arguments)


def test_the_notebook_asks_and_streams(runtime, tmp_path):
    pytest.importorskip("boto3", reason="boto3 is not installed")
    [program] = [block for language, block in BLOCKS if language == "python"]
    parts = [{"choices": [{"delta": {"content": text}}]} for text in ("Schö", "n")]
    text = "".join(f"data: {json.dumps(part, ensure_ascii=False)}\n\n" for part in parts) + "data: [DONE]\n\n"
    runtime.answers += [
        (200, {}, json.dumps({"choices": [{"message": {"content": "whole"}}]}).encode()),
        (200, {"Content-Type": "application/vnd.amazon.eventstream"}, event_stream(text.encode(), 5)),
    ]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environ_of(tmp_path, runtime),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "whole\nSchön", done.stderr


def test_every_page_it_points_at_is_there():
    for link in re.findall(r"\]\(([^)#:]+)\)", GUIDE):
        assert (ROOT / "docs" / link).exists(), link
