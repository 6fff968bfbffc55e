"""An exchange with a container, which leaves neither thread nor socket behind however it is lost."""

import gc
import socket
import struct
import threading
import time
import warnings
from http import HTTPStatus

import pytest
import urllib3.connection
from deploy.conftest import PATIENCE_S

from scripts.emulator import upstream
from scripts.emulator.upstream import Address, Exchange, Expired


@pytest.fixture
def address(stand_in) -> Address:
    host, port = stand_in.url.removeprefix("http://").split(":")
    return Address(host, int(port))


@pytest.fixture(autouse=True)
def nothing_left():
    """No watch lives on, and no socket is left for the collector to find."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
        deadline = time.monotonic() + PATIENCE_S
        while watches():
            assert time.monotonic() < deadline, "a watch is left"
            time.sleep(0.01)
        gc.collect()
    assert not [str(warning.message) for warning in seen]


def watches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watch"]


def begin(address, body=b"{}", headers=None, deadline_s=3 * PATIENCE_S) -> Exchange:
    return Exchange(
        address,
        "/invocations",
        headers or {},
        body,
        connect_timeout_s=PATIENCE_S,
        deadline_s=deadline_s,
        client=None,
    )


def test_a_request_that_cannot_be_written_is_hung_up(address):
    with pytest.raises(ValueError, match="header"):
        begin(address, headers={"x-thing": "two\nlines"})


def test_a_request_that_is_interrupted_is_hung_up(address, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(urllib3.connection.HTTPConnection, "getresponse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        begin(address)


def test_a_watch_that_cannot_begin_leaves_nothing(address, monkeypatch):
    class Thread(threading.Thread):
        def start(self):
            if self.name == "watch":
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(upstream.threading, "Thread", Thread)
    with pytest.raises(RuntimeError, match="new thread"):
        begin(address)


def test_an_exchange_that_nobody_closes_is_closed(address):
    exchange = begin(address)
    assert exchange.status == HTTPStatus.OK
    del exchange


def test_one_whose_watch_has_ended_before_is_closed_too(address):
    exchange = begin(address, body=b'{"parts": ["a", "never"]}', deadline_s=0.3)
    with pytest.raises(Expired):
        list(exchange.parts())
    exchange._watch._thread.join()
    del exchange


def test_a_client_that_resets_its_connection_leaves_nothing(emulate, stand_in, monkeypatch):
    """Then the server reads what the client may have sent on, fails, and does not close its answer."""
    emulator = emulate()
    host, port = emulator.url.removeprefix("http://").split(":")
    monkeypatch.setattr("scripts.emulator.api.token_trouble", lambda *given: None)
    body = b'{"stream": true, "parts": ["data: 1\\n\\n", "data: 2\\n\\n"]}'
    for _ in range(3):
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /endpoints/weir/openai/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}"
            client.sendall(head.encode() + b"\r\ncontent-type: application/json\r\n\r\n" + body)
            seen = b""
            for part in (b"data: 1", b"data: 2"):
                while part not in seen:
                    seen += client.recv(65536)
                client.sendall(b"x")  # behind which the watch cannot see the end, and the server wants to read on
                stand_in.go.release()
            time.sleep(0.1)  # it reads by then; were it slower, nothing would be tried and nothing fail
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
