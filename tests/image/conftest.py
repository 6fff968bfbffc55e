"""A container engine and an image that was built; without them these tests say so, loudly."""

import os
import subprocess

import pytest
from server.conftest import model_directory

from scripts.emulator.containers import find_engine

__all__ = ["model_directory"]

IMAGE = os.environ.get("WEIR_TEST_IMAGE", "weir:cpu")


@pytest.fixture(scope="session")
def engine() -> str:
    found = find_engine()
    if found is None:
        pytest.skip("no container engine: start Docker or Podman, then make image-cpu")
    return found


@pytest.fixture(scope="session")
def image(engine) -> str:
    if subprocess.run([engine, "image", "inspect", IMAGE], capture_output=True, check=False).returncode:
        pytest.skip(f"no image {IMAGE}: make image-cpu, or name another one in WEIR_TEST_IMAGE")
    return IMAGE


def pytest_terminal_summary(terminalreporter):
    """A letter among thousands is no warning that the image was not tested."""
    for report in terminalreporter.stats.get("skipped", []):
        if "tests/image/" in report.nodeid:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.write_line(f"IMAGE NOT TESTED: {report.nodeid}: {reason}", red=True, bold=True)
