"""The SageMaker SDKs, as they are, send what a dry run prints. Each lives in an environment of its own."""

import hashlib
import shutil
import subprocess
import sys

import pytest
from deploy.endpoints.conftest import REGION, ROLE, ROOT
from deploy.endpoints.test_life_cycle import printed_calls, what_is_there

ENVIRONMENTS = ROOT / ".venv-clients"
REQUIREMENTS = {
    "sdk2": ("sagemaker>=2.257,<3", "click>=8.1"),
    # Of v3 the part with the resource classes; the whole is a gigabyte.
    "sdk3": ("sagemaker-core>=2.27,<3", "click>=8.1"),
}
COMMON = ("--image-uri", "image:1", "--role-arn", ROLE, "--region", REGION, "--model-data", "s3://models/llama/")
COMMON += ("--model-size", "16", "--cuda-version", "13.0", "--instance-type", "ml.g4dn.xlarge", "--poll", "0.01")
FLAGS = ("--", "--max-concurrent-requests", "64", "--cors-allow-origin", "https://Example.org")
KINDS = {
    "realtime": ("--autoscale", "1:2"),
    "async": ("--kind", "async", "--async-output", "s3://answers/", "--success-topic", "arn:aws:sns:x:1:y"),
    "component": ("--kind", "component", "--component", "llama", "--accelerators", "1", "--cpus", "2"),
    "adapter": ("--kind", "adapter", "--adapter", "french", "--adapter-data", "s3://models/french.tar.gz"),
}


def python_of(via):
    """The Python of an SDK's environment, which is made if it is not there or has other requirements."""
    directory = ENVIRONMENTS / f"sagemaker_{via}"
    python, mark = directory / "bin" / "python", directory / "requirements.sha256"
    wanted = hashlib.sha256("\n".join((sys.version, *REQUIREMENTS[via])).encode()).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return str(python)
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True, timeout=120)
    pip = [sys.executable, "-m", "pip", f"--python={python}", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "install", "--no-compile", *REQUIREMENTS[via]]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    if installed.returncode:
        shutil.rmtree(directory, ignore_errors=True)
        pytest.skip(f"pip could not install {REQUIREMENTS[via]}: {installed.stderr.strip().splitlines()[-1]}")
    mark.write_text(wanted)
    return str(python)


@pytest.mark.timeout(900)  # the first time its environment is made
@pytest.mark.parametrize(
    ("via", "kind"),
    [("sdk2", "realtime"), ("sdk2", "async"), *[("sdk3", kind) for kind in KINDS]],
)
def test_an_sdk_sends_what_a_dry_run_prints(via, kind, run, aws):
    python = python_of(via)
    if kind == "adapter":
        run("deploy", *COMMON, "--kind", "component", aws=aws)
        aws.calls.clear()
    arguments = (*COMMON, "--via", via, *KINDS[kind])
    done = run("deploy", *arguments, *FLAGS, aws=aws, python=python)
    assert "invoke.py --name weir" in done.out
    assert aws.changes() == printed_calls(run("deploy", *arguments, "--dry-run", *FLAGS).out)
    assert aws.others == []  # no bucket was made, no code uploaded
    run("teardown", "--yes", "--poll", "0.01", aws=aws, python=python)
    assert not any(what_is_there(aws).values())
