"""A vision-language judge, against real HTTP servers on this machine that answer as OpenAI's protocol has it."""

import base64
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffrl.images.rewards import RewardError, ask, parse
from diffrl.images.rewards.codecs import to_uint8
from diffrl.images.rewards.judge import JUDGE, UNIFIED, Judge, Question
from diffrl.support.errors import UserError
from diffrl.support.stopping import Stopped, stop_signals
from tests.images.rewards.reward_cases import images

Answer = Callable[[int, dict[str, Any]], tuple[int, bytes]]
"""The number of the request and its body -> status and body."""
SECRET = "sk-very-secret-0123456789"


class Endpoint:
    """What a stub got: bodies, headers and paths, in the order in which they came."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.url = ""


@contextmanager
def endpoint(answer: Answer, **headers: str) -> Iterator[Endpoint]:
    seen, lock = Endpoint(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.bodies.append(body)
                seen.keys.append(self.headers["Authorization"])
                seen.paths.append(self.path)
                status, said = answer(len(seen.bodies), body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    seen.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield seen
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def said(text: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def shown(body: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The pixels and the question that a request brings."""
    picture, text = body["messages"][0]["content"]
    data = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), text["text"]


def brightness(count: int, body: dict[str, Any]) -> tuple[int, bytes]:
    pixels, question = shown(body)
    return said(f"It shows {question[:3]}. Score: 1? No.\n**Score:** {round(pixels.mean() / 25.5, 3)}")


