"""Many clients at once, some of whom leave: what the others get is what each would get alone, and nothing is left.

At a tenth of its scale in an ordinary run; `make test-soak` runs it whole.
"""

import asyncio
import itertools
import json
import os
import random
import sys
import time
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.server, pytest.mark.soak]

SCALE = float(os.environ.get("WEIR_TEST_SCALE", "1"))
STREAMS = 64
ROUNDS = max(1, round(2 * SCALE))
FLAT_REQUESTS = max(500, round(500 * SCALE))
# Two numbers of float32 noise apart: a choice between logits that are nearer is decided by rounding.
NEAR_TIE = 1e-4
TEXT = "Weir answers many clients at once, and each of them gets what it would get alone; nothing of it is luck. "


class Client:
    """A connection of its own for every request, so that leaving is as rude as it gets."""

    def __init__(self, url: str) -> None:
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)

    async def send(self, path: str, body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 22)
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: weir\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(head.encode() + f"content-length: {len(payload)}\r\n\r\n".encode() + payload)
        await writer.drain()
        return reader, writer

    async def stream(self, body: object, leave_after: int | None = None) -> list[dict[str, Any]]:
        """The events of a stream, or the first `leave_after` of them."""
        reader, writer = await self.send("/generate_stream", body)
        events: list[dict[str, Any]] = []
        try:
            while leave_after is None or len(events) < leave_after:
                line = await reader.readline()
                if not line:
                    break
                if line.startswith(b"data:"):
                    events.append(json.loads(line[5:]))
        finally:
            writer.transport.abort() if leave_after is not None else writer.close()
        return events

    async def leave_before_the_answer(self, body: object, seconds: float) -> None:
        _, writer = await self.send("/generate", body)
        await asyncio.sleep(seconds)
        writer.transport.abort()

    async def ping(self) -> float:
        begun = time.monotonic()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(b"GET /ping HTTP/1.1\r\nhost: weir\r\nconnection: close\r\n\r\n")
            status = await reader.readline()
        finally:
            writer.close()
        assert b"200" in status, status
        return time.monotonic() - begun


def a_request(rng: random.Random) -> dict[str, Any]:
    start = rng.choice([0, 0, rng.randrange(40)])  # many share a prefix
    parameters: dict[str, Any] = {
        "max_new_tokens": rng.choice([1, 8, 30, 60, 120]), "details": True, "top_n_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    if rng.random() < 0.5:
        parameters |= {"do_sample": True, "seed": rng.randrange(2**63), "temperature": rng.choice([0.7, 1.0, 1.5])}
        parameters |= rng.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"typical_p": 0.8}, {"min_p": 0.05}])
    parameters |= rng.choice([{}, {}, {"repetition_penalty": 1.2}, {"frequency_penalty": 0.5}])
    length = rng.choice([3, 20, 90, 200])
    return {"inputs": (TEXT * 4)[start : start + length], "parameters": parameters}


async def crowd(client: Client, rng: random.Random) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """One round: some leave early, some leave before anything came; returns requests and events of the others."""

    async def one(body: dict[str, Any], fate: float, delay: float) -> list[dict[str, Any]] | None:
        await asyncio.sleep(delay)
        if fate < 0.2:
            await client.stream(body, leave_after=1 + int(fate * 50))
            return None
        if fate < 0.3:
            await client.leave_before_the_answer(body, fate / 2)
            return None
        return await client.stream(body)

    bodies = [a_request(rng) for _ in range(STREAMS)]
    results = await asyncio.gather(*(one(body, rng.random(), rng.random() * 0.5) for body in bodies))
    return [(body, events) for body, events in zip(bodies, results, strict=True) if events is not None]


def difference(crowded: list[dict[str, Any]], alone: list[dict[str, Any]]) -> str | None:
    """ "same", "near tie" or what differs."""
    for here, there in itertools.zip_longest(crowded, alone):
        if here is None or there is None or "error" in here or "error" in there:
            return f"{here} against {there}"
        if here["token"]["id"] != there["token"]["id"]:
            best = [top["logprob"] for top in there["top_tokens"]]
            gap = best[0] - best[1] if len(best) > 1 else float("inf")
            return "near tie" if gap < NEAR_TIE else f"{here['token']} against {there['token']}, {gap} apart"
    return "same" if crowded[-1]["generated_text"] == alone[-1]["generated_text"] else "other text"


def metric(server, name: str) -> float:
    for line in server.get("/metrics").text.splitlines():
        if line.split(" ")[0] == name:
            return float(line.split(" ")[1])
    return 0.0


def settled(server) -> bool:
    names = ("weir_kv_blocks_used", "tgi_batch_current_size", "tgi_queue_size")
    return all(metric(server, name) == 0 for name in names)


def wait_settled(server) -> None:
    deadline = time.monotonic() + 5
    while not settled(server):
        assert time.monotonic() < deadline, server.get("/metrics").text
        time.sleep(0.05)


async def pings_during(client: Client, work: Any) -> tuple[Any, list[float]]:
    times: list[float] = []

    async def ping_often() -> None:
        while True:
            times.append(await client.ping())
            await asyncio.sleep(0.05)

    pinging = asyncio.create_task(ping_often())
    try:
        return await work, times
    finally:
        pinging.cancel()


def test_each_answer_in_a_crowd_is_the_answer_alone_and_nothing_is_left(start, capsys):
    # Too few blocks for everybody: preemption is part of the test.
    server = start("--dtype=float32", "--max-batch-size=48", "--kv-cache-memory=240KiB").wait_ready()
    client, rng = Client(server.url), random.Random(5)
    family = {process.pid for process in server.processes()}
    verdicts: dict[str, int] = {}
    for _ in range(ROUNDS):
        survivors, times = asyncio.run(pings_during(client, crowd(client, rng)))
        assert len(times) > 5
        wait_settled(server)
        for body, events in survivors:
            verdict = difference(events, asyncio.run(client.stream(body)))
            verdicts[verdict] = verdicts.get(verdict, 0) + 1
    with capsys.disabled():  # the count of near ties is a finding, also when it is allowed
        sys.stdout.write(f"\nanswers in a crowd against alone: {verdicts}\n")
    assert set(verdicts) <= {"same", "near tie"}, verdicts
    assert verdicts.get("near tie", 0) <= 0.02 * sum(verdicts.values()), verdicts
    assert metric(server, "weir_preemptions") > 0
    wait_settled(server)
    assert {process.pid for process in server.processes()} == family
    # Every permit is back: as many requests as there are permits are all taken in.
    assert metric(server, 'tgi_request_failure{err="overloaded"}') == 0


def test_memory_of_the_worker_stays_flat(start):
    server = start("--dtype=float32", "--kv-cache-memory=4MiB").wait_ready()
    client = Client(server.url)
    worker: psutil.Process = server.processes()[1]

    async def many(count: int) -> None:
        gate = asyncio.Semaphore(32)

        async def one(i: int) -> None:
            async with gate:
                body = {"inputs": TEXT[i % 40 :], "parameters": {"max_new_tokens": 8, "ignore_eos": True}}
                if i % 7 == 0:
                    await client.stream(body, leave_after=2)
                else:
                    events = await client.stream(body)
                    assert events[-1]["generated_text"] is not None, events

        await asyncio.gather(*(one(i) for i in range(count)))

    asyncio.run(many(250))
    before = worker.memory_info().rss
    asyncio.run(many(FLAT_REQUESTS))
    wait_settled(server)
    after = worker.memory_info().rss
    assert after < 300e6
    assert after - before < 8e6, f"{before / 1e6:.1f} MB became {after / 1e6:.1f} MB"
