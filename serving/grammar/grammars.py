"""The words wing's judge of grammars: compiles each on trial in a process of its own, within hard limits.

Knows no tensor and no route; `check` may take most of a second, so that it runs off the hub.
"""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

import msgspec

from serving.errors import ModelError, ValidationError
from serving.grammar.compiler import check_size, digest
from serving.protocol import Grammar

log = logging.getLogger(__name__)

START_LIMIT_S: Final = 20.0
WALL_LIMIT_S: Final = 0.8
REMEMBERED: Final = 1024

_TOO_LONG: Final = "grammar is not valid: it takes too long to compile"
_TOO_COMPLEX: Final = "grammar is not valid: it is too complex"


class Grammars:
    """Judges grammars, and remembers the verdicts. For any number of threads.

    Args:
        tokenizer_json: the text of a tokenizer.json.
        vocab_size: ids that the model can choose are below it.
        eos_token_ids: the ids that may end a text.
    """

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._arguments = [str(number) for number in (vocab_size, *sorted(eos_token_ids))]
        self._tokenizer_file = os.memfd_create("tokenizer.json")
        with open(self._tokenizer_file, "wb", closefd=False) as file:
            file.write(tokenizer_json.encode())
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._idle: list[_Trial] = []
        self._close = weakref.finalize(self, _end, self._idle, self._tokenizer_file)

    def warm(self) -> None:
        """Start a process ahead of the first grammar; does not wait for it."""
        trial = self._start()
        with self._lock:
            self._idle.append(trial)

    def check(self, grammar: Grammar) -> None:
        """Hold a grammar to the rules.

        Raises:
            ValidationError: it is wrong, too large or too complex, or allows no text at all.
        """
        check_size(grammar)
        name = digest(grammar)
        with self._lock:
            known = name in self._verdicts
            verdict = self._verdicts.get(name)
            if known:
                self._verdicts.move_to_end(name)
        if not known:
            verdict = self._judge(name, grammar)
        if verdict is not None:
            raise ValidationError(verdict)

    def close(self) -> None:
        """End the processes; also done when the object is gone. Safe to call twice."""
        self._close()

    def _judge(self, name: bytes, grammar: Grammar) -> str | None:
        trial = self._lend()
        try:
            verdict = trial.judge(grammar)
        except ModelError as error:
            trial.end()
            log.warning("no grammars: %s", error)
            verdict = "grammar is not supported"
        except _Ended as ended:
            trial.end()
            log.warning("a grammar's trial ended with %s", ended)
            # Ready for the next hostile grammar, so that it is refused as quickly.
            self.warm()
            if not ended.is_verdict:  # nothing to remember: others may be why
                return _TOO_LONG
            verdict = _TOO_LONG if ended.code == -signal.SIGPROF else _TOO_COMPLEX
        else:
            with self._lock:
                self._idle.append(trial)
        with self._lock:
            self._verdicts[name] = verdict
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        return verdict

    def _lend(self) -> "_Trial":
        """A process that nobody uses: one that waits, if it still lives, or a new one."""
        while True:
            with self._lock:
                trial = self._idle.pop() if self._idle else None
            if trial is None:
                return self._start()
            if trial.alive():
                return trial
            trial.end()

    def _start(self) -> "_Trial":
        return _Trial(self._tokenizer_file, self._arguments)


class _Ended(Exception):
    """The process ended, or was not done in time.

    Attributes:
        is_verdict: whether the grammar did that, and not a busy machine or whoever kills processes for their memory.
    """

    def __init__(self, code: int | None, *, started: bool) -> None:
        super().__init__("a timeout" if code is None else f"code {code}")
        self.code = code
        self.is_verdict = started and code is not None and code != -signal.SIGKILL


class _Trial:
    """One process, lent to one thread at a time."""

    def __init__(self, tokenizer_file: int, arguments: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.grammar.process", str(tokenizer_file), *arguments],
            pass_fds=(tokenizer_file,), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            bufsize=0,
        )  # fmt: skip
        self._ready = False

    def judge(self, grammar: Grammar) -> str | None:
        """What is wrong with a grammar, if anything. Raises _Ended, or ModelError if no grammar can be judged."""
        if not self._ready:
            fault = self._answer(START_LIMIT_S)
            if fault is not None:
                raise ModelError(fault)
            self._ready = True
        assert self._process.stdin is not None
        line = memoryview(msgspec.json.encode(grammar) + b"\n")
        try:
            while line:  # an unbuffered pipe may take less than it is given
                line = line[self._process.stdin.write(line) :]
        except OSError as error:
            raise _Ended(self._process.wait(), started=self._ready) from error
        return self._answer(WALL_LIMIT_S)

    def alive(self) -> bool:
        """Whether the process can be asked."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _answer(self, limit_s: float) -> str | None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()  # not `select`: a busy server's descriptors can be too large for that
        poll.register(descriptor, select.POLLIN)
        until = time.monotonic() + limit_s
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise _Ended(None, started=self._ready)
            piece = os.read(descriptor, 65_536)
            if not piece:
                raise _Ended(self._process.wait(), started=self._ready)
            line += piece
        return msgspec.json.decode(line, type=str | None)


def _end(trials: list[_Trial], tokenizer_file: int) -> None:
    while trials:
        trials.pop().end()
    os.close(tokenizer_file)
