import http.server
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import DataError, UserError
from envs import datasets, fetching, registry
from envs.datasets import called
from envs.rows import first_rows


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> Path:
    """Our data directory, Minari's and D4RL's, all empty."""
    for variable in ("DIFFRL_DATA", "MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


def sample(rows: int = 40) -> OfflineDataset:
    rng = np.random.default_rng(0)
    timeouts = np.arange(rows) % 10 == 9
    return OfflineDataset(
        observations=rng.normal(size=(rows, 11)).astype(np.float32),
        actions=rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        rewards=rng.normal(size=rows).astype(np.float32),
        terminals=np.zeros(rows, bool),
        timeouts=timeouts,
    )


# Finding and loading


def test_all_rows_of_a_data_set_are_no_part_of_it_and_generated_ones_are(folders):
    minari_format = pytest.importorskip("diffrl.data.minari")
    d4rl.write(datasets.cached_path("hopper-medium-v2"), sample())
    minari_format.write("ours/mine-v0", sample())
    for name in ("hopper-medium-v2", "ours/mine-v0"):
        n = len(datasets.load_dataset(name))
        for rows, part in ((None, None), (n - 1, n - 1), (n, None), (n + 1, None)):
            assert first_rows(name, datasets.load_dataset(name, rows=rows), rows, quiet=True) == part
    d4rl.write(datasets.cached_path("maze2d-umaze-v1", 40), sample())
    dataset = datasets.load_dataset("maze2d-umaze-v1", rows=40)
    assert first_rows("maze2d-umaze-v1", dataset, 40) == 40
    d4rl.write(datasets.cached_path("maze2d-umaze-v1"), sample())
    assert first_rows("maze2d-umaze-v1", dataset, 40, quiet=True) is None


def test_an_id_is_loaded_from_the_data_directory_or_d4rl_s_own(folders):
    theirs = folders / "D4RL_DATASET_DIR" / "hopper_medium-v2.hdf5"
    d4rl.write(theirs, sample(20))
    assert len(datasets.load_dataset("hopper-medium-v2")) == 20
    d4rl.write(datasets.cached_path("hopper-medium-v2"), sample(40))
    dataset = datasets.load_dataset("hopper-medium-v2", rows=25)
    assert len(dataset) == 25
    assert dataset.metadata["dataset"] == "hopper-medium-v2"
    assert dataset.metadata["env_id"] == "Hopper-v4"


@pytest.mark.parametrize("name", ["hopper_medium-v2.hdf5", "hopper-medium-v2.hdf5"])
def test_d4rl_s_own_names_are_known(folders, capsys, name):
    """In our data directory too; and of a path that has such a name it is said which id scores it, and that is true."""
    from diffrl.commands.data import Info

    path, place = folders / name, folders / "DIFFRL_DATA" / "d4rl" / name
    data = d4rl.OfflineDataset(np.zeros((3, 11)), np.zeros((3, 3)), np.ones(3), np.zeros(3, bool), np.zeros(3, bool))
    d4rl.write(path, data)
    Info(str(path)).run()
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name} is the name of D4RL's hopper-medium-v2. Put it in {place.parent}, and --dataset hopper-" in said
    assert "reads and scores it; or name its environment: --env Hopper-v4." in said
    Info(str(path), env="Hopper-v4").run()
    assert "the name of D4RL's" not in capsys.readouterr().err
    place.parent.mkdir(parents=True)
    shutil.copy(path, place)
    assert len(datasets.load_dataset("hopper-medium-v2")) == 3
    Info(str(place)).run()
    assert "D4RL's hopper-medium-v2. --dataset hopper-" in " ".join(capsys.readouterr().err.split())


def test_missing_timeouts_of_an_id_are_counted_by_its_step_limit(folders):
    import h5py

    path = d4rl.write(datasets.cached_path("kitchen-mixed-v0"), sample(600))
    with h5py.File(path, "r+") as file:
        del file["timeouts"], file.attrs["sha256"]
    assert datasets.load_dataset("kitchen-mixed-v0").episodes().tolist() == [[0, 280], [280, 560], [560, 600]]


def test_a_path_and_a_minari_id_or_folder_are_loaded(folders):
    pytest.importorskip("minari")
    from diffrl.data import minari as minari_format

    path = d4rl.write(folders / "mine.hdf5", sample())
    assert len(datasets.load_dataset(path)) == 40
    folder = minari_format.write("ours/mine-v0", sample())
    for name in ("ours/mine-v0", "minari:ours/mine-v0", str(folder)):
        assert len(datasets.load_dataset(name, rows=30)) == 30


