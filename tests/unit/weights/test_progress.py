"""How progress is told where there is no terminal, and that it ends at 100 %."""

import logging

import pytest

from serving.weights.progress import Progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "serving.weights.progress")
    return caplog


def test_a_log_shows_every_tenth_and_the_end(clock, lines):
    with Progress("Loading", 10**10, terminal=False, clock=clock) as progress:
        for _ in range(20):
            clock.now += 1
            progress.add(10**10 // 20)
    assert len(lines.messages) == 10
    assert lines.messages[0] == "Loading: 10 %, 1.00 of 10.00 GB, 500 MB/s, 18 s left"
    assert lines.messages[-1] == "Loading: 100 %, 10.00 of 10.00 GB, 500 MB/s, 0 s left"


def test_slow_work_is_told_every_ten_seconds_and_quick_work_not_at_all(clock, lines):
    with Progress("Loading", 10**9, terminal=False, clock=clock) as progress:
        for _ in range(4):
            clock.now += 6
            progress.add(10**6)
        assert [line.split(", ")[0] for line in lines.messages] == ["Loading: 0 %", "Loading: 0 %"]
    lines.clear()
    with Progress("Loading", 100, terminal=False, clock=clock) as progress:
        for _ in range(100):
            clock.now += 0.005
            progress.add(1)
    assert lines.messages == []


def test_what_did_not_have_to_be_done_counts_at_the_end_but_not_after_a_failure(clock, lines):
    with Progress("Loading", 100, terminal=False, clock=clock) as progress:
        clock.now += 2
        progress.add(50)
        clock.now += 0.1
    assert [line.split(",")[0] for line in lines.messages] == ["Loading: 50 %", "Loading: 100 %"]
    lines.clear()
    progress = Progress("Loading", 100, terminal=False, clock=clock)
    clock.now += 2
    progress.add(50)
    progress.__exit__(OSError, OSError("gone"), None)
    assert [line.split(",")[0] for line in lines.messages] == ["Loading: 50 %"]


def test_a_terminal_gets_a_bar_that_ends_full_and_no_lines(clock, lines, capsys):
    with Progress("Loading", 2048, terminal=True, clock=clock) as progress:
        clock.now += 20
        progress.add(1024)
    assert "100%" in capsys.readouterr().err.splitlines()[-1]
    assert lines.messages == []


def test_silence_is_silent(clock, lines, capsys):
    with Progress("Loading", 100, shown=False, terminal=True, clock=clock) as progress:
        clock.now += 20
        progress.add(50)
    assert capsys.readouterr().err == ""
    assert lines.messages == []
