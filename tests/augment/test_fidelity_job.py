"""`diffrl augment fidelity`: the report of any two data sets is that of a synthesis."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fidelity import as_rows, pendulum

from diffrl.augment.fidelity import job
from diffrl.augment.fidelity.job import fidelity_of, folder_of, steers
from diffrl.augment.fidelity.measures import FEWEST
from diffrl.augment.job import REPORT
from diffrl.augment.synther.augmenter import synther
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.cli import main
from diffrl.commands.augment import Fidelity
from diffrl.commands.words import flag_values, parse, switches
from diffrl.data import d4rl
from diffrl.support.errors import DataError

ENV = "Pendulum-v1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real rows of Pendulum, others that are sound, others whose actions are shuffled, and those of another task."""
    path = tmp_path_factory.mktemp("fidelity")
    data = pendulum(0, 3_000, 0.0, False)
    d4rl.write(path / "real.hdf5", as_rows(data.rows[:2_000], data))
    d4rl.write(path / "sound.hdf5", as_rows(data.rows[2_000:], data))
    broken = data.rows[2_000:].copy()
    broken[:, 3] = np.random.default_rng(0).permutation(broken[:, 3])
    d4rl.write(path / "broken.hdf5", as_rows(broken, data))
    d4rl.write(path / "other.hdf5", as_rows(np.delete(data.rows, [0, 5], 1), data._replace(o=2)))
    return path


