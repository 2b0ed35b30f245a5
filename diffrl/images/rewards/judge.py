"""A vision-language model as the judge, behind an OpenAI-compatible endpoint (vLLM, SGLang, Ollama, a vendor's).

The model is shown one image and asked a question with the prompt in it, and ends its answer with a score. Judgements
are kept in the cache, keyed by the image's bytes, the whole question (the prompt in it), the address and the model: the
same image is asked about once, in a run that goes on too. What an endpoint asks for stands in $DIFFRL_JUDGE_KEY alone;
it goes into the request's header, and is in no file, no message and no key of the cache.
"""

import base64
import hashlib
import io
import json
import os
import queue
import re
import threading
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl.images.rewards.arguments import judge_of
from diffrl.images.rewards.base import Metadata, RewardError
from diffrl.images.rewards.codecs import encode, to_uint8
from diffrl.images.rewards.posting import (
    PATIENCE,
    PIECE,
    Broken,
    Server,
    TooLong,
    Unclear,
    check_address,
    check_secret,
    patiently,
    post,
    without_secret,
)
from diffrl.support.errors import UserError, shown
from diffrl.support.files import atomic_path, cache_directory, read_json, read_text
from diffrl.support.folder import say_once
from diffrl.support.stopping import Stopped, noted

KEY = "DIFFRL_JUDGE_KEY"
"""The environment variable with the endpoint's API key; local servers mostly need none."""
ANSWER = 1 << 22
"""Bytes of an answer at most: a model that reasons writes much."""
_ALONE = r"[\[(](?=[\s*_`]*-?\d+(?:\.\d+)?(?:/\d+)?[\s*_`]*[\])])[\s*_`]*"  # a bracket around a number and no more
BEFORE = rf"[\s*_]*(?:(?:[:=]|[-\u2013\u2014](?=\s))[\s*_:`'\"$]*(?:{_ALONE})?)?"
"""What may stand between the mark of a score and its number, as a regular expression."""
NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?:,\d+)*)"
FORMAT = 1
"""Of the cache's keys and files: another number begins it anew."""


@dataclass(frozen=True)
class Question:
    """What a judge is asked, with "{prompt}" where the image's prompt goes, and how its answer is read.

    mark: what stands before the score; its last place counts. low, high: the scores that there are; a value is
    score / high.
    """

    text: str
    mark: str
    low: float
    high: float

    def of(self, prompt: str) -> str:
        """The question about an image of a prompt."""
        return self.text.replace("{prompt}", prompt)

    def score(self, answer: str) -> float | None:
        """The score in an answer, None where there is none, or one that there cannot be.

        A comma between digits is a decimal one, as in "7,5"; "7,500", which may be thousands, is no score. Marks of
        emphasis, code and brackets around the number alone may stand before it: "**Score:** `8`", "Score: [8]"; what is
        in brackets before a colon is no score: "Score (0 to 10): 8" has none that is read.
        """
        found = re.findall(rf"{re.escape(self.mark)}{BEFORE}{NUMBER}", answer, re.IGNORECASE)
        score = _number(found[-1]) if found else None
        return score if score is not None and self.low <= score <= self.high else None


def _number(text: str) -> float | None:
    """The number of "7", "7.5" or "7,5"; None where a comma may be another than a decimal one."""
    whole, comma, decimals = text.partition(",")
    if not comma:
        return float(text)
    decimal = decimals.isdecimal() and len(decimals) != 3 and "." not in whole
    return float(f"{whole}.{decimals}") if decimal else None


JUDGE = Question(
    "The image was made for this text: {prompt}\n"
    "Judge how completely and correctly it shows what the text says, and how good it is as a picture. Say in one or "
    "two sentences what is right and what is wrong. Then end with a line 'Score: N', where N is a number from 0 "
    "(useless) to 10 (perfect).",
    "Score",
    0,
    10,
)
"""The question of `vlm`, unless a file brings another one."""
UNIFIED = Question(
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate this "
    "image based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the "
    "provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in "
    "the caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]",
    "Final Score",
    1,
    5,
)
"""UnifiedReward's question about one image (Wang et al. 2025, arXiv 2503.05236), with which it was trained."""


