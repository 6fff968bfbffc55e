"""The runner process's first breath: `python -m serving.runner.process FD`, FD being its end of the worker's pipe.

Knows no torch yet: loading that takes seconds, and a worker that dies meanwhile must not leave a process behind.
"""

import os
import socket
import sys
from importlib import import_module

from serving.lifeline import die_with_parent


def main() -> int:
    """Serve until the pipe ends. Returns the exit code."""
    die_with_parent()
    channel = socket.socket(fileno=int(sys.argv[1]))
    code: int = import_module("serving.runner.plan_server").serve(channel)
    return code


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # At once: the threads of a process group would wait for ranks that may be gone.
    os._exit(code)