@pytest.mark.long
def test_a_file_is_judged_as_its_rows_are(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = str(folder / "real.hdf5")
    options = ["--env", ENV, "--held-out", "0.2", "--out"]
    assert main(["augment", "fidelity", real, str(folder / "sound.hdf5"), *options, str(tmp_path / "sound")]) == 0
    assert "No fault found in 400 rows" in " ".join(capsys.readouterr().err.split())
    assert main(["augment", "fidelity", real, str(folder / "broken.hdf5"), *options, str(tmp_path / "broken")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "Do not train on these rows. Actions do not lead to their next states" in said
    assert "--steps" not in said  # of which nothing is known here
    for name in ("sound", "broken"):
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == sorted(REPORT)
        assert str(folder) not in (tmp_path / name / "fidelity.html").read_text()  # it is made to be given to others
    verdicts = json.loads((tmp_path / "broken" / "fidelity.json").read_text())["verdicts"]
    assert verdicts["dynamics"].startswith("Not measured by a simulator: nobody has checked whether the observation of")


@pytest.mark.long
@pytest.mark.parametrize("mix", [pytest.param("replace", marks=pytest.mark.slow), "append"])
def test_the_report_is_the_one_of_the_synthesis(folder: Path, tmp_path: Path, mix: str) -> None:
    """The same rows are held out, and real rows before the synthetic ones are none of them."""
    real, out = str(folder / "real.hdf5"), tmp_path / "new.hdf5"
    model = SynthERConfig(width=8, blocks=1, steps=5, batch_size=32)
    sampling = Sampling("dpmpp2m", sampling_steps=2)
    synther(real, out, env=ENV, samples=300, held_out=0.2, seed=3, mix=mix, model=model, sampling=sampling, quiet=True)
    found = fidelity_of(real, str(out), env=ENV, held_out=0.2, seed=3, quiet=True)
    first, second = (
        json.loads((tmp_path / name / "fidelity.json").read_text()) for name in ("new-synther", "new-fidelity")
    )
    assert first.pop("title") != second.pop("title")
    assert first == second
    assert found.terminal_rows[0] == 300


def test_few_real_rows_are_judged_by_default(folder: Path, tmp_path: Path) -> None:
    """A twentieth of 1,000 rows is too few to ask a classifier, or a regressor, about."""
    data = pendulum(0, 2_000, 0.0, False)
    broken = data.rows[1_000:].copy()
    for column in (3, 4):
        broken[:, column] = np.random.default_rng(column).permutation(broken[:, column])
    real = d4rl.write(tmp_path / "real.hdf5", as_rows(data.rows[:1_000], data))
    made = d4rl.write(tmp_path / "made.hdf5", as_rows(broken, data))
    report = fidelity_of(str(real), str(made), env=ENV, quiet=True)
    assert report.rows == FEWEST
    assert "Actions do not lead to their next states" in report.verdicts["overall"]
    assert "ewards are not those of their states and actions" in report.verdicts["overall"]


@pytest.mark.long
def test_a_file_says_whether_its_rows_are_steered(folder: Path, tmp_path: Path) -> None:
    sampling = {"above": 0.5, "guidance": 1.0}
    assert steers({"sampling": json.dumps(sampling)})
    assert steers({"sampling": json.dumps({"above": 0.0, "guidance": 2.0})})
    assert steers({"algorithm": "Flow-to-Better (Zhang et al. 2024, ICLR), diffrl"})
    assert not steers({"sampling": json.dumps({"above": 0.0, "guidance": 1.0}), "algorithm": "SynthER"})
    assert not steers({})
    assert not steers({"sampling": "at random"})
    rows = d4rl.read(folder / "sound.hdf5", action_limit=None)
    made = d4rl.write(tmp_path / "made.hdf5", replace(rows, metadata={**rows.metadata, "sampling": sampling}))
    real = str(folder / "real.hdf5")
    for steered, said in ((None, True), (False, False)):
        report = fidelity_of(real, str(made), tmp_path / str(said), env=ENV, steered=steered, quiet=True)
        assert report.steered == said


def test_the_switch_says_whether_rows_are_steered(folder: Path, tmp_path: Path) -> None:
    """Anywhere among the words, without a value or with one; by default the file does."""
    real, sound = str(folder / "real.hdf5"), str(folder / "sound.hdf5")
    assert main(["augment", "fidelity", real, "--steered", sound, "--env", ENV, "--out", str(tmp_path / "out")]) == 0
    for words, steered in (
        ([real, sound, "--steered"], True),
        (["--steered", real, sound], True),
        ([real, "--steered", "True", sound], True),
        (["--no-steered", real, sound], False),
        ([real, sound, "--force"], None),
    ):
        given = parse(Fidelity, flag_values(words, switches(Fidelity)), "diffrl augment fidelity")
        assert (given.real, given.synthetic, given.steered) == (real, sound, steered)


def test_of_many_rows_the_first_are_compared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the report of a synthesis."""
    monkeypatch.setattr(job, "REPORTED", 700)
    report = fidelity_of(str(folder / "real.hdf5"), str(folder / "sound.hdf5"), tmp_path, env=ENV, quiet=True)
    assert report.terminal_rows[0] == 700


def test_real_data_with_synthetic_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = d4rl.read(folder / "real.hdf5", action_limit=None)
    counts = {"real_rows": 1_500, "synthetic_rows": 500, "source_rows": 1_500}
    mixed = d4rl.write(tmp_path / "mixed.hdf5", replace(rows, metadata={**rows.metadata, **counts}))
    with pytest.raises(DataError, match="has 500 synthetic rows beside its 1,500 real ones"):
        fidelity_of(str(mixed), str(folder / "sound.hdf5"), tmp_path, env=ENV, quiet=True)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["real.hdf5", "other.hdf5"], "have observations and actions of sizes (2, 1), the real ones (3, 1)"),
        (["real.hdf5", "nowhere.hdf5"], "nowhere.hdf5 does not exist"),
        (["nowhere.hdf5", "sound.hdf5"], "nowhere.hdf5 does not exist"),
        (["real.hdf5", "sound.hdf5", "--held-out", "0.99"], "leaves 20 rows to compare with, beside 1,980 held out"),
        (["real.hdf5", "sound.hdf5", "--held-out", "2"], "--held-out is 2"),
        (["real.hdf5", "sound.hdf5", "--out", "full"], "exists. Use --force to replace it"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "fidelity.html").write_text("mine")
    assert main(["augment", "fidelity", *words, "--env", ENV]) == 2
    error = capsys.readouterr().err
    assert text in " ".join(error.split())
    assert "Traceback" not in error
    assert (folder / "full" / "fidelity.html").read_text() == "mine"
    assert not (folder / "sound-fidelity").exists()


def test_a_report_has_a_place_of_its_own(folder: Path) -> None:
    assert folder_of(str(folder / "sound.hdf5")) == folder / "sound-fidelity"
    assert folder_of("minari:hopper/synthetic-v0") == Path("runs/hopper-synthetic-v0-fidelity")
