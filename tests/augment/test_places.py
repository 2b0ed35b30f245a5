"""Where `diffrl augment` writes: to paths alone, over nobody's rows, and with a model that is known by its data."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from diffrl.augment import chunks
from diffrl.augment.config import Request
from diffrl.augment.fidelity.job import fidelity_of
from diffrl.augment.job import REPORT, augment
from diffrl.augment.label.config import LabelConfig
from diffrl.augment.synther.augmenter import SynthER, synther
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.cli import main
from diffrl.commands.augment import _kept
from diffrl.data import d4rl
from diffrl.data.offline import Floats, OfflineDataset
from diffrl.support.errors import UserError
from diffrl.support.files import lock_file
from diffrl.support.stopping import Interrupted, Stopped
from tests.data.pendulum import pendulum

MODEL = SynthERConfig(width=16, blocks=1, steps=20, batch_size=32)
SAMPLING = Sampling(solver="dpmpp2m", sampling_steps=4)
TINY: dict[str, Any] = {"model": MODEL, "sampling": SAMPLING, "samples": 100, "env": "Pendulum-v1", "quiet": True}
FLAGS = ["--width", "16", "--blocks", "1", "--steps", "20", "--batch-size", "32", "--env", "Pendulum-v1"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return d4rl.write(tmp_path / "source.hdf5", OfflineDataset(**pendulum(3)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "file:///{here}/new.hdf5"], "--out is the address file:///{here}/new.hdf5; nothing is written to"),
        (["--out", "file:///{here}/new.hdf5"], "addresses: give the path, /{here}/new.hdf5."),
        (["--out", "FILE:///{here}/new.hdf5"], "give the path, /{here}/new.hdf5."),
        (["--out", "memory://b/new.hdf5"], "--out is the address memory://b/new.hdf5; nothing"),
        (["--out", "s3://b/new.hdf5"], "--out is the address s3://b/new.hdf5; nothing is written to addresses: give a"),
        (["--out", "new.hdf5", "--folder", "s3://b/model"], "--folder is the address s3://b/model; nothing"),
        (["--out", "new.hdf5", "--folder", "file:///{here}/m"], "--folder is the address file:///{here}/m; nothing"),
        (["--out", "new.hdf5", "--folder", "file:///{here}/m"], "give the path, /{here}/m."),
    ],
)
@pytest.mark.parametrize("verb", ["synther", "flow-to-better"])
def test_nothing_is_written_to_an_address(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    words: list[str],
    said: str,
) -> None:
    """One line says so before anything is made, and names the path that an address of this machine means."""
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path).lstrip("/")
    more = ["--preferences", "20"] if verb == "flow-to-better" else []
    assert main(["augment", verb, str(source), *more, *(word.format(here=here) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said.format(here=here) in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == [source.name]


def test_labels_and_reports_have_no_address_either(source: Path, tmp_path: Path) -> None:
    for place in (f"file://{tmp_path}/labels.json", "s3://b/labels.json"):
        with pytest.raises(UserError, match=f"--out is the address {place}; nothing"):
            LabelConfig(str(source), out=place)
    for folder in (f"file://{tmp_path}/report", Path(f"file://{tmp_path}/report")):
        with pytest.raises(
            UserError, match=f"--out is the address file://{tmp_path}/report; .*path, {tmp_path}/report"
        ):
            fidelity_of(str(source), str(source), folder)
    assert main(["augment", "fidelity", str(source), str(source), "--out", "s3://b/report"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == [source.name]
    assert Request(str(source), "minari:a/b-v0").out == "minari:a/b-v0"  # an id is none


class Meanwhile(SynthER):
    """In its run somebody else writes the data set, once rows are generated, or as the last of them are written."""

    def __init__(self, at: str, place: Path) -> None:
        super().__init__(MODEL, SAMPLING)
        self._at, self._place = at, place

    @override
    def look(self, generated: Floats) -> int:
        if self._at == "look":
            self._place.write_text("rows of somebody else's")
        return super().look(generated)

    @override
    def table(self, rows: Floats) -> dict[str, Any]:
        if self._at == "table":
            self._place.write_text("rows of somebody else's")
        return super().table(rows)


@pytest.mark.parametrize("at", ["look", "table"])
@pytest.mark.parametrize("over", [False, True])
def test_what_another_process_wrote_in_the_meantime_is_kept(source: Path, tmp_path: Path, at: str, over: bool) -> None:
    """The rows stay as well: they are written elsewhere, or over it, without anything being made again."""
    out, folder, other = tmp_path / "new.hdf5", tmp_path / "model", tmp_path / "other.hdf5"
    options: dict[str, Any] = {"samples": 100, "env": "Pendulum-v1", "folder": folder, "report": False}
    with pytest.raises(UserError, match="written by something else in the meantime, and is not overwritten") as said:
        augment(Request(str(source), str(out), **options), Meanwhile(at, out), quiet=True)
    assert f"with another --out and --folder {folder} it writes them" in str(said.value)
    assert out.read_text() == "rows of somebody else's"
    assert (folder / chunks.ROWS).is_file()
    straight = d4rl.read(synther(str(source), tmp_path / "straight.hdf5", report=False, **TINY))
    found = d4rl.read(synther(str(source), out if over else other, folder=folder, report=False, force=over, **TINY))
    assert all(np.array_equal(values, found.columns()[name]) for name, values in straight.columns().items())


def test_two_do_not_make_one_data_set_at_once(source: Path, tmp_path: Path) -> None:
    """The second is refused before anything is trained, with --force too; its folder is not left behind."""
    out, folder = tmp_path / "new.hdf5", tmp_path / "model"
    descriptor = lock_file(tmp_path / ".new.hdf5.lock")
    assert descriptor is not None
    for force in (False, True):
        with pytest.raises(UserError, match=r"Another process is making .*new\.hdf5: wait until it has ended"):
            synther(str(source), out, folder=folder, force=force, **TINY)
    assert not folder.exists()
    (tmp_path / ".new.hdf5.lock").unlink()
    synther(str(source), out, folder=folder, report=False, **TINY)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "new.hdf5", "source.hdf5"]


def test_a_place_that_takes_no_files_is_found_at_first(source: Path, tmp_path: Path) -> None:
    """Also where the model's folder is elsewhere, and can be written to."""
    folder, file = tmp_path / "model", tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"Cannot write .*file/new\.hdf5: .*\. Choose another --out\."):
        synther(str(source), file / "new.hdf5", folder=folder, **TINY)
    assert not folder.exists()


