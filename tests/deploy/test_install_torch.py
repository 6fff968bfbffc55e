"""scripts/install_torch.sh: which build it takes, from wheels that are not torch; no network is asked."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "2.13.0"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an empty environment with pip."""
    directory = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True, timeout=120)
    return directory / "bin" / "python"


@pytest.fixture
def install(python, tmp_path):
    """Runs the script for a kind where pip finds these wheels: builds that they are, by builds in their names."""

    def run(kind: str, **wheels: str) -> subprocess.CompletedProcess[str]:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torch"], capture_output=True, check=True)
        for named, build in wheels.items():
            write_wheel(tmp_path, VERSION + {"plain": ""}.get(named, f"+{named}"), f"{VERSION}+{build}")
        lock = tmp_path / "lock.txt"
        lock.write_text(f"# packages\ntorch=={VERSION}\nnumpy==1.0\n")
        pip = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
        return subprocess.run(
            ["scripts/install_torch.sh", python, kind, lock],
            cwd=ROOT, env={"PATH": "/usr/bin:/bin", **pip}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def metadata() -> str:
        command = [python, "-c", "import importlib.metadata as m; print(m.version('torch'))"]
        return subprocess.check_output(command, text=True).strip()

    run.version = metadata
    return run


def write_wheel(directory: Path, version: str, told: str) -> None:
    info = f"torch-{version}.dist-info"
    requires = "Requires-Dist: a-package-that-nobody-has\n"
    with zipfile.ZipFile(directory / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/version.py", f"__version__ = {told!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n{requires}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(("kind", "build"), [("cpu", "cpu"), ("cuda", "cu130")])
def test_the_very_build_comes_first_and_without_what_it_requires(install, kind, build):
    done = install(kind, cpu="cpu", cu130="cu130", plain="cu130")
    assert done.returncode == 0, done.stderr
    assert install.version() == f"{VERSION}+{build}"


def test_cuda_is_content_with_pypis_wheel_though_a_cpu_build_lies_beside_it(install):
    done = install("cuda", cpu="cpu", plain="cu130")
    assert done.returncode == 0, done.stderr
    assert install.version() == VERSION


def test_a_wheel_that_is_another_build_than_its_name_promised_is_not_taken_for_cuda(install):
    done = install("cuda", plain="cpu")
    assert done.returncode != 0
    assert "from versions: 2.13.0)" in done.stderr, "it went on to the next source"


def test_a_cpu_never_gets_the_wheel_with_cudas_libraries(install, python):
    done = install("cpu", plain="cu130")
    assert done.returncode != 0
    with pytest.raises(subprocess.CalledProcessError):
        install.version()


def test_what_is_there_is_not_installed_again(install, python):
    assert install("cuda", plain="cu130").returncode == 0
    pip = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin"}
    again = subprocess.check_output(["scripts/install_torch.sh", python, "cuda"], cwd=ROOT, env=pip, text=True)
    assert again == f"==> torch {VERSION}+cu130 is installed\n"
