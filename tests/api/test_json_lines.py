"""JSON lines: how many of them there may be, and that nothing of an answered line is held."""

import pytest
from flask import Response

from serving.api import json_lines
from serving.api.errors import Refusal, native_body
from serving.api.json_lines import AT_A_TIME, MOST, JSONLines, split
from serving.errors import ClientGone


def test_empty_lines_are_none_and_carriage_returns_belong_to_line_ends():
    assert [line.strip() for line in split(b"a\r\n\r\n \nb\n\nc")] == [b"a", b"b", b"c"]
    assert split(b"\n" * (MOST + 1)) == []


def test_more_lines_than_the_cap_are_refused_with_its_name():
    assert len(split(b"{}\n" * MOST)) == MOST
    with pytest.raises(Refusal, match=f"more than {MOST} lines") as refusal:
        split(b"{}\n" * (MOST + 1))
    assert refusal.value.status == 422


class Line:
    """A generation that writes down what becomes of it."""

    def __init__(self, number: int, events: list, failure: Exception | None = None) -> None:
        self.number = number
        self.events = events
        self.failure = failure
        events.append(("begun", number))

    def finish(self) -> Response:
        if self.failure is not None:
            raise self.failure
        self.events.append(("answered", self.number))
        return Response(str(self.number))

    def close(self) -> None:
        self.events.append(("closed", self.number))


def answered(lines, failures=()) -> list:
    events = []

    def begin(number):
        line = Line(number, events, dict(failures).get(number))
        return line, line.finish

    try:
        JSONLines(begin, lambda number: native_body).answered(lines)
    except ClientGone:
        events.append(("gone", None))
    return events


def test_a_line_is_let_go_once_its_answer_is_taken():
    events = answered(range(3 * AT_A_TIME))
    for number in range(3 * AT_A_TIME):
        place = events.index(("answered", number))
        assert events[place + 1] == ("closed", number)
    assert events.index(("closed", 0)) < events.index(("begun", AT_A_TIME))


def test_all_lines_are_let_go_when_the_client_leaves():
    events = answered(range(AT_A_TIME), failures={2: ClientGone()}.items())
    assert ("gone", None) in events
    assert {number for kind, number in events if kind == "closed"} == set(range(AT_A_TIME))


def test_no_line_of_a_body_with_too_many_is_read(serve, monkeypatch):
    monkeypatch.setattr(json_lines, "MOST", 2)
    server = serve()
    asked = server.started()
    response = server.client.post("/invocations", data=b'{"inputs": "a"}\n' * 3, content_type="application/jsonlines")
    assert (response.status_code, response.content_type) == (422, "text/plain; charset=utf-8")
    assert "more than 2 lines" in response.text
    assert not asked
