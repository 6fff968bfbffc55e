"""The image's entry point, run as it is run in the image, with a stand-in for the server."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "container" / "entrypoint.py"
STAND_IN = """
import json, os, signal, sys, time
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print(os.getpid(), flush=True)
    time.sleep(60)
print(json.dumps({"argv": sys.argv[1:], "environ": dict(os.environ), "pid": os.getpid()}))
"""


@pytest.fixture
def stand_in(tmp_path) -> dict[str, str]:
    """An environment in which `python -m serving` tells what it was given."""
    package = tmp_path / "packages" / "serving"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-IS", str(SCRIPT), *arguments]


def run(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environ, cwd="/", capture_output=True, text=True, timeout=30, check=False
    )


def told(environ: dict[str, str], *arguments: str) -> dict:
    done = run(environ, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture
def script(tmp_path):
    """The script as a module, and a root directory for it that is empty but for what the test puts there."""
    spec = importlib.util.spec_from_file_location("weir_entrypoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "root"
    root.mkdir()

    def prepared(*arguments, **environ):
        return module.prepared(arguments, environ, root)

    prepared.root = root
    return prepared


def put(root: Path, name: str, text: str = "") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "arguments", [[], ["serve"], ["--model-id", "org/model"], ["--port=1", "-g", "3"], ["serve", "--model-id=x"]]
)
def test_flags_and_the_word_serve_start_the_server(stand_in, arguments):
    assert told(stand_in, *arguments)["argv"] == arguments


def test_another_command_is_run_as_it_is(stand_in):
    done = run({**stand_in, "HF_TOKEN": ""}, "bash", "-c", 'echo "$0 $1 ${HF_TOKEN-unset}"', "a b", "c")
    assert (done.returncode, done.stdout) == (0, "a b c \n")


@pytest.mark.parametrize(("name", "code"), [("no-such-command", 127), ("/dev/null", 126)])
def test_what_cannot_be_run_is_said_in_one_line(stand_in, name, code):
    done = run(stand_in, name)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"Error: cannot run '{name}': ")
    assert done.stderr.count("\n") == 1


def test_it_becomes_the_server_and_the_server_gets_the_signal(stand_in):
    with subprocess.Popen(
        command("serve", "wait"), env=stand_in, cwd="/", stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert int(process.stdout.readline()) == process.pid
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 7
        finally:
            process.kill()


def test_it_loads_nothing_that_takes_time():
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print(*sys.modules)"
    modules = set(subprocess.check_output([sys.executable, "-IS", "-c", code], text=True).split())
    assert not modules & {"serving", "click", "subprocess", "json", "logging", "asyncio", "torch"}


def test_what_the_sdk_left_empty_is_unset(stand_in):
    given = {"HF_MODEL_ID": "", "SM_NUM_GPUS": "", "SAGEMAKER_PROGRAM": "", "HF_TOKEN": "", "HF_HOME": "/data"}
    kept = {"CUDA_VISIBLE_DEVICES": "", "MODEL_ID": ""}
    environ = told({**stand_in, **given, **kept}, "serve")["environ"]
    assert environ["HF_HOME"] == "/data"
    assert not {"HF_MODEL_ID", "SM_NUM_GPUS", "SAGEMAKER_PROGRAM", "HF_TOKEN"} & environ.keys()
    assert environ["CUDA_VISIBLE_DEVICES"] == "", "to see no GPU is something to say"


def test_sagemakers_variables_become_the_servers_settings(stand_in):
    """The entry point hands on what the settings' table reads itself."""
    given = {
        "HF_MODEL_ID": "org/model", "HF_MODEL_REVISION": "v2", "SM_NUM_GPUS": "4", "HF_MODEL_QUANTIZE": "fp8",
        "HF_MODEL_TRUST_REMOTE_CODE": "true", "SAGEMAKER_BIND_TO_PORT": "9000", "PORT": "80",
    }  # fmt: skip
    from serving.settings import Settings

    told_of = told({**stand_in, **given, "NCCL_SHM_DISABLE": "1"}, "serve")
    settings = Settings.resolve(told_of["argv"], told_of["environ"])
    assert (settings.model_id, settings.revision, settings.num_shard) == ("org/model", "v2", 4)
    assert (settings.quantize, settings.trust_remote_code, settings.port) == ("fp8", True, 9000)


