"""A page of this machine answers nobody else: each rule, by requests written out byte by byte."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffrl.support.errors import UserError
from diffrl.support.page import KINDS, LARGEST_BODY, POLICY, Page, static


def failing(value: Any) -> Any:
    raise {"user": UserError("no such pair"), "disk": OSError(28, "No space left on device")}.get(
        value, RuntimeError("a fault")
    )


class Served:
    """A page that is served, and what it answers to bytes."""

    def __init__(self, page: Page, address: str) -> None:
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{32,})/", address)
        assert found
        self.page, self.address, self.port, self.token = page, address, int(found[1]), found[2]

    def raw(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(request)
            answer = b""
            while part := connection.recv(2**16):
                answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:])}
        return int(lines[0].split()[1]), headers, body

    def ask(self, path: str | None = None, *lines: str, method: str = "GET", body: bytes = b"", host: str = "") -> Any:
        """The answer to a request; path: below the token's, or absolute."""
        path = path if path is not None and path.startswith("/") else f"/{self.token}/{path or ''}"
        head = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{self.port}'}", *lines]
        return self.raw("\r\n".join([*head, "", ""]).encode("latin-1") + body)

    def post(self, name: str, value: Any, *lines: str) -> tuple[int, Any]:
        body = json.dumps(value).encode()
        about = "Content-Type: application/json", f"Content-Length: {len(body)}"
        status, _, answer = self.ask(name, *about, *lines, method="POST", body=body)
        return status, json.loads(answer)


@pytest.fixture
def served() -> Iterator[Served]:
    files = {"index.html": b"<p>here", "page.js": b"1", "secret.txt": b"not a page's kind"}
    page = Page(files, {"double": lambda x: 2 * x, "failing": failing})
    with page.serving() as address:
        yield Served(page, address)


def test_who_knows_the_token_gets_the_files_and_the_calls(served: Served) -> None:
    for path, content in (("", b"<p>here"), ("index.html", b"<p>here"), ("page.js", b"1")):
        assert served.ask(path)[::2] == (200, content)
    assert served.ask(host=f"localhost:{served.port}")[0] == 200
    assert served.post("double", [1, "a"]) == (200, [1, "a", 1, "a"])
    served.page.files["new.png"] = b"\x89PNG"  # type: ignore[index]
    assert served.ask("new.png")[1]["content-type"] == "image/png"


