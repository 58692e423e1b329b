"""A real S3-compatible server on loopback (nanio), and a network before it that breaks when a test says so."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ACCESS, SECRET = "stillroom", "a-secret-for-tests"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Server:
    """Objects of a bucket are files under `data/BUCKET`, so that a test can damage them behind the server's back."""

    def __init__(self, data: Path) -> None:
        self.data, self.port = data, free_port()
        data.mkdir(exist_ok=True)
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "nanio", "serve", "--data-dir", str(self.data), "--host", "127.0.0.1"]
        quiet = ["--port", str(self.port), "--no-access-log", "--log-level", "error"]
        environment = os.environ | {"NANIO_ACCESS_KEY": ACCESS, "NANIO_SECRET_KEY": SECRET}
        self.process = subprocess.Popen([*command, *quiet], env=environment, stderr=subprocess.DEVNULL)
        for _ in range(3000):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.01)
        raise AssertionError("the server does not listen")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def make_bucket(self, name: str) -> Path:
        """A bucket, and the folder of its objects."""
        folder = self.data / name
        folder.mkdir()
        return folder

    def age(self, seconds: float) -> None:
        """Make everything look as if it had been written so long ago."""
        then = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - seconds))
        for path in self.data.rglob("*.json"):
            text = path.read_text()
            path.write_text(re.sub(r'("(?:initiated|last_modified)":\s*")[^"]*"', rf'\g<1>{then}"', text))


class Network:
    """Passes requests on to a server, unless `fault` has another idea.

    Attributes:
        fault: called with method and path for each request; returns None, "slow down", "refuse" (close at once),
            "lose" (let the server answer, then close), "cut" (half of the answer, then close) or "hang".
        requests: method and path of each.
        received_bytes, sent_bytes: of the bodies of requests, and of answers.
    """

    def __init__(self, server: Server) -> None:
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.received_bytes = self.sent_bytes = 0
        self.released = threading.Event()
        network = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are sent apart, and one would wait for the other

            def handle_any(self) -> None:
                network.requests.append((self.command, self.path))
                fault = network.fault(self.command, self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if fault != "refuse" else b""
                network.received_bytes += len(body)
                if fault == "hang":
                    network.released.wait(60)
                if fault == "slow down":
                    self.answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN, len(SLOW_DOWN))
                elif fault == "refuse":
                    self.close_connection = True
                else:
                    self.pass_on(body, fault)

            def pass_on(self, body: bytes, fault: str | None) -> None:
                there = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                try:
                    there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() != "expect":
                            there.putheader(name, value)
                    there.endheaders(body)
                    response = there.getresponse()
                    content = response.read()
                except OSError:
                    self.close_connection = True
                    return
                finally:
                    there.close()
                if fault == "lose":
                    self.close_connection = True
                    return
                network.sent_bytes += len(content)
                self.answer(response.status, dict(response.getheaders()), content, len(content), fault == "cut")

            def answer(self, status: int, headers: dict, content: bytes, length: int, cut: bool = False) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "server", "date", "transfer-encoding"):
                        self.send_header(name, value)
                declared = headers.get("content-length") if self.command == "HEAD" else length
                self.send_header("Content-Length", str(declared))
                self.end_headers()
                self.wfile.write(content[: length // 2] if cut else content)
                self.close_connection = self.close_connection or cut

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                """A client that is killed closes its connections."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
