"""A reward that another process or machine computes, over HTTP and JSON.

The protocol, one POST a batch, UTF-8 JSON both ways:

    request   {"images": [base64 of a PNG file, RGB, 8 bits, ...], "prompts": [text, ...], "metadata": [object, ...]}
    answer    {"scores": [number, ...]}                     status 200; one finite number an image, in their order
    refusal   {"error": text}                               status 4xx: the request's fault, not tried again
              any body                                      status 408, 429 or 5xx: tried again

Where $DIFFRL_SCORER_TOKEN is set, requests bring it: `Authorization: Bearer TOKEN`. It is in no address, because those
are written into a run's folder. A redirection is not followed: it would take the token elsewhere.

No pickle, no class names, nothing executable. `python -m diffrl.images.rewards.serve` is a server of it; another
takes thirty lines in any language. Images travel as bytes, rounded to the nearest of 256 levels.
"""

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.images.rewards.base import Metadata, RewardError
from diffrl.images.rewards.codecs import encode, to_uint8
from diffrl.images.rewards.protocol import Limits
from diffrl.support.errors import UserError, first_line

TOKEN = "DIFFRL_SCORER_TOKEN"
"""The environment variable with what a scorer asks for, of the client and of the server."""
PIXELS = Limits.pixels
"""Pixels of a request, at most, where that takes more than one image: what our server takes."""
ANSWER = 1 << 20
"""Bytes of an answer at most, beside 100 an image."""
AGAIN = (408, 429)
"""Statuses below 500 after which a request is tried again."""
LARGEST = torch.finfo(torch.float32).max


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Takes a redirection for the refusal that it is to us."""

    @override
    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirection)


def check_token(token: str, source: str) -> None:
    """Raise UserError for a token that no header can carry; the text names its source and not the token."""
    if not all("!" <= letter <= "~" for letter in token):
        raise UserError(f"{source} is to be of ASCII letters, digits and signs, without spaces.")


class Remote:
    """The scores of a server at `url`; not differentiable.

    batch: images a request, at most. token: what the server asks for; by default $DIFFRL_SCORER_TOKEN. timeout: seconds
    for an answer. retries: further attempts where the server cannot be reached, is too slow or answers 408, 429 or 5xx,
    the first after `pause` seconds, each later one after twice as long.

    Raises UserError for an address that is not http or https; a call raises RewardError where no attempt gives scores,
    or the answer is not of the protocol.
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
        token: str | None = None,
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:  # a port that is no number, half an IPv6 address
            known = False
        if not known:
            raise UserError(f"remote:{url}: expected an address such as remote:http://localhost:8000")
        if "@" in parts.netloc:
            raise UserError(
                f"remote:{parts.scheme}://...@{parts.netloc.rpartition('@')[2]}: an address with a password would be "
                f"written into the run's folder; give what the scorer asks for in ${TOKEN}"
            )
        self.name = f"remote:{url}"
        self._token = os.environ.get(TOKEN, "") if token is None else token
        check_token(self._token, f"${TOKEN}")
        self.url, self.batch, self.timeout, self.retries, self.pause = url, batch, timeout, retries, pause

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
            raise RewardError(f"{self.name}: the metadata cannot be sent as JSON: {first_line(error)}") from error
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return self._scores(self._post(body), len(request["images"]))
            except urllib.error.HTTPError as error:
                with error:
                    said = _said(error)
                if error.code not in AGAIN and error.code < 500:
                    raise RewardError(f"{self.name} refused the request: HTTP {error.code} {said}".rstrip()) from error
                failure = f"answered HTTP {error.code} {said}".rstrip()
            except TimeoutError:
                failure = f"gave no answer within {self.timeout:g} s"
            except (OSError, http.client.HTTPException) as error:  # refused, an unknown host, an answer that broke off
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                failure = f"gave no answer within {self.timeout:g} s" if late else f"cannot be reached: {reason}"
        raise RewardError(
            f"{self.name} {failure} ({self.retries + 1} attempts). Is the scorer running there? One is started by: "
            "python -m diffrl.images.rewards.serve REWARD --port N"
        )

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.url, body, headers, method="POST")
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        until, most = time.monotonic() + self.timeout, ANSWER + 100 * self.batch
        content = b""
        with _OPENER.open(request, timeout=self.timeout) as answer:
            # The timeout of a socket begins anew with every byte.
            while part := answer.read1(1 << 16):
                content += part
                if len(content) > most:
                    raise RewardError(f"{self.name}: the answer has more than {most} bytes; see diffrl's protocol")
                if time.monotonic() > until:
                    raise TimeoutError("timed out")
        return content

    def _scores(self, answer: bytes, count: int) -> list[float]:
        """The scores an answer holds. Raises RewardError where it is not of the protocol."""
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RewardError(
                f"{self.name}: the answer is no JSON but {answer[:60]!r}; see diffrl's protocol"
            ) from error
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list):
            raise RewardError(f'{self.name}: the answer has no list "scores": {answer[:60]!r}')
        if len(scores) != count:
            raise RewardError(f"{self.name} gave {len(scores)} scores for {count} images")
        for i, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= LARGEST:
                raise RewardError(
                    f"{self.name}: score {i} of {count} is {repr(score)[:40]}; it must be a finite number"
                )
        return [float(score) for score in scores]


def _said(error: urllib.error.HTTPError) -> str:
    """What an answer that is an error says, in a line."""
    try:
        content = json.loads(error.read(10_000))
        return " ".join(str(content["error"]).split())[:500]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return ""
