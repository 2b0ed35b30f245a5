"""The remote scorer against real HTTP servers on this machine."""

import base64
import email.utils
import hashlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.images.rewards import RewardError, ask, parse, posting, protocol, serve
from diffrl.images.rewards.codecs import to_uint8
from diffrl.images.rewards.remote import Remote
from diffrl.support.errors import UserError
from diffrl.support.stopping import Stopped, stop_signals
from tests.images.rewards.reward_cases import images

Answer = Callable[[int, dict[str, Any]], tuple[int, bytes]]
"""The number of the request and what it says -> status and body."""


@contextmanager
def running(http: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@contextmanager
def scorer(answer: Answer, **headers: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers as told, its address, and the requests that it got.

    A body that ends in "..." breaks off there, and is said to be longer."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answer(len(seen), seen[-1])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            whole = body.removesuffix(b"...")
            self.send_header("Content-Length", str(len(whole) if whole == body else 1000))
            self.end_headers()
            self.wfile.write(whole)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, seen


def scores(values: list[Any]) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": values}).encode()


def test_images_prompts_and_metadata_arrive_in_order_and_in_batches() -> None:
    batch = images(5, 3, 6, 4)

    def brightness(count: int, request: dict[str, Any]) -> tuple[int, bytes]:
        assert set(request) == {"images", "prompts", "metadata"}
        return scores([m["weight"] * len(p) for p, m in zip(request["prompts"], request["metadata"], strict=True)])

    prompts = ["a", "bb", "ccc", "dddd", "é日"]
    metadata = [{"weight": w} for w in (1, 10, 100, 1000, 0.5)]
    with scorer(brightness) as (url, seen):
        values = ask(Remote(url, batch=2), batch, prompts, metadata)
    assert values.tolist() == [1, 20, 300, 4000, 1]
    assert [len(request["images"]) for request in seen] == [2, 2, 1]
    sent = [protocol.decode(image, 0) for request in seen for image in request["images"]]
    assert all(torch.equal(a, torch.from_numpy(b).permute(2, 0, 1)) for a, b in zip(sent, to_uint8(batch), strict=True))
    assert base64.b64decode(seen[0]["images"][0]).startswith(b"\x89PNG")


class Mean:
    """A reward that sees the pixels, the prompt and the metadata."""

    name, differentiable = "mean", True

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        offset = torch.tensor([len(p) + m.get("more", 0) for p, m in zip(prompts, metadata, strict=True)])
        return images.mean((1, 2, 3)) + offset


def test_our_server_gives_what_the_reward_gives() -> None:
    batch = images(4, 3, 8, 8)
    prompts, metadata = ["a", "bb", "", "c"], [{}, {"more": 3}, {}, {}]
    with running(serve.server(Mean())) as url:
        far = parse(f"remote:{url}")
        torch.testing.assert_close(ask(far, batch, prompts, metadata), ask(Mean(), batch, prompts, metadata))
        assert not far.differentiable
        assert far.name == f"remote:{url}"
    jpeg = parse("jpeg + digit:3")
    with running(serve.server(jpeg)) as url:
        torch.testing.assert_close(ask(parse(f"remote:{url}"), batch, prompts), ask(jpeg, batch, prompts))


def test_images_of_several_sizes_are_scored_one_by_one() -> None:
    small, large = images(1, 3, 4, 4), images(1, 3, 8, 6, seed=1)
    request: dict[str, Any] = {"images": [], "prompts": ["", ""], "metadata": [{}, {}]}

    def keep(count: int, sent: dict[str, Any]) -> tuple[int, bytes]:
        request["images"] += sent["images"]
        return scores([0])

    with scorer(keep) as (url, _):
        for batch in (small, large):
            ask(Remote(url), batch, [""])
    assert serve.answer(Mean(), request)["scores"] == pytest.approx([small.mean().item(), large.mean().item()])
    assert serve.answer(Mean(), {"images": [], "prompts": []}) == {"scores": []}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "no JSON but '<html>'"),
        (b"[1, 2]", 'no list "scores"'),
        (b'{"score": [1, 2]}', 'no list "scores"'),
        (b'{"scores": [1]}', "gave 1 scores for 2 images"),
        (b'{"scores": [1, NaN]}', "score 1 of 2 is nan"),
        (b'{"scores": [1e999, 1]}', "score 0 of 2 is inf"),
        (b'{"scores": [1, "2"]}', "score 1 of 2 is '2'"),
        (b'{"scores": [1, null]}', "score 1 of 2 is None"),
        (b'{"scores": [true, 1]}', "score 0 of 2 is True"),
    ],
)
def test_answers_that_are_none_are_named(body: bytes, said: str) -> None:
    with scorer(lambda count, request: (200, body)) as (url, seen):
        with pytest.raises(RewardError) as caught:
            ask(Remote(url), images(2, 3, 4, 4), ["", ""])
        assert said in str(caught.value)
        assert len(seen) == 1, "what is wrong stays wrong"


