"""Writes the locked requirements of every kind of image: what the tests ran with is what the images get.

It must not know an index or a machine: names and versions only, without torch's build (its index decides that).
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DESCRIPTION = """\
Write container/requirements-{cpu,cuda,rocm,dev}.txt. What CPU, CUDA and ROCm share is read from this environment. What
CUDA needs besides is resolved by pip (on Linux; it asks the index and downloads no wheel where the index serves
metadata alone), for torch's CUDA build and the extra `cuda` of pyproject.toml; for ROCm, only the extra `rocm`.
"""
ROOT = Path(__file__).resolve().parent.parent
KINDS = ("cpu", "cuda", "rocm")
BUILD = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b")  # what torch requires besides in a build for a device
HEADS = {
    "cpu": """\
# Written by `python -m scripts.lock_requirements` from an environment that passed the tests. What the server needs on a
# CPU. After the empty line: the same packages for CUDA and ROCm.
""",
    "cuda": """\
# Written by `python -m scripts.lock_requirements` from an environment that passed the tests. What the server needs on
# NVIDIA GPUs. Up to the empty line: torch, the CUDA libraries that its wheels require, and number formats; after it the
# same packages as on a CPU.
""",
    "rocm": """\
# Written by `python -m scripts.lock_requirements` from an environment that passed the tests. What the server needs on
# AMD GPUs. torch's wheels for ROCm are on PyTorch's index alone and bring their own triton in a version that they name:
# it is NOT locked here, and these pins have not been installed beside them yet. After the empty line: the same packages
# as on a CPU.
""",
    "dev": """\
# Written by `python -m scripts.lock_requirements` from an environment that passed the tests. What the tests, the
# checks and the scripts need beyond requirements-cpu.txt.
""",
}

Pins = dict[str, str]  # version by canonical name


def main() -> int:
    """Write all files, or with --check say, offline, whether they are what would be written."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, ask no index; exit with 1 on a stale file")
    check: bool = parser.parse_args().check
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    # An image is asked for models in S3, too.
    runtime = closure([*pyproject["project"]["dependencies"], *extras["sagemaker"]])
    development = closure([*extras["dev"], *pyproject["build-system"]["requires"]]) - runtime
    torch, shared = installed({"torch"}), installed(runtime - {"torch"})
    texts = {"dev": HEADS["dev"] + lines(installed(development))}
    problems: list[str] = []
    for kind in KINDS:
        besides = locked(kind) if check else resolved(kind, extras[kind], torch["torch"], shared)
        problems += unmet(kind, extras[kind], besides)
        texts[kind] = f"{HEADS[kind]}{lines(torch)}{lines(besides)}\n{lines(shared)}"
    for name, text in texts.items():
        if not check:
            path(name).write_text(text, encoding="utf-8")
        elif text != _read(name):
            problems.append(f"{path(name)} is not what is installed")
    for problem in problems:
        print(f"{problem}; run `python -m scripts.lock_requirements`.")
    return 1 if problems else 0


def path(name: str) -> Path:
    """Where the lock of a kind lies, or with `dev` that of the development tools."""
    return ROOT / "container" / f"requirements-{name}.txt"


def closure(requirements: Iterable[str]) -> set[str]:
    """The canonical names of everything that these requirements install here, but for what depends on torch's build.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or BUILD.match(name):
            continue
        seen.add(key)
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            wanted = Requirement(line)
            if any(_applies(wanted, extra) for extra in ("", *requirement.extras)):
                waiting.append(wanted)
    return found


def installed(names: Iterable[str]) -> Pins:
    """The versions here, without a build's name."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in names}


def resolved(kind: str, extra: list[str], torch: str, shared: Pins) -> Pins:
    """What a kind needs beyond torch and what all share, as pip resolves it. Raises CalledProcessError."""
    if kind == "cpu":
        return {}
    # PyPI's wheel for Linux is the CUDA build, and "===" passes over all others; nobody but PyTorch's index knows what
    # its ROCm wheels require.
    wanted = [f"torch==={torch}", *extra] if kind == "cuda" else ["--no-deps", *extra]
    with TemporaryDirectory() as directory:
        constraints = Path(directory, "constraints.txt")
        constraints.write_text(lines(shared))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report=-"]
        told = subprocess.check_output([*command, f"--constraint={constraints}", *wanted], text=True)
    metadata = [one["metadata"] for one in json.loads(told)["install"]]
    found = {str(canonicalize_name(one["name"])): one["version"] for one in metadata}
    return {name: version for name, version in found.items() if name not in shared and name != "torch"}


def locked(name: str) -> Pins:
    """What stands in a kind's lock between torch and the empty line."""
    first = _read(name).partition("\n\n")[0].splitlines()
    pins = dict(line.split("==") for line in first if not line.startswith("#"))
    return {package: version for package, version in pins.items() if package != "torch"}


def unmet(kind: str, extra: list[str], besides: Mapping[str, str]) -> list[str]:
    """What the extra of pyproject.toml asks for and the pins do not give."""
    return [
        f"{path(kind)} does not meet {requirement}"
        for requirement in map(Requirement, extra)
        if not requirement.specifier.contains(besides.get(canonicalize_name(requirement.name), "0"))
    ]


def lines(pins: Mapping[str, str]) -> str:
    """Pinned requirements in order."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def _applies(requirement: Requirement, extra: str) -> bool:
    environment = {**{key: str(value) for key, value in default_environment().items()}, "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def _read(name: str) -> str:
    return path(name).read_text(encoding="utf-8") if path(name).is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