def test_a_missing_download_says_how_to_get_it():
    with pytest.raises(DataError, match=r"diffrl data download hopper-medium-v2.*local file"):
        datasets.load_dataset("hopper-medium-v2")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hoper-medium-v2", "did you mean 'hopper-medium-v2'"),
        ("nowhere/file.hdf5", "does not exist"),
        ("mujoco/hopper/medium-v0", "diffrl data download mujoco/hopper/medium-v0"),
        ("minari:what?", "no Minari id"),
    ],
)
def test_an_unknown_name_is_the_user_s_error(name, text):
    with pytest.raises(UserError, match=text):
        datasets.load_dataset(name)


def test_a_folder_that_is_no_data_set_is_named(folders):
    with pytest.raises(DataError, match="not a Minari data set"):
        datasets.load_dataset(folders)


def test_a_missing_maze_is_generated_once_and_fewer_rows_never_pass_for_the_whole():
    dataset = datasets.load_dataset("maze2d-umaze-v1", rows=500, progress=False)
    assert (len(dataset), dataset.observation_size, dataset.action_size) == (500, 4, 2)
    path = datasets.cached_path("maze2d-umaze-v1", 500)
    written = path.stat().st_mtime_ns
    again = datasets.load_dataset("maze2d-umaze-v1", rows=500, progress=False)
    np.testing.assert_array_equal(again.observations, dataset.observations)
    assert path.stat().st_mtime_ns == written
    assert not datasets.cached_path("maze2d-umaze-v1").exists()


def test_only_mazes_are_generated():
    with pytest.raises(UserError, match=r"cannot be generated; try `diffrl data download hopper-medium-v2`"):
        datasets.generate("hopper-medium-v2")
    with pytest.raises(UserError, match="at least 1"):
        datasets.generate("maze2d-umaze-v1", rows=0)


# Downloading


@dataclass
class Host:
    """A file server on 127.0.0.1 that can be told to misbehave."""

    content: bytes = b""
    ranges: bool = True
    drop_after: int | None = None  # bytes of a response after which the connection is cut
    status: int | None = None
    asked: list[str | None] = field(default_factory=list)  # the Range header of every request
    url: str = ""


@pytest.fixture
def host() -> Iterator[Host]:
    state = Host()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            if state.status is not None:
                return self.send_error(state.status)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            total = len(state.content)
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                return self.end_headers()
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            self.wfile.write(state.content[start:][: state.drop_after])
            return None

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/file"
    yield state
    server.shutdown()
    server.server_close()


FAST = {"backoff": 0.001, "timeout": 5.0, "progress": False}
CONTENT = bytes(range(256)) * 40


def test_a_file_is_fetched_verified_and_put_in_place(host, tmp_path):
    host.content = CONTENT
    seen = []
    fetching.fetch(host.url, tmp_path / "file", lambda path: seen.append(path.read_bytes()), **FAST)
    assert seen == [CONTENT]
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert not (tmp_path / "file.part").exists()


def test_a_dropping_host_is_resumed_where_it_was_cut(host, tmp_path):
    host.content, host.drop_after = CONTENT, 3000
    fetching.fetch(host.url, tmp_path / "file", attempts=2, **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert host.asked == [None, "bytes=3000-", "bytes=6000-", "bytes=9000-"]


def test_a_part_left_by_an_earlier_call_is_resumed_even_if_it_is_whole(host, tmp_path):
    host.content = CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT[:777])
    fetching.fetch(host.url, tmp_path / "file", **FAST)
    assert host.asked == ["bytes=777-"]
    (tmp_path / "more.part").write_bytes(CONTENT)
    fetching.fetch(host.url, tmp_path / "more", **FAST)
    assert (tmp_path / "file").read_bytes() == (tmp_path / "more").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(host, tmp_path):
    host.content = CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    fetching.fetch(host.url, tmp_path / "file", **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_host_without_ranges_starts_anew_and_gives_up_where_that_never_helps(host, tmp_path):
    host.content, host.ranges = CONTENT, False
    (tmp_path / "file.part").write_bytes(b"something else")
    fetching.fetch(host.url, tmp_path / "file", **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT
    host.drop_after = 3000
    host.asked.clear()
    with pytest.raises(fetching.DownloadError, match="cut after 3000 of 10240 bytes"):
        fetching.fetch(host.url, tmp_path / "other", attempts=3, **FAST)
    assert len(host.asked) == 4  # one that brought something, three that brought nothing new
    assert (tmp_path / "other.part").exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 3)])
def test_an_error_of_the_host_is_reported_and_only_passing_ones_are_tried_again(host, tmp_path, status, requests):
    host.status = status
    with pytest.raises(fetching.DownloadError, match=str(status) if status == 404 else "Service Unavailable"):
        fetching.fetch(host.url, tmp_path / "file", attempts=3, **FAST)
    assert len(host.asked) == requests


