"""A way into a container that has no network: all connections go through one process inside it.

Knows only bytes; the image needs a `python3`. A client that does not read holds up the others.
"""

import contextlib
import itertools
import socket
import socketserver
import struct
import subprocess
import threading
from collections.abc import Sequence

from scripts.emulator.upstream import Address

CHUNK_BYTES = 65536
# On the pipe: what a frame does (open, data, close), to which connection, how many bytes follow.
FRAME = struct.Struct(">cII")
OPEN, DATA, CLOSE = b"o", b"d", b"c"
# Runs inside: standard input and output, and sockets of the container's own loopback address.
INSIDE = """
import socket, struct, sys, threading
frame, port, sockets, lock = struct.Struct(">cII"), int(sys.argv[1]), {}, threading.Lock()
source, sink = sys.stdin.buffer, sys.stdout.buffer
def put(kind, number, data=b""):
    with lock:
        sink.write(frame.pack(kind, number, len(data)) + data)
        sink.flush()
def pump(number, connection):
    try:
        while data := connection.recv(65536):
            put(b"d", number, data)
    except OSError:
        pass
    put(b"c", number)
while len(head := source.read(frame.size)) == frame.size:
    kind, number, size = frame.unpack(head)
    data = source.read(size)
    try:
        if kind == b"o":
            sockets[number] = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(number, sockets[number]), daemon=True).start()
        elif kind == b"d":
            sockets[number].sendall(data)
        else:
            with sockets.pop(number) as connection:
                connection.shutdown(socket.SHUT_RDWR)
    except (OSError, KeyError):
        if kind == b"o":
            put(b"c", number)
"""


class Relay:
    """A listener on this machine for a port inside a container; ends with `close`.

    Args:
        enter: the command that runs another one inside, such as `docker exec --interactive NAME`.
        port: inside.
    """

    def __init__(self, enter: Sequence[str], port: int) -> None:
        self._inside = subprocess.Popen(
            [*enter, "python3", "-u", "-c", INSIDE, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._inside.stdin is not None
        assert self._inside.stdout is not None
        self._down, self._up = self._inside.stdin, self._inside.stdout
        self._lock = threading.Lock()  # of the connections
        self._pen = threading.Lock()  # of the pipe; another one, since writing waits for the process inside
        self._numbers = itertools.count()
        self._clients: dict[int, socket.socket] = {}
        relay = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                relay._carry(self.request)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self._server.daemon_threads = True
        self.address = Address("127.0.0.1", int(self._server.server_address[1]))
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.1,), name="relay"),
            threading.Thread(target=self._return, name="relay-up"),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Take no more connections, and end those that there are."""
        self._server.shutdown()
        self._inside.terminate()
        with self._pen, contextlib.suppress(OSError):
            self._down.close()
        for thread in self._threads:
            thread.join()
        self._inside.wait()
        self._server.server_close()

    def _carry(self, client: socket.socket) -> None:
        """Send what a client says; whoever ends first, both ends are closed."""
        with self._lock:
            number = next(self._numbers)
            self._clients[number] = client
        self._send(OPEN, number)
        with contextlib.suppress(OSError):
            while data := client.recv(CHUNK_BYTES):
                self._send(DATA, number, data)
        self._send(CLOSE, number)
        with self._lock:
            self._clients.pop(number, None)

    def _send(self, kind: bytes, number: int, data: bytes = b"") -> None:
        with self._pen, contextlib.suppress(OSError, ValueError):  # the process inside is gone
            self._down.write(FRAME.pack(kind, number, len(data)) + data)
            self._down.flush()

    def _return(self) -> None:
        """Hand out what comes back, until the process inside ends."""
        with self._up:
            while len(head := self._up.read(FRAME.size)) == FRAME.size:
                kind, number, size = FRAME.unpack(head)
                self._deliver(kind, number, self._up.read(size))
        for number in list(self._clients):
            self._deliver(CLOSE, number, b"")

    def _deliver(self, kind: bytes, number: int, data: bytes) -> None:
        with self._lock:
            client = self._clients.get(number)
        if client is None:
            return
        with contextlib.suppress(OSError):
            if kind == DATA:
                client.sendall(data)
            else:
                client.shutdown(socket.SHUT_RDWR)
