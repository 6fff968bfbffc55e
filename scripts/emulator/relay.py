"""A way into a container that has no network: each connection goes through a process inside it.

Knows only bytes; the image needs a `python3`.
"""

import contextlib
import socket
import socketserver
import subprocess
import threading
from collections.abc import Sequence
from typing import IO

from scripts.emulator.upstream import Address

CHUNK_BYTES = 65536
# Runs inside: standard input and output, and a socket of the container's own loopback address.
INSIDE = """
import os, socket, sys, threading
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def out():
    while data := s.recv(65536):
        while data:
            data = data[os.write(1, data):]
    os._exit(0)
threading.Thread(target=out, daemon=True).start()
while data := os.read(0, 65536):
    s.sendall(data)
s.shutdown(socket.SHUT_RDWR)
"""


class Relay:
    """A listener on this machine for a port inside a container; ends with `close`.

    Args:
        enter: the command that runs another one inside, such as `docker exec --interactive NAME`.
        port: inside.
    """

    def __init__(self, enter: Sequence[str], port: int) -> None:
        command = [*enter, "python3", "-c", INSIDE, str(port)]

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                _carry(self.request, command)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="relay")
        self._thread.start()
        self.address = Address("127.0.0.1", int(self._server.server_address[1]))

    def close(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _carry(outer: socket.socket, command: Sequence[str]) -> None:
    inner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert inner.stdin is not None
    assert inner.stdout is not None
    upwards = threading.Thread(target=_send_up, args=(outer, inner.stdin), daemon=True)
    upwards.start()
    with contextlib.suppress(OSError), inner.stdout as output:
        while data := output.read1(CHUNK_BYTES):  # type: ignore[attr-defined]  # a BufferedReader
            outer.sendall(data)
    with contextlib.suppress(OSError):
        outer.shutdown(socket.SHUT_RDWR)
    inner.terminate()
    inner.wait()
    upwards.join()


def _send_up(outer: socket.socket, inner: IO[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError), inner:
        while data := outer.recv(CHUNK_BYTES):
            inner.write(data)
            inner.flush()
