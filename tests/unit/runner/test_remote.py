"""The runner behind its pipe: a real process with a real model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from models.cases import CASES, randomized
from models.lora_files import random_adapter

from serving.errors import ModelError, RunnerDied
from serving.plan import NewAdapter, NewRow, Row, StepPlan
from serving.protocol import SamplingParams
from serving.runner.frames import RunnerOptions
from serving.runner.load import load_runner
from serving.runner.remote import Rank, RunnerProcess


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    randomized(CASES["llama"]).save_pretrained(directory)
    return RunnerOptions(
        model_dir=str(directory), device="cpu", dtype="float32", max_rows=2, max_step_tokens=32, kv_cache_bytes=1 << 20
    )


@pytest.fixture
def runner(options):
    process = RunnerProcess.start(options)
    yield process
    process.close()


def plan(position, token_ids, started):
    row = Row(sequence_id=1, token_ids=token_ids, position=position, block_table=[1, 2], sample=True)
    news = [NewRow(sequence_id=1, token_ids=token_ids, prompt_length=len(token_ids), sampling=SamplingParams())]
    return StepPlan(rows=[row], started=news if started else [])


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_results_equal_those_of_a_runner_in_process_and_come_in_order(options, runner):
    local = load_runner(options)
    assert runner.facts == local.facts
    plans = [plan(0, [5, 6, 7], True), plan(3, [8], False), plan(4, [9], False)]
    for each in plans:
        runner.submit(each)
        local.submit(each)
    for _ in plans:
        assert runner.collect().rows[0].choice.token_id == local.collect().rows[0].choice.token_id
    assert runner.alive()


def test_a_killed_process_is_noticed_while_idle_and_while_waited_for(runner):
    os.kill(runner.pids[0], signal.SIGKILL)
    wait_until(lambda: not runner.alive(), 2.0)
    with pytest.raises(RunnerDied):
        runner.collect()
    runner.close()
    assert not runner.alive()


def test_a_step_that_fails_in_the_device_process_is_a_death_not_a_hang(runner):
    runner.submit(plan(0, [10**6], True))  # no such token: the embedding refuses it
    with pytest.raises(RunnerDied, match="IndexError"):
        runner.collect()
    wait_until(lambda: not runner.alive())


def test_closing_ends_the_process(options):
    process = RunnerProcess.start(options)
    process.close()
    assert gone(process.pids[0])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_choose_what_one_chooses(options, size):
    alone = RunnerProcess.start(options)
    together = RunnerProcess.start(msgspec.structs.replace(options, rank_count=size))
    try:
        assert len(set(together.pids)) == size
        assert together.facts.rank_count == size
        ids, position = [5, 6, 7], 0
        for _ in range(12):
            chosen = set()
            for runner in (alone, together):
                runner.submit(plan(position, ids, position == 0))
                chosen.add(runner.collect().rows[0].choice.token_id)
            position += len(ids)
            ids = [*chosen]
            assert len(chosen) == 1
        assert together.alive()
    finally:
        alone.close()
        together.close()
    assert all(gone(pid) for pid in together.pids)


@pytest.fixture
def two_ranks(options):
    runner = RunnerProcess.start(msgspec.structs.replace(options, rank_count=2))
    yield runner
    runner.close()
    assert all(gone(pid) for pid in runner.pids)


def test_the_death_of_any_rank_is_noticed_while_idle(two_ranks):
    os.kill(two_ranks.pids[1], signal.SIGKILL)
    wait_until(lambda: not two_ranks.alive(), 5.0)


def test_the_death_of_a_rank_that_another_waits_for_in_a_step_is_noticed(two_ranks):
    os.kill(two_ranks.pids[1], signal.SIGSTOP)
    two_ranks.submit(plan(0, [5, 6, 7], True))
    assert two_ranks.alive()
    os.kill(two_ranks.pids[1], signal.SIGKILL)
    with pytest.raises(RunnerDied):
        two_ranks.collect()


def test_a_rank_that_cannot_start_ends_the_others(options):
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(ModelError, match="3 ranks cannot share the 8 heads"):
        RunnerProcess.start(msgspec.structs.replace(options, rank_count=3))
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_model_that_cannot_be_served_says_why_through_the_pipe(options, tmp_path):
    with pytest.raises(ModelError, match="not a directory"):
        RunnerProcess.start(RunnerOptions(model_dir=str(tmp_path / "nowhere")))


def test_the_process_dies_with_a_parent_that_was_killed(options):
    code = (
        "import sys, time, msgspec\n"
        "from serving.runner.frames import RunnerOptions\n"
        "from serving.runner.remote import Rank, RunnerProcess\n"
        f"options = msgspec.json.decode({msgspec.json.encode(options)!r}, type=RunnerOptions)\n"
        "print('pid', RunnerProcess.start(options).pids[0], flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        pid = next(int(line.split()[1]) for line in parent.stdout if line.startswith(b"pid "))
        parent.kill()
        parent.wait()
    wait_until(lambda: gone(pid), 5.0)


def test_the_worker_side_never_imports_torch():
    code = "import sys, serving.runner.remote; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_process_that_may_run_a_models_own_code_is_handed_no_secrets(monkeypatch):
    secret = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "API_KEY", "AWS_SECRET_ACCESS_KEY",
              "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")  # fmt: skip
    for name in (*secret, "WEIR_HARMLESS"):
        monkeypatch.setenv(name, "x")
    rank = Rank.start()
    try:
        # What a program was started with stands there from its first moment on.
        wait_until(lambda: b"serving.runner.process" in Path(f"/proc/{rank.process.pid}/cmdline").read_bytes())
        handed = psutil.Process(rank.process.pid).environ()
    finally:
        rank.channel.close()
        rank.process.wait()
    assert "WEIR_HARMLESS" in handed
    assert not {*secret} & {*handed}


@pytest.mark.parametrize("size", [1, 2])
def test_adapters_are_loaded_refused_used_and_dropped_by_plans(options, tmp_path, size):
    adapter = random_adapter(options.model_dir, tmp_path / "adapter", 3, spread=1.0)
    (tmp_path / "empty").mkdir()
    runner = RunnerProcess.start(msgspec.structs.replace(options, rank_count=size, max_adapters=1))

    def answer(plan):
        runner.submit(plan)
        return runner.collect()

    def first_choice(sequence_id, adapter):
        row = Row(sequence_id=sequence_id, token_ids=[5, 6, 7], position=0, block_table=[1], sample=True)
        new = NewRow(
            sequence_id=sequence_id, token_ids=[5, 6, 7], prompt_length=3, sampling=SamplingParams(), adapter=adapter
        )
        return answer(StepPlan(rows=[row], started=[new], finished=[sequence_id - 1])).rows[0].choice

    try:
        asked = [NewAdapter(1, str(tmp_path / "empty")), NewAdapter(2, str(adapter))]
        refused = answer(StepPlan(rows=[], adapters=asked)).refused
        assert list(refused) == [1]
        assert "adapter_config.json" in refused[1]
        assert str(tmp_path) not in refused[1]
        plain, adapted = first_choice(1, 0), first_choice(2, 2)
        assert adapted.logprob != pytest.approx(plain.logprob, abs=1e-3)
        assert first_choice(3, 0).logprob == pytest.approx(plain.logprob, abs=1e-5)
        again = StepPlan(rows=[], finished=[3], dropped=[2], adapters=[NewAdapter(3, str(adapter))])
        assert answer(again).refused == {}
        assert first_choice(4, 3).logprob == pytest.approx(adapted.logprob, abs=1e-5)
    finally:
        runner.close()


def test_without_room_for_adapters_they_are_refused(options, runner):
    runner.submit(StepPlan(rows=[], adapters=[NewAdapter(1, "anywhere")]))
    assert runner.collect().refused == {1: "this server was started without room for adapters"}