def test_images_and_prompts_arrive_and_scores_go_to_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though eight questions are on their way at once; a prompt with braces stays as it is."""
    monkeypatch.setenv("DIFFRL_JUDGE_KEY", SECRET)
    batch = images(6, 3, 6, 4) * torch.linspace(0.1, 1, 6)[:, None, None, None]
    prompts = [f"{{prompt}} {i}" for i in range(6)]
    with endpoint(brightness) as server:
        reward = parse(f"vlm:{server.url}#some/model")
        values = ask(reward, batch, prompts)
    pixels = to_uint8(batch)
    expected = torch.tensor([round(p.mean() / 25.5, 3) / 10 for p in pixels], dtype=torch.float32)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    assert set(server.paths) == {"/v1/chat/completions"}
    assert set(server.keys) == {f"Bearer {SECRET}"}
    assert {(body["model"], body["temperature"]) for body in server.bodies} == {("some/model", 0)}
    sent = {question: image for image, question in map(shown, server.bodies)}
    for prompt, image in zip(prompts, pixels, strict=True):
        assert np.array_equal(sent[JUDGE.text.replace("{prompt}", prompt)], image)
    assert not reward.differentiable


def test_unifiedreward_is_asked_as_published() -> None:
    with endpoint(lambda count, body: said("4 of 5?\nFinal Score: 4.5")) as server:
        value = ask(parse(f"unifiedreward:{server.url}#UnifiedReward-7b-v1.5"), images(1, 3, 4, 4), ["a cat"])
    assert value.item() == pytest.approx(4.5 / 5)
    assert shown(server.bodies[0])[1].endswith(
        "after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [a cat]"
    )
    assert UNIFIED.score("Final Score: 0") is None
    assert UNIFIED.score("Final Score: 5") == 5
    assert UNIFIED.score("Score: 5") is None


def test_a_judgement_is_kept_by_image_prompt_question_and_model(tmp_path: Path) -> None:
    """Asked once for each, in a run that goes on too; a damaged file is asked for again; the key is in no file."""
    batch, cache = images(2, 3, 4, 4), tmp_path / "kept"
    with endpoint(lambda count, body: said(f"{SECRET} Score: {count}")) as server:

        def judge(model: str = "m", question: Any = JUDGE) -> Judge:
            return Judge("vlm:x", server.url, model, question, cache=cache, at_once=1, key=SECRET)

        first = ask(judge(), batch, ["a", "a"])
        assert first.tolist() == pytest.approx([0.1, 0.2])
        assert torch.equal(ask(judge(), batch.flip(0), ["a", "a"]), first.flip(0))
        assert len(server.bodies) == 2
        assert ask(judge(), batch, ["a", "b"]).tolist() == pytest.approx([0.1, 0.3])
        assert ask(judge("other"), batch[:1], ["a"]).item() == pytest.approx(0.4)
        assert ask(judge(question=UNIFIED.__class__("{prompt}?", "Score", 0, 10)), batch[:1], ["a"]).item() == 0.5
        assert ask(judge(), batch[[0, 0, 0]], ["c", "c", "c"]).tolist() == pytest.approx([0.6] * 3)
        assert len(server.bodies) == 6, "the same three are asked about once"
        files = sorted(cache.rglob("*.json"))
        assert len(files) == 6
        assert not any(SECRET in file.read_text() for file in files)
        for file, damage in zip(
            files, ["", "[]", '{"score": "1"}', '{"score": 11}', "{", '{"score": NaN}'], strict=True
        ):
            file.write_text(damage)
        assert ask(judge(), batch[:1], ["a"]).item() == pytest.approx(0.7)
        assert ask(judge(), batch[:1], ["a"]).item() == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7,5", 7.5),
        ("Score: 8,25.", 8.25),
        ("Score: 7, or rather", 7),
        ("Score: 7.", 7),
        ("Score: 7/10", 7),
        ("Score: 7,500", None),
        ("Score: 1,000", None),
        ("Score: 7,5,6", None),
        ("Score: 7.5,6", None),
        ("Score: 3. Score: 4,5", 4.5),
        ("**Score**: `8`", 8),
        ("Score: [8]", 8),
        ("Score: **[8/10]**", 8),
        ('Score = "8"', 8),
        ("Score - 8", 8),
        ("Score: -1", None),
        ("Score: 1e1", 10),
        ("Score: 5e-1", 0.5),
        ("Score (0 to 10): 8", None),
        ("Score: (0 to 10) 8", None),
        ("Score: (0-10): 8", None),
        ("Score: (1–5) 4", None),
        ("Score: (3-shot) 9", None),
        ("**Score**: (1-10) **7**", None),
        ("Score: [**7**]", 7),
        ("Score: 7\n(Score: [0,10])", 7),
    ],
)
def test_a_comma_in_a_score_is_a_decimal_one_or_unclear(answer: str, score: float | None, tmp_path: Path) -> None:
    """And what an older version read off such an answer, and kept, is not used."""
    assert JUDGE.score(answer) == score
    with endpoint(lambda count, body: said("Score: 7")) as server:
        judge = Judge("vlm:x", server.url, "m", cache=tmp_path)
        ask(judge, images(1, 3, 4, 4), ["p"])
        (file,) = tmp_path.rglob("*.json")
        file.write_text(json.dumps({"score": 2, "model": "m", "answer": answer}))
        assert ask(judge, images(1, 3, 4, 4), ["p"]).item() == pytest.approx(0.7)
        assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("answer", "line", "attempts"),
    [
        ((200, b"<html>"), "the answer is no chat completion but '<html>'", 1),
        ((200, b'{"choices": []}'), "the answer is no chat completion", 1),
        ((200, b'["a"]'), "the answer is no chat completion", 1),
        (said("I like it."), r"gave no 'Score: N', N from 0 to 10, but 'I like it\.' \(3 attempts\)", 3),
        (said("Score: 11"), "gave no 'Score: N'", 3),
        (said("Score: -1"), "gave no 'Score: N'", 3),
        (said(None), "gave None for a text", 3),
        ((401, b'{"error": {"message": "bad key"}}'), r"HTTP 401 bad key\. Is \$DIFFRL_JUDGE_KEY right\?", 1),
        ((404, b'{"error": {"message": "no model m"}}'), r"HTTP 404 no model m\. Are address and model right", 1),
        ((500, b"oops"), r"answered HTTP 500 \(3 attempts\)", 3),
    ],
)
def test_nonsense_is_one_clear_line(answer: tuple[int, bytes], line: str, attempts: int) -> None:
    with endpoint(lambda count, body: answer) as server:
        with pytest.raises(RewardError, match=line) as caught:
            ask(Judge("vlm:x", server.url, "m", retries=2, pause=0.001), images(1, 3, 4, 4), ["p"])
        assert "\n" not in str(caught.value)
        assert len(server.bodies) == attempts


def test_a_model_that_gives_a_score_at_last_and_a_busy_server_are_asked_again(pauses: list[float]) -> None:
    """The pauses double; a server that says how long to wait is waited for, a minute at most."""
    with endpoint(lambda count, body: said("Score: 7" if count == 3 else "Hm.")) as server:
        assert ask(Judge("vlm:x", server.url, "m"), images(1, 3, 4, 4), ["p"]).item() == pytest.approx(0.7)
    assert pauses == [0.5, 1.0]
    pauses.clear()
    with endpoint(lambda count, body: said("Score: 7") if count == 3 else (429, b""), Retry_After="7") as server:
        ask(Judge("vlm:x", server.url, "m"), images(1, 3, 4, 4), ["p"])
    assert pauses == [7.0, 7.0]


@pytest.mark.parametrize("gone", [(200, b""), (200, b'{"choi'), (503, b"")])
def test_a_judge_that_has_answered_before_is_waited_for(
    gone: tuple[int, bytes], pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not so a model that gives no score, which a server is not to blame for; and the address is not doubted."""
    with endpoint(lambda count, body: gone if 1 < count < 8 else said("Score: 7")) as server:
        judge = Judge("vlm:x", server.url, "m", key=SECRET)
        for _ in range(2):
            assert ask(judge, images(1, 3, 4, 4), ["p"]).item() == pytest.approx(0.7)
    assert pauses == [0.5, 1, 2, 4, 8, 16]
    told = " ".join(capsys.readouterr().err.split())
    assert "It has answered before, so it is waited for, up to 5 min" in told
    assert "address" not in told
    pauses.clear()
    with endpoint(lambda count, body: said("Score: 7" if count == 1 else "Hm.")) as server:
        judge = Judge("vlm:x", server.url, "m")
        ask(judge, images(1, 3, 4, 4), ["p"])
        with pytest.raises(RewardError, match=r"gave no 'Score: N'.*\(4 attempts\)"):
            ask(judge, images(1, 3, 4, 4), ["p"])
    assert pauses == [0.5, 1, 2]


