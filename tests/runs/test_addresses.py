"""Runs and data sets at addresses: fetched whole, fetched once, fetched anew when they change, and never written."""

import http.server
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.registry import _registry

import diffrl
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.runs.config import TrainConfig
from diffrl.runs.run import Run
from diffrl.runs.study.scores import Scores
from diffrl.support import files, remote
from diffrl.support.errors import DataError, UserError
from diffrl.support.folder import Damaged, spare
from envs.datasets import load_dataset
from tests.runs.made_runs import made_run, small


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remote"


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.rm("/", recursive=True) if system.exists("/kept") else None
    yield system
    if system.exists("/kept"):
        system.rm("/kept", recursive=True)


def recorded() -> OfflineDataset:
    """Two episodes of 20 steps of noise."""
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=(40, 3)).astype(np.float32) for name in ("observations", "next_observations")}
    ends = np.arange(40) % 20 == 19
    actions = rng.uniform(-0.9, 0.9, (40, 1)).astype(np.float32)
    rewards = rng.normal(size=40).astype(np.float32)
    return OfflineDataset(**columns, actions=actions, rewards=rewards, terminals=ends, timeouts=np.zeros(40, bool))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; of a name with `cut` half, and then the connection breaks."""

    asked: list[str]

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send the file."""
        self.asked.append(self.path)
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "cut" in self.path else content)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A web server of this machine: its address, the folder that it serves, and the paths that were sent."""
    folder, asked = tmp_path / "www", []
    folder.mkdir()
    handler = partial(type("Served", (Handler,), {"asked": asked}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder, asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "address", "path"),
    [
        ("s3://bucket/a", "s3://bucket/a", None),
        ("s3:/bucket/a", "s3://bucket/a", None),  # as pathlib writes it
        ("https://host/a.hdf5", "https://host/a.hdf5", None),
        ("runs/a", None, "runs/a"),
        ("runs/a:/b", None, "runs/a:/b"),
        ("C:/runs/a", None, "C:/runs/a"),
        ("minari:mujoco/hopper/medium-v0", None, "minari:mujoco/hopper/medium-v0"),
        ("x" * 50_000, None, "x" * 50_000),
        ("s3://" + "x" * 50_000, "s3://" + "x" * 50_000, None),
    ],
)
def test_what_is_an_address(name: str, address: str | None, path: str | None) -> None:
    assert files.address_of(name) == address
    assert files.address_of(Path(name)) == address
    if path is not None:
        assert files.to_write(name) == files.path_of(name) == Path(path)
    else:
        with pytest.raises(UserError, match="written to a path"):
            files.to_write(name)


@pytest.mark.parametrize("name", ["file:///shared/a", "file:/shared/a", "local:///shared/a", "FILE:///shared/a"])
def test_a_url_of_files_is_read_as_its_path_and_never_written_to(name: str) -> None:
    """Its plain path is named, whatever pathlib made of the slashes."""
    for given in (name, Path(name)):
        assert files.address_of(given) is None
        assert files.path_of(given) == Path("/shared/a")
        for check in (files.to_write, files.unused):
            with pytest.raises(UserError, match=r"^(file|local|FILE):///shared/a: .* a path: give /shared/a\.$"):
                check(given)
    with pytest.raises(UserError, match=r"give /shared/a\.$"), files.atomic_path(name):
        pass
    assert files.address_of("S3://Bucket/A") == "s3://Bucket/A"
    assert files.address_of("C:/Users/a") is None
    for address in ("memory://b/a", "s3://b/a", "S3://b/a"):
        with pytest.raises(UserError, match="written to a path"):
            spare(Path(address), force=True)


def test_a_folder_here_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "a").mkdir(parents=True)
    assert files.address_of("s3:/a") is None
    assert remote.local_folder(Path("s3:/a")) == Path("s3:/a")


@pytest.mark.parametrize(
    ("place", "file", "inner"),
    [
        ("/kept/run", "/kept/run/a/b", "a/b"),
        ("bucket/run/", "bucket/run/a", "a"),
        ("http://host/run", "http://host/run/a", "a"),
        ("http://host/run", "http://host/other/a", None),
        ("http://host/run", "http://other/run/a", None),
        ("/kept/run", "/kept/run/../other", None),
        ("/kept/run", "/kept/run2/a", None),
        ("http://host/run", "http://host/run/?C=N;O=D", None),
        ("/kept/run", "/kept/run/a\\..\\b", None),
        ("/kept/run", "/kept/run", None),
    ],
)
def test_nothing_lies_outside_of_a_folder(place: str, file: str, inner: str | None) -> None:
    assert remote._below(place, file) == inner


def test_a_file_comes_once_and_again_when_it_has_changed(site: tuple[str, Path, list[str]], cache: Path) -> None:
    address, folder, asked = site
    (folder / "a.csv").write_text("one")
    first = remote.local_file(f"{address}/a.csv")
    assert (first.name, first.read_text()) == ("a.csv", "one")
    assert remote.local_file(Path(f"{address}/a.csv")) == first
    assert asked == ["/a.csv"]
    (folder / "a.csv").write_text("two, longer")
    second = remote.local_file(f"{address}/a.csv")
    assert second.read_text() == "two, longer"
    assert not first.exists()  # nobody asks for the old one any more
    assert asked == ["/a.csv"] * 2
    assert cache in second.parents


def test_a_new_content_of_the_same_size_is_seen_where_only_the_size_is_told(memory: Any, cache: Path) -> None:
    """Of a file whose keeper says nothing else, no copy is trusted."""
    found = {"a": ("/kept/a", {"size": 3})}
    for text in (b"one", b"two"):
        memory.pipe("/kept/a", text)
        assert (remote._copy("memory://kept/a", cache, memory, found, UserError) / "a").read_bytes() == text


def test_a_run_at_an_address_is_the_run(memory: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", small("bc"))
    memory.put(str(run), "/kept/run", recursive=True)
    observation = np.ones(3, np.float32)
    there, here = (diffrl.load_policy(path, seed=5) for path in ("memory://kept/run", run))
    assert np.array_equal(there(observation), here(observation))
    assert Run.read(Path("memory://kept/run")).fingerprint == Run.read(run).fingerprint
    assert diffrl.evaluate("memory://kept/run", episodes=1, which=("last",), quiet=True) == diffrl.evaluate(
        run, episodes=1, which=("last",), quiet=True
    )


def test_runs_of_a_web_server_are_reported_without_their_checkpoints(
    site: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder, asked = site
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        made_run(folder / "sweep" / name, small("bc"), seeds=(1, 2) if name == "a" else (3,))
    here, there = (Scores.of_runs([path]) for path in (folder / "sweep", f"{address}/sweep"))
    assert [row[:6] for row in there.rows] == [row[:6] for row in here.rows] != []
    assert asked
    assert not [path for path in asked if path.endswith(".safetensors") and "checkpoints" in path]
    assert main(["report", f"{address}/sweep", "--out", "report"]) == 0
    assert (tmp_path / "report" / "index.html").is_file()
    asked.clear()
    assert main(["evaluate", f"{address}/sweep/b", "--episodes", "1", "--which", "last"]) == 0
    assert (tmp_path / "b-evaluation.json").is_file()
    assert [path for path in asked if path.endswith(".safetensors") and "checkpoints" in path]


def test_a_flipped_bit_at_an_address_is_found(memory: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", small("bc"))
    memory.put(str(run), "/kept/run", recursive=True)
    content = bytearray(memory.cat("/kept/run/config.yaml"))
    content[5] ^= 1
    memory.pipe("/kept/run/config.yaml", bytes(content))
    with pytest.raises(Damaged, match="checksum"):
        Run.read("memory://kept/run")


@pytest.mark.usefixtures("own_data")
def test_training_on_a_file_at_an_address_is_training_on_the_file(
    site: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    """Bit for bit; the run keeps the address, and goes on from it."""
    address, folder, asked = site
    d4rl.write(folder / "rollouts.hdf5", recorded())
    runs = []
    for dataset in (str(folder / "rollouts.hdf5"), f"{address}/rollouts.hdf5"):
        config = TrainConfig(dataset=dataset, agent=small("bc"), env="none", steps=3, out=tmp_path / f"run{len(runs)}")
        runs.append(diffrl.train(config, quiet=True))
    here, there = (diffrl.load_policy(run) for run in runs)
    observation = np.ones(3, np.float32)
    assert np.array_equal(here(observation), there(observation))
    assert Run.read(runs[1]).config.dataset == f"{address}/rollouts.hdf5"
    assert asked == ["/rollouts.hdf5"]
    assert diffrl.resume(runs[1], steps=5, quiet=True) == runs[1]
    assert Run.read(runs[1]).config.steps == 5


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize("name", ["cut.hdf5", "cut.npz"])
def test_a_connection_that_breaks_is_one_line_and_leaves_nothing(
    name: str, site: tuple[str, Path, list[str]], cache: Path
) -> None:
    address, folder, _ = site
    (folder / name).write_bytes(bytes(100_000))
    with pytest.raises(DataError, match=r"was cut off at 50,000 of 100,000 bytes; the same command") as caught:
        load_dataset(f"{address}/{name}")
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


class Site:
    """A web server of this machine that can be shut, and opened again in the same place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.port = folder, list[str](), 0
        folder.mkdir(exist_ok=True)
        self.open()

    def open(self) -> None:
        """Serve the folder."""
        handler = partial(type("Served", (Handler,), {"asked": self.asked}), directory=str(self.folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def shut(self) -> None:
        """Refuse every connection from now on."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A `Site`, which is asked anew each time."""
    monkeypatch.setattr(remote, "_AGAIN", 0.0)
    found = Site(tmp_path / "shop")
    yield found
    found.shut()


def said_by(capsys: pytest.CaptureFixture[str]) -> str:
    """All that was printed, in one line."""
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


def test_without_its_server_a_file_is_read_from_its_copy_which_is_said(
    shop: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    d4rl.write(shop.folder / "rollouts.hdf5", recorded())
    address = f"http://127.0.0.1:{shop.port}/rollouts.hdf5"
    fetched = load_dataset(address)
    shop.shut()
    capsys.readouterr()
    kept = load_dataset(address)
    said = said_by(capsys)
    assert np.array_equal(kept.observations, fetched.observations)
    assert f"{address} cannot be reached (127.0.0.1:{shop.port} refuses the connection): the copy of 20" in said
    assert "whether it changed there is not known" in said
    load_dataset(address)
    assert "cannot be reached" not in said_by(capsys)  # once is enough
    with pytest.raises(DataError, match="refuses the connection"):
        load_dataset(address.replace("rollouts", "others"))
    shop.open()
    changed = recorded()
    changed.observations[:] += 1
    d4rl.write(shop.folder / "rollouts.hdf5", changed, force=True)
    assert np.array_equal(load_dataset(address).observations, changed.observations)


def test_what_has_changed_and_does_not_come_whole_is_not_taken_from_the_copy(shop: Site) -> None:
    """The server was reached: the copy is known to be another file."""
    address = f"http://127.0.0.1:{shop.port}/cut.csv"
    (shop.folder / "cut.csv").write_bytes(b"")
    remote.local_file(address)
    (shop.folder / "cut.csv").write_bytes(b"12345678")
    with pytest.raises(UserError, match="was cut off at 4 of 8 bytes"):
        remote.local_file(address)


def test_without_its_server_a_run_is_read_from_a_whole_copy_alone(
    shop: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report's copy has no checkpoints, and does not do for an evaluation; one of all does for a report."""
    monkeypatch.chdir(tmp_path)
    made_run(shop.folder / "a", small("bc"))
    address, evaluate = f"http://127.0.0.1:{shop.port}/a", ["--episodes", "1", "--which", "last"]
    assert len(Scores.of_runs([address]).rows) > 0
    shop.shut()
    assert len(Scores.of_runs([address]).rows) > 0
    assert "cannot be reached" in said_by(capsys)
    assert main(["evaluate", address, *evaluate]) == 2
    assert "refuses the connection" in said_by(capsys)
    shop.open()
    assert main(["evaluate", address, *evaluate]) == 0
    shop.shut()
    said_by(capsys)
    assert main(["evaluate", address, *evaluate]) == 0
    assert said_by(capsys).count("whether it changed there is not known") == 1


@pytest.mark.usefixtures("own_data")
def test_a_run_goes_on_from_the_copy_of_its_data(shop: Site, tmp_path: Path) -> None:
    d4rl.write(shop.folder / "rollouts.hdf5", recorded())
    dataset = f"http://127.0.0.1:{shop.port}/rollouts.hdf5"
    config = TrainConfig(dataset=dataset, agent=small("bc"), env="none", steps=3, out=tmp_path / "run")
    run = diffrl.train(config, quiet=True)
    shop.shut()
    assert diffrl.resume(run, steps=5, quiet=True) == run
    assert Run.read(run).config.steps == 5


def test_a_folder_of_which_a_part_cannot_be_listed_is_refused(shop: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not taken for one without that part."""
    made_run(shop.folder / "a", small("bc"))
    whole = Handler.do_GET

    def do_get(self: Handler) -> None:
        if self.path.endswith("/checkpoints/"):
            self.connection.close()
        else:
            whole(self)

    monkeypatch.setattr(Handler, "do_GET", do_get)
    with pytest.raises(UserError, match=r"closed the connection|connection broke"):
        remote.local_folder(f"http://127.0.0.1:{shop.port}/a")


MISTAKES = {
    "nothing there": (["data", "info", "ADDRESS/none.hdf5"], "There is nothing at http"),
    "no run": (["evaluate", "ADDRESS/none"], "http"),
    "no server": (["data", "info", "http://127.0.0.1:9/a.hdf5"], "127.0.0.1:9 refuses the connection"),
    "no scheme": (["data", "info", "nosuch://a/b.hdf5"], "nosuch://a/b.hdf5: there is no scheme nosuch://"),
    "scheme with a slip": (["data", "info", "htps://a/b.hdf5"], "did you mean https://?"),
    "no server of a run": (["evaluate", "http://127.0.0.1:9/a"], "127.0.0.1:9 refuses the connection"),
    "no server of runs": (["report", "http://127.0.0.1:9/a", "--out", "r"], "127.0.0.1:9 refuses the connection"),
    "no server of a policy": (["render", "http://127.0.0.1:9/a", "--out=v.gif"], "127.0.0.1:9 refuses the connection"),
    "no such machine": (["data", "info", "http://nosuch.invalid/a.hdf5"], "no machine called nosuch.invalid is found"),
    "a web page": (["data", "info", "ADDRESS/"], "is a web page, and no file of data"),
    "a damaged file": (["data", "info", "ADDRESS/bad.hdf5"], "/bad.hdf5"),
    "chain": (["data", "info", "zip://a.hdf5::memory://b.zip"], "not a chain"),
    "pickle": (["data", "info", "ADDRESS/a.pkl"], "pickle"),
    "train's out": (["train", "bc/maze2d-umaze-v1", "--rows=500", "--steps=1", "--out=s3://a/b"], "written to a path"),
    "sweep's out": (["sweep", "bc/maze2d-umaze-v1", "--out=s3://a/b"], "written to a path"),
    "resume": (["resume", "memory://kept/run"], "written to a path"),
    "report's out": (["report", "--csv=scores.csv", "--out=s3://a/b"], "written to a path"),
    "checksum": (["data", "info", "ADDRESS/a.hdf5", "--add-checksum"], "written to a path"),
}


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_line(
    name: str,
    site: tuple[str, Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, folder, _ = site
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("scores.csv").write_text("task,agent,seed,step,score\nmaze,a,0,1,2\nmaze,a,1,1,2\n")
    (folder / "a.pkl").write_bytes(b"\x80\x04N.")
    (folder / "bad.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    words, expected = MISTAKES[name]
    assert main([word.replace("ADDRESS", address) for word in words]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert "Client" not in said
    assert str(tmp_path / "cache") not in said
    assert [path.name for path in Path().iterdir()] == ["scores.csv"]


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    with pytest.raises(UserError, match=r"aiohttp is not installed.*diffrl\[remote\]"):
        remote.local_file("http://127.0.0.1:9/a")
    for name, scheme in (("s3fs", "s3"), ("gcsfs", "gs")):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(UserError) as caught:
            remote.local_file(f"{scheme}://bucket/a")
        expected = f"{name} is not installed. `pip install {name}` brings what {scheme}:// needs."
        assert str(caught.value) == f"{scheme}://bucket/a cannot be opened: {expected}"


class NoCredentialsError(Exception):
    """Named and worded as botocore's, whose library the tests do not need."""

    def __str__(self) -> str:
        return "Unable to locate credentials"


class Locked(fsspec.AbstractFileSystem):
    """A file system as s3fs is where it finds no credentials."""

    def info(self, path: str, **options: object) -> Any:
        raise NoCredentialsError

    find = ls = info


def test_where_credentials_are_missing_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry, "s3", Locked)
    for read in (remote.local_file, remote.local_folder):
        with pytest.raises(UserError) as caught:
            read("s3://bucket/a")
        said = str(caught.value)
        assert said.startswith("s3://bucket/a cannot be read: no credentials for S3 are found here. Set $AWS_ACCESS_")
        assert "FSSPEC_S3_ANON=true" in said
        assert "Check the address" not in said


def test_s3fs_itself_misses_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="no credentials for S3 are found here"):
        remote.local_file("s3://bucket/a")