def test_a_local_model_needs_no_hub(script):
    assert "HF_HUB_OFFLINE" not in script("serve").environ
    put(script.root, "opt/ml/model/config.json")
    assert script("serve").environ["HF_HUB_OFFLINE"] == "1"
    assert script("serve", HF_MODEL_ID="/opt/ml/model").environ["HF_HUB_OFFLINE"] == "1"
    assert script("serve", HF_MODEL_ID="//opt/ml/model/").environ["HF_HUB_OFFLINE"] == "1"
    assert script("serve", HF_MODEL_ID="").environ["HF_HUB_OFFLINE"] == "1"
    assert script("serve", HF_HUB_OFFLINE="").environ["HF_HUB_OFFLINE"] == "1"
    assert script("serve", HF_HUB_OFFLINE="0").environ["HF_HUB_OFFLINE"] == "0"


def test_a_model_of_the_hub_needs_it(script):
    put(script.root, "opt/ml/model/config.json")
    for start in (
        script("serve", HF_MODEL_ID="org/model"),
        script("--model-id", "org/model"),
        script("--model-id=org/model"),
        script("serve", MODEL_ID="s3://bucket/model/"),
    ):
        assert "HF_HUB_OFFLINE" not in start.environ
    put(script.root, "adapter/adapter_config.json")
    assert "HF_HUB_OFFLINE" not in script("--model-id", "/adapter").environ, "its base may be there"
    put(script.root, "adapter/config.json")
    assert "HF_HUB_OFFLINE" not in script("--model-id", "/adapter").environ, "it is an adapter all the same"


def test_a_local_model_with_an_adapter_of_the_hub_needs_it(script):
    put(script.root, "opt/ml/model/config.json")
    for start in (
        script("serve", LORA_ADAPTERS="b=/opt/b,org/a"),
        script("--lora-adapters=org/a@v2"),
        script("--lora-adapters", "a=org/a", "--lora-adapters", "b=/opt/b"),
    ):
        assert "HF_HUB_OFFLINE" not in start.environ
    assert script("serve", LORA_ADAPTERS="b=/opt/b, c=./c").environ["HF_HUB_OFFLINE"] == "1"


def test_a_relative_path_is_looked_up_where_the_server_will(script, tmp_path, monkeypatch):
    put(tmp_path, "here/models/mine/config.json")
    put(script.root, "models/other/config.json")
    monkeypatch.chdir(tmp_path / "here")
    assert script("--model-id", "models/mine").environ["HF_HUB_OFFLINE"] == "1"
    assert script("--model-id", "./models/mine/").environ["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in script("--model-id", "models/other").environ


@pytest.mark.parametrize(
    ("host", "library_path", "expected"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", None, "{compat}"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build",
            "/a:/b",
            "{compat}:/a:/b",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Sun May 12", "/a", "/a"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release", None, None),
        ("nothing that is known", None, None),
        (None, None, None),
    ],
)
def test_an_older_driver_gets_the_newer_library_that_the_image_brings(script, host, library_path, expected):
    compat = script.root / "usr/local/cuda/compat"
    put(compat, "libcuda.so.550.54.15")
    (compat / "libcuda.so.1").symlink_to("libcuda.so.550.54.15")
    if host is not None:
        put(script.root, "proc/driver/nvidia/version", host + "\nGCC version: 12.2.0\n")
    given = {} if library_path is None else {"LD_LIBRARY_PATH": library_path}
    wanted = None if expected is None else expected.format(compat=compat)
    for arguments in (["serve"], ["bash"]):
        assert script(*arguments, **given).environ.get("LD_LIBRARY_PATH") == wanted


def test_without_the_library_the_driver_is_left_alone(script):
    put(script.root, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.1.1  x")
    assert "LD_LIBRARY_PATH" not in script("serve").environ
