"""A small HTTP server for pages of this machine: one request a connection, GET and HEAD only.

Python's :mod:`http.server`, with what a hostile client or page makes necessary. A request's head must
arrive whole within :data:`HEAD_SECONDS` and is at most :data:`HEAD_BYTES` long; a request with a body is
refused. Each connection has a thread, and there are at most :data:`CONNECTIONS`. On loopback addresses the
``Host`` must be one of their names, so that another site's page can't read ours by DNS rebinding.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from fastokd.errors import UserError, in_one_line, warn

HEAD_SECONDS, ANSWER_SECONDS, HEAD_BYTES, CONNECTIONS = 5.0, 30.0, 16384, 256
_HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@dataclass(frozen=True)
class Answer:
    """``policy``: the Content-Security-Policy. ``tag``: the ETag; a client that has it gets no body."""

    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    tag: str | None = None
    policy: str = _NOTHING


def refusal(status: HTTPStatus) -> Answer:
    """An answer without a page."""
    return Answer(f"{status.value} {status.phrase}\n".encode(), status=status)


class Server(ThreadingHTTPServer):
    """Gives ``answer(path, query)`` to GET and HEAD; the path is as the client wrote it, undecoded.

    Raises:
        UserError: it can't listen on ``host`` and ``port`` (0: a free one).
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, answer: Callable[[str, str], Answer]) -> None:
        if not 0 <= port <= 65535:
            raise UserError(f"--port is {port}: it must be between 0 (a free one) and 65535")
        self.answer = answer
        self.loopback = is_loopback(host)
        self.names = {"localhost", "127.0.0.1", "[::1]", _in_url(host)}
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), _Handler)
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"can't listen on {_in_url(host)}:{port} ({error}): choose another --port or --host"
            ) from error
        self.loopback = is_loopback(str(self.server_address[0]))
        self.url = f"http://{_in_url(host)}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Without the look-up of the host's name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begins the connection's thread, unless there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Reports bugs only; a client that disconnects is no error."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            warn(f"a request failed: {in_one_line(error)}")


class _TooLargeError(Exception):
    """A request's head has too many bytes."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def version_string(self) -> str:
        """For the header ``Server``."""
        return "fastokd"

    def handle(self) -> None:
        """The one request of the connection."""
        self.requestline, self.request_version, self.command = "", self.protocol_version, ""
        self.close_connection = True
        try:
            head = _read_head(self.connection)
        except TimeoutError:
            self.send_error(HTTPStatus.REQUEST_TIMEOUT)
            return
        except _TooLargeError:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        self.rfile.close()
        self.rfile = io.BytesIO(head)
        self.connection.settimeout(ANSWER_SECONDS)
        self.handle_one_request()

    def finish(self) -> None:
        """Reads the rest of the request for at most 0.5 s, so that closing doesn't reset the connection before the
        client has read the answer."""
        with suppress(OSError):
            super().finish()
            self.connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + 0.5
            while (left := end - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65536):
                    break

    def do_GET(self) -> None:
        """Answers, or refuses the request."""
        if self.request_version == "HTTP/0.9":
            return
        refused = self._refused()
        if refused is not None:
            self.send_error(refused)
            return
        path, _, query = self.path.partition("?")
        try:
            answer = self.server.answer(path, query)
        except Exception as error:  # a bug: the server goes on
            warn(f"{path} can't be shown: {in_one_line(error)}")
            answer = refusal(HTTPStatus.INTERNAL_SERVER_ERROR)
        if answer.tag is not None and self.headers.get("If-None-Match") == answer.tag:
            answer = replace(answer, body=b"", status=HTTPStatus.NOT_MODIFIED)
        self._send(answer)

    do_HEAD = do_GET

    def _refused(self) -> HTTPStatus | None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1:
            return HTTPStatus.BAD_REQUEST
        name = re.sub(r":\d*$", "", hosts[0].strip().lower())
        if self.server.loopback and name not in self.server.names:
            return HTTPStatus.MISDIRECTED_REQUEST
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return None

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Without what the client wrote; also for what the base class refuses."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:  # any other method
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self._send(refusal(status))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {"Content-Type": answer.kind, "Content-Length": str(len(answer.body))}
        if answer.tag is not None:
            headers["ETag"] = answer.tag
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        for name, value in {
            **_HEADERS,
            "Content-Security-Policy": answer.policy,
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed for a request."""


def _read_head(connection: socket.socket) -> bytes:
    """A request up to its empty line.

    Raises:
        TimeoutError: it takes too long.
        _TooLargeError: it is too long.
        ConnectionError: the client has ended it before.
    """
    end, head = time.monotonic() + HEAD_SECONDS, b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        if len(head) > HEAD_BYTES:
            raise _TooLargeError
        connection.settimeout(max(0.001, end - time.monotonic()))
        piece = connection.recv(4096)
        if not piece:
            raise ConnectionAbortedError
        head += piece
        if time.monotonic() > end:
            raise TimeoutError
    return head


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()