class Judge:
    """The scores of the model `model` behind `url`, the address before /chat/completions; not differentiable.

    A value is score / highest score, so in [0, 1]. name: the reward's. key: by default $DIFFRL_JUDGE_KEY. timeout:
    seconds for an answer. retries: further attempts where the server cannot be reached, is too slow, answers 408, 429
    or 5xx, or its model gives no score; the first after `pause` seconds, each later one after twice as long. patience:
    seconds that a server is waited for after its last answer, once it has answered well. at_once: questions on their
    way at a time. cache: a folder; None keeps nothing.

    Raises UserError for an address that is not http or https; a call raises RewardError, in one line, where no attempt
    gives a score, or the answer is none of the protocol.
    """

    differentiable = False

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        question: Question = JUDGE,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        pause: float = 0.5,
        patience: float = PATIENCE,
        at_once: int = 8,
        key: str | None = None,
        cache: Path | None = None,
    ) -> None:
        kind = name.partition(":")[0]
        check_address(kind, url, KEY, f"{kind}:http://localhost:8000/v1#MODEL")
        if "?" in url:
            address = url.partition("?")[0]
            raise UserError(
                f"{kind}:{address}?...: /chat/completions comes after the address, so it has no '?'; a key belongs in "
                f"${KEY}"
            )
        self._key = os.environ.get(KEY, "") if key is None else key
        check_secret(self._key, f"${KEY}")
        self._called = name  # of errors: `name` may become that of where it was before
        self.name, self.url, self.model, self.question = name, url.rstrip("/"), model, question
        self.timeout, self.retries, self.pause, self.at_once = timeout, retries, pause, at_once
        self.cache = cache
        self._server = Server(patience)
        self._sets_temperature = True
        """Whether requests ask for temperature 0; some models, those that reason among them, refuse that."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        files = [encode(pixels, "PNG") for pixels in to_uint8(images)]
        questions = [self.question.of(prompt) for prompt in prompts]
        keys = [self._digest(file, question) for file, question in zip(files, questions, strict=True)]
        once = dict(zip(keys, zip(files, questions, strict=True), strict=True))
        scores = {key: score for key in once if (score := self._kept(key)) is not None}
        open_ = {key: asked for key, asked in once.items() if key not in scores}
        scores |= self._asked(open_)
        values = [scores[key] / self.question.high for key in keys]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _asked(self, open_: Mapping[str, tuple[bytes, str]]) -> dict[str, float]:
        """The scores of these files and questions, by key. Raises what the first one that fails raises.

        After an error, or Ctrl-C, no more is asked. The threads are daemons: an executor's would keep the process until
        the last answer is here.
        """
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, float | Exception | Stopped]] = queue.SimpleQueue()
        given_up, stopped = threading.Event(), noted()

        def work() -> None:
            while not given_up.is_set():
                try:
                    key = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((key, self._ask(key, *open_[key], given_up, stopped)))
                except (Exception, Stopped) as error:  # it is raised where the scores are waited for
                    done.put((key, error))
                    return

        for key in open_:
            todo.put(key)
        scores: dict[str, float] = {}
        try:
            for _ in range(min(self.at_once, len(open_))):
                threading.Thread(target=work, name="judge", daemon=True).start()
            while len(scores) < len(open_):
                try:
                    key, score = done.get(timeout=PIECE)  # Python misses a signal that comes as a wait begins
                except queue.Empty:
                    continue
                if isinstance(score, Exception | Stopped):
                    raise score
                scores[key] = score
        finally:
            given_up.set()
        return scores

    def _ask(
        self, key: str, file: bytes, question: str, given_up: threading.Event, stopped: Callable[[], bool]
    ) -> float:
        picture = "data:image/png;base64," + base64.b64encode(file).decode("ascii")
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        try:
            score, text = patiently(
                self._called,
                lambda: self._judgement(body),
                server=self._server,
                retries=self.retries,
                pause=self.pause,
                timeout=self.timeout,
                hints={0: "", 401: f"Is ${KEY} right?", 403: f"Is ${KEY} right?", 404: "Are address and model right?"},
                clean=self._safe,
                given_up=given_up,
                stopped=stopped,
            )
        except RewardError as error:
            raise RewardError(self._safe(str(error))) from None  # what it comes from may hold what the server repeats
        self._keep(key, score, text)
        return score

    def _judgement(self, body: Mapping[str, Any]) -> tuple[float, str]:
        """The score that one request gives, and the answer. Raises Unclear, Broken for no completion."""
        try:
            answer = self._posted(body)
        except TooLong as error:
            raise RewardError(f"{self._called}: {error}") from error
        text = self._safe(self._text(answer))
        score = self.question.score(text)
        if score is None:
            raise Unclear(
                f"gave no '{self.question.mark}: N', N from {self.question.low:g} to {self.question.high:g}, but "
                f"{shown(text)}"
            )
        return score, text

    def _posted(self, body: Mapping[str, Any]) -> bytes:
        """The answer to a request at temperature 0; where the endpoint refuses to be told one, at the model's own."""
        if self._sets_temperature:
            try:
                return self._post({**body, "temperature": 0})
            except urllib.error.HTTPError as error:
                if error.code not in (400, 422):
                    raise
                with error:
                    said = error.read(10_000)
                if b"temperature" not in said.lower():
                    raise urllib.error.HTTPError(
                        error.url, error.code, error.msg, error.headers, io.BytesIO(said)
                    ) from error
        answer = self._post(body)
        if self._sets_temperature:  # and not before: what is refused may be something else
            self._sets_temperature = False
            say_once(f"{self.url} takes no temperature for {self.model}: it is asked at the model's own.")
        return answer

    def _post(self, body: Mapping[str, Any]) -> bytes:
        url, data = f"{self.url}/chat/completions", json.dumps(body).encode()
        return post(url, data, secret=self._key, timeout=self.timeout, most=ANSWER)

    def _text(self, answer: bytes) -> str:
        """What the model says in an answer of the endpoint.

        Raises Broken for no JSON; for JSON of another form RewardError, and Unclear once the server has answered well.
        """
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            said = self._safe(answer.decode(errors="replace"))  # before it is cut: half a key is one too
            no_completion = RewardError(
                f"{self._called}: the answer is no chat completion but {said[:60]!r}. Is {self.url} the address before "
                "/chat/completions of an OpenAI-compatible server?"
            )
            if isinstance(error, ValueError):
                raise Broken(f"no chat completion but {said[:60]!r}", no_completion) from error
            if not self._server.answered:
                raise no_completion from error
            raise Unclear(f"gave no chat completion but {shown(said)}") from error  # as of a filter of contents
        if not isinstance(text, str):
            raise Unclear(f"gave {shown(text if text is None else self._safe(repr(text)))} for a text")
        return text

    def _safe(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        return without_secret(text, self._key, KEY)

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _digest(self, file: bytes, question: str) -> str:
        asked = [FORMAT, self.url, self.model, self.question.mark, question, hashlib.sha256(file).hexdigest()]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _kept(self, key: str) -> float | None:
        """The score that is kept; None, of a damaged file, and of an older version's that read another score off the
        answer: it is asked for again."""
        path = None if self.cache is None else self._path(self.cache, key)
        if path is None or not path.exists():
            return None
        try:
            kept: Any = read_json(path)
            score, text = kept["score"], kept.get("answer")
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        usable = isinstance(score, int | float) and self.question.low <= score <= self.question.high
        usable = usable and (not isinstance(text, str) or self.question.score(text) == score)
        return float(score) if usable else None

    def _keep(self, key: str, score: float, answer: str) -> None:
        if self.cache is None:
            return
        path = self._path(self.cache, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"score": score, "model": self.model, "answer": answer}))

    @staticmethod
    def _path(cache: Path, key: str) -> Path:
        return cache / key[:2] / f"{key}.json"


def parse_judge(kind: str, argument: str, timeout: float, *, unified: bool = False) -> Judge:
    """The judge of "URL#MODEL", or of "URL#MODEL#FILE" with a question of the user's.

    FILE: a text with {prompt} where the prompt goes, which asks for a line 'Score: N', N from 0 to 10. Raises UserError
    for anything else.
    """
    url, model, file = judge_of(kind, argument)
    question = UNIFIED if unified else _question(Path(file)) if file else JUDGE
    cache = cache_directory() / "judgements"
    return Judge(f"{kind}:{argument}", url, model, question, timeout=timeout, cache=cache)


def _question(path: Path) -> Question:
    text = read_text(path, "a text with the question").strip()
    if "score:" not in text.lower():
        raise UserError(
            f"{path} does not ask for a line 'Score: N', N from 0 to 10: nothing could be read off answers."
        )
    return Question(text, JUDGE.mark, JUDGE.low, JUDGE.high)
