"""Runners in processes of their own, one a rank, seen from the worker.

Knows no torch: torch lives on the other side of the pipes.
"""

import contextlib
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from serving.errors import ModelError, RunnerDied
from serving.plan import ModelFacts, StepPlan, StepResult
from serving.runner.frames import Done, Failed, Ready, Refused, RunnerOptions, Start, receive, send
from serving.settings import process_environment, without_secrets

_EXIT_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Rank:
    """One process and our end of its pipe."""

    process: subprocess.Popen[bytes]
    channel: socket.socket

    @classmethod
    def start(cls) -> Self:
        """Start a process that waits for its first frame, without secrets: a model's own code may run there."""
        ours, theirs = socket.socketpair()
        # The ranks of one machine need no other network; what an operator said of it goes first.
        environment = {"GLOO_SOCKET_IFNAME": "lo", **without_secrets(process_environment())}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.runner.process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
        return cls(process, ours)

    def how_it_ended(self) -> str:
        """In a few words, for the operator."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_WAIT_S)
        code = self.process.returncode
        if code == -signal.SIGKILL:
            return "killed: too little memory? A smaller --kv-cache-memory or --max-batch-prefill-tokens needs less"
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


class RunnerProcess:
    """`plan.Runner` over pipes to `python -m serving.runner.process`, one process a rank.

    Every rank is sent every plan; rank 0 answers. When one ends, the others wait for it in vain: then all are ended. A
    process dies with its parent: it reads the end of the pipe, and the kernel kills it should it hang.
    """

    def __init__(self, ranks: Sequence[Rank], facts: ModelFacts, meeting: tempfile.TemporaryDirectory[str]) -> None:
        self._ranks, self._facts, self._meeting = ranks, facts, meeting
        self._results = msgspec.msgpack.Decoder(Done | Failed)

    @classmethod
    def start(cls, options: RunnerOptions) -> Self:
        """Start the processes and wait until their model is loaded and warm.

        Raises:
            ModelError: the model cannot be served; the text says why.
            RunnerDied: a process ended without a word (killed, or out of memory).
        """
        # Kept as long as they live: NCCL looks there now and then.
        meeting = tempfile.TemporaryDirectory(prefix="weir-ranks-")
        ranks: list[Rank] = []
        try:
            for number in range(options.rank_count):
                ranks.append(Rank.start())
                send(ranks[-1].channel, Start(options, number, str(Path(meeting.name, "ranks"))))
            facts = _await_ready(ranks)
        except BaseException:
            _end(ranks)
            meeting.cleanup()
            raise
        return cls(ranks, facts, meeting)

    @property
    def facts(self) -> ModelFacts:
        """See `plan.Runner`."""
        return self._facts

    @property
    def pids(self) -> list[int]:
        """The processes' ids, for tests and logs."""
        return [rank.process.pid for rank in self._ranks]

    def submit(self, plan: StepPlan) -> None:
        """See `plan.Runner`."""
        for rank in self._ranks:
            send(rank.channel, plan)

    def collect(self) -> StepResult:
        """See `plan.Runner`."""
        first = self._ranks[0]
        if len(self._ranks) > 1 and first not in (spoke := _await_any(self._ranks)):
            # Nobody but rank 0 speaks, unless it fails.
            number = self._ranks.index(spoke[0])
            raise RunnerDied(f"rank {number} of {len(self._ranks)} ended ({spoke[0].how_it_ended()})")
        try:
            answer = self._results.decode(receive(first.channel))
        except msgspec.DecodeError as error:
            raise RunnerDied(f"a frame that is none on the runner's pipe: {error}") from error
        if isinstance(answer, Failed):
            raise RunnerDied(answer.text)
        return answer.result

    def alive(self) -> bool:
        """See `plan.Runner`."""
        if any(rank.channel.fileno() < 0 or rank.process.poll() is not None for rank in self._ranks):
            return False
        # Readable without a plan in flight is either the end of the stream or a result not yet collected.
        return all(rank.channel.recv(1, socket.MSG_PEEK) for rank in _readable(self._ranks, 0))

    def close(self) -> None:
        """See `plan.Runner`."""
        _end(self._ranks)
        self._meeting.cleanup()


def _await_ready(ranks: Sequence[Rank]) -> ModelFacts:
    """What rank 0 measured, once all have. Raises ModelError and RunnerDied as soon as one has failed."""
    facts: dict[int, ModelFacts] = {}
    while waiting := [rank for number, rank in enumerate(ranks) if number not in facts]:
        for rank in _await_any(waiting):
            try:
                answer = msgspec.msgpack.decode(receive(rank.channel), type=Ready | Refused)
            except RunnerDied as error:
                raise RunnerDied(f"the runner process ended while loading ({rank.how_it_ended()})") from error
            if isinstance(answer, Refused):
                raise ModelError(answer.text)
            facts[ranks.index(rank)] = answer.facts
    return facts[0]


def _await_any(ranks: Sequence[Rank]) -> list[Rank]:
    """Wait until some have something to read, be it the end of the stream."""
    return _readable(ranks, None)


def _readable(ranks: Sequence[Rank], timeout_s: float | None) -> list[Rank]:
    poll = select.poll()
    for rank in ranks:
        poll.register(rank.channel, select.POLLIN)
    ready = {number for number, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
    return [rank for rank in ranks if rank.channel.fileno() in ready]


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        with contextlib.suppress(OSError):
            rank.channel.shutdown(socket.SHUT_RDWR)  # the process reads the end of the stream and leaves
        rank.channel.close()
    for number, rank in enumerate(ranks):
        # One that waits for another rank inside a step reads nothing more.
        try:
            rank.process.wait(_EXIT_WAIT_S if number == 0 else 1)
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
