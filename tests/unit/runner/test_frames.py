import socket
import struct
import threading

import msgspec
import pytest

from serving.errors import RunnerDied
from serving.plan import NewRow, Row, StepPlan
from serving.protocol import SamplingParams
from serving.runner.frames import receive, send


@pytest.fixture
def pipe():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_plan_survives_the_pipe(pipe):
    params = SamplingParams(seed=2**64 - 1, logit_bias={5: -1.5}, do_sample=True)
    plan = StepPlan(
        rows=[Row(sequence_id=2**40, token_ids=[1, 2], position=3, block_table=[9], sample=True)],
        started=[NewRow(sequence_id=7, token_ids=list(range(100_000)), prompt_length=3, sampling=params)],
        finished=[4],
    )
    # Larger than the socket's buffer: the writer has to wait for the reader.
    writer = threading.Thread(target=send, args=(pipe[0], plan))
    writer.start()
    got = msgspec.msgpack.decode(receive(pipe[1]), type=StepPlan)
    writer.join()
    assert got == plan


def test_the_end_of_the_stream_is_a_death_wherever_it_falls(pipe):
    ours, theirs = pipe
    ours.sendall(struct.pack("<I", 10) + b"half")
    ours.close()
    with pytest.raises(RunnerDied):
        receive(theirs)


def test_a_broken_length_is_not_allocated(pipe):
    pipe[0].sendall(b"\xff\xff\xff\xff")
    with pytest.raises(RunnerDied, match="4294967295"):
        receive(pipe[1])


def test_writing_to_nobody_is_a_death(pipe):
    pipe[1].close()
    with pytest.raises(RunnerDied):
        send(pipe[0], StepPlan(rows=[]))
