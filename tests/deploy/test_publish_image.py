"""scripts/publish_image.sh with stand-ins for docker, aws, soci and skopeo: what is asked of whom, in which order."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
URI = "111122223333.dkr.ecr.eu-west-1.amazonaws.com/team/weir"
IMAGE = f"{URI}:0123456789ab-cuda"
DIGEST = "sha256:" + "ab" * 32
STAND_IN = f"""#!{sys.executable} -IS
import pathlib, sys
log = pathlib.Path("log")
words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with log.open("a") as file:
    print(*words, file=file)
line, before = " ".join(words), log.read_text()
if "describe-images" in line:
    if "docker push" not in before and not pathlib.Path("pushed").exists():
        sys.exit("ImageNotFoundException")
    print("{DIGEST}\\t2600000000")
elif "imageScanStatus.status" in line:
    states = pathlib.Path("states").read_text().split()
    asked = before.count("imageScanStatus.status")
    state = states[min(asked, len(states)) - 1]
    if state == "absent":
        sys.exit("ScanNotFoundException")
    print(state)
elif "describe-image-scan-findings" in line:
    print(pathlib.Path("scan").read_text())
"""


@pytest.fixture
def publish(tmp_path):
    """Publishes weir:cuda from a copy of the tree; the scan goes through these states and finds these severities."""
    (tmp_path / "scripts").mkdir()
    for script in ("publish_image.sh", "scan_gate.py"):
        shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    (tmp_path / "container").mkdir()
    (tmp_path / "container/scan_allowances.json").write_text("[]")
    programs = tmp_path / "bin"
    programs.mkdir()

    def run(*states: str, findings: tuple[str, ...] = (), tools: tuple[str, ...] = ("soci", "skopeo")):
        for name in ("docker", "aws", *tools):
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        (programs / "python3").symlink_to(sys.executable)
        (tmp_path / "states").write_text(" ".join(states))
        found = [{"name": f"CVE-{i}", "severity": severity} for i, severity in enumerate(findings)]
        scan = {"imageScanStatus": {"status": states[-1]}, "imageScanFindings": {"findings": found}}
        (tmp_path / "scan").write_text(json.dumps(scan))
        environ = {"PATH": f"{programs}:/usr/bin:/bin", "SCAN_POLL_S": "0", "HOME": os.environ["HOME"]}
        command = [tmp_path / "scripts/publish_image.sh", "cuda", URI, "0123456789ab"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
        log = tmp_path / "log"
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def test_it_is_tagged_pushed_scanned_and_indexed_in_that_order(publish, tmp_path):
    done, log = publish("absent", "IN_PROGRESS", "COMPLETE", findings=("HIGH",))
    assert done.returncode == 0, done.stderr
    steps = [
        f"docker tag weir:cuda {IMAGE}", f"docker push {IMAGE}", f"imageDigest={DIGEST} --no-paginate",
        f"skopeo copy docker://{IMAGE} oci-archive:", "soci convert --standalone", f"docker://{IMAGE}-soci",
    ]  # fmt: skip
    places = [next(place for place, line in enumerate(log) if step in line) for step in steps]
    assert places == sorted(places)
    assert all("--repository-name team/weir" in line for line in log if line.startswith("aws"))
    detail = json.loads((tmp_path / "imageDetail-cuda.json").read_text())
    assert detail == {"ImageURI": IMAGE, "ImageDigest": DIGEST, "CompressedBytes": 2600000000}


def test_an_enhanced_scan_ends_the_waiting_too(publish):
    done, log = publish("PENDING", "ACTIVE")
    assert done.returncode == 0, done.stderr
    assert sum("imageScanStatus.status" in line for line in log) == 2


@pytest.mark.parametrize(
    ("states", "findings"),
    [(("COMPLETE",), ("CRITICAL",)), (("FAILED",), ()), (("UNSUPPORTED_IMAGE",), ()), (("IN_PROGRESS",), ())],
)
def test_what_the_gate_does_not_let_pass_gets_neither_index_nor_detail(publish, tmp_path, states, findings):
    done, log = publish(*states, findings=findings)
    assert done.returncode != 0
    assert not any("soci" in line for line in log)
    assert not (tmp_path / "imageDetail-cuda.json").exists()
    assert (tmp_path / "findings-cuda.json").exists()


def test_a_name_is_given_once(publish, tmp_path):
    (tmp_path / "pushed").touch()
    done, log = publish("COMPLETE")
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert not any(line.startswith("docker") for line in log)


def test_without_the_tools_there_is_no_index_and_it_says_so(publish, tmp_path):
    done, log = publish("COMPLETE", tools=("skopeo",))
    assert done.returncode == 0, done.stderr
    assert "NO SOCI INDEX" in done.stderr
    assert not any(line.startswith("skopeo") for line in log)
    assert (tmp_path / "imageDetail-cuda.json").exists()
