"""JSON lines: one request a line in, one answer a line out, in the same order.

Knows no dialect's fields.
"""

import io
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from http import HTTPStatus
from typing import Generic, TypeVar

import msgspec
from flask import Response

from serving.api import errors
from serving.api.body import TYPE_PREFIX
from serving.api.generation import Generation
from serving.api.schemas import native
from serving.errors import Overloaded, RequestError, Unavailable

CONTENT_TYPES = ("application/jsonlines", "application/x-jsonlines", "application/jsonl", "application/x-ndjson")
AT_A_TIME = 16  # lines that are answered together
MOST = 1024  # lines of a body: their answers are held until the last of them

T = TypeVar("T")


def split(body: bytes) -> list[bytes]:
    """The lines of a body, without the empty ones.

    Raises:
        Refusal: there are more than `MOST`.
    """
    lines: list[bytes] = []
    for line in io.BytesIO(body):
        if not line.strip():
            continue
        if len(lines) == MOST:
            text = f"{TYPE_PREFIX}the body holds more than {MOST} lines; send it in several"
            raise errors.Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, text)
        lines.append(line)
    return lines


class JSONLines(Generic[T]):
    """Answers the lines of one body.

    Args:
        begin: begins a request's generation; the second of what it returns waits for the answer.
        dialect_of: how a request's errors are told.
    """

    def __init__(
        self,
        begin: Callable[[T], tuple[Generation, Callable[[], Response]]],
        dialect_of: Callable[[T], errors.Dialect],
    ) -> None:
        self._begin = begin
        self._dialect_of = dialect_of

    def answered(self, lines: Sequence[T | errors.Refusal]) -> list[bytes]:
        """What each line is answered; a failure is the answer of its own line.

        Args:
            lines: requests, or why they cannot be read as such.

        Raises:
            Unavailable: even the first line cannot be taken in.
            ClientGone: nobody is left to tell.
        """
        answers: list[bytes] = []
        waiting: deque[_Begun] = deque()
        try:
            for line in lines:
                begun = self._begun(line)
                while isinstance(begun, Overloaded) and waiting:  # by this very body, perhaps
                    answers.append(_taken(waiting))
                    begun = self._begun(line)
                if isinstance(begun, Unavailable):
                    if not answers and not waiting:
                        raise begun
                    begun = _Begun(partial(_failure, begun, errors.native_body))
                waiting.append(begun)
                if len(waiting) == AT_A_TIME:
                    answers.append(_taken(waiting))
            while waiting:
                answers.append(_taken(waiting))
        finally:
            for left in waiting:
                left.close()
        return answers

    def _begun(self, line: T | errors.Refusal) -> "_Begun | Unavailable":
        """A line whose answer can be waited for, or why it cannot be begun now."""
        if isinstance(line, errors.Refusal):
            told = native.ErrorBody(error=line.text, error_type="validation")
            return _Begun(partial(msgspec.json.encode, told))
        dialect = self._dialect_of(line)
        try:
            generation, finish = self._begin(line)
        except Unavailable as error:
            return error
        except RequestError as error:
            return _Begun(partial(_failure, error, dialect))
        return _Begun(partial(_finished, finish, dialect), generation)


class _Begun:
    """A line that is being answered: `answer` waits for its answer, `close` ends what is unfinished."""

    def __init__(self, answer: Callable[[], bytes], generation: Generation | None = None) -> None:
        self.answer = answer
        self._generation = generation

    def close(self) -> None:
        if self._generation is not None:
            self._generation.close()


def _taken(waiting: deque[_Begun]) -> bytes:
    """The first one's answer, of which nothing else is held."""
    with closing(waiting.popleft()) as begun:
        return begun.answer()


def _finished(finish: Callable[[], Response], dialect: errors.Dialect) -> bytes:
    try:
        return finish().get_data()
    except RequestError as error:
        return _failure(error, dialect)


def _failure(error: RequestError, dialect: errors.Dialect) -> bytes:
    return msgspec.json.encode(dialect(error))