def test_without_the_token_there_is_nothing(served: Served) -> None:
    wrong = served.token[:-1] + ("A" if served.token[-1] != "A" else "B")
    for path in (
        "/",
        "/index.html",
        f"/{wrong}/",
        f"/{wrong}/page.js",
        f"/{served.token}",
        f"/{served.token}x/",
        "/é/",
    ):
        assert served.ask(path)[0] == 404
    body = b"1"
    about = "Content-Type: application/json", "Content-Length: 1"
    assert served.ask(f"/{wrong}/double", *about, method="POST", body=body)[0] == 404
    assert len({Page({}, {}).token for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", "[::1]:{port}"]
)
def test_another_host_is_refused_whatever_it_knows(served: Served, host: str) -> None:
    """As after DNS rebinding, where a page of the name `evil.example` is sent to this machine."""
    assert served.ask(host=host.format(port=served.port))[0] == 403


def test_a_host_is_named_once(served: Served) -> None:
    path = f"/{served.token}/"
    assert served.raw(f"GET {path} HTTP/1.0\r\n\r\n".encode())[0] == 403
    assert served.ask(path, "Host: evil.example")[0] == 403


def test_another_page_of_the_browser_may_not_ask(served: Served) -> None:
    assert served.post("double", 1, "Origin: https://evil.example")[0] == 403
    assert served.post("double", 1, "Origin: null")[0] == 403
    assert served.post("double", 1, f"Origin: http://127.0.0.1:{served.port}") == (200, 2)


ESCAPES = [
    "..", "../", "../secret.txt", "..%2fpage.py", "%2e%2e/page.py", "%2e%2e%2fpage.py", "..\\page.py", "....//page.py",
    "a/../index.html", "./index.html", "/index.html", "index%2ehtml", "index.html%00", "index.html?x", "index.html;x",
    "%252e%252e/x", "index.html/", "INDEX.HTML", "secret.txt",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_what_is_no_name_of_a_file_is_nothing(served: Served, name: str) -> None:
    assert served.ask(f"/{served.token}/{name}")[0] == 404


def test_bodies_are_small_of_known_length_and_json(served: Served) -> None:
    kind, path = "Content-Type: application/json", f"/{served.token}/double"
    # Refused by the length it states, before any of it has come.
    assert served.ask(path, kind, f"Content-Length: {LARGEST_BODY + 1}", method="POST")[0] == 413
    text = b'"' + b"x" * (LARGEST_BODY - 2) + b'"'
    assert served.ask(path, kind, f"Content-Length: {LARGEST_BODY}", method="POST", body=text)[0] == 200
    for lines in (
        [],
        ["Content-Length: -1"],
        ["Content-Length: 1", "Content-Length: 2"],
        ["Transfer-Encoding: chunked"],
    ):
        assert served.ask(path, kind, *lines, method="POST", body=b"1")[0] == 411
    form = "Content-Type: application/x-www-form-urlencoded"
    assert served.ask(path, form, "Content-Length: 1", method="POST", body=b"1")[0] == 415
    for bad in (b"{", b"\xff", b"[" * 60_000):
        assert served.ask(path, kind, f"Content-Length: {len(bad)}", method="POST", body=bad)[0] == 400


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"])
def test_other_methods_are_none(served: Served, method: str) -> None:
    assert served.ask(method=method)[0] == 501


def test_calls_are_asked_and_files_are_got(served: Served) -> None:
    assert served.ask("double")[0] == 404
    assert served.post("index.html", 1)[0] == 404


def test_errors_are_sentences_on_the_page(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    assert served.post("failing", "user") == (409, {"error": "no such pair"})
    assert served.post("failing", "disk") == (409, {"error": "[Errno 28] No space left on device"})
    assert served.post("failing", "fault") == (500, {"error": "RuntimeError: a fault"})
    assert served.post("double", 3) == (200, 6)
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out
    assert served.token not in said.err + said.out


def test_every_answer_has_the_policy_and_is_kept_nowhere(served: Served) -> None:
    for _, headers, _ in (served.ask(), served.ask("/"), served.ask(method="PUT"), served.ask(host="evil.example")):
        assert headers["content-security-policy"] == POLICY
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
    assert "default-src 'none'" in POLICY
    assert "unsafe" not in POLICY


def test_no_other_interface_is_listened_to(served: Served) -> None:
    """127.0.0.2 is this machine too, and every address of it is reached where a server listens to 0.0.0.0."""
    for address in ("127.0.0.2", "::1"):
        with pytest.raises(OSError), socket.create_connection((address, served.port), timeout=5):
            pass


def test_one_call_at_a_time_and_none_after_the_end() -> None:
    inside, most = 0, 0
    began, go_on, done = threading.Event(), threading.Event(), []

    def slow(value: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        began.set()
        go_on.wait(20)
        done.append(value)
        inside -= 1
        return value

    def ask(value: int) -> None:
        try:
            answers.append(served.post("slow", value)[0])
        except (OSError, IndexError):  # too late to be heard at all
            answers.append(503)

    page = Page({}, {"slow": slow})
    with page.serving() as address:
        served = Served(page, address)
        answers: list[int] = []
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        assert began.wait(20)
        threading.Timer(0.2, go_on.set).start()  # after the block below has begun to end
    finished = len(done)
    for thread in threads:
        thread.join(20)
    assert most == 1
    assert inside == 0
    assert len(done) == finished >= 1  # what had begun has ended, and what had not does not begin
    assert sorted(answers) == sorted([200] * finished + [503] * (4 - finished))


def test_a_port_that_is_taken_is_a_sentence(served: Served) -> None:
    with pytest.raises(UserError, match=rf"port {served.port} .*--port"), Page({}, {}).serving(served.port):
        pass


def test_static_files_are_those_of_known_kinds() -> None:
    found = static("diffrl.augment.label", "page")
    assert set(found) == {"index.html", "page.css", "page.js", "icon.svg"}
    assert {Path(name).suffix for name in found} <= set(KINDS)
    for content in found.values():  # nothing of the network, nothing inline: the policy would refuse it
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", text)