def test_an_unclear_answer_after_an_outage_is_counted_by_itself(
    pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is an answer: the next outage is waited for as if there had been none."""
    texts = dict.fromkeys((8, 10, 18), "Hm.") | {1: "Score: 7", 20: "Score: 7"}
    with endpoint(lambda count, body: said(texts[count]) if count in texts else (503, b"")) as server:
        judge = Judge("vlm:x", server.url, "m")
        for _ in range(2):
            assert ask(judge, images(1, 3, 4, 4), ["p"]).item() == pytest.approx(0.7)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 0.5, 0.5, 1, 0.5, 1, 2, 4, 8, 16, 30, 2, 0.5]
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("is waited for") == told.count("answers again.") == 2


@pytest.mark.parametrize("answer", [b'{"error": {"message": "filtered"}}', b'{"choices": []}', b"[]", b"null"])
def test_json_that_is_no_completion_is_not_waited_for(
    answer: bytes, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a filter of contents gives of an image, each time: the address is right."""
    with endpoint(lambda count, body: said("Score: 7") if count == 1 else (200, answer)) as server:
        judge = Judge("vlm:x", server.url, "m")
        ask(judge, images(1, 3, 4, 4), ["p"])
        with pytest.raises(RewardError, match=r"gave no chat completion but .* \(4 attempts\)") as caught:
            ask(judge, images(1, 3, 4, 4), ["p"])
    assert pauses == [0.5, 1, 2]
    assert "address" not in str(caught.value)
    assert not capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_that_is_noted_ends_what_the_threads_wait_for() -> None:
    def busy(count: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if count == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return 503, b""

    with endpoint(busy, Retry_After="60") as server, stop_signals():
        with pytest.raises(Stopped):
            ask(Judge("vlm:x", server.url, "m", at_once=2), images(4, 3, 4, 4), ["p"] * 4)
        assert len(server.bodies) <= 2


def test_an_endpoint_that_refuses_a_temperature_is_asked_without(capsys: pytest.CaptureFixture[str]) -> None:
    """From its first refusal on, and that is said; what it refuses for other reasons is told as ever."""
    refusal = b'{"error": {"message": "Unsupported value: \'temperature\' does not support 0", "param": "temperature"}}'

    def picky(count: int, body: dict[str, Any]) -> tuple[int, bytes]:
        return (400, refusal) if "temperature" in body else brightness(count, body)

    with endpoint(picky) as server:
        judge = Judge("vlm:x", server.url, "o-model", at_once=1)
        values = ask(judge, images(3, 3, 4, 4), ["a", "b", "c"])
        assert ["temperature" in body for body in server.bodies] == [True, False, False, False]
    assert "takes no temperature for o-model" in " ".join(capsys.readouterr().err.split())
    with endpoint(brightness) as server:
        told = ask(Judge("vlm:x", server.url, "m", at_once=1), images(3, 3, 4, 4), ["a", "b", "c"])
    assert torch.equal(values, told)
    with endpoint(lambda count, body: (400, refusal)) as server:
        judge = Judge("vlm:x", server.url, "m", at_once=1)
        with pytest.raises(RewardError, match="HTTP 400 Unsupported value"):
            ask(judge, images(1, 3, 4, 4), ["a"])
        with pytest.raises(RewardError, match="HTTP 400 Unsupported value"):
            ask(judge, images(1, 3, 4, 4), ["a"])
        assert ["temperature" in body for body in server.bodies] == [True, False, True, False]


def test_after_an_error_no_more_questions_are_asked() -> None:
    with endpoint(lambda count, body: (400, b"")) as server:
        with pytest.raises(RewardError, match="HTTP 400"):
            ask(Judge("vlm:x", server.url, "m", at_once=1), images(40, 3, 4, 4), ["p"] * 40)
        assert len(server.bodies) < 20


def test_an_error_ends_what_is_still_being_tried() -> None:
    """While one question waits to be asked again, another is refused: the first is not asked again, nor waited for."""

    def answer(count: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if shown(body)[1].endswith("busy"):
            return 429, b""
        return 400, b""

    with endpoint(answer, Retry_After="60") as server:
        judge = Judge("vlm:x", server.url, "m", Question("{prompt}", "Score", 0, 10), at_once=2)
        with pytest.raises(RewardError, match="HTTP 400"):
            ask(judge, images(2, 3, 4, 4), ["wrong", "busy"])
        for thread in threading.enumerate():
            if thread.name == "judge":
                assert thread.daemon, "the process would wait at its end for an answer that is on its way"
                thread.join(30)
                assert not thread.is_alive()
        assert len(server.bodies) <= 2


def test_a_cache_that_cannot_be_written_is_no_silent_server(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with endpoint(lambda count, body: said("Score: 3")) as server:
        with pytest.raises(OSError, match="file"):
            ask(Judge("vlm:x", server.url, "m", cache=tmp_path / "file" / "kept"), images(1, 3, 4, 4), ["p"])
        assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [400, 500])
def test_a_key_that_a_server_repeats_is_not_shown(status: int) -> None:
    echo = json.dumps({"error": {"message": f"Incorrect API key {SECRET}"}}).encode()
    cut = json.dumps({"error": {"message": "x" * 490 + SECRET}}).encode()
    answers = (status, echo), (200, SECRET.encode()), said(f"I know {SECRET}"), (status, cut)
    for answer in (*answers, (200, b"<" * 45 + SECRET.encode()), said([SECRET])):
        with endpoint(lambda count, body, answer=answer: answer) as server:
            with pytest.raises(RewardError) as caught:
                ask(Judge("vlm:x", server.url, "m", retries=0, key=SECRET), images(1, 3, 4, 4), ["p"])
            assert SECRET not in str(caught.value)
            assert caught.value.__cause__ is None
            assert SECRET[:8] not in str(caught.value), "nor the half of it, where what is said is cut"
            assert "$DIFFRL_" in str(caught.value)


def test_what_is_written_wrongly_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, line in {
        "vlm:http://localhost:8000/v1": "expected vlm:URL#MODEL",
        "vlm:localhost#m": "expected an address such as vlm:http://localhost:8000/v1#MODEL",
        "vlm:http://host/v1?key=secret@1#m": r"a key belongs in \$DIFFRL_JUDGE_KEY",
        "vlm:http://me:secret@host/v1#m": r"give what the server asks for in \$DIFFRL_JUDGE_KEY",
        "unifiedreward:http://h/v1#m#file.txt": "expected unifiedreward:URL#MODEL,",
        f"vlm:http://h/v1#m#{tmp_path / 'none.txt'}": "does not exist",
    }.items():
        with pytest.raises(UserError, match=line) as caught:
            parse(spec)
        assert "secret@" not in str(caught.value)
    question = tmp_path / "question.txt"
    question.write_text("Is {prompt} blue?")
    with pytest.raises(UserError, match="does not ask for a line 'Score: N'"):
        parse(f"vlm:http://h/v1#m#{question}")
    question.write_text("Is {prompt} blue? Score: N")
    with endpoint(lambda count, body: said("Score: 3")) as server:
        ask(parse(f"vlm:{server.url}#m#{question}"), images(1, 3, 4, 4), ["a cat"])
        assert shown(server.bodies[0])[1] == "Is a cat blue? Score: N"
    monkeypatch.setenv("DIFFRL_JUDGE_KEY", "a\nb")
    with pytest.raises(UserError, match=r"\$DIFFRL_JUDGE_KEY is to be of ASCII"):
        parse("vlm:http://h/v1#m")
