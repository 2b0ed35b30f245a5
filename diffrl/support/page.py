"""A small web page for the person at this machine: files of a program, and functions that the page calls.

It knows nothing of what it shows. A page is made of `files`, by name, and of `calls`, functions from JSON to JSON:

    page = Page(static("diffrl.augment.label", "page"), {"state": state, "choose": choose})
    with page.serving() as address:  # http://127.0.0.1:PORT/TOKEN/
        ...

The server is the standard library's, and nobody else reaches it: it listens to 127.0.0.1 alone; every path begins with
a random token, compared in constant time; a Host or an Origin of another name, as in DNS rebinding, is refused. No path
is ever decoded, joined or looked up on the disk: a name is in `files` as it stands, or there is nothing.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files as resources
from pathlib import PurePath
from socketserver import TCPServer
from typing import Any, NamedTuple

from typing_extensions import override

from diffrl.support.console import console
from diffrl.support.errors import UserError, first_line, said_by
from diffrl.support.files import parse_json

HOST = "127.0.0.1"
"""The only address that a page listens to."""
LARGEST_BODY = 2**16
"""Bytes of JSON that a page may send at once."""
PATIENCE = 10.0
"""Seconds that a connection may be silent."""
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
"""What a file is sent as, by the end of its name; no other files are sent."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy: files and calls of the page itself, nothing inline, nothing of the network."""
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_PATH = re.compile(r"/([\w-]{1,100})/([\w.-]{0,200})", re.ASCII)
"""/TOKEN/NAME, with nothing that would have to be decoded."""
_INDEX = "index.html"

Call = Callable[[Any], Any]
"""What answers a page's request: from JSON to JSON."""


class Refused(Exception):
    """A request that is not answered: the status, and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Answer(NamedTuple):
    """What goes back: status, kind of content, content."""

    status: HTTPStatus
    kind: str
    content: bytes


def static(package: str, folder: str) -> dict[str, bytes]:
    """The files in a folder of an installed package, by name: those whose kind is one of `KINDS`."""
    found = resources(package).joinpath(folder).iterdir()
    return {file.name: file.read_bytes() for file in found if PurePath(file.name).suffix in KINDS}


@dataclass(frozen=True, eq=False)
class Page:
    """A page of files and calls, for whoever knows its token."""

    files: Mapping[str, bytes]
    """Content by name; `index.html` is the page itself. It is asked anew each time, so that files may come and go."""
    calls: Mapping[str, Call]
    """What the page may ask for, one at a time. A UserError or OSError becomes a sentence on the page."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    """What every path begins with."""
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Held while a call runs: take it to change what calls use, or to wait until none runs."""

    @contextlib.contextmanager
    def serving(self, port: int = 0) -> Iterator[str]:
        """In the block the page is there, served by threads; yields its address.

        port: 0 for any that is free. When the block ends, no call is running, and none begins. Raises UserError where
        the port is taken.
        """
        try:
            server = _Server(self, port)
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or error
            raise UserError(
                f"Nothing can be served at port {port} of this machine ({said}): choose another --port, or 0 for any."
            ) from error
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}/{self.token}/"
        finally:
            server.shutdown()
            server.server_close()
            with self.turn:
                server.closed = True
            thread.join()

    def get(self, name: str) -> Answer:
        """The file of that name, or the page for "". Raises Refused, 404, where there is none."""
        name = name or _INDEX
        kind, content = KINDS.get(PurePath(name).suffix), self.files.get(name)
        if kind is None or content is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")
        return Answer(HTTPStatus.OK, kind, content)

    def post(self, name: str, body: bytes, closed: Callable[[], bool] = lambda: False) -> Answer:
        """What a call answers to JSON. Raises Refused where there is no such call, and for what is no JSON.

        closed: asked when it is the call's turn; where it says so, the call is refused.
        """
        call = self.calls.get(name)
        if call is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")
        try:
            asked = parse_json(body, "The request is no JSON")
        except UserError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        with self.turn:
            if closed():
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "The command has ended.")
            try:
                answer = call(asked)
            except (UserError, OSError) as error:
                raise Refused(HTTPStatus.CONFLICT, str(error)) from error
            except Exception as error:  # a fault of ours: the page says so, and the command goes on
                console.print(f"The page's `{name}` failed: {said_by(error)}", style="red", markup=False)
                raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, said_by(error)) from error
        return _json(HTTPStatus.OK, answer)


def _json(status: HTTPStatus, value: Any) -> Answer:
    return Answer(status, "application/json", json.dumps(value, allow_nan=False).encode())


class _Server(ThreadingHTTPServer):
    """Serves one page, a thread a connection."""

    daemon_threads = True
    block_on_close = False  # a connection that is open and silent holds nobody up

    def __init__(self, page: Page, port: int) -> None:
        self.page, self.closed = page, False
        super().__init__((HOST, port), _Handler)

    @override
    def server_bind(self) -> None:
        """Bind without asking the network for this machine's name, as HTTPServer would."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is its own affair; the rest is said in a line."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            console.print(f"The page's server: {said_by(error)}", style="red", markup=False)


class _Handler(BaseHTTPRequestHandler):
    """One request. Nothing of it is read before its host and its token are right."""

    server: _Server
    timeout = PATIENCE

    def do_GET(self) -> None:
        """Send a file."""
        self._answer(lambda name: self.server.page.get(name))

    def do_POST(self) -> None:
        """Answer a call."""
        self._answer(lambda name: self.server.page.post(name, self._body(), lambda: self.server.closed))

    def _answer(self, find: Callable[[str], Answer]) -> None:
        try:
            self._send(find(self._name()))
        except Refused as refused:
            self.close_connection = True
            self._send(_json(refused.status, {"error": str(refused)}))
        except OSError:  # it has gone, or is silent
            self.close_connection = True

    def _name(self) -> str:
        """The name in the path. Raises Refused: 403 for another host or origin, 404 without the token."""
        port = self.server.server_port
        own = {f"{host}:{port}" for host in (HOST, "localhost")}
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0].strip().lower() not in own:
            raise Refused(HTTPStatus.FORBIDDEN, "This page is for this machine alone.")
        if any(origin.strip().lower().removeprefix("http://") not in own for origin in origins):
            raise Refused(HTTPStatus.FORBIDDEN, "Another page may not ask this one.")
        parts = _PATH.fullmatch(self.path)
        given = parts[1] if parts else ""
        if not hmac.compare_digest(given.encode(), self.server.page.token.encode()) or parts is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")
        return parts[2]

    def _body(self) -> bytes:
        """The JSON that was sent. Raises Refused: 411 without a length, 413 for too much, 415 for other kinds."""
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0].strip(), re.ASCII):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "A request states its length.")
        length = int(lengths[0])
        if length > LARGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request has {LARGEST_BODY:,} bytes at most.")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A request is JSON.")
        body = self.rfile.read(length)
        if len(body) != length:
            raise Refused(HTTPStatus.BAD_REQUEST, "The request has been cut short.")
        return body

    def _send(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        for key, value in _HEADERS.items():
            self.send_header(key, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    @override
    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request of ours, such as another method, in our own words."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send(_json(HTTPStatus(code), {"error": HTTPStatus(code).phrase}))

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the address holds the token."""


def open_browser(address: str) -> bool:
    """Show an address in the person's browser, where there is one; gives whether it was tried."""
    import webbrowser

    try:
        return webbrowser.open(address)
    except (webbrowser.Error, OSError) as error:
        console.print(f"No browser could be opened: {first_line(error)}", markup=False)
        return False
