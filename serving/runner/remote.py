"""A runner in a process of its own, seen from the worker.

Knows no torch: torch lives on the other side of the pipe.
"""

import contextlib
import select
import signal
import socket
import subprocess
import sys
from typing import Self

import msgspec

from serving.errors import ModelError, RunnerDied
from serving.plan import ModelFacts, StepPlan, StepResult
from serving.runner.frames import Done, Failed, Ready, Refused, RunnerOptions, receive, send

_EXIT_WAIT_S = 5.0


class RunnerProcess:
    """`plan.Runner` over a pipe to `python -m serving.runner.process`.

    The process dies with its parent: it reads the end of the pipe, and the kernel kills it should it hang.
    """

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, facts: ModelFacts) -> None:
        self._process, self._channel, self._facts = process, channel, facts
        self._results = msgspec.msgpack.Decoder(Done | Failed)

    @classmethod
    def start(cls, options: RunnerOptions) -> Self:
        """Start the process and wait until its model is loaded and warm.

        Raises:
            ModelError: the model cannot be served; the text says why.
            RunnerDied: the process ended without a word (killed, or out of memory).
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.runner.process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            send(ours, options)
            answer = msgspec.msgpack.decode(receive(ours), type=Ready | Refused)
        except RunnerDied as error:
            _end(process, ours)
            raise RunnerDied(f"the runner process ended while loading ({_how(process)})") from error
        except BaseException:
            _end(process, ours)
            raise
        if isinstance(answer, Refused):
            _end(process, ours)
            raise ModelError(answer.text)
        return cls(process, ours, answer.facts)

    @property
    def facts(self) -> ModelFacts:
        """See `plan.Runner`."""
        return self._facts

    @property
    def pid(self) -> int:
        """The process's id, for tests and logs."""
        return self._process.pid

    def submit(self, plan: StepPlan) -> None:
        """See `plan.Runner`."""
        send(self._channel, plan)

    def collect(self) -> StepResult:
        """See `plan.Runner`."""
        try:
            answer = self._results.decode(receive(self._channel))
        except msgspec.DecodeError as error:
            raise RunnerDied(f"a frame that is none on the runner's pipe: {error}") from error
        if isinstance(answer, Failed):
            raise RunnerDied(answer.text)
        return answer.result

    def alive(self) -> bool:
        """See `plan.Runner`."""
        if self._channel.fileno() < 0 or self._process.poll() is not None:
            return False
        readable, _, _ = select.select([self._channel], [], [], 0)
        # Readable without a plan in flight is either the end of the stream or a result not yet collected.
        return not readable or bool(self._channel.recv(1, socket.MSG_PEEK))

    def close(self) -> None:
        """See `plan.Runner`."""
        _end(self._process, self._channel)


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    with contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)  # the process reads the end of the stream and leaves
    channel.close()
    try:
        process.wait(_EXIT_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _how(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code == -signal.SIGKILL:
        return "killed: too little memory? A smaller --kv-cache-memory or --max-batch-prefill-tokens needs less"
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
