"""Policies of the Hub, from a server on this machine that answers as the Hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffrl
from diffrl.runs.export import hub
from diffrl.runs.export.export import export
from diffrl.support.errors import UserError
from tests.runs.made_runs import made_run, observations_of, small

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "5" * 40


class Hub(ThreadingHTTPServer):
    """The part of the Hub's API that a download asks for: a repository's revision, its tree, its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, Path] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        for name, folder in self.server.repositories.items():
            files = sorted(file.name for file in folder.iterdir())
            if path.startswith(f"api/models/{name}"):
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": etag(folder / n)}
                        for n in files
                    ]
                    self.answer(json.dumps(tree).encode(), body)
                    return
                about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                self.answer(json.dumps(about).encode(), body)
                return
            file = path.removeprefix(f"{name}/resolve/{COMMIT}/")
            if file in files:
                self.answer((folder / file).read_bytes(), body, etag(folder / file))
                return
        error = b"" if path.startswith("api/") else b"Entry not found"
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound" if path.startswith("api/") else "EntryNotFound")
        self.send_header("Content-Length", str(len(error)))
        self.end_headers()

    def answer(self, data: bytes, body: bool, tag: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        if tag:
            self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if body:
            self.wfile.write(data)


def etag(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub's library asks this server, keeps what it fetches here, and the current folder is an empty one."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    download = huggingface_hub.snapshot_download

    def of_this_one(repository: str, **options: Any) -> str:
        return str(download(repository, endpoint=server.url, cache_dir=tmp_path / "cache", token=False, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", of_this_one)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_policy_of_the_hub_acts_as_the_run_does(served: Hub, tmp_path: Path) -> None:
    """Bit for bit; fetched are three files, and neither the card nor a pickle beside them."""
    run = made_run(tmp_path / "run", small("diffusion_ql"))
    to = export(run, tmp_path / "to")
    (to / "pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    served.repositories["user/name"] = to
    x = observations_of(run)
    expected = diffrl.load_policy(run)(x)
    for name in ("user/name", "hf://user/name", "HF://user/name"):
        assert np.array_equal(diffrl.load_policy(name)(x), expected)
    fetched = {path.rpartition("/")[2] for path in served.asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors", "SHA256SUMS"}


def test_a_path_that_exists_wins_and_says_so(served: Hub, tmp_path: Path, capsys: Any) -> None:
    """A run's folder silently; an exported policy's with how to reach the Hub's. A mistyped path asks no Hub."""
    served.repositories["user/name"] = export(made_run(tmp_path / "a", small("bc"), seeds=(1,)), tmp_path / "to")
    run = made_run(Path("user/name"), small("bc"), seeds=(2,))
    assert diffrl.load_policy("user/name").agent.seeds == (2,)
    export(run, "user/policy")
    assert diffrl.load_policy("user/policy").agent.seeds == (2,)
    assert "user/policy is a folder here, and is taken; the Hub's is hf://user/policy" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"user/nam is not a run's folder: it does not exist.*Runs beside it: user/name"
    ):
        diffrl.load_policy("user/nam")
    assert served.asked == []
    assert diffrl.load_policy("hf://user/name").agent.seeds == (1,)


def test_what_the_hub_cannot_give_is_a_sentence(served: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    """A name that it has not, one that is none, another's model, a damaged file, a network that is down."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / "model.safetensors").write_bytes(b"")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "weights.bin").write_bytes(b"")
    damaged = export(made_run(tmp_path / "run", small("bc")), tmp_path / "damaged")
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    served.repositories |= {"some/bert": other, "some/bare": bare, "some/damaged": damaged}
    for name, words in (
        ("no/such", "no/such is no folder here, and the Hub has no such model"),
        ("hf://nonsense", "is no id of the Hub's: expected hf://USER/NAME"),
        ("some/bert", "does not say `format: diffrl-policy`"),
        ("some/bare", "some/bare on the Hub holds no policy of diffrl: it has no config.json"),
        ("some/damaged", "its checksum does not match SHA256SUMS"),
    ):
        with pytest.raises(UserError) as caught:
            diffrl.load_policy(name)
        assert words in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
    served.repositories.clear()
    monkeypatch.setattr(Hub, "url", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the Hub could not give it"):
        diffrl.load_policy("some/other")


def test_without_the_hubs_library_its_extra_is_named(monkeypatch: Any, tmp_path: Path) -> None:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'diffrl\[images\]'"):
        hub.exported("some/name")


def test_what_is_no_id_is_never_asked_for(served: Hub, tmp_path: Path) -> None:
    for name in ("runs/a/b", "run", "./some/name", "../name", "/absent/name", Path("some/name"), str(tmp_path / "x")):
        assert hub.exported(name) is None
    assert served.asked == []