def test_a_busy_server_is_tried_again() -> None:
    with scorer(lambda count, request: scores([7]) if count == 3 else (503 if count == 1 else 429, b"")) as (url, seen):
        assert ask(Remote(url, pause=0.001), images(1, 3, 4, 4), [""]).tolist() == [7]
        assert len(seen) == 3
    with scorer(lambda count, request: (500, b'{"error": "out of memory"}')) as (url, seen):
        with pytest.raises(RewardError, match=r"HTTP 500 out of memory \(3 attempts\)"):
            ask(Remote(url, pause=0.001, retries=2), images(1, 3, 4, 4), [""])
        assert len(seen) == 3


def test_each_pause_is_twice_the_last(pauses: list[float]) -> None:
    with scorer(lambda count, request: (503, b"")) as (url, _), pytest.raises(RewardError, match="HTTP 503"):
        ask(Remote(url, pause=0.5, retries=3), images(1, 3, 4, 4), [""])
    assert pauses == [0.5, 1.0, 2.0]


def test_a_refusal_is_told_and_not_repeated() -> None:
    with scorer(lambda count, request: (400, b'{"error": "no such\\nprompt"}')) as (url, seen):
        with pytest.raises(RewardError, match="refused the request: HTTP 400 no such prompt"):
            ask(Remote(url, pause=0.001), images(1, 3, 4, 4), [""])
        assert len(seen) == 1


@pytest.mark.parametrize("status", [400, 500])
def test_a_token_that_a_server_repeats_is_not_shown(status: int) -> None:
    token = "a-very-secret-token"
    with scorer(lambda count, request: (status, json.dumps({"error": f"wrong: {token}"}).encode())) as (url, _):
        with pytest.raises(RewardError, match=r"wrong: \$DIFFRL_SCORER_TOKEN") as caught:
            ask(Remote(url, retries=0, token=token), images(1, 3, 4, 4), [""])
        assert token not in str(caught.value)


def test_no_server_and_a_silent_one_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(RewardError, match=r"no answer within 0\.05 s \(2 attempts\)"):
            ask(Remote(f"http://127.0.0.1:{port}", timeout=0.05, retries=1, pause=0.001), images(1, 3, 4, 4), [""])
    with pytest.raises(RewardError, match=r"cannot be reached: .*refuses.*Is the scorer running"):
        ask(Remote(f"http://127.0.0.1:{port}", retries=1, pause=0.001), images(1, 3, 4, 4), [""])


def test_our_server_refuses_what_is_not_of_the_protocol() -> None:
    png = base64.b64encode(b"no picture").decode()
    for request, said in (
        ([], "expected"),
        ({"images": ["x"]}, "expected"),
        ({"images": [png], "prompts": [""]}, "image 0 is no PNG"),
        ({"images": ["%%"], "prompts": [""]}, "image 0 is no PNG"),
        ({"images": [], "prompts": [""]}, "0 images, 1 prompts"),
    ):
        with pytest.raises(protocol.BadRequest, match=said):
            serve.answer(Mean(), request)
    refusal = pytest.raises(RewardError, match="HTTP 400 the prompt 'seven' does not name one digit")
    with running(serve.server(parse("digit"))) as url, refusal:
        ask(parse(f"remote:{url}"), images(1, 3, 8, 8), ["seven"])


