"""A server for any reward in the protocol of `remote`: python -m diffrl.images.rewards.serve REWARD --port N.

It listens to this machine only unless `--host` says otherwise. What a request may cost is bounded before it is read or
decoded: `Limits`. Pages of a browser are refused (by their Origin, and by a Host that is no address and no name of this
machine), and with `--token`, or $DIFFRL_SCORER_TOKEN, everybody who does not send it.
"""

import argparse
import contextlib
import hashlib
import hmac
import io
import ipaddress
import json
import os
import re
import socket
import sys
import threading
import weakref
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from typing_extensions import override

from diffrl.images.rewards.arguments import SERVED
from diffrl.images.rewards.base import Reward, asks_a_person, grouped
from diffrl.images.rewards.entry import GRAMMAR, TERM
from diffrl.images.rewards.posting import check_secret
from diffrl.images.rewards.protocol import BadRequest, Budget, Limits, Refused, TimedReader, read, scores
from diffrl.images.rewards.registry import listing, named_in, parse
from diffrl.images.rewards.remote import TOKEN
from diffrl.support.errors import UserError, first_line
from diffrl.support.files import sha256

ENDS = 2**20
"""Bytes at each end of a file that a folder's digest looks at."""
LINGER = 2.0
"""Seconds for the rest of a request that has been refused."""
_TURNS: weakref.WeakValueDictionary[int, threading.Lock] = weakref.WeakValueDictionary()
"""The lock of each reward that is served, by its identity; alive as long as a server of it."""


def answer(reward: Reward, request: Any, limits: Limits | None = None) -> dict[str, list[float]]:
    """The answer to a request. Raises BadRequest where it is not of the protocol, UserError where the reward does."""
    checked = read(request, limits or Limits())
    return {"scores": scores(reward, checked, checked.decoded())}


class Server(ThreadingHTTPServer):
    """A server of `reward`: at most `limits.connections` at a time, each a thread; the next ones are told 503.

    hosts: names by which a request may call it beside addresses, localhost and this machine's name. token: what a
    request must send; "": nothing. serves: what answers say that `reward` is; "": nothing.
    A reward is asked by one request at a time, whatever number of servers it has.
    """

    request_queue_size = 128  # of connections that wait to be accepted: beyond, they try again after a second

    def __init__(
        self,
        address: tuple[str, int],
        reward: Reward,
        token: str,
        hosts: Sequence[str],
        limits: Limits,
        serves: str = "",
    ) -> None:
        self.reward, self.token, self.limits = reward, token, limits
        self.serves = {"serves": serves} if serves else {}
        self.names = {name.lower() for name in ("localhost", socket.gethostname(), address[0], *hosts)}
        self.turn = _TURNS.setdefault(id(reward), threading.Lock())
        self.bytes, self.pixels = Budget(2 * limits.body), Budget(2 * limits.pixels)
        self._free = threading.BoundedSemaphore(limits.connections)
        super().__init__(address, Handler)

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):  # it may have gone
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    @override
    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is its own affair; say the rest in a line, without a traceback."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            print(f"{client_address[0]}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)

    def knows(self, host: str) -> bool:
        """Whether a request may call this server by the `host` of its header, which may end in :PORT.

        An address is always right: what a hostile page needs is a name of its own that leads here.
        """
        name = host.strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True


