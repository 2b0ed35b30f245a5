"""A file fetched from its host, resumed where an earlier try was cut, and verified before it is in its place."""

from __future__ import annotations

import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffrl.support.errors import DataError, UserError


class DownloadError(UserError):
    """A file could not be fetched. What has arrived is kept beside the target, and a later download resumes it."""


_INTERRUPTED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
_CHUNK = 1 << 20


def fetch(
    url: str,
    target: Path,
    verify: Callable[[Path], None] = lambda path: None,
    *,
    attempts: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
    progress: bool = True,
) -> None:
    """Download `url` to `target` by way of `target.part`, which a later call resumes (HTTP Range).

    Gives up after `attempts` tries in a row that brought nothing new, with pauses of `backoff`, 2 `backoff`,
    4 `backoff`, ... seconds; each try waits `timeout` seconds for an answer. `verify(part)` raises DataError where
    the whole file is not what it should be: it is then deleted. Raises DownloadError where the file cannot be had.
    """
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    most, failures = 0, 0
    while True:
        try:
            _fetch_once(url, part, timeout, progress)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # what we hold does not fit the file there: start anew
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise DownloadError(f"{url} answered {error.code} {error.reason}: the file is not there.") from error
            reason: Exception = error
        except _INTERRUPTED as error:
            reason = error
        size = part.stat().st_size if part.exists() else 0
        failures = 0 if size > most else failures + 1
        most = max(most, size)
        if failures >= attempts:
            why = getattr(reason, "reason", None) or reason
            raise DownloadError(
                f"{url} could not be fetched: {why} ({attempts} tries, {size} bytes so far)."
            ) from reason
        pause = backoff * 2 ** max(0, failures - 1)
        if progress:
            print(f"{reason}; trying again in {pause:g} s ({size} bytes so far)", file=sys.stderr)
        time.sleep(pause)
    try:
        verify(part)
    except DataError as error:
        part.unlink(missing_ok=True)
        raise DownloadError(f"{url} was fetched, but is not a usable data set, and was deleted: {error}") from error
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)


def _fetch_once(url: str, part: Path, timeout: float, progress: bool) -> None:
    """Append what is missing to `part`, or start it anew where the host cannot resume.

    Raises ConnectionError where the connection is cut, and what urllib raises.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            error.close()
            return  # it was complete already
        raise
    with response:
        size_there = response.headers.get("Content-Length") or "*"
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
            if span is None or int(span[1]) != have:
                part.unlink()
                raise ConnectionError("the host sent another part of the file than was asked for")
            size_there = span[2]
        else:
            have = 0
        total = None if size_there == "*" else int(size_there)
        with part.open("ab" if have else "wb") as file, _bar(part.stem, have, total, progress) as advance:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                advance(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise ConnectionError(f"the connection was cut after {size} of {total} bytes")


@contextmanager
def _bar(name: str, have: int, total: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields the function that advances it by bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(name, total=total, completed=have)
        yield lambda size: bar.advance(task, size)
