"""`weir plan` against reality: what the runner process then holds, and what its options do."""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from models.cases import CASES, FALLBACK_CASES, randomized
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from serving.planning.command import main
from serving.runner.footprint import predict
from serving.runner.frames import RunnerOptions
from serving.runner.remote import RunnerProcess

_MEDIUM = {
    "vocab_size": 24000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**_MEDIUM),
    "tied": Qwen2Config(**_MEDIUM, tie_word_embeddings=True),
    "experts": Qwen3MoeConfig(**_MEDIUM, head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=352),
}
ROWS, CONTEXT = 16, 2048


def planned(*arguments):
    """The command's exit code and its JSON, from a process of its own: what it holds is part of the plan."""
    command = [sys.executable, "-m", "serving", "plan", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def anonymous_bytes(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


class PeakOfChildren(threading.Thread):
    """The most anonymous memory that a runner held while the block ran, once it was more than a copy of us."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self._done = 0, threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self.join()

    def run(self):
        while not self._done.wait(0.002):
            for child in psutil.Process().children():
                with contextlib.suppress(OSError):
                    if b"serving.runner.process" not in Path(f"/proc/{child.pid}/cmdline").read_bytes():
                        continue
                    self.peak = max(self.peak, anonymous_bytes(child.pid))


@pytest.mark.parametrize("name", MODELS)
def test_what_the_runner_holds_is_what_was_planned(name, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16).save_pretrained(tmp_path)
    code, plan = planned(
        tmp_path, "--device", "cpu", "--memory", 64, "--context", CONTEXT, "--concurrency", ROWS
    )  # fmt: skip
    assert code == 0
    options = RunnerOptions(
        model_dir=str(tmp_path), device="cpu", max_rows=ROWS, max_step_tokens=512, max_total_tokens=CONTEXT,
        kv_cache_bytes=1 << 32,
    )  # fmt: skip
    with PeakOfChildren() as children:
        runner = RunnerProcess.start(options)
        runner.close()
    facts, footprint = runner.facts, plan["footprint"]
    assert facts.weight_bytes == pytest.approx(footprint["weight_bytes"], rel=0.01)
    assert facts.kv_bytes == footprint["kv_bytes_per_token"] * facts.block_size * facts.block_count
    assert children.peak == pytest.approx(plan["peak_bytes"], rel=0.1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    randomized(CASES["llama"]).save_pretrained(directory)
    return directory


def test_instances_stand_cheapest_first_and_one_that_cannot_share_the_heads_is_left_out(small):
    code, plan = planned(small)
    names = [row["instance"] for row in plan["instances"]]
    prices = [row["price"] for row in plan["instances"]]
    assert code == 0
    assert prices == sorted(prices)
    assert "ml.g5.xlarge" in names
    assert plan["instances"][0]["fits"] is True


def test_the_exit_code_says_whether_it_fits(small):
    code, plan = planned(small, "--instance", "ml.g5.xlarge", "--context", 200)
    assert code == 0
    most = plan["instances"][0]["most_concurrency"]
    # More requests need a larger step, too: what is left to the cache shrinks a little.
    assert planned(small, "--instance", "ml.g5.xlarge", "--context", 200, "--concurrency", most)[0] == 1
    assert planned(small, "--instance", "ml.g5.xlarge", "--context", 200, "--concurrency", most // 2)[0] == 0
    assert planned(small, "--budget", 0.01)[0] == 1


def test_room_for_adapters_is_taken_from_the_cache_to_the_byte(small, capsys):
    asked = ["--instance", "ml.g5.xlarge", "--context", "200", "--json"]
    assert main([str(small), *asked]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([str(small), *asked, "--adapters", "5", "--adapter-rank", "16"]) == 0
    adapted = json.loads(capsys.readouterr().out)
    reserved = adapted["footprint"]["adapter_bytes"]
    numbers = (
        3 * 16 * (3 * (64 + 96) + (64 + 64) + 2 * (64 + 160) + (80 + 64))
    )  # 3 layers, rank 16: q to v, o, gate and up, down
    assert reserved == 5 * numbers * 4
    kept = plain["footprint"]["kv_bytes_per_token"]
    assert plain["instances"][0]["kv_tokens"] - adapted["instances"][0]["kv_tokens"] in (
        reserved // kept,
        reserved // kept + 1,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--instance", "ml.none"], "ml.none is not in the table: ml.g4dn.xlarge"),
        (["--context", "100000"], "the model has 256 positions"),
        (["--device", "cpu"], "say how much --memory"),
    ],
)
def test_bad_usage_is_one_line(small, arguments, message, capsys):
    assert main([str(small), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_table_for_people(small, capsys):
    assert main([str(small), "--context", "128", "--concurrency", "8"]) == 0
    printed = capsys.readouterr().out
    assert "asked for: 8 x 128 tokens" in printed
    assert "ml.g5.xlarge" in printed
    assert "on demand" in printed


def test_a_model_without_an_architecture_here_is_refused_in_one_line(tmp_path, capsys):
    randomized(FALLBACK_CASES["smollm3"]).save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "no architecture of our own for model type 'smollm3'" in capsys.readouterr().err


def test_a_model_is_weighed_once_for_every_number_of_gpus(small, monkeypatch):
    weighed = []

    def noted(*arguments, rank_count, **keywords):
        weighed.append(rank_count)
        return predict(*arguments, rank_count=rank_count, **keywords)

    monkeypatch.setattr("serving.planning.command.predict", noted)
    assert main([str(small), "--json"]) == 0
    assert weighed == [1, 4, 8]
