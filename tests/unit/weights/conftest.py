"""A hub and the command that downloads from it, in a process of its own as in a server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Downloaded:
    """What came of `weir download-weights`.

    Attributes:
        lines: its log; every line of it was JSON.
    """

    code: int
    lines: list[dict[str, Any]]
    stderr: str

    @property
    def directory(self) -> Path:
        assert self.code == 0, self
        return Path(self.lines[-1]["directory"])

    @property
    def error(self) -> str:
        """The one line that it failed with."""
        assert self.code == 1, self
        errors = [line["message"] for line in self.lines if line["level"] == "ERROR"]
        assert len(errors) == 1, self
        assert "\n" not in errors[0]
        assert "Traceback" not in self.stderr
        return errors[0]

    def files(self) -> set[str]:
        return {str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if path.is_file()}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture
def download(hub, tmp_path) -> Callable[..., Downloaded]:
    """Run the command; downloads are kept from one call to the next."""

    def download(model_id: str, *flags: str, **environ: str) -> Downloaded:
        clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(
            [sys.executable, "-m", "serving", "download-weights", "--json-output", model_id, *flags],
            cwd=ROOT,
            env={**clean, "HF_ENDPOINT": hub.url, **environ},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Downloaded(done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr)

    return download
