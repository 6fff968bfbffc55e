"""The locks of the images: one set of packages, and what each kind of device needs besides."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import lock_requirements
from scripts.lock_requirements import KINDS, closure, locked, main, unmet

ROOT = Path(__file__).parents[2]


def blocks(kind: str) -> tuple[list[str], str]:
    """The pins before the empty line, and everything after it."""
    first, _, shared = (ROOT / f"container/requirements-{kind}.txt").read_text().partition("\n\n")
    return [line for line in first.splitlines() if not line.startswith("#")], shared


def test_every_kind_has_the_same_packages_and_torch():
    (cpu, shared), (cuda, of_cuda), (rocm, of_rocm) = map(blocks, KINDS)
    assert shared == of_cuda == of_rocm
    assert "transformers==" in shared
    assert "torch" not in dict(line.split("==") for line in shared.split())
    assert cpu == [cuda[0]] == [rocm[0]]
    assert cpu[0].startswith("torch==")


def test_cuda_pins_torchs_libraries_its_compiler_and_the_number_formats():
    pins = locked("cuda")
    assert {"bitsandbytes", "triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= pins.keys()
    # The build of torch that scripts/install_torch.sh takes.
    assert pins["nvidia-cuda-runtime"].startswith("13.0.")
    assert "cuda) build=cu130" in (ROOT / "scripts/install_torch.sh").read_text()
    assert locked("rocm").keys() == {"bitsandbytes"}
    assert locked("cpu") == {}


def test_what_torch_requires_in_a_build_for_a_device_is_not_shared():
    requires = {"torch": ["filelock", "nvidia-cublas==13", "triton==3", "cuda-toolkit[all]==13"], "filelock": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock_requirements.importlib.metadata, "requires", requires.__getitem__)
        assert closure(["torch"]) == {"torch", "filelock"}


def test_an_extra_that_the_pins_do_not_meet_is_said():
    assert unmet("cuda", ["bitsandbytes>=0.49"], {"bitsandbytes": "0.50"}) == []
    for pins in ({"bitsandbytes": "0.48"}, {}):
        assert "does not meet bitsandbytes>=0.49" in unmet("cuda", ["bitsandbytes>=0.49"], pins)[0]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The project's lock files in a directory of their own, and `--check` over them."""
    (tmp_path / "container").mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name in (*KINDS, "dev"):
        lock = f"container/requirements-{name}.txt"
        (tmp_path / lock).write_text((ROOT / lock).read_text())
    monkeypatch.setattr(lock_requirements, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["lock_requirements", "--check"])
    return tmp_path / "container"


def test_check_is_content_with_what_is_there(copied):
    assert main() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("old", "new"), [("\nflask==", "\nflask==1."), ("\ntorch==", "\ntorch==1."), ("\n\n", "\n")])
def test_check_finds_one_lock_that_went_its_own_way(copied, capsys, kind, old, new):
    lock = copied / f"requirements-{kind}.txt"
    assert old in lock.read_text()
    lock.write_text(lock.read_text().replace(old, new, 1))
    assert main() == 1
    assert f"requirements-{kind}.txt is not what is installed" in capsys.readouterr().out


def test_check_asks_no_index(copied, monkeypatch):
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: pytest.fail("pip was asked"))
    assert main() == 0
