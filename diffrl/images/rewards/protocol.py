"""What a server of rewards takes from strangers: requests of the protocol of `remote`, within limits, checked first."""

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer, override

from diffrl.images.models.loading import images_extra
from diffrl.images.rewards.base import Reward, ask
from diffrl.support.errors import UserError, first_line

DEPTH = 32
"""Lists and objects within one another, at most, in a request's metadata."""


@dataclass(frozen=True)
class Limits:
    """What a request may cost. All requests in work together may cost twice that; the others wait."""

    pixels: int = 1 << 25
    """Of its images in all: 32 of 1024 x 1024. Decoded and as float32 they take 15 bytes each, 500 MB."""
    body: int = 1 << 28
    """Bytes of its body."""
    images: int = 4096
    headers_s: float = 10.0
    """Seconds within which its headers must be here, from when the connection is made."""
    read_s: float = 60.0
    """Seconds for its body; also to wait until those before it leave room, and for the client to take the answer."""
    connections: int = 64
    """At a time; the next ones are told to come again."""


class Refused(UserError):
    """A request that is not served. status: what HTTP calls the reason."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class BadRequest(Refused):
    """A request that is not of the protocol."""

    def __init__(self, text: str) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, text)


class Budget:
    """An amount that is shared: who wants some of it waits until there is enough."""

    def __init__(self, amount: int) -> None:
        self._left, self._changed = amount, threading.Condition()

    @contextlib.contextmanager
    def spent(self, amount: int, seconds: float) -> Iterator[None]:
        """Around what needs `amount` of it. Raises Refused where there is not enough within so many seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= amount, seconds):
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "busy with other requests: come again")
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


class TimedReader(io.RawIOBase):
    """What a connection sends, until a moment: a timeout of the socket alone begins anew with every byte."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """Read on for so many seconds from now. Reading later than that raises TimeoutError."""
        self._until = time.monotonic() + seconds

    @override
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fill the buffer with what is there, as `io.RawIOBase` has it."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


@dataclass(frozen=True)
class Request:
    """A request of the protocol, with the headers of its images read and nothing decoded."""

    files: list[Any]
    """The images as Pillow has opened them."""
    prompts: list[str]
    metadata: list[Mapping[str, Any]]

    @property
    def pixels(self) -> int:
        """Of all images, as their headers say."""
        return sum(file.width * file.height for file in self.files)

    def decoded(self) -> list[Tensor]:
        """The images as bytes, (3, H, W) each. Raises BadRequest, naming the image, where one is damaged."""
        return [_pixels(file, i) for i, file in enumerate(self.files)]


def read(request: Any, limits: Limits) -> Request:
    """Check a request and open its images. Raises BadRequest where it is not of the protocol, or beyond the limits."""
    if not isinstance(request, dict) or not all(isinstance(request.get(key), list) for key in ("images", "prompts")):
        raise BadRequest('expected {"images": [...], "prompts": [...], "metadata": [...]}')
    images, prompts, metadata = request["images"], request["prompts"], request.get("metadata")
    metadata = [{} for _ in images] if metadata is None else metadata
    if not isinstance(metadata, list) or not all(isinstance(row, dict) for row in metadata):
        raise BadRequest("metadata is a list of objects")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise BadRequest("prompts are texts")
    if not len(images) == len(prompts) == (len(metadata) or len(images)):
        raise BadRequest(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; one each")
    if len(images) > limits.images:
        raise BadRequest(f"{len(images)} images in a request; {limits.images} at most")
    _check_depth(metadata)
    checked = Request([_opened(image, i) for i, image in enumerate(images)], prompts, metadata or [{}] * len(images))
    if checked.pixels > limits.pixels:
        largest = max(checked.files, key=lambda file: file.width * file.height)
        raise BadRequest(
            f"the images have {checked.pixels} pixels in all, the largest {largest.width} x {largest.height}; this "
            f"scorer takes {limits.pixels} a request: send fewer, or start it with --max-pixels"
        )
    return checked


def _check_depth(value: Any) -> None:
    """Raise BadRequest for what is nested too deeply."""
    level = [value]
    for _ in range(DEPTH + 2):  # the list of all metadata, and each of them, are none of theirs
        inner = [entry.values() if isinstance(entry, dict) else entry for entry in level]
        level = [entry for entries in inner for entry in entries if isinstance(entry, dict | list)]
        if not level:
            return
    raise BadRequest(f"metadata is nested more than {DEPTH} deep")


def _opened(image: Any, index: int) -> Any:
    """A base64 PNG with its header read. Raises BadRequest, naming the image, for anything else."""
    with images_extra("A server of rewards"):
        from PIL import Image
    try:
        return Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=["PNG"])
    except Exception as error:  # Pillow raises what it likes for a broken file, its limit on pixels among that
        raise BadRequest(f"image {index} is no PNG in base64: {first_line(error)}") from error


def _pixels(file: Any, index: int) -> Tensor:
    try:
        with file:
            pixels = np.array(file.convert("RGB"))
    except Exception as error:  # as above
        raise BadRequest(f"image {index} is a damaged PNG: {first_line(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode(image: Any, index: int) -> Tensor:
    """A base64 PNG as bytes (3, H, W). Raises BadRequest, naming the image, for anything else."""
    return _pixels(_opened(image, index), index)


@torch.no_grad()
def scores(reward: Reward, request: Request, images: list[Tensor]) -> list[float]:
    """The scores of a request's decoded images: in one call where all are of one size, else one by one."""
    if not images:
        return []
    if len({image.shape for image in images}) == 1:
        batch = torch.stack(images).float() / 255
        values: list[float] = ask(reward, batch, request.prompts, request.metadata).tolist()
        return values
    triples = zip(images, request.prompts, request.metadata, strict=True)
    return [ask(reward, image[None].float() / 255, [prompt], [meta]).item() for image, prompt, meta in triples]
