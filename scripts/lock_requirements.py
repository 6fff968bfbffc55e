"""Writes the locked requirements from what is installed: what the tests ran with is what the image gets.

It must not know an index or a machine: names and versions only, without torch's build (its index decides that).
"""

import argparse
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ROOT / "container" / "requirements-cpu.txt"
DEVELOPMENT = ROOT / "container" / "requirements-dev.txt"
RUNTIME_HEAD = """\
# Written by `python -m scripts.lock_requirements` from an environment that passed the tests. What the server needs.
# Only the build of torch differs between CPU, CUDA and ROCm: scripts/install_torch.sh puts the right one in first.
"""
DEVELOPMENT_HEAD = """\
# Written by `python -m scripts.lock_requirements` from an environment that passed the tests. What the tests, the
# checks and the scripts need beyond requirements-cpu.txt.
"""


def main() -> int:
    """Write both files, or with --check say whether they are what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is stale")
    check: bool = parser.parse_args().check
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    # An image is asked for models in S3, too.
    runtime = closure([*project["dependencies"], *extras["sagemaker"]])
    builders = pyproject["build-system"]["requires"]
    development = closure([*extras["dev"], *builders]) - runtime
    stale = [
        path.name
        for path, text in (
            (RUNTIME, RUNTIME_HEAD + lines(runtime)),
            (DEVELOPMENT, DEVELOPMENT_HEAD + lines(development)),
        )
        if not _write(path, text, check=check)
    ]
    if stale:
        print(f"Not what is installed: {', '.join(stale)}; run `python -m scripts.lock_requirements`.")
    return 1 if stale else 0


def closure(requirements: Iterable[str]) -> set[str]:
    """The canonical names of everything that these requirements install here. Raises PackageNotFoundError."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            wanted = Requirement(line)
            if any(_applies(wanted, extra) for extra in ("", *requirement.extras)):
                waiting.append(wanted)
    return found


def lines(names: Iterable[str]) -> str:
    """Pinned requirements, torch first, the others in order."""
    ordered = sorted(names, key=lambda name: (name != "torch", name))
    return "".join(f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n" for name in ordered)


def _applies(requirement: Requirement, extra: str) -> bool:
    environment = {**{key: str(value) for key, value in default_environment().items()}, "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def _write(path: Path, text: str, *, check: bool) -> bool:
    if check:
        return path.is_file() and path.read_text(encoding="utf-8") == text
    path.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
