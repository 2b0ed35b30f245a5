"""Questions to servers over HTTP: one POST, tried again where trying again may help, and what went wrong in a line."""

import email.utils
import http.client
import json
import math
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from typing_extensions import override

from diffrl.images.rewards.base import RewardError
from diffrl.support import stopping
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.support.stopping import Stopped
from diffrl.support.unreached import why

T = TypeVar("T")
LIMITED = 429
"""The status of a server that is asked too often: it is there."""
AGAIN = (408, LIMITED)
"""Statuses below 500 after which a request is tried again."""
LONGEST = 60.0
"""Seconds that a server may ask to be waited for (Retry-After), at most."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, at most, unless the server asks for more."""
PATIENCE = 300.0
"""Seconds that a server which has answered before is waited for: one of a large model takes minutes to start."""
PIECE = 0.2
"""Seconds between two looks at whether a wait is to end."""
now = time.monotonic
"""The clock of waits."""


class Unclear(Exception):
    """An answer that is of no use and may be another one next time; its text ends the sentence "NAME ..."."""


class Broken(Exception):
    """An answer that is none of the protocol: the rest of one that broke off, if the server has answered well before.

    Its text ends the sentence "NAME gave ..."; what it was raised for is what is wrong where that server is a new one.
    """

    def __init__(self, text: str, error: RewardError) -> None:
        super().__init__(text)
        self.error = error


class TooLong(Exception):
    """An answer of more bytes than it may have."""


class Short(http.client.HTTPException):
    """An answer of fewer bytes than its Content-Length says; its text is "N of M bytes"."""


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Takes a redirection for the refusal that it is to us."""

    @override
    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirection)


def check_address(name: str, url: str, secret: str, example: str) -> None:
    """Raise UserError for an address that is not http or https, or that holds a password.

    name: of the reward. secret: the environment variable that a password belongs in. example: of a right one.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number, half an IPv6 address
        known = False
    if not known:
        raise UserError(f"{name}:{url}: expected an address such as {example}")
    if "@" in parts.netloc:
        raise UserError(
            f"{name}:{parts.scheme}://...@{parts.netloc.rpartition('@')[2]}: an address with a password would be "
            f"written into the run's folder; give what the server asks for in ${secret}"
        )


def check_secret(secret: str, source: str) -> None:
    """Raise UserError for a secret that no header can carry; the text names its source and not the secret."""
    if not all("!" <= letter <= "~" for letter in secret):
        raise UserError(f"{source} is to be of ASCII letters, digits and signs, without spaces.")


def without_secret(text: str, secret: str, source: str) -> str:
    """The text with `$source` where the secret stands, which a server may repeat: also as JSON and `repr` write it."""
    for form in {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]} - {""}:
        text = text.replace(form, f"${source}")
    return text


def post(url: str, body: bytes, *, secret: str, timeout: float, most: int) -> bytes:
    """The answer to a JSON body. Raises OSError, HTTPException; TooLong beyond `most` bytes.

    secret: goes along as a bearer's token, and nowhere else: a redirection, which is not followed, would take it away.
    timeout: seconds until the whole answer is here.
    """
    request = urllib.request.Request(
        url, body, {"Content-Type": "application/json", "Accept": "application/json"}, method="POST"
    )
    if secret:
        request.add_unredirected_header("Authorization", f"Bearer {secret}")
    until = time.monotonic() + timeout
    content = b""
    with _OPENER.open(request, timeout=timeout) as answer:
        # The timeout of a socket begins anew with every byte.
        while part := answer.read1(1 << 16):
            content += part
            if len(content) > most:
                raise TooLong(f"the answer has more than {most} bytes")
            if time.monotonic() > until:
                raise TimeoutError("timed out")
        unsaid = answer.status == http.HTTPStatus.NO_CONTENT or answer.headers.get("Transfer-Encoding")  # RFC 9112, 6.3
        said = "" if unsaid else answer.headers.get("Content-Length", "")
    if said.isascii() and said.isdigit() and len(content) < int(said):  # which read1 takes for the end
        raise Short(f"{len(content)} of {said} bytes")
    return content


