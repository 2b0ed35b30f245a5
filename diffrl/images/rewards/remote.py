"""A reward that another process or machine computes, over HTTP and JSON.

The protocol, one POST a batch, UTF-8 JSON both ways:

    request   {"images": [base64 of a PNG file, RGB, 8 bits, ...], "prompts": [text, ...], "metadata": [object, ...]}
    answer    {"scores": [number, ...]}                     status 200; one finite number an image, in their order
              {"scores": [number, ...], "serves": text}     where it says which reward it serves, in any words that
                                                            are the same as long as that is
    refusal   {"error": text}                               status 4xx: the request's fault, not tried again
              any body                                      status 408, 429 or 5xx: tried again, after the seconds of
                                                            Retry-After if it says any

Where $DIFFRL_SCORER_TOKEN is set, requests bring it: `Authorization: Bearer TOKEN`. It is in no address, because those
are written into a run's folder. A redirection is not followed: it would take the token elsewhere.

A client that was told what is served takes no scores of a server that says something else: two rewards at one address,
one after the other, would be taken for one. Where nothing is said, nothing is compared.

No pickle, no class names, nothing executable. `python -m diffrl.images.rewards.serve` is a server of it; another
takes thirty lines in any language. Images travel as bytes, rounded to the nearest of 256 levels.
"""

import base64
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.images.rewards.base import Metadata, RewardError
from diffrl.images.rewards.codecs import encode, to_uint8
from diffrl.images.rewards.posting import (
    PATIENCE,
    Broken,
    Server,
    TooLong,
    check_address,
    check_secret,
    patiently,
    post,
    without_secret,
)
from diffrl.images.rewards.protocol import Limits
from diffrl.support.errors import first_line, printable

TOKEN = "DIFFRL_SCORER_TOKEN"
"""The environment variable with what a scorer asks for, of the client and of the server."""
PIXELS = Limits.pixels
"""Pixels of a request, at most, where that takes more than one image: what our server takes."""
ANSWER = 1 << 20
"""Bytes of an answer at most, beside 100 an image."""
SERVES = 2000
"""Characters of what a server says that it serves, at most; those behind them are not looked at."""
HINT = "Is the scorer running there? One is started by `python -m diffrl.images.rewards.serve REWARD --port N`."
LARGEST = torch.finfo(torch.float32).max


class Remote:
    """The scores of a server at `url`; not differentiable.

    batch: images a request, at most. token: what the server asks for; by default $DIFFRL_SCORER_TOKEN. timeout: seconds
    for an answer. retries: further attempts where the server cannot be reached, is too slow or answers 408, 429 or 5xx,
    the first after `pause` seconds, each later one after twice as long. patience: seconds that a server is waited for
    once it has answered well.

    Raises UserError for an address that is not http or https; a call raises RewardError where no attempt gives scores,
    or the answer is not of the protocol, or is of a server that serves something else than `serves`.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        *,
        batch: int = 32,
        timeout: float = 60.0,
        retries: int = 3,
        pause: float = 0.5,
        patience: float = PATIENCE,
        token: str | None = None,
    ) -> None:
        check_address("remote", url, TOKEN, "remote:http://localhost:8000")
        self.name = self._called = f"remote:{url}"  # of errors: `name` may become that of where it was before
        self._token = os.environ.get(TOKEN, "") if token is None else token
        check_secret(self._token, f"${TOKEN}")
        self.url, self.batch, self.timeout, self.retries, self.pause = url, batch, timeout, retries, pause
        self._server = Server(patience)
        self.serves: str | None = None
        """What the server said that it serves; None: it has not. A run that goes on sets it to what it was."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        files = [base64.b64encode(encode(pixels, "PNG")).decode("ascii") for pixels in to_uint8(images)]
        scores: list[float] = []
        size = max(1, min(self.batch, PIXELS // images[0, 0].numel())) if len(images) else 1
        for first in range(0, len(files), size):
            rows = slice(first, first + size)
            scores += self._ask({"images": files[rows], "prompts": prompts[rows], "metadata": metadata[rows]})
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _ask(self, request: dict[str, Sequence[Any]]) -> list[float]:
        try:
            body = json.dumps({key: list(values) for key, values in request.items()}).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"{self._called}: the metadata cannot be sent as JSON: {first_line(error)}") from error
        return patiently(
            self._called,
            lambda: self._scores(self._post(body), len(request["images"])),
            server=self._server,
            retries=self.retries,
            pause=self.pause,
            timeout=self.timeout,
            hints={0: HINT},
            clean=self._without_token,
        )

    def _without_token(self, text: str) -> str:
        """The text with the variable's name where the token stands: a server may send it back."""
        return without_secret(text, self._token, TOKEN)

    def _post(self, body: bytes) -> bytes:
        most = ANSWER + 100 * self.batch
        try:
            return post(self.url, body, secret=self._token, timeout=self.timeout, most=most)
        except TooLong as error:
            raise RewardError(f"{self._called}: {error}; see diffrl's protocol") from error

    def _scores(self, answer: bytes, count: int) -> list[float]:
        """The scores an answer holds. Raises Broken for no JSON, RewardError for another than the protocol's."""
        begins = repr(self._without_token(answer.decode(errors="replace"))[:60])
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError) as error:
            no_json = RewardError(f"{self._called}: the answer is no JSON but {begins}; see diffrl's protocol")
            raise Broken(f"no JSON but {begins}", no_json) from error
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list):
            raise RewardError(f'{self._called}: the answer has no list "scores": {begins}')
        if len(scores) != count:
            raise RewardError(f"{self._called} gave {len(scores)} scores for {count} images")
        for i, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= LARGEST:
                shown = self._without_token(repr(score))[:40]
                raise RewardError(f"{self._called}: score {i} of {count} is {shown}; it must be a finite number")
        self._compare(content.get("serves"))
        return [float(score) for score in scores]

    def _compare(self, said: object) -> None:
        """Keep what the server says that it serves. Raises RewardError where it has said something else before."""
        if not isinstance(said, str) or not said.strip():
            return
        now = printable(" ".join(self._without_token(said).split())[:SERVES])
        if self.serves not in (None, now):
            raise RewardError(
                f"{self._called} serves {now} by now, and served {self.serves} before: what one of them scores cannot "
                "be compared with the other's. Start the scorer of before there again, or have the run take this one: "
                "`diffrl resume RUN --accept-changes`."
            )
        self.serves = now