def test_the_same_data_by_another_name_go_on_with_their_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By another spelling of the path, or once the file was moved; of other data that is refused as before."""
    (below := tmp_path / "below").mkdir()
    monkeypatch.chdir(below)
    synther("../source.hdf5", "new.hdf5", report=False, **TINY)
    step = Path("new-synther/checkpoints/000000020/state.safetensors")
    before = step.stat().st_mtime_ns

    capsys.readouterr()
    assert main(["augment", "synther", str(source), "--out", "new.hdf5", "--samples", "100", *FLAGS]) == 2
    assert "what wrote it is finished. Use --force to replace it" in capsys.readouterr().err
    synther(str(source), "new.hdf5", report=False, force=True, **TINY)
    source.rename(below / "moved.hdf5")
    assert main(["augment", "synther", "moved.hdf5", "--out", "new.hdf5", "--samples", "100", *FLAGS]) == 2
    said = capsys.readouterr().err
    assert "by a model of the data set '../source.hdf5', not 'moved.hdf5'. If both hold the same rows, --force" in said
    synther("moved.hdf5", "new.hdf5", report=False, force=True, **TINY)
    assert step.stat().st_mtime_ns == before

    other = d4rl.read(below / "moved.hdf5", action_limit=None)
    d4rl.write(below / "other.hdf5", other.head(500))
    with pytest.raises(UserError, match=r"other settings \(dataset \.\./source\.hdf5, not other\.hdf5; other data\)"):
        synther("other.hdf5", "new.hdf5", report=False, force=True, **TINY)


def test_who_is_stopped_hears_what_is_kept(source: Path, tmp_path: Path) -> None:
    """Nothing is, before anything was trained."""
    for out in (str(tmp_path / "new.hdf5"), "minari:hopper/new-v0"):
        asked = Request(str(source), out, folder=None if out.endswith("hdf5") else tmp_path / "new-synther")
        for words in (
            "Stopped before anything was trained: the same",
            "Stopped. What is trained and generated is kept",
        ):
            with pytest.raises(Interrupted, match=words), _kept(asked, "synther", "training", "less"):
                raise Stopped
            synther(str(source), tmp_path / "new.hdf5", report=False, force=True, **TINY)
        shutil.rmtree(tmp_path / "new-synther")
    assert Request("a", "minari:hopper/new-v0").model_folder("synther") == Path("runs/hopper-new-v0-synther")


def test_of_one_row_it_is_said_in_the_singular(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = synther(str(source), tmp_path / "new.hdf5", **TINY | {"samples": 1, "quiet": False})
    said = capsys.readouterr().err
    assert "generates 1 synthetic one (--samples)" in said
    assert "Only 1 synthetic row can be compared" in said
    assert ", 1 synthetic transition, each" in said
    assert d4rl.read(out, action_limit=None).metadata["description"].startswith("1 synthetic transition, each")


@pytest.mark.long
def test_no_report_of_other_rows_is_left(source: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "new.hdf5", tmp_path / "new-synther"
    synther(str(source), out, **TINY)
    assert all((folder / name).is_file() for name in REPORT)
    synther(str(source), out, force=True, **TINY)
    assert all((folder / name).is_file() for name in REPORT)
    synther(str(source), out, force=True, report=False, **TINY | {"samples": 60})
    assert not any((folder / name).exists() for name in REPORT)
    assert d4rl.read(out, action_limit=None).metadata["fidelity"] == "not measured"
    shutil.rmtree(folder)