def test_an_answer_that_breaks_off_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is JSON so far or not, and from the first question on: the address is right."""
    for body in (b'{"sco...', b'{"scores": [3]}...'):
        with scorer(lambda count, request, body=body: (200, body) if count < 3 else scores([7])) as (url, seen):
            assert ask(Remote(url, pause=0.001), images(1, 3, 4, 4), [""]).tolist() == [7]
            assert len(seen) == 3
    with scorer(lambda count, request: (200, b'{"sco...')) as (url, seen):
        with pytest.raises(RewardError, match=r"broke off its answer after 5 of 1000 bytes \(2 attempts\)"):
            ask(Remote(url, retries=1, pause=0), images(1, 3, 4, 4), [""])
        assert len(seen) == 2
    remote = Remote("http://localhost:1", retries=1, pause=0)
    answers = [http.client.BadStatusLine("x"), http.client.BadStatusLine("")]
    monkeypatch.setattr(remote, "_post", lambda body: (_ for _ in ()).throw(answers.pop()))
    with pytest.raises(RewardError, match="cannot be reached: x"):
        ask(remote, images(1, 3, 4, 4), [""])
    assert not answers


@pytest.mark.parametrize("failure", [(500, b""), (503, b""), (200, b""), (200, b'{"sco'), (200, b'{"scores"...')])
def test_a_server_that_has_answered_before_is_waited_for(
    failure: tuple[int, bytes], pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """With pauses that grow to half a minute, and told once; the next time it is away, too, and once it is back."""
    with scorer(lambda count, request: scores([count]) if count % 10 == 1 else failure) as (url, seen):
        remote = Remote(url)
        for first in (1, 11, 21):
            assert ask(remote, images(1, 3, 4, 4), [""]).tolist() == [first]
        assert len(seen) == 21
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30] * 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("It has answered before, so it is waited for, up to 5 min.") == 2
    assert said.count("answers again.") == 2


def test_a_server_is_not_waited_for_for_ever(pauses: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Five minutes in all, pauses and attempts together; a refusal is not waited for."""
    with scorer(lambda count, request: scores([1])) as (url, _):
        remote = Remote(url)
        ask(remote, images(1, 3, 4, 4), [""])
    for _ in range(2):
        pauses.clear()
        with pytest.raises(RewardError, match=r"cannot be reached: .*refuses.*\(1\d attempts\). Is the scorer running"):
            ask(remote, images(1, 3, 4, 4), [""])
        assert 300 - 30 <= sum(pauses) <= 300
        assert "cannot be reached: the server refuses the connection. It has answered before" in " ".join(
            capsys.readouterr().err.split()
        )
    with scorer(lambda count, request: scores([1]) if count == 1 else (400, b"")) as (url, seen):
        remote = Remote(url)
        ask(remote, images(1, 3, 4, 4), [""])
        with pytest.raises(RewardError, match="HTTP 400"):
            ask(remote, images(1, 3, 4, 4), [""])
        assert len(seen) == 2


def test_a_server_that_says_when_to_come_again_is_asked_then(pauses: list[float]) -> None:
    """By seconds or by a date, a minute at most; what is neither, or has been, is nothing."""
    at = posting.time.time()
    for said, expected in {
        "7": 7,
        email.utils.formatdate(at + 20, usegmt=True): 20,
        "3600": 60,
        email.utils.formatdate(at + 3600, usegmt=True): 60,
        email.utils.formatdate(at - 3600, usegmt=True): 0.5,
        "soon": 0.5,
    }.items():
        pauses.clear()
        with scorer(lambda count, request: scores([7]) if count == 2 else (503, b""), Retry_After=said) as (url, _):
            ask(Remote(url), images(1, 3, 4, 4), [""])
        assert pauses == [pytest.approx(expected, abs=5 if expected == 20 else 0)]


