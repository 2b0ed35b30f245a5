"""What the scorer refuses, before it costs anything: by real connections to a real server."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrl.images.rewards import RewardError, ask, parse, protocol, remote, serve
from diffrl.images.rewards.protocol import DEPTH, Limits
from diffrl.images.rewards.remote import PIXELS, TOKEN, Remote
from tests.images.rewards.reward_cases import images
from tests.images.rewards.test_remote import scorer, scores

QUICK = Limits(headers_s=0.3, read_s=0.5)


class Mean:
    """A reward that says how many ask it at once."""

    name, differentiable = "mean", False

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.within, self.most = seconds, 0, 0

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        self.within += 1
        self.most = max(self.most, self.within)
        time.sleep(self.seconds)
        self.within -= 1
        return images.mean((1, 2, 3))


@contextmanager
def serving(*rewards: Any, **options: Any) -> Iterator[list[int]]:
    """The ports of servers, one of each reward."""
    servers = [serve.server(reward, **options) for reward in rewards]
    threads = [threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield [s.server_address[1] for s in servers]
    finally:
        for s, thread in zip(servers, threads, strict=True):
            s.shutdown()
            s.server_close()
            thread.join()


def said(port: int, text: bytes) -> tuple[int, str]:
    """The status and what the server says to some bytes, which are all that is sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(text)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    content = json.loads(body)
    return int(head.split()[1]), content.get("error", content)


def post(body: bytes, *headers: str, host: str = "localhost") -> bytes:
    lines = ["POST / HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def request_of(*files: bytes, **more: Any) -> bytes:
    texts = [base64.b64encode(file).decode() for file in files]
    return json.dumps({"images": texts, "prompts": [""] * len(texts), **more}).encode()


def png(width: int, height: int) -> bytes:
    """A whole PNG of one bit a pixel, in a few kB whatever its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_images_of_too_many_pixels_are_refused_by_their_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 80 million in 20 kB, and several that are too many together; nothing is decoded."""
    assert len(png(16_000, 5_000)) < 20_000
    with serving(Mean()) as [port], monkeypatch.context() as patch:
        patch.setattr(protocol.Request, "decoded", lambda self: pytest.fail("decoded"))
        status, text = said(port, post(request_of(png(16_000, 5_000))))
        assert status == 400
        assert "80000000 pixels in all, the largest 16000 x 5000; this scorer takes 33554432 a request" in text
        status, text = said(port, post(request_of(*[png(4096, 2048)] * 5)))
        assert (status, "41943040 pixels in all" in text) == (400, True)
    with serving(Mean(), limits=Limits(pixels=256)) as [port]:
        assert said(port, post(request_of(png(16, 16)))) == (200, {"scores": [0.0]})
        assert said(port, post(request_of(png(16, 17))))[0] == 400


def test_what_pillow_calls_a_bomb_is_refused() -> None:
    width, height = 30_000, 30_000
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with serving(Mean()) as [port]:
        status, text = said(port, post(request_of(b"\x89PNG\r\n\x1a\n" + head + bytes(64))))
    assert status == 400
    assert "image 0 is no PNG in base64" in text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"images": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b"5", "expected"),
        (b"9" * 5000, "no JSON"),
        (b'{"images": 5, "prompts": []}', "expected"),
        (b'{"images": [], "prompts": [], "metadata": 5}', "metadata is a list of objects"),
        (b'{"images": [], "prompts": [], "metadata": "ab"}', "metadata is a list of objects"),
        (b'{"images": [null], "prompts": [""]}', "image 0 is no PNG"),
        (b'{"images": [{}], "prompts": [""]}', "image 0 is no PNG"),
        (b'{"images": [""], "prompts": [5]}', "prompts are texts"),
        (b'{"images": [], "prompts": [], "metadata": [{}]}', "0 images, 0 prompts and 1 metadata"),
        (request_of(png(64, 64)[:45] + bytes(8) + png(64, 64)[53:]), "image 0 is"),
        (request_of(*[b""] * 5000), "5000 images in a request; 4096 at most"),
    ],
)
def test_nonsense_is_the_requests_fault(body: bytes, text: str) -> None:
    with serving(Mean()) as [port]:
        status, answer = said(port, post(body))
        assert (status, text in answer) == (400, True), answer
        assert len(answer) < 300
        assert said(port, post(request_of(png(8, 8))))[0] == 200, "the server goes on"


def test_metadata_may_be_deep_and_not_deeper() -> None:
    def nested(depth: int) -> bytes:
        value: Any = 1
        for _ in range(depth):
            value = [value]
        return post(request_of(png(8, 8), metadata=[{"a": value}]))

    with serving(Mean()) as [port]:
        assert said(port, nested(DEPTH))[0] == 200
        assert said(port, nested(DEPTH + 1)) == (400, f"metadata is nested more than {DEPTH} deep")


