"""Virtual environments of the tests' own, for packages that cannot live beside our requirements."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENTS = Path(__file__).resolve().parents[1] / ".venv-clients"


def python_with(name: str, requirements: tuple[str, ...]) -> str:
    """The Python of such an environment, which is made if it is not there or has other requirements."""
    directory = ENVIRONMENTS / name
    python, mark = directory / "bin" / "python", directory / "requirements.sha256"
    wanted = hashlib.sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return str(python)
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True, timeout=120)
    pip = [sys.executable, "-m", "pip", f"--python={python}", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "install", "--no-compile", *requirements]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    if installed.returncode:
        shutil.rmtree(directory, ignore_errors=True)
        pytest.skip(f"pip could not install {' '.join(requirements)}: {installed.stderr.strip().splitlines()[-1]}")
    mark.write_text(wanted)
    return str(python)