@contextmanager
def speaking(answer: bytes) -> Iterator[str]:
    """The address of a server that answers every request with these bytes, and hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def test_how_long_an_answer_is_stands_in_one_place() -> None:
    """RFC 9112, 6.3: of an answer in chunks its Content-Length says nothing, nor of one without content."""

    def refused(answer: bytes) -> str:
        with speaking(answer) as url, pytest.raises(RewardError) as caught:
            ask(Remote(url, retries=0), images(1, 3, 4, 4), [""])
        return str(caught.value)

    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    with speaking(chunked + b'Content-Length: 1000\r\n\r\nf\r\n{"scores": [7]}\r\n0\r\n\r\n') as url:
        assert ask(Remote(url), images(1, 3, 4, 4), [""]).tolist() == [7]
    assert "broke off its answer (1 attempts)" in refused(chunked + b"\r\n5\r\nhello")
    assert "broke off its answer (1 attempts)" in refused(chunked + b"\r\nf\r\nhello")
    assert "no JSON but ''" in refused(b"HTTP/1.1 204 No Content\r\nContent-Length: 10\r\n\r\n")


@pytest.mark.parametrize("before", [b"x" * 50, b'{"scores": 1, "for": "'.ljust(50)])
def test_no_part_of_a_token_is_shown_where_an_answer_is_cut(before: bytes) -> None:
    token = "a-very-secret-token"
    answering = scorer(lambda count, request: (200, before + token.encode() + b'"}'))
    with answering as (url, _), pytest.raises(RewardError) as caught:
        ask(Remote(url, retries=0, token=token, patience=0), images(1, 3, 4, 4), [""])
    assert "a-very" not in str(caught.value)


@pytest.mark.parametrize("answer", ['{"scores": [TOKEN]}', "TOKEN", '{"nothing": TOKEN}'])
def test_a_token_of_signs_that_json_escapes_is_not_shown(answer: str) -> None:
    token = "se\"cret\\tok'en"
    body = answer.replace("TOKEN", json.dumps(token)).encode()
    with scorer(lambda count, request: (200, body)) as (url, _), pytest.raises(RewardError) as caught:
        ask(Remote(url, retries=0, token=token, patience=0), images(1, 3, 4, 4), [""])
    assert "cret" not in str(caught.value)


def test_a_token_is_not_shown_while_a_server_is_waited_for(
    pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    token = "a-very-secret-token"
    with scorer(lambda count, request: (200, token.encode()) if 1 < count < 9 else scores([1])) as (url, _):
        remote = Remote(url, token=token)
        for _ in range(2):
            ask(remote, images(1, 3, 4, 4), [""])
    said = " ".join(capsys.readouterr().err.split())
    assert "$DIFFRL_SCORER_TOKEN" in said
    assert "is waited for" in said
    assert token not in said


class Fails:
    """A question that fails with a status so many times; before some of its attempts another question is answered."""

    def __init__(self, status: int, times: int, server: posting.Server, answers: Callable[[int], bool]) -> None:
        self.status, self.times, self.server, self.answers, self.asked = status, times, server, answers, 0

    def __call__(self) -> int:
        self.asked += 1
        if self.asked > self.times:
            return self.asked
        if self.answers(self.asked):
            self.server.well("x")
        raise urllib.error.HTTPError("", self.status, "", http.client.HTTPMessage(), io.BytesIO())


def patiently(question: Callable[[], int], server: posting.Server, given_up: threading.Event | None = None) -> int:
    return posting.patiently("x", question, server=server, retries=3, pause=0.5, timeout=1, hints={}, given_up=given_up)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_answers_other_questions_is_there(
    status: int, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A question is asked for as long as others are answered, and without a word; five minutes after, no longer."""
    server = posting.Server()
    server.well("x")
    assert patiently(Fails(status, 40, server, lambda asked: asked % 3 == 0), server) == 41
    assert sum(pauses) > 600
    pauses.clear()
    with pytest.raises(RewardError, match=rf"HTTP {status} .2\d attempts"):
        patiently(Fails(status, 99, server, lambda asked: asked in (3, 6, 9, 12)), server)
    assert 270 <= sum(pauses[11:]) <= 300
    said = capsys.readouterr().err
    assert said.count("is waited for") == (1 if status == 503 else 0)
    assert "answers again" not in said


