"""The gunicorn worker: gevent serving without monkey-patching, and an orderly end.

Knows no route and no model; of the application only its settings, its bridge and its journal.
"""

import functools
import logging
import os
from types import FrameType
from typing import Any, Protocol

import gevent
from gevent import socket
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn import glogging
from gunicorn.arbiter import Arbiter
from gunicorn.workers.ggevent import GeventWorker

from serving.bridge import Bridge, State
from serving.errors import WeirError
from serving.settings import Settings, process_environment
from serving.telemetry import logs
from serving.telemetry.journal import Journal

POLL_S = 0.1
BEAT_S = 1.0
LAST_WORDS_S = 1.0  # for responses that are being written

log = logging.getLogger(__name__)


class Application(Protocol):
    """What gunicorn loads for this worker: a WSGI callable with three attributes."""

    settings: Settings
    bridge: Bridge[Any]
    journal: Journal


class Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn is untyped
    """gunicorn's logging, sent where ours goes. Requests are not logged."""

    def setup(self, cfg: Any) -> None:
        """Configure the process's logging from the settings."""
        settings = Settings.resolve([], process_environment())
        logs.configure(settings.log_level, json_output=settings.json_output)
        self.cfg = cfg
        self._access_log_enabled = False
        self.error_log.propagate = True
        self.error_log.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether gunicorn says more than the worker's own last line, when that left because of a failure."""
    if record.msg == "Worker (pid:%s) exited with code %s." and isinstance(record.args, tuple):
        return bool(record.args[1] != Arbiter.WORKER_BOOT_ERROR)
    return record.msg not in ("Shutting down: %s", "Reason: %s")


class Worker(GeventWorker):  # type: ignore[misc]  # gunicorn is untyped
    """Serves until told to leave, or until the engine has failed."""

    wsgi: Application
    sockets: list[Any]
    alive: bool
    hurried = False

    def patch(self) -> None:
        """Make the listeners green, and nothing else: the engine's thread has to stay a real one."""
        self.sockets = [socket.socket(s.FAMILY, socket.SOCK_STREAM, fileno=s.sock.detach()) for s in self.sockets]

    def run(self) -> None:
        """Serve; then answer 503 to what is new while open requests end; then leave nothing behind.

        Raises:
            SystemExit: the engine failed; the code tells gunicorn to stop rather than to start another worker.
        """
        bridge, settings = self.wsgi.bridge, self.wsgi.settings
        pulse = gevent.spawn(self._beat)
        servers = [self._serve(listener) for listener in self.sockets]
        while self.alive and bridge.failure is None:
            gevent.sleep(POLL_S)
        failure = bridge.failure
        if failure is not None:
            _report(failure)
            self.hurried = True
        self.alive = False  # the answers from here on close their connections
        bridge.drain(0 if self.hurried else settings.graceful_termination_timeout)
        bridge.close()
        for server in servers:
            server.stop(timeout=LAST_WORDS_S)
        self.wsgi.journal.close()
        pulse.kill()
        if failure is not None:
            raise SystemExit(Arbiter.WORKER_BOOT_ERROR)
        log.info("Stopped")

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT and SIGQUIT: end open requests at once."""
        self.hurried = True
        self.alive = False
        if self.wsgi.bridge.state is State.DRAINING:
            gevent.spawn(self.wsgi.bridge.drain, 0)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer a connection's fault; that an idle one was ended with the server is none."""
        if not isinstance(exc, gevent.GreenletExit):
            super().handle_error(req, client, addr, exc)

    def _serve(self, listener: Any) -> StreamServer:
        listener.setblocking(True)
        server = StreamServer(
            listener, handle=functools.partial(self.handle, listener), spawn=Pool(self.worker_connections)
        )
        server.start()
        host, port = listener.getsockname()[:2]
        log.info("Listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)
        return server

    def _beat(self) -> None:
        """Tell the arbiter that the hub turns; leave when there is no arbiter any more."""
        while True:
            self.tmp.notify()
            if os.getppid() != self.ppid:
                self.hurried = True
                self.alive = False
            gevent.sleep(BEAT_S)


def _report(failure: BaseException) -> None:
    if isinstance(failure, WeirError):
        log.error("%s", failure)
    else:
        log.error("The engine stopped: %s: %s", type(failure).__name__, failure, exc_info=failure)
