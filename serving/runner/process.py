"""The runner process: `python -m serving.runner.process FD` serves plans that arrive on the inherited socket.

Knows no engine and no HTTP. Builds the model and runs it in one and the same thread: in two, torch would keep two
thread pools and halve its speed.
"""

import ctypes
import logging
import os
import signal
import socket
import sys

import msgspec
import torch

from serving.errors import ConfigurationError, RunnerDied
from serving.plan import StepPlan
from serving.runner.frames import Done, Failed, Ready, Refused, RunnerOptions, receive, send
from serving.runner.load import load_runner
from serving.runner.memory import cpu_count, keep_freed_memory
from serving.runner.model_runner import ModelRunner
from serving.telemetry import logs

_LOG = logging.getLogger("serving.runner")
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve until the pipe ends. Returns the exit code."""
    _die_with_parent()
    # Ctrl-C and a container's stop reach the whole group; the worker drains first and closes the pipe itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        options = msgspec.msgpack.decode(receive(channel), type=RunnerOptions)
        logs.configure(options.log_level, json_output=options.log_json)
        keep_freed_memory()
        torch.set_num_threads(cpu_count())
        try:
            runner = load_runner(options)
        except ConfigurationError as error:
            send(channel, Refused(str(error)))
            return 1
        send(channel, Ready(runner.facts))
        _serve(channel, runner)
    except RunnerDied:
        pass  # the worker closed the pipe, or died: nobody is left to serve
    return 0


def _serve(channel: socket.socket, runner: ModelRunner) -> None:
    plans = msgspec.msgpack.Decoder(StepPlan)
    while True:
        plan = plans.decode(receive(channel))
        try:
            result = runner.execute(plan)
        except Exception as error:
            # Whatever went wrong, half a step's keys are written: the state is not to be trusted any more.
            _LOG.exception("a step failed; the runner starts again")
            send(channel, Failed(type(error).__name__))
            raise SystemExit(1) from error
        send(channel, Done(result))


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew of our wish
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