def test_a_server_that_is_asked_too_often_is_not_said_to_be_away(
    pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server = posting.Server()
    server.well("x")
    assert patiently(Fails(429, 10, server, lambda asked: False), server) == 11
    assert not capsys.readouterr().err


def test_nothing_is_waited_for_once_all_is_given_up(pauses: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    server, given_up = posting.Server(), threading.Event()
    server.well("x")

    def set_it(asked: int) -> bool:
        if asked == 4:
            given_up.set()
        return False

    with pytest.raises(RewardError, match=r"HTTP 503 .4 attempts"):
        patiently(Fails(503, 99, server, set_it), server, given_up)
    assert not capsys.readouterr().err
    assert pauses == [0.5, 1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_that_is_noted_ends_a_wait() -> None:
    """As in a run of several processes, whose blocks note signals; though the server asks to be waited for longer."""

    def busy(count: int, request: dict[str, Any]) -> tuple[int, bytes]:
        os.kill(os.getpid(), signal.SIGINT)
        return 503, b""

    with scorer(busy, Retry_After="60") as (url, seen), stop_signals() as stopped:
        with pytest.raises(Stopped):
            ask(Remote(url), images(1, 3, 4, 4), [""])
        assert stopped()
        assert len(seen) == 1


def test_a_port_that_is_none_is_told() -> None:
    with pytest.raises(UserError, match=r"cannot listen to 127\.0\.0\.1:70000"):
        serve.server(Mean(), port=70_000)


def test_addresses() -> None:
    for url in ("localhost:80", "file:///etc/passwd", "http://", "http://host:x", "http://[::1"):
        with pytest.raises(UserError, match="expected an address"):
            Remote(url)
    with pytest.raises(
        UserError, match=r"http://\.\.\.@host:1.*written into the run's folder.*\$DIFFRL_SCORER_TOKEN"
    ) as caught:
        Remote("http://me:secret@host:1/score")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match=r"\$DIFFRL_SCORER_TOKEN is to be of ASCII"):
        Remote("http://host:1", token="a\r\nHost: b")


def test_the_command_serves(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "diffrl.images.rewards.serve", "jpeg", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            assert said[:2] == ["jpeg", "at"]
            batch = images(2, 3, 16, 16)
            torch.testing.assert_close(
                ask(parse(f"remote:{said[2]}"), batch, ["", ""]), ask(parse("jpeg"), batch, ["", ""])
            )
        finally:
            process.terminate()
    assert serve.main(["jpgg"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("reward 'jpgg': there is no reward"), "it has no option --reward"
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that it ends in any case
        for spec in ("human", "human:2", "jpeg + 0.5*human"):
            assert serve.main([spec, "--port", str(taken.getsockname()[1])]) == 2
            assert "A scorer asks nobody" in capsys.readouterr().err
        assert serve.main(["jpeg + remote:http://localhost:1", "--port", str(taken.getsockname()[1])]) == 2
        assert "is a scorer already: give clients its address" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    (kept,) = (line for line in lines if line.startswith("human"))
    (other,) = (line for line in lines if line.startswith("python"))
    assert not [line for line in lines if line.startswith("remote:") or len(line) > 120]
    assert max(len(line) for line in lines if "REWARD is" in line or "NAME[:ARGUMENT]" in line) <= 100
    said = " ".join(" ".join(lines).split())
    assert "--port PORT the port to listen to; 0: any free one (8000)" in said
    assert "--device DEVICE where the reward's networks are: cpu, cuda, cuda:1 (cpu)" in said
    assert kept.startswith("human:RUN/votes.json  ")
    assert kept.index("  a model") == other.index("  a function"), "one below the other"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve.main(["jpeg", "--port", str(taken.getsockname()[1])]) == 2


def test_a_reward_that_compares_images_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The client sends a batch at a time: of a prompt's images a request may bring a part."""
    file = tmp_path / "mine.py"
    file.write_text("def rank(images, prompts, metadata): ...\n\nrank.grouped = True\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that it ends in any case
        assert serve.main([f"0.5*python:{file}#rank + jpeg", "--port", str(taken.getsockname()[1])]) == 2
    assert "compares all images of a prompt" in capsys.readouterr().err


def test_where_nothing_listens_is_said_in_words() -> None:
    with pytest.raises(RewardError) as caught:
        ask(Remote("http://127.0.0.1:1", retries=0), images(1, 3, 4, 4), [""])
    assert str(caught.value) == (
        "remote:http://127.0.0.1:1 cannot be reached: the server refuses the connection (1 attempts). Is the scorer "
        "running there? One is started by `python -m diffrl.images.rewards.serve REWARD --port N`."
    )


def test_a_server_that_serves_another_reward_is_refused() -> None:
    """Once it has said which; one that does not say, or says what is no text, is not compared."""
    answers = [None, "warmth", None, 5, "warmth", "png"]

    def answer(count: int, request: dict[str, Any]) -> tuple[int, bytes]:
        said = answers[count - 1]
        return 200, json.dumps({"scores": [count]} | ({} if said is None else {"serves": said})).encode()

    with scorer(answer) as (url, seen):
        remote = Remote(url, token="secret")
        for count in range(1, 6):
            assert ask(remote, images(1, 3, 4, 4), [""]).tolist() == [count]
        with pytest.raises(RewardError, match=r"serves png by now, and served warmth before: .* Start the scorer of"):
            ask(remote, images(1, 3, 4, 4), [""])
        assert len(seen) == 6, "and it is not asked again"


def test_what_is_served_is_told_by_the_content_of_its_files(tmp_path: Path) -> None:
    """Wherever they lie: the same file elsewhere is the same reward, and an edited one is another."""
    file, other = tmp_path / "rw.py", tmp_path / "other" / "rw.py"
    other.parent.mkdir()
    for path in (file, other):
        path.write_text("def warmth(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    text = f"jpeg:90 + 0.5*python:rw.py#warmth (rw.py sha256:{digest})"
    assert serve.named(f"jpeg:90 + 0.5*python:{file}#warmth") == text
    assert serve.named(f"jpeg:90 + 0.5*python:{other}#warmth") == text
    other.write_text(f"{other.read_text()}\n")
    assert serve.named(f"jpeg:90 + 0.5*python:{other}#warmth") != text
    assert serve.named("clip:openai/clip-vit-large-patch14") == "clip:openai/clip-vit-large-patch14"


def test_what_is_served_tells_folders_apart_and_no_places(tmp_path: Path) -> None:
    """By what they hold, not by where they lie; nothing of an address that is asked is told, nor of a path."""
    for name, held in (("a", b"1" * 100), ("b", b"2" * 100), ("c", b"1" * 100)):
        (tmp_path / name / "m").mkdir(parents=True)
        (tmp_path / name / "m/model.safetensors").write_bytes(held)
        (tmp_path / name / "head").write_bytes(held)
    a, b, c = (serve.named(f"0.5*clip:{tmp_path / name / 'm'}") for name in "abc")
    assert a.startswith("0.5*clip:m (m sha256:")
    assert a == c != b
    a, b, c = (serve.named(f"aesthetic:{tmp_path / 'a/m'}#{tmp_path / name / 'head'}") for name in "abc")
    assert a.startswith("aesthetic:m#head (m sha256:")
    assert a == c != b
    for url in ("http://10.0.0.3:8000/v1", "http://judge.example/v1?api_key=SECRET"):
        assert serve.named(f"vlm:{url}#Qwen/Qwen3-VL") == "vlm:#Qwen/Qwen3-VL"
        assert serve.named(f"vlm:{url}#/data/models/q") == "vlm:#q"
