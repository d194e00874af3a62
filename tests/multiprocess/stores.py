"""Object stores on this machine, for tests: servers of their own, in processes of their own.

S3 is moto's server.  Google's is the package gcp-storage-emulator, behind a small proxy: the
emulator leaves out the header that tells which generation of an object is sent, without which
TensorStore takes an answer for broken.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["google", "s3"]

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def s3(bucket: str) -> Iterator[dict[str, str]]:
    """A server with one bucket; the variables that lead programs to it."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
    with _server(command) as port:
        url = f"http://127.0.0.1:{port}"
        with _DIRECT.open(urllib.request.Request(f"{url}/{bucket}", method="PUT")):
            pass
        yield {
            "no_proxy": "127.0.0.1",
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
        }


@contextlib.contextmanager
def google(bucket: str) -> Iterator[dict[str, str]]:
    """The same for Google's."""
    command = str(Path(sys.executable).with_name("gcp-storage-emulator"))
    if not Path(command).exists():
        command = shutil.which("gcp-storage-emulator") or command
    options = ["start", "--host", "127.0.0.1", "--in-memory", "--default-bucket", bucket, "--port"]
    with _server([command, *options]) as port, _Proxy(port) as front:
        yield {
            "no_proxy": "127.0.0.1",
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{front}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anybody",
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _server(command: list[str]) -> Iterator[int]:
    """A process that serves HTTP on the port that ends its command, from when it answers on."""
    for left in reversed(range(5)):  # somebody else may get the port before it does
        port = _free_port()
        process = subprocess.Popen(
            [*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            if _is_up(process, port):
                yield port
                return
            assert left, f"{command} ended"
        finally:
            process.kill()
            process.wait()


def _is_up(process: subprocess.Popen[bytes], port: int) -> bool:
    """Waits until it answers; false if it has ended, and whatever answers is another."""
    deadline = time.monotonic() + 300
    while not _answers(port):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"{process.args} does not answer"
        time.sleep(0.02)
    return process.poll() is None


def _answers(port: int) -> bool:
    try:
        with _DIRECT.open(f"http://127.0.0.1:{port}/", timeout=60):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


class _Proxy:
    """Hands requests on to a port of this machine, and adds a header to the answers."""

    def __init__(self, port: int) -> None:
        handler = type("Handler", (_Handler,), {"behind": port})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> int:
        self._thread.start()
        return self._server.server_address[1]

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    behind = 0
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer goes out at once

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = http.client.HTTPConnection("127.0.0.1", self.behind, timeout=300)
        try:
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            content = answer.read()
        finally:
            behind.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        if "alt=media" in self.path:
            self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _pass_on

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
