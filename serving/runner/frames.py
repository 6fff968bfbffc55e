"""The frames between the worker and a runner process: length-prefixed msgpack of known types, never pickle.

Knows no torch (the worker imports this) and no engine.
"""

import socket
import struct
from typing import Any

import msgspec
from msgspec import Struct

from serving.errors import RunnerDied
from serving.plan import ModelFacts, StepResult

# No honest frame is larger: a plan is a few integers a token, a result a few numbers a row. A broken peer's
# length must not become an allocation.
_MAX_FRAME_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")


class RunnerOptions(Struct, frozen=True, kw_only=True):
    """What the operator says about the device; `None` leaves the choice to what is measured.

    Attributes:
        model_dir: a directory with config.json and safetensors.
        adapter_dir: a directory with an adapter that is merged into them.
        dtype: "float16", "bfloat16" or "float32".
        device: "auto", "cpu" or "cuda".
        load_format: "auto" reads the weights, "dummy" draws random ones on the device from config.json alone.
        trust_remote_code: whether code that comes with a model may run.
        max_step_tokens: the token budget of a step.
        max_rows: the most sequences in a step.
        max_total_tokens: the longest sequence to make room for.
        max_input_tokens: the longest text that an encoder has to read.
        kv_cache_bytes: how much memory keys and values take on a CPU.
        device_memory_fraction: the part of a GPU's memory that may be used.
        grammars: whether rows may have a grammar.
        eos_token_ids: the ids that may end a text under a grammar.
        rank_count: how many devices share the model out; each has a process.
        max_adapters: LoRA adapters for which memory is set aside; without any, layers cannot be adapted.
        max_adapter_rank: the largest rank that one of them may have.
    """

    model_dir: str
    adapter_dir: str | None = None
    dtype: str | None = None
    device: str = "auto"
    load_format: str = "auto"
    trust_remote_code: bool = False
    max_step_tokens: int | None = None
    max_rows: int = 128
    max_total_tokens: int | None = None
    max_input_tokens: int | None = None
    kv_cache_bytes: int | None = None
    device_memory_fraction: float = 1.0
    grammars: bool = False
    eos_token_ids: list[int] = []
    rank_count: int = 1
    max_adapters: int = 0
    max_adapter_rank: int = 64
    log_json: bool = False
    log_level: str = "info"


class Start(Struct, frozen=True, tag=True):
    """The first frame to a process: what to load, and which rank it is.

    Attributes:
        meeting_file: where the ranks find one another, if there are several.
    """

    options: RunnerOptions
    rank: int = 0
    meeting_file: str = ""


class Ready(Struct, frozen=True, tag=True):
    """The model is loaded, measured and warm."""

    facts: ModelFacts


class Done(Struct, frozen=True, tag=True):
    """A plan was executed; rank 0 says so."""

    result: StepResult


class Refused(Struct, frozen=True, tag=True):
    """The model cannot be served here; the text is for the operator. The process ends after this frame."""

    text: str


class Failed(Struct, frozen=True, tag=True):
    """A plan could not be executed; the device's state is lost and the process ends after this frame."""

    text: str


def send(channel: socket.socket, message: Any) -> None:
    """Write one frame. Raises RunnerDied where the other side is gone."""
    body = msgspec.msgpack.encode(message)
    try:
        channel.sendall(_LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise RunnerDied("the other side of the runner's pipe is gone") from error


def receive(channel: socket.socket) -> bytes:
    """Read one frame's body; blocks. Raises RunnerDied at the end of the stream or on a broken frame."""
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
    if length > _MAX_FRAME_BYTES:
        raise RunnerDied(f"a frame of {length} bytes on the runner's pipe")
    return _exactly(channel, length)


def _exactly(channel: socket.socket, count: int) -> bytes:
    buffer = bytearray(count)
    view, read = memoryview(buffer), 0
    while read < count:
        try:
            got = channel.recv_into(view[read:])
        except OSError as error:
            raise RunnerDied("the runner's pipe broke") from error
        if got == 0:
            raise RunnerDied("the runner process ended")
        read += got
    return bytes(buffer)
