"""A server for any reward in the protocol of `remote`: python -m diffrl.images.rewards.serve REWARD --port N.

It answers whoever reaches it, so it listens to this machine only unless `--host` says otherwise; put a proxy with
passwords before it where others share the network.
"""

import argparse
import base64
import io
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrl.images.rewards.base import Reward, ask
from diffrl.images.rewards.registry import GRAMMAR, listing, parse
from diffrl.support.errors import UserError, first_line, images_extra

LIMIT = 1 << 28
"""Bytes of a request at most."""


class BadRequest(UserError):
    """A request that is not of the protocol."""


def answer(reward: Reward, request: Any) -> dict[str, list[float]]:
    """The answer to a request. Raises BadRequest where it is not of the protocol, UserError where the reward does."""
    keys = ("images", "prompts", "metadata")
    if not isinstance(request, dict) or not all(isinstance(request.get(key), list) for key in keys[:2]):
        raise BadRequest('expected {"images": [...], "prompts": [...], "metadata": [...]}')
    images = [decode(image, i) for i, image in enumerate(request["images"])]
    prompts = request["prompts"]
    metadata = request.get("metadata") or [{}] * len(images)
    if not len(images) == len(prompts) == len(metadata):
        raise BadRequest(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; one each")
    if not all(isinstance(p, str) for p in prompts) or not all(isinstance(m, dict) for m in metadata):
        raise BadRequest("prompts are texts, metadata objects")
    return {"scores": _scores(reward, images, prompts, metadata)}


def decode(image: Any, index: int) -> Tensor:
    """A base64 PNG as a tensor (3, H, W) in [0, 1]. Raises BadRequest, naming the image, for anything else."""
    with images_extra("A server of rewards"):
        from PIL import Image
    try:
        with Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=["PNG"]) as file:
            pixels = np.asarray(file.convert("RGB"))
    except Exception as error:  # Pillow raises what it likes for a broken file, its limit on pixels among that
        raise BadRequest(f"image {index} is no PNG in base64: {first_line(error)}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


@torch.no_grad()
def _scores(
    reward: Reward, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> list[float]:
    """The scores of images: in one call where all are of one size, else one by one."""
    if not images:
        return []
    if len({image.shape for image in images}) == 1:
        scores: list[float] = ask(reward, torch.stack(list(images)), prompts, metadata).tolist()
        return scores
    triples = zip(images, prompts, metadata, strict=True)
    return [ask(reward, image[None], [prompt], [meta]).item() for image, prompt, meta in triples]


def server(reward: Reward, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server of `reward`, to be run by `serve_forever`. port 0: any free one; `server_address` tells which.

    A reward is asked by one request at a time. Raises UserError where the address cannot be listened to.
    """
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        """Answers POST, at any path."""

        def do_POST(self) -> None:
            """Answer one request."""
            try:
                length = int(self.headers.get("Content-Length", ""))
                if not 0 <= length <= LIMIT:
                    raise BadRequest(f"a request of {length} bytes; {LIMIT} at most")
                request = json.loads(self.rfile.read(length))
                with turn:
                    status, content = 200, json.dumps(answer(reward, request))
            except (UserError, ValueError) as error:
                status, content = 400, json.dumps({"error": str(error)})
            except Exception as error:  # a fault of ours: told to the client, and the server goes on
                self.log_error("%s: %s", type(error).__name__, error)
                status, content = 500, json.dumps({"error": f"{type(error).__name__}: {first_line(error)}"})
            body = content.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Write nothing: requests are many, and errors are written elsewhere."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:  # the latter: no port has such a number
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen to {host}:{port}: {reason}; choose another --port") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: serves until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m diffrl.images.rewards.serve",
        description=f"Serve a reward over HTTP and JSON. REWARD is {GRAMMAR}; known:\n\n{listing()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reward", metavar="REWARD")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen to (this machine only)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        reward = parse(options.reward, device=options.device)
        with server(reward, options.host, options.port) as http:
            host, port = http.server_address[:2]
            print(f"{reward.name} at http://{host!s}:{port}", flush=True)
            http.serve_forever()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
