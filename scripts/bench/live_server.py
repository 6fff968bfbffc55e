"""A real server to measure: started as an operator would, on a free port of the loopback address, and ended.

Knows no workload.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from scripts.bench.client import Address
from scripts.bench.offline import peak_rss_bytes
from serving.errors import ConfigurationError

START_LIMIT_S = 600.0
STOP_LIMIT_S = 30.0
STANDARD_ERROR = 2


class LiveServer:
    """`python -m serving`, as a context that waits until it is ready and ends it.

    Attributes:
        address: where it listens.
        pid: gunicorn's arbiter.

    Raises:
        ConfigurationError: it ended, or was not ready in time; its own words are on standard error.
    """

    def __init__(self, model_dir: Path, flags: Sequence[str]) -> None:
        self.address = Address("127.0.0.1", _free_port())
        where = ["--hostname", self.address.host, "--port", str(self.address.port)]
        command = [sys.executable, "-m", "serving", "--model-id", str(model_dir), *where, *flags]
        # Its log goes where ours goes: standard output is for figures.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=STANDARD_ERROR)
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_LIMIT_S
        try:
            while not self._ready():
                if self._process.poll() is not None:
                    raise ConfigurationError(
                        f"the server ended with code {self._process.returncode} before it was ready"
                    )
                if time.monotonic() > deadline:
                    raise ConfigurationError(f"the server was not ready after {START_LIMIT_S:.0f} s")
                time.sleep(0.1)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address.host}:{self.address.port}/ping", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def peak_rss_mb(pid: int) -> dict[str, float]:
    """The most that each kind of a server's processes held, in megabytes. `pid`: gunicorn's arbiter.

    A runner forgets its mark when it measures its worst step: what loading took is not in it.
    """
    arbiter = psutil.Process(pid)
    peaks: dict[str, float] = {}
    for process in (arbiter, *arbiter.children(recursive=True)):
        kind = "arbiter" if process.pid == pid else _kind(process)
        peaks[kind] = max(peaks.get(kind, 0.0), peak_rss_bytes(process.pid) / 1e6)
    return peaks


def _kind(process: psutil.Process) -> str:
    return "runner" if "serving.runner.process" in process.cmdline() else "worker"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
