"""A container of a few lines for tests of the life cycle, started as `python serving_script.py MODE serve`.

Modes: `well` leaves on SIGTERM; `deaf` ignores it; `ill` answers pings with 503 from the fourth on; `short` ends at
once; `writes` leaves a file in the model directory.
"""

import http.server
import itertools
import os
import signal
import sys
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    mode = ""
    pings = itertools.count(1)

    def do_GET(self):
        number = next(self.pings)
        self.send_response(503 if self.mode == "ill" and number > 3 else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def main():
    Handler.mode, word = sys.argv[1:]
    assert word == "serve"
    sys.stderr.write(f"mode {Handler.mode}\n")
    if Handler.mode == "short":
        sys.exit("no such model")
    if Handler.mode == "writes":
        Path(os.environ["HF_MODEL_ID"], "cache.json").write_text("{}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if Handler.mode == "deaf" else lambda *_: sys.exit(0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Handler) as server:
        server.daemon_threads = True
        server.serve_forever()


main()
