"""The launcher: which model, which address, and what gunicorn is told."""

import errno
import json
import os
import socket
import sys
from functools import partial

import pytest

from serving import launcher
from serving.adapter_names import parse
from serving.errors import ConfigurationError
from serving.launcher import (
    DEMO_MODEL,
    check_adapters,
    check_address,
    choose_model,
    gunicorn_arguments,
    launch,
    shard_count,
)
from serving.settings import Settings


@pytest.fixture
def became(monkeypatch, logging_restored):
    """What the process would have become: (program, arguments, environment)."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    return calls


def _gpus_of(directory, environ, devices, count=launcher._usable_gpus):
    """How many may be used of those that have a file in this directory, not in /dev."""
    return count(environ, directory)


@pytest.mark.parametrize("name", ["org/model", "gpt2", "s3://bucket/prefix", "s3://bucket"])
def test_the_named_model_is_chosen_and_nothing_is_asked_of_a_network(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    assert choose_model(str(tmp_path), tmp_path / "sagemaker").model_id == str(tmp_path)
    assert choose_model(name, tmp_path).model_id == name


@pytest.mark.parametrize("found", ["config.json", "adapter_config.json"])
def test_without_a_name_sagemakers_model_comes_before_the_demo_model(tmp_path, found):
    assert choose_model(None, tmp_path).model_id == str(DEMO_MODEL)
    (tmp_path / "model.safetensors").touch()
    assert choose_model(None, tmp_path).model_id == str(DEMO_MODEL)
    (tmp_path / found).write_text("{}")
    assert choose_model(None, tmp_path).model_id == str(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/directory", "./model", "org/model/extra", "s3://", "https://hub/org/model"])
def test_what_can_be_no_model_is_refused_at_once(tmp_path, name):
    with pytest.raises(ConfigurationError, match="there is no such directory") as error:
        choose_model(name, tmp_path)
    assert "--model-id" in str(error.value)


@pytest.mark.parametrize("adapter", ["org/model=./{}", "tgi=./{}", "weir-demo=./{}", "french=/no/such/directory"])
def test_an_adapter_that_cannot_be_is_refused_at_once(tmp_path, monkeypatch, adapter):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fr").mkdir()
    choice = choose_model("org/model", tmp_path)
    check_adapters(choice, [parse("french=./fr"), parse(f"it={tmp_path}/fr"), parse("org/french"), parse("b=org/b@v1")])
    with pytest.raises(ConfigurationError, match="`lora_adapters`: "):
        check_adapters(choice, [parse(adapter.format("fr"))])


@pytest.fixture
def four_gpus(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 4),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 4),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, 4),
        ({"NVIDIA_VISIBLE_DEVICES": "0,2,3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1,2", "NVIDIA_VISIBLE_DEVICES": "all"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5c89, GPU-77aa"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 4),
        ({"SM_NUM_GPUS": "2"}, 4),  # a setting's name: Settings reads it
    ],
)
def test_unsaid_the_model_is_shared_out_over_the_gpus_that_may_be_used(four_gpus, environ, count):
    assert shard_count(None, None, environ, four_gpus) == count
    assert shard_count(False, None, environ, four_gpus) == 1


@pytest.mark.parametrize(("sharded", "num_shard"), [(None, 3), (False, 3), (True, 3), (None, 1), (False, 1)])
def test_a_number_of_shards_that_was_said_holds(four_gpus, sharded, num_shard):
    assert shard_count(sharded, num_shard, {"CUDA_VISIBLE_DEVICES": "0"}, four_gpus) == num_shard


def test_without_a_gpu_one_device_has_the_whole_model(tmp_path):
    for environ in ({}, {"NVIDIA_VISIBLE_DEVICES": "all"}, {"CUDA_VISIBLE_DEVICES": "0,1"}):
        assert shard_count(None, None, environ, tmp_path) == 1


def test_sharding_over_one_device_is_refused(four_gpus, tmp_path):
    with pytest.raises(ConfigurationError, match="`sharded` is true but `num_shard` <= 1"):
        shard_count(True, 1, {}, four_gpus)
    with pytest.raises(ConfigurationError, match="`sharded` is true but only found 1 CUDA devices"):
        shard_count(True, None, {"CUDA_VISIBLE_DEVICES": "2"}, four_gpus)
    assert shard_count(True, None, {}, four_gpus) == 4


@pytest.mark.parametrize(
    ("flags", "variables", "chosen"),
    [
        (["--model-id=org/flag"], {"MODEL_ID": "org/variable", "HF_MODEL_ID": "org/sagemaker"}, "org/flag"),
        ([], {"MODEL_ID": "org/variable", "HF_MODEL_ID": "org/sagemaker"}, "org/variable"),
        ([], {"HF_MODEL_ID": "org/sagemaker"}, "org/sagemaker"),
        ([], {}, "the mounted one"),
    ],
)
def test_a_flag_comes_before_a_variable_that_before_sagemakers_and_that_before_what_is_mounted(
    became, tmp_path, flags, variables, chosen
):
    (tmp_path / "config.json").write_text("{}")
    launch([*flags, "--port=0", "--hostname=127.0.0.1"], variables, sagemaker_model=tmp_path)
    assert Settings.resolve([], became[0][2]).model_id == (str(tmp_path) if chosen == "the mounted one" else chosen)


@pytest.mark.parametrize(
    ("flags", "environ", "blocks", "warned"),
    [
        (["--num-shard=4"], {}, 16384, True),
        ([], {"SM_NUM_GPUS": "2"}, 16384, True),
        ([], {}, 16384, True),  # all GPUs that there are
        ([], {"CUDA_VISIBLE_DEVICES": "1"}, 16384, False),
        (["--num-shard=1"], {}, 16384, False),
        (["--device=cpu", "--num-shard=2"], {}, 16384, False),  # gloo has no need of it
        (["--num-shard=4"], {"NCCL_SHM_DISABLE": "1"}, 16384, False),
        (["--num-shard=4"], {}, 2**18, False),
    ],
)
def test_several_devices_want_shared_memory(became, four_gpus, monkeypatch, capsys, flags, environ, blocks, warned):
    monkeypatch.setattr(launcher, "_usable_gpus", partial(_gpus_of, four_gpus))
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, blocks, 0, 0, 0, 0, 0, 0, 255)))
    launch([*flags, "--model-id=org/model", "--port=0", "--hostname=127.0.0.1"], environ)
    lines = [line for line in capsys.readouterr().out.splitlines() if "/dev/shm" in line]
    assert len(became) == 1, "it starts all the same"
    assert len(lines) == warned
    if warned:
        assert " WARN " in lines[0]
        assert "64 MiB" in lines[0]
        assert "--shm-size 1g" in lines[0]


def test_a_system_without_shared_memory_starts(became, monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "SHARED_MEMORY", tmp_path / "missing")
    launch(["--num-shard=2", "--model-id=org/model", "--port=0", "--hostname=127.0.0.1"], {})
    assert len(became) == 1


def test_a_busy_port_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Port {port} is in use"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    check_address("127.0.0.1", 0)


def test_an_address_that_is_not_ours_is_refused():
    with pytest.raises(ConfigurationError, match="Cannot listen at"):
        check_address("192.0.2.1", 0)


def test_gunicorn_is_told_what_keeps_it_calm():
    arguments = gunicorn_arguments(Settings(max_concurrent_requests=10, graceful_termination_timeout=25, port=81))
    assert arguments[-1] == "serving.wsgi:application()"
    assert "--workers=1" in arguments
    assert "--worker-connections=296" in arguments, "idle connections must not keep health checks out"
    assert "--bind=0.0.0.0:81" in arguments
    assert "--no-control-socket" in arguments
    assert not any(argument.startswith("--preload") for argument in arguments)
    graceful = next(argument for argument in arguments if argument.startswith("--graceful-timeout="))
    assert int(graceful.partition("=")[2]) > 25


def test_an_ipv6_address_is_written_in_brackets():
    assert "--bind=[::1]:80" in gunicorn_arguments(Settings(hostname="::1", port=80))


def test_it_becomes_gunicorn_and_hands_the_settings_on(became, tmp_path, capsys):
    flags = [f"--model-id={tmp_path}", "--port=0", "--max-best-of=7", "--api-key=@@key", "--hostname=127.0.0.1"]
    launch(flags, {"PATH": "/bin", "MAX_BEST_OF": "3", "MODEL_ID": "other", "HF_TASK": "x"})
    program, arguments, environ = became[0]
    assert (program, arguments[1:3]) == (sys.executable, ["-m", "gunicorn"])
    assert environ["PATH"] == "/bin"
    settings = Settings.resolve([], environ)
    assert (settings.model_id, settings.max_best_of, settings.api_key) == (str(tmp_path), 7, "@key")
    assert not any("@key" in argument for argument in arguments), "command lines are for everybody to read"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["WARN", "INFO"]
    assert "HF_TASK" in lines[0]
    assert str(tmp_path) in lines[1]


def test_the_runtime_environment_is_told_when_asked_for(became, tmp_path, capsys):
    launch([f"--model-id={tmp_path}", "--port=0", "--env", "--json-output"], {})
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert json.loads(first["message"].partition(": ")[2])["gunicorn"]


def test_bad_usage_is_one_line_and_exits_2(became, capsys):
    assert launch(["--prot=80"], {}) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--port" in captured.err
    assert captured.out == ""
    assert became == []


def test_a_setting_that_is_too_long_for_the_system_is_named(monkeypatch, logging_restored, tmp_path, capsys):
    def refuse(*call) -> None:
        raise OSError(errno.E2BIG, "Argument list too long")

    monkeypatch.setattr(os, "execve", refuse)
    assert launch([f"--model-id={tmp_path}", "--port=0", f"--chat-template={'{' * 1000}"], {}) == 1
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith("Argument list too long; the longest setting is CHAT_TEMPLATE")
    )


def test_what_cannot_start_is_one_line_and_exits_1(became, capsys):
    assert launch(["--model-id=/no/such/directory"], {}) == 1
    assert capsys.readouterr().out.count("\n") == 1
    assert became == []


def test_help_and_version_exit_0(became, capsys):
    assert launch(["--help"], {}) == 0
    assert "--max-concurrent-requests" in capsys.readouterr().out
    assert launch(["--version"], {}) == 0
    assert became == []