class Handler(BaseHTTPRequestHandler):
    """Answers POST, at any path."""

    server: Server

    @override
    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.reader = TimedReader(self.connection, self.server.limits.headers_s)
        self.rfile = io.BufferedReader(self.reader)

    def do_POST(self) -> None:
        """Answer one request."""
        content: dict[str, Any]
        try:
            status, content = HTTPStatus.OK, {"scores": self._scores(), **self.server.serves}
        except Refused as error:
            status, content = error.status, {"error": str(error)}
        except TimeoutError:
            status, content = HTTPStatus.REQUEST_TIMEOUT, {"error": "the request did not arrive in time"}
        except UserError as error:
            status, content = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except OSError:  # the client has gone
            self.close_connection = True
            return
        except Exception as error:  # a fault of the reward's: told to the client, and the server goes on
            self.log_error("%s: %s", type(error).__name__, first_line(error))
            said = f"{type(error).__name__}: {first_line(error)}"
            status, content = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": said}
        self._send(status, content)
        if status not in (HTTPStatus.OK, HTTPStatus.REQUEST_TIMEOUT):
            self._discard()

    def do_GET(self) -> None:
        """Say what is expected instead."""
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "a scorer answers POST; see diffrl's protocol"})

    def _scores(self) -> list[float]:
        """The scores that the request asks for: read and decoded beside others, scored when it is its turn."""
        served, limits = self.server, self.server.limits
        self._check_sender()
        length = self._length()
        with served.bytes.spent(length, limits.read_s):
            self.reader.allow(limits.read_s)
            body = self.rfile.read(length)
            if len(body) < length:
                raise BadRequest(f"the request broke off after {len(body)} of {length} bytes")
            request = read(_json(body), limits)
            with served.pixels.spent(request.pixels, limits.read_s):
                images = request.decoded()
                with served.turn:
                    return scores(served.reward, request, images)

    def _check_sender(self) -> None:
        """Raise Refused for a page of a browser, another name than this machine's, and without the token."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if origin is not None:
            raise Refused(HTTPStatus.FORBIDDEN, f"requests of web pages are refused; this one is of {origin[:100]!r}")
        if not self.server.knows(host):
            raise Refused(
                HTTPStatus.FORBIDDEN,
                f"this scorer is not called {host[:100]!r}; where it is, start it with --allow-host NAME",
            )
        if self.server.token:
            sent = self.headers.get("Authorization", "")
            if not hmac.compare_digest(sent.encode(), f"Bearer {self.server.token}".encode()):
                what = "a wrong token" if sent else "no token"
                raise Refused(HTTPStatus.UNAUTHORIZED, f"{what}: set ${TOKEN} to the one that the scorer has")

    def _length(self) -> int:
        """The body's bytes. Raises Refused where they are not said, or too many."""
        said, limit = self.headers.get("Content-Length", ""), self.server.limits.body
        if not (said.isascii() and said.isdecimal()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, f"expected a Content-Length in bytes, got {said[:100]!r}")
        if len(said) > 18 or int(said) > limit:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request of {said[:30]} bytes; {limit} at most: send fewer images",
            )
        return int(said)

    def _send(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.connection.settimeout(self.server.limits.read_s)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _discard(self) -> None:
        """Read what is still on its way: closed before that, the connection would be reset, and the answer lost."""
        self.reader.allow(LINGER)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(1 << 16):
                pass

    @override
    def log_error(self, format: str, *args: Any) -> None:
        if not format.startswith("Request timed out"):  # silent connections may be many
            super().log_error(format, *args)

    @override
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Write nothing: requests are many, and errors are written elsewhere."""


def _json(body: bytes) -> Any:
    """What a body says. Raises BadRequest where it is no JSON, or too deep for a parser."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise BadRequest(f"the request is no JSON in UTF-8: {said}") from error


def server(
    reward: Reward,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    token: str = "",
    hosts: Sequence[str] = (),
    limits: Limits | None = None,
    serves: str = "",
) -> Server:
    """A server of `reward`, to be run by `serve_forever`. port 0: any free one; `server_address` tells which.

    token, hosts, limits, serves: as `Server` takes them. Raises UserError where the address cannot be listened to.
    """
    try:
        return Server((host, port), reward, token, hosts, limits or Limits(), serves)
    except (OSError, OverflowError) as error:  # the latter: no port has such a number
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen to {host}:{port}: {reason}; choose another --port") from error


def named(spec: str) -> str:
    """What answers say that a reward is: its text, with the last parts of paths, and digests of what is there.

    Where files lie, and at which address another server is asked, is nobody else's business, and may change.
    """
    terms, digests = [], []
    for term in spec.split(" + "):
        match = TERM.fullmatch(term)
        if match is None or not match["argument"]:
            terms.append(term.strip())
            continue
        parts = match["argument"].split("#")
        if match["name"] in SERVED:
            parts[0] = ""
        for i, part in enumerate(parts):
            path = Path(part).expanduser()
            if part and path.exists():
                parts[i] = path.absolute().name
                digests.append(f"{parts[i]} sha256:{_digest(path)[:16]}")
            elif path.is_absolute():
                parts[i] = path.name
        terms.append(f"{term[: match.start('argument')]}{'#'.join(parts)}".strip())
    return " + ".join(terms) + (f" ({', '.join(digests)})" if digests else "")


def _digest(path: Path) -> str:
    """A digest of a file; of a folder, of its files' names and sizes, and of the `ENDS` of what they hold."""
    if path.is_file():
        return sha256(path)
    found = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        size = file.stat().st_size
        found.update(f"{file.relative_to(path).as_posix()} {size} ".encode())
        with file.open("rb") as opened:
            found.update(opened.read(ENDS))
            opened.seek(max(size - ENDS, 0))
            found.update(opened.read(ENDS))
    return found.hexdigest()


def _servable() -> str:
    """The rewards that can be served, a line each: of `human` only the votes of a run."""
    kept, of = "human:RUN/votes.json", "a model of the votes that a person gave in a run"
    lines = re.sub(r"(?m)^(human\S* +).*", lambda line: kept.ljust(len(line[1])) + of, listing())
    return re.sub(r"(?m)^remote:.*\n?", "", lines).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: serves until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m diffrl.images.rewards.serve",
        description=f"Serve a reward over HTTP and JSON. REWARD is\n{GRAMMAR}; known:\n\n{_servable()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reward", metavar="REWARD")
    parser.add_argument("--port", type=int, default=8000, help="the port to listen to; 0: any free one (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen to (this machine only)")
    parser.add_argument(
        "--token",
        default=os.environ.get(TOKEN, ""),
        help=f"a secret that requests must send; by default ${TOKEN}, which other users do not see in the list of "
        "processes; clients send theirs",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which it may be called, beside addresses and this machine's own; may be given again",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=Limits.pixels, help="pixels of a request's images in all (%(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", help="where the reward's networks are: cpu, cuda, cuda:1 (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.max_pixels < 1:
            raise UserError(f"--max-pixels is {options.max_pixels}; expected at least 1")
        if asks_a_person(options.reward):
            raise UserError("A scorer asks nobody: a person is a --reward of a run; or serve human:RUN/votes.json.")
        if "remote" in named_in(options.reward):
            raise UserError(f"{options.reward} is a scorer already: give clients its address, or serve what it serves.")
        serves = named(options.reward)  # the files as they are read now
        reward = parse(options.reward, device=options.device)
        if grouped(reward):
            raise UserError(f"{reward.name} compares all images of a prompt, and a request may bring some of them.")
        check_secret(options.token, "--token")
        limits = Limits(pixels=options.max_pixels)
        with server(
            reward,
            options.host,
            options.port,
            token=options.token,
            hosts=options.allow_host,
            limits=limits,
            serves=serves,
        ) as http:
            host, port = http.server_address[:2]
            print(f"{reward.name} at http://{host!s}:{port}", flush=True)
            if not options.token and not ipaddress.ip_address(str(host)).is_loopback:
                print(f"It answers whoever reaches it: --token, or ${TOKEN}, keeps others out.", file=sys.stderr)
            http.serve_forever()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