class Server:
    """What is known of a server that several threads may ask, and how long it is waited for.

    patience: seconds that it is waited for after its last answer to any of them, once it has answered well.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.answered = False
        """Whether it has ever answered well: its address is right, and what fails now may pass."""
        self.last = -math.inf
        """When it answered last, by `now`."""
        self._told = False
        """Whether it was said that it is waited for."""
        self._turn = threading.Lock()

    def well(self, name: str) -> None:
        """It has answered well. name: of the reward."""
        self.answered = True
        self.heard(name)

    def heard(self, name: str) -> None:
        """It has answered, well or not clearly; said on the terminal where it was waited for."""
        with self._turn:
            self.last = now()
            if self._told:
                self._told = False
                console.print(f"{name} answers again.", markup=False)

    def wait_for(self, name: str, failure: str) -> None:
        """Say on the terminal that it is waited for, and why; once until it has answered again."""
        with self._turn:
            if not self._told:
                self._told = True
                console.print(
                    f"{name} {failure}. It has answered before, so it is waited for, up to "
                    f"{self.patience / 60:.3g} min. Ctrl-C ends it at once.",
                    markup=False,
                )

    def given_up(self) -> None:
        """It is waited for no longer: when it is the next time, that is said again."""
        with self._turn:
            self._told = False


def wait(seconds: float, stopped: Callable[[], bool], given_up: threading.Event | None = None) -> bool:
    """Wait so long, or until nothing more is to be asked: whether it may go on.

    Raises Stopped where a signal is noted, as a run of several processes does, which goes on to the end of its round.
    """
    until = now() + seconds
    while True:
        if stopped():
            raise Stopped
        if given_up is not None and given_up.is_set():
            return False
        if (left := until - now()) <= 0:
            return True
        piece = min(left, PIECE)
        if given_up is None:
            time.sleep(piece)
        else:
            given_up.wait(piece)


def patiently(
    name: str,
    ask: Callable[[], T],
    *,
    server: Server,
    retries: int,
    pause: float,
    timeout: float,
    hints: Mapping[int, str],
    clean: Callable[[str], str] = str,
    given_up: threading.Event | None = None,
    stopped: Callable[[], bool] | None = None,
) -> T:
    """What `ask` gives, asked again after `pause` seconds, then twice as long each time, up to `retries` times more.

    Asked again where the server cannot be reached, is too slow, breaks off its answer, answers 408, 429 or 5xx, or is
    `Unclear`; one that says how long to wait is waited for so long. A server that has answered well before is asked
    beyond these attempts, until `server.patience` seconds have passed since it last answered this question or another
    one; and what is none of the protocol (`Broken`) is asked for again, where that of a new server is an error at once.
    Unclear answers are counted by themselves: `retries` + 1 of them end it. hints: a sentence after the refusal of a
    status; 0: after the last attempt. clean: takes a secret out of what a server says. given_up: once it is set,
    nothing more is waited for, said or asked. stopped: whether a signal was noted; by default for this thread.
    Raises RewardError, in a line, for a refusal and after the last attempt; Stopped where `stopped` while it waits.
    """
    stopped = stopping.noted() if stopped is None else stopped
    asked, unclear = 0, 0
    away, silent = 0, 0  # attempts without an answer: since the last one to this question, and to any question
    began, last = now(), server.last
    while True:
        asked, to_wait, limited, is_unclear = asked + 1, 0.0, False, False
        try:
            answer = ask()
            server.well(name)
            return answer
        except urllib.error.HTTPError as error:
            with error:
                text = _said(error, clean)
            if error.code not in AGAIN and error.code < 500:
                hint = hints.get(error.code, "")
                line = f"{name} refused the request: HTTP {error.code} {text}".rstrip().rstrip(".")
                raise RewardError(f"{line}. {hint}".rstrip()) from error
            limited, to_wait = error.code == LIMITED, _asked_to_wait(error)
            failure = f"answered HTTP {error.code} {text}".rstrip().rstrip(".")
        except TimeoutError:
            failure = f"gave no answer within {timeout:g} s"
        except Short as error:
            failure = f"broke off its answer after {error}"
        except http.client.IncompleteRead:
            failure = "broke off its answer"
        except (OSError, http.client.HTTPException) as error:  # refused, an unknown host, no HTTP
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            failure = f"gave no answer within {timeout:g} s" if late else f"cannot be reached: {_lost(reason)}"
        except Broken as error:
            if not server.answered:
                raise error.error from error
            failure = f"gave {error}"
        except Unclear as error:
            is_unclear, failure = True, str(error)
            server.heard(name)
        if server.last > last:
            last, silent = server.last, 0
        unclear, away, silent = (unclear + 1, 0, 0) if is_unclear else (unclear, away + 1, silent + 1)
        count = unclear if is_unclear else away
        seconds = max(to_wait, min(pause * 2.0 ** min(count - 1, 100), max(pause, LONGEST_PAUSE)))
        if given_up is not None and given_up.is_set():
            break
        if count > retries:
            if is_unclear or not server.answered or now() + seconds - max(began, last) > server.patience:
                break
            if silent > retries and not limited:
                server.wait_for(name, clean(failure))
        if not wait(seconds, stopped, given_up):
            break
    server.given_up()
    raise RewardError(f"{name} {failure} ({asked} attempts). {hints.get(0, '')}".rstrip())


def _lost(reason: object) -> object:
    """Why a server is not reached, without the number that the system has for it."""
    if isinstance(reason, ConnectionRefusedError | socket.gaierror):
        return why(reason)
    return getattr(reason, "strerror", None) or reason


def _asked_to_wait(error: urllib.error.HTTPError) -> float:
    """Seconds that an answer asks to wait, by their number or by a date; 0 for none."""
    text = error.headers.get("Retry-After", "") if error.headers else ""
    if text.isascii() and text.isdigit():
        return min(float(text), LONGEST)
    try:
        return min(max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0), LONGEST)
    except (ValueError, OverflowError):
        return 0.0


def _said(error: urllib.error.HTTPError, clean: Callable[[str], str]) -> str:
    """What an answer that is an error says, in a line: {"error": TEXT}, or, as OpenAI has it, its "message"."""
    try:
        content = json.loads(error.read(10_000))["error"]
        content = content["message"] if isinstance(content, dict) else content
        return " ".join(clean(str(content)).split())[:500]  # cut at the end: half a secret is one too
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return ""