def test_lengths_are_checked_before_anything_is_read() -> None:
    start = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    with serving(Mean(), limits=QUICK) as [port]:
        for value, status in ((b"268435457", 413), (b"9" * 5000, 413), (b"-1", 411), (b"1_0", 411), (b"x", 411)):
            assert said(port, start + b"Content-Length: " + value + b"\r\n\r\n")[0] == status
        assert said(port, start + b"Transfer-Encoding: chunked\r\n\r\n")[0] == 411
        assert said(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 405


def test_who_asks_is_checked() -> None:
    """A page of a browser says its Origin; one that has its own name lead here says that as Host."""
    body = request_of(png(8, 8))
    with serving(Mean(), hosts=["scorer.lan"]) as [port]:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:80", "10.0.0.7", "scorer.lan:8000"):
            assert said(port, post(body, host=host))[0] == 200, host
        for host in ("evil.example", "localhost.evil.example:80", "", "127.0.0.1.evil.example"):
            status, text = said(port, post(body, host=host))
            assert (status, "--allow-host NAME" in text) == (403, True), host
        for origin in ("https://evil.example", "null", "http://localhost"):
            assert said(port, post(body, f"Origin: {origin}"))[0] == 403


def test_a_token_keeps_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of a body is read; ours send it from the environment, and say so where it is wrong."""
    batch = images(2, 3, 8, 8)
    with serving(Mean(), token="s3cret", limits=QUICK) as [port]:
        for header in ("X: y", "Authorization: Bearer s3cre", "Authorization: s3cret", "Authorization: Bearer \xe9"):
            head = post(b"", header).replace(b"Content-Length: 0", b"Content-Length: 100")
            assert said(port, head)[0] == 401
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(RewardError, match=rf"refused the request: HTTP 401 no token: set \${TOKEN}"):
            ask(Remote(url), batch, ["", ""])
        with pytest.raises(RewardError, match="HTTP 401 a wrong token"):
            ask(Remote(url, token="other"), batch, ["", ""])
        monkeypatch.setenv(TOKEN, "s3cret")
        torch.testing.assert_close(ask(parse(f"remote:{url}"), batch, ["", ""]), batch.mean((1, 2, 3)))


def test_silent_and_slow_connections_are_dropped() -> None:
    """Each byte in time is not enough: the whole has a limit. More than there is room for are told to come again."""
    limits = Limits(headers_s=0.4, read_s=0.4, connections=8)
    with serving(Mean(), limits=limits) as [port], ExitStack() as stack:
        before = threading.active_count()
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(40)]
        slow = post(request_of(png(8, 8)))
        time.sleep(0.1)
        assert threading.active_count() <= before + 8
        url = f"http://127.0.0.1:{port}"
        assert ask(Remote(url, retries=8, pause=0.05), torch.ones(1, 3, 8, 8), [""]).tolist() == [1]
        assert all(connection.recv(1 << 12)[:12] in (b"", b"HTTP/1.0 503") for connection in silent)
        for first in (10, len(slow) - 100):  # in its headers, in its body
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(slow[:first])
                assert dropped(connection, slow[first : first + 50])


def dropped(connection: socket.socket, rest: bytes) -> bool:
    """Whether the server closes a connection before it has got all of the rest, a byte every 50 ms."""
    try:
        for byte in rest:
            time.sleep(0.05)
            connection.sendall(bytes([byte]))
    except OSError:
        return True
    return False


def test_a_reward_is_asked_by_one_whatever_number_of_servers() -> None:
    shared, own = Mean(0.1), Mean(0.1)
    with serving(shared, shared, own) as ports:
        threads = [
            threading.Thread(target=said, args=(port, post(request_of(png(8, 8))))) for port in ports for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (shared.most, own.most) == (1, 1)


def test_decoding_waits_for_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one request is scored, a damaged one is answered."""
    inside, go_on = threading.Event(), threading.Event()

    class Waits(Mean):
        def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
            inside.set()
            assert go_on.wait(20)
            return super().__call__(images, prompts, metadata)

    with serving(Waits()) as [port]:
        thread = threading.Thread(target=said, args=(port, post(request_of(png(8, 8)))))
        thread.start()
        assert inside.wait(20)
        damaged = png(64, 64)
        assert said(port, post(request_of(damaged[:45] + bytes(8) + damaged[53:])))[0] == 400
        go_on.set()
        thread.join()


def test_the_client_sends_no_more_pixels_than_a_scorer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 4 of 1,600 pixels each where 5,000 are allowed, but 3; and one at least."""
    monkeypatch.setattr(remote, "PIXELS", 5000)
    for side, sizes in ((30, [4]), (40, [3, 1]), (80, [1, 1, 1, 1])):
        with scorer(lambda count, request: scores([0] * len(request["images"]))) as (url, seen):
            ask(Remote(url), torch.zeros(4, 1, side, side), [""] * 4)
        assert [len(request["images"]) for request in seen] == sizes
    assert Limits.pixels == PIXELS


def test_answers_of_a_hostile_scorer_are_told() -> None:
    """Without an end, too deep, numbers that no float holds, or a redirection, which would take the token elsewhere."""
    for body, text in (
        (b'{"scores": [' + b" " * (1 << 21) + b"0]}", "more than"),
        (b"[" * 100_000, "no JSON"),
        (b'{"scores": [1' + b"0" * 400 + b"]}", "score 0 of 1"),
    ):
        with scorer(lambda count, request, body=body: (200, body)) as (url, _):  # type: ignore[misc]
            with pytest.raises(RewardError, match=text) as caught:
                ask(Remote(url), torch.zeros(1, 1, 8, 8), [""])
            assert len(str(caught.value)) < 300
    with scorer(lambda count, request: (302, b"")) as (url, seen):
        with pytest.raises(RewardError, match="refused the request: HTTP 302"):
            ask(Remote(url, token="t"), torch.zeros(1, 1, 8, 8), [""])
        assert len(seen) == 1


def test_a_png_is_what_it_was() -> None:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(file, "PNG")
    pixels = protocol.decode(base64.b64encode(file.getvalue()).decode(), 0)
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 0].tolist() == [1, 2, 3]