def serve(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hopper-medium-v2 at `url`, and no pauses."""
    benchmark = replace(registry.get("hopper-medium-v2"), url=url)
    monkeypatch.setitem(registry._table(), "hopper-medium-v2", benchmark)
    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: None)


def test_download_makes_an_id_loadable_with_a_checksum_and_fetches_it_once(host, folders, monkeypatch):
    host.content = d4rl.write(folders / "origin.hdf5", sample()).read_bytes()
    serve(host.url, monkeypatch)
    path = datasets.download("hopper-medium-v2", progress=False)
    assert path == datasets.cached_path("hopper-medium-v2")
    assert datasets.load_dataset("hopper-medium-v2").metadata["sha256"]
    datasets.download("hopper-medium-v2", progress=False)
    assert len(host.asked) == 1


def test_a_page_in_place_of_the_file_is_refused_and_deleted(host, folders, monkeypatch):
    host.content = b"<html>moved</html>"
    serve(host.url, monkeypatch)
    with pytest.raises(UserError, match="not an HDF5 file"):
        datasets.download("hopper-medium-v2", progress=False)
    assert list((folders / "DIFFRL_DATA" / "d4rl").iterdir()) == []


def test_a_host_that_is_down_leaves_the_user_with_something_to_do(monkeypatch):
    serve("http://127.0.0.1:9/file", monkeypatch)
    with pytest.raises(UserError) as error:
        datasets.download("hopper-medium-v2", progress=False)
    for text in ("refused", "try again later", "copy it to", "diffrl data download mujoco/hopper/medium-v0"):
        assert text in str(error.value)


def test_a_host_that_is_down_keeps_nobody_waiting_for_what_is_made_here(monkeypatch, capsys):
    """It is said before the host is asked, and asked once more only."""
    benchmark = replace(registry.get("maze2d-umaze-v1"), url="http://127.0.0.1:9/file")
    monkeypatch.setitem(registry._table(), "maze2d-umaze-v1", benchmark)
    waits = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    with pytest.raises(UserError, match=r"\(2 tries"):
        datasets.download("maze2d-umaze-v1")
    assert len(waits) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.index("`diffrl data generate maze2d-umaze-v1`") < said.index("trying again")


def test_tries_of_minari_s_client_are_not_told_one_by_one(monkeypatch, capsys):
    """Its client is Hugging Face's, which warns of each; its level is afterwards what it was."""
    import logging

    import minari

    pytest.importorskip("huggingface_hub.utils.logging")
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = logger.getEffectiveLevel()

    def refused(*arguments, **options):
        logger.warning("Retrying in 1s")
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "download_dataset", refused)
    with pytest.raises(UserError, match="Minari's host could not be reached"):
        datasets.download("mujoco/nothing/here-v0")
    said = capsys.readouterr().err
    assert "Asking Minari's host for mujoco/nothing/here-v0." in said
    assert "Retrying" not in said
    assert logger.getEffectiveLevel() == before


def test_a_file_in_the_place_of_the_data_directory_is_named(folders, monkeypatch):
    (folders / "file").touch()
    monkeypatch.setenv("DIFFRL_DATA", str(folders / "file"))
    with pytest.raises(UserError, match=r"\$DIFFRL_DATA is .*file, which is a file; expected a folder"):
        datasets.generate("maze2d-umaze-v1", rows=100)


def test_a_path_cannot_be_downloaded():
    with pytest.raises(UserError, match="is a path"):
        datasets.download("here.hdf5")


def test_of_two_who_need_a_data_set_that_is_missing_one_generates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other waits, and reads what the first has made."""
    monkeypatch.setenv("DIFFRL_DATA", str(tmp_path))
    path, made = datasets.cached_path("maze2d-umaze-v1", 50), []
    from envs import maze2d

    generate = maze2d.generate

    def slow(*words: Any, **options: Any) -> Path:
        made.append(words[0])
        time.sleep(0.5)
        return generate(*words, **options)

    monkeypatch.setattr(maze2d, "generate", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: datasets.load_dataset("maze2d-umaze-v1", rows=50, progress=False), range(2))
    assert made == ["maze2d-umaze-v1"]
    assert np.array_equal(first.observations, second.observations)
    assert "Waiting for another process" in capsys.readouterr().err
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("hopper-medium-v2", "hopper-medium-v2"),
        ("mujoco/hopper/expert-v0", "mujoco/hopper/expert-v0"),
        ("minari:walk-v0", "minari:walk-v0"),
        ("/home/me/rollouts.hdf5", "rollouts.hdf5"),
        ("~/rollouts.hdf5", "rollouts.hdf5"),
        ("file:///home/me/rollouts.hdf5", "rollouts.hdf5"),
        ("s3://bucket/of/mine/rollouts.hdf5", "rollouts.hdf5"),
    ],
)
def test_results_name_data_without_the_folders_of_a_machine(name, short):
    assert called(name) == short
