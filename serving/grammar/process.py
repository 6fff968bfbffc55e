"""A process that compiles grammars on trial: `python -m serving.grammar.process FD VOCAB_SIZE EOS_ID...`.

Knows no request. A hostile grammar can compile for minutes, take all memory or exhaust the stack, and nothing can
interrupt it but the end of its process: so there is one to spare. FD is a file with the tokenizer.json; grammars come
in on stdin, an object a line, and `null` or what is wrong with each goes out on stdout, that about FD first.
"""

import os
import resource
import signal
import sys
import threading
from pathlib import Path

import msgspec

from serving.errors import ModelError, ValidationError
from serving.grammar.compiler import GrammarCompiler
from serving.protocol import Grammar

CPU_LIMIT_S = 0.4
MEMORY_LIMIT_BYTES = 1 << 30  # beyond what the process takes before its first grammar
# Less than the device's thread has, which will compile the same grammar without a net.
STACK_BYTES = 1 << 20


def main() -> None:
    """Serve until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the worker closes stdin itself
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocab_size, *eos_token_ids = map(int, sys.argv[2:])
    tokenizer_json = _read(int(sys.argv[1]))
    try:
        compiler = GrammarCompiler(tokenizer_json, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    except ModelError as error:
        _answer(str(error))
        return
    _answer(None)
    most = _data_bytes() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    threading.stack_size(STACK_BYTES)
    server = threading.Thread(target=_serve, args=(compiler,))
    server.start()
    server.join()


def _serve(compiler: GrammarCompiler) -> None:
    grammars = msgspec.json.Decoder(Grammar)
    for line in sys.stdin.buffer:
        # The kernel ends the process when the time is up, whatever it does then and whoever holds which lock.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        try:
            compiler.compile(grammars.decode(line))
        except ValidationError as error:
            fault: str | None = error.detail
        else:
            fault = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(fault)


def _answer(value: str | None) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def _read(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode()


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
