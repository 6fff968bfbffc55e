"""The way into a container without a network, with a process of this machine in the container's place."""

import threading

import pytest
import requests
from deploy.conftest import PATIENCE_S

from scripts.emulator.relay import Relay


@pytest.fixture
def relay(stand_in):
    relay = Relay([], int(stand_in.url.rpartition(":")[2]))
    yield relay
    relay.close()


def post(relay, body: bytes) -> requests.Response:
    return requests.post(f"http://{relay.address}/invocations", data=body, timeout=PATIENCE_S)


def test_large_bodies_go_through_in_both_directions_at_the_same_time(relay):
    bodies = [bytes([number]) * 3_000_000 for number in range(6)]
    found = {}

    def ask(number):
        found[number] = post(relay, bodies[number]).content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(bodies))] == bodies


def test_a_client_that_hangs_up_is_noticed_inside(relay, stand_in):
    asked = {"parts": ["data: 1\n\n"] * 4000, "headers": {"Content-Type": "text/event-stream"}}
    url = f"http://{relay.address}/invocations"
    with requests.post(url, json=asked, stream=True, timeout=PATIENCE_S) as answer:
        assert next(answer.iter_content(None))
    stand_in.push_until_gone()


def test_nobody_inside_is_a_closed_connection():
    relay = Relay([], 9)
    with pytest.raises(requests.ConnectionError):
        post(relay, b"x")
    relay.close()
