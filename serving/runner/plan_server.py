"""The runner process at work: loads a model, then executes the plans that arrive on its pipe.

Knows no engine and no HTTP. Builds the model and runs it in one and the same thread: in two, torch would keep two
thread pools and halve its speed.
"""

import logging
import socket

import msgspec
import torch

from serving.errors import ConfigurationError, RunnerDied
from serving.parallel import DistributedRanks, OneRank, Ranks
from serving.plan import StepPlan
from serving.runner.frames import Done, Failed, Ready, Refused, Start, receive, send
from serving.runner.load import choose_device, load_runner
from serving.runner.memory import cpu_count, keep_freed_memory
from serving.runner.model_runner import ModelRunner
from serving.telemetry import logs

log = logging.getLogger("serving.runner")


def serve(channel: socket.socket) -> int:
    """Serve until the pipe ends. Returns the process's exit code."""
    try:
        start = msgspec.msgpack.decode(receive(channel), type=Start)
        options = start.options
        logs.configure(options.log_level, json_output=options.log_json)
        # Fewer than there are where OMP_NUM_THREADS says so.
        torch.set_num_threads(max(1, min(cpu_count() // options.rank_count, torch.get_num_threads())))
        try:
            ranks = _meet(start)
            runner = load_runner(options, ranks)
        except ConfigurationError as error:
            send(channel, Refused(str(error)))
            return 1
        keep_freed_memory()
        send(channel, Ready(runner.facts))
        return _execute_plans(channel, runner, answers=ranks.rank == 0)
    except RunnerDied:
        return 0  # the worker closed the pipe, or died: nobody is left to serve


def _meet(start: Start) -> Ranks:
    options = start.options
    if options.rank_count == 1:
        return OneRank()
    device = choose_device(options, start.rank)
    return DistributedRanks(start.rank, options.rank_count, start.meeting_file, device)


def _execute_plans(channel: socket.socket, runner: ModelRunner, *, answers: bool) -> int:
    plans = msgspec.msgpack.Decoder(StepPlan)
    while True:
        plan = plans.decode(receive(channel))
        try:
            result = runner.execute(plan)
        except Exception as error:
            # Whatever went wrong, half a step's keys are written: the state is not to be trusted any more.
            log.exception("a step failed; the runner starts again")
            send(channel, Failed(type(error).__name__))
            return 1
        if answers:
            send(channel, Done(result))
