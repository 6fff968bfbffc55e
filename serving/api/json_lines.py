"""JSON lines: one request a line in, one answer a line out, in the same order.

Knows no dialect's fields.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Generic, TypeVar

import msgspec
from flask import Response

from serving.api import errors
from serving.api.generation import Generation
from serving.api.schemas import native
from serving.errors import Overloaded, RequestError, Unavailable

CONTENT_TYPES = ("application/jsonlines", "application/x-jsonlines", "application/jsonl", "application/x-ndjson")
AT_A_TIME = 16  # lines that are answered together

T = TypeVar("T")


def split(body: bytes) -> list[bytes]:
    """The lines of a body, without the empty ones."""
    return [line for line in body.splitlines() if line.strip()]


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
        waiting: deque[Callable[[], bytes]] = deque()
        with ExitStack() as generations:
            for line in lines:
                answer = self._begun(line, generations)
                while isinstance(answer, Overloaded) and waiting:  # by this very body, perhaps
                    answers.append(waiting.popleft()())
                    answer = self._begun(line, generations)
                if isinstance(answer, Unavailable):
                    if not answers and not waiting:
                        raise answer
                    answer = partial(_failure, answer, errors.native_body)
                waiting.append(answer)
                if len(waiting) == AT_A_TIME:
                    answers.append(waiting.popleft()())
            answers += [answer() for answer in waiting]
        return answers

    def _begun(self, line: T | errors.Refusal, generations: ExitStack) -> Callable[[], bytes] | Unavailable:
        """A function that waits for a line's answer, or why it cannot be begun now."""
        if isinstance(line, errors.Refusal):
            return partial(msgspec.json.encode, native.ErrorBody(error=line.text, error_type="validation"))
        dialect = self._dialect_of(line)
        try:
            generation, finish = self._begin(line)
        except Unavailable as error:
            return error
        except RequestError as error:
            return partial(_failure, error, dialect)
        generations.callback(generation.close)
        return partial(_finished, finish, dialect)


def _finished(finish: Callable[[], Response], dialect: errors.Dialect) -> bytes:
    try:
        return finish().get_data()
    except RequestError as error:
        return _failure(error, dialect)


def _failure(error: RequestError, dialect: errors.Dialect) -> bytes:
    return msgspec.json.encode(dialect(error))
