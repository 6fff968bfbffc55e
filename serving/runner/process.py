"""The runner process's first breath: `python -m serving.runner.process FD`, FD being its end of the worker's pipe.

Knows no torch yet: loading that takes seconds, and a worker that dies meanwhile must not leave a process behind.
"""

import ctypes
import os
import signal
import socket
import sys
from importlib import import_module

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> int:
    """Serve until the pipe ends. Returns the exit code."""
    _die_with_parent()
    # Ctrl-C and a container's stop reach the whole group; the worker drains first and closes the pipe itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    code: int = import_module("serving.runner.plan_server").serve(channel)
    return code


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew of our wish
        raise SystemExit(1)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # At once: the threads of a process group would wait for ranks that may be gone.
    os._exit(code)
