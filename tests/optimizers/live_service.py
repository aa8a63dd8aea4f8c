"""A service of real processes for the tests: backends with a size, and a client that loads them.

    python live_service.py backend START      prints its port, then serves
    python live_service.py load PORT...       sends requests to all of them for ever

A request takes 2 ms at the best size, 16, and 4 ms more for the squared factors of 2 from it. That
is the time counted: what a busy machine adds is not the service's.
"""

import contextlib
import http.server
import json
import math
import sys
import threading
import time
import urllib.request


class Backend(http.server.BaseHTTPRequestHandler):
    size, changes, seconds, count = 0, 0, 0.0, 0
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def answer(self, text, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked has gone, or gave up
            self.wfile.write(text.encode())

    def do_GET(self):
        if self.path == "/work":
            seconds = 0.002 + 0.004 * math.log2(Backend.size / 16) ** 2
            time.sleep(seconds)
            with Backend.lock:
                Backend.seconds += seconds
                Backend.count += 1
            self.answer("done\n")
        elif self.path == "/metrics":
            with Backend.lock:
                self.answer(
                    f"work_seconds_sum {Backend.seconds}\nwork_seconds_count {Backend.count}\n"
                    f"size {Backend.size}\nchanges_total {Backend.changes}\n"
                )
        elif self.path == "/state":
            self.answer(json.dumps({"size": Backend.size, "changes": Backend.changes}))

    def do_PUT(self):
        size = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["size"]
        if not isinstance(size, int | float) or not 1 <= size <= 64:
            return self.answer(f"size is {size!r}\n", 422)
        Backend.size = size
        Backend.changes += 1
        self.answer("set\n")


def backend(start):
    Backend.size = start
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


def load(ports):
    while True:
        for port in ports:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/work").read()


if __name__ == "__main__":
    if sys.argv[1] == "backend":
        backend(int(sys.argv[2]))
    load(sys.argv[2:])
