"""`diffrl augment synther`: from data of every kind to a file that trains, however often it is cut."""

import dataclasses
import errno
import json
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import diffrl
from agents import IQL
from diffrl.augment import chunks, job
from diffrl.augment.config import Request
from diffrl.augment.synther import generate as generation
from diffrl.augment.synther.augmenter import SynthER, hold_out, load_model, synther
from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import ROWS_VERSION, Sampling, SynthERConfig
from diffrl.augment.synther.model import TransitionDiffusion, bins_of
from diffrl.cli import main
from diffrl.data import d4rl, minari
from diffrl.data.env_spec import EnvSpec
from diffrl.data.fidelity import NOT_MEASURED, USELESS, Verdict
from diffrl.data.offline import BOTH_STAND_IN, MADE_STAND_IN, OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.runs.config import TrainConfig
from diffrl.support.errors import UserError
from diffrl.support.schema import parse_kwargs
from tests.data.pendulum import pendulum

TINY: dict[str, Any] = {
    "model": SynthERConfig(width=16, blocks=1, steps=20, batch_size=32),
    "sampling": Sampling(solver="dpmpp2m", sampling_steps=4),
    "quiet": True,
}
SMALL = {"width": 16, "blocks": 1, "steps": 20, "batch-size": 32, "solver": "dpmpp2m", "sampling-steps": 4}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


def hopper_like(n: int = 400, episode: int = 50) -> OfflineDataset:
    """Episodes of a made-up robot, every second one with a true end."""
    rng = np.random.default_rng(0)
    rows = np.arange(n)
    last = rows % episode == episode - 1
    odd = rows // episode % 2 == 1
    return OfflineDataset(
        observations=rng.normal(size=(n, 11)).astype(np.float32),
        actions=rng.uniform(-1, 1, (n, 3)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        terminals=last & odd,
        timeouts=last & ~odd,
        metadata={"env_id": "Hopper-v4"},
    )


def _words(text: str) -> str:
    """A text without its line breaks and frames."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return d4rl.write(tmp_path / "source.hdf5", hopper_like())


def test_a_finished_file_of_other_settings_names_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at most, and what then makes the other file does; of the same settings nothing but that it is finished."""
    out, folder = tmp_path / "more.hdf5", tmp_path / "more-synther"
    words = ["augment", "synther", str(source), "--samples", "50", "--no-report", "--out", str(out)]
    assert main([*words, *FLAGS]) == 0
    for more, said in (
        ([], "is finished. Use --force to replace it, or choose another --out."),
        (["--samples", "60"], "is finished. Use --force"),
        (["--steps", "21"], "is finished, by a model of other settings (steps 20, not 21): choose another --out for"),
        (
            ["--steps", "21", "--seed", "1", "--width", "8"],
            "is finished, by a model of other settings (seed 0, not 1; steps 20, not 21): ",
        ),
        (
            ["--held-out", "0.1"],
            "is finished, by a model of other settings (held-out 0.05, not 0.1): ",
        ),
        (["--folder", str(tmp_path / "none"), "--steps", "21"], "is finished. Use --force"),
    ):
        capsys.readouterr()
        assert main([*words, *FLAGS, *more]) == 2
        text = " ".join(capsys.readouterr().err.split())
        assert f"{out} exists; what wrote it {said}" in text
        assert (f"or remove {folder} and use --force" in text) == ("by a model" in said)
    with pytest.raises(UserError, match=r"other settings \(width 16, not 8\)"):
        synther(str(source), out, samples=50, **TINY | {"model": replace(TINY["model"], width=8)})
    (folder / "config.json").write_text("[]")
    assert main([*words, *FLAGS, "--steps", "21"]) == 2
    assert "is finished. Use --force" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main([*words, *FLAGS, "--steps", "21", "--force"]) == 0


def test_a_file_becomes_a_file_that_trains_iql(source: Path, tmp_path: Path) -> None:
    """The written file carries environment, bounds and the source's range of returns, which scales IQL's rewards."""
    out = synther(str(source), tmp_path / "new.hdf5", samples=3000, **TINY)
    dataset = d4rl.read(out)
    assert len(dataset) == 3000 == dataset.n_episodes
    assert dataset.has_next
    assert np.array_equal(dataset.timeouts, ~dataset.terminals)
    assert dataset.metadata["source"] == "source.hdf5"
    for file in (out, *(out.with_name("new-synther") / f"fidelity.{end}" for end in ("html", "json"))):
        assert str(tmp_path).encode() not in file.read_bytes(), file  # it is made to be given to others
    assert dataset.metadata["source_sha256"] == d4rl.digest(d4rl.read(source).columns())
    returns = d4rl.read(source).episode_returns()
    assert dataset.return_range() == pytest.approx((returns.min(), returns.max()))
    agent = IQL(width=8, layers=1, batch_size=16, reward_tune="iql_locomotion")
    config = TrainConfig(
        dataset=str(out), agent=agent, steps=20, eval_every=20, eval_episodes=1, out=tmp_path / "run", workers=1
    )
    run = diffrl.train(config, quiet=True)
    assert (run / "learning_curve.png").exists()
    names = {path.name for path in (tmp_path / "new-synther").iterdir()}
    assert {"config.json", "codec.safetensors", "checkpoints", "metrics.csv", "fidelity.html"} <= names
    assert not names & {chunks.ROWS, chunks.ABOUT}


def test_too_few_rows_for_a_report_are_written_without(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file says why they were not measured, and no remedy that would not help."""
    out = synther(str(source), tmp_path / "new.hdf5", samples=3, **TINY)
    assert len(d4rl.read(out)) == 3
    assert not (tmp_path / "new-synther" / "fidelity.html").exists()
    about = d4rl.read(out).metadata
    verdict = Verdict.of(about)
    assert verdict is not None
    assert verdict != NOT_MEASURED
    assert verdict.word == NOT_MEASURED.word
    assert "Only 3 synthetic rows" in verdict.sentence
    assert main(["data", "info", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"their fidelity was not measured: {verdict.sentence}" in said
    assert "--no-report" not in said


@pytest.mark.long
def test_the_report_shows_an_untrained_model(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty steps are none: rows far from the data's distribution, found so by the numbers on disk.

    The file keeps the verdict, HDF5 and Minari alike; `data info` and training say it.
    """
    out = synther("maze2d-umaze-v1", tmp_path / "new.hdf5", rows=3000, samples=500, held_out=0.2, **TINY)
    found = json.loads((tmp_path / "new-synther" / "fidelity.json").read_text())
    assert found["sliced_w2"]["synthetic"] > 2 * found["sliced_w2"]["real"]
    assert found["marginals"]["ks_mean"]["synthetic"] > 2 * found["marginals"]["ks_mean"]["real"]
    # The maze is nearly linear, and the rows are whitened: even without training s' is a tenth of a step off, no more.
    assert found["dynamics"]["median"]["synthetic"] > 1000 * found["dynamics"]["median"]["real"]
    assert found["terminal_rate"]["synthetic"] == 0  # there are none in the data
    said = found["verdicts"]["overall"]
    assert said.startswith("Do not train on these rows.")
    assert Verdict.of(d4rl.read(out).metadata) == Verdict(USELESS, said)
    warned = f"synthetic rows: when they were made, their fidelity report said: {said[:400]}"
    assert main(["data", "info", str(out)]) == 0
    assert warned in " ".join(capsys.readouterr().out.split())
    words = f"train --agent bc --dataset {out} --steps 2 --eval-episodes 1 --max-episode-steps 4 --agent.width 8"
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 0
    assert " ".join(capsys.readouterr().err.split()).count(warned) == 1

    package = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    minari.write("test/useless-v0", d4rl.read(out))
    assert Verdict.of(minari.read("test/useless-v0").metadata) == Verdict(USELESS, said)
    assert package.load_dataset("test/useless-v0").storage.metadata["diffrl"]["fidelity"] == USELESS


def test_a_benchmark_and_minari(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """maze2d by its id into Minari, whose own package loads it; then from there, by id, into a file."""
    package = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    synther("maze2d-umaze-v1", "minari:test/synthetic-v0", rows=3000, samples=150, report=False, **TINY)
    loaded = package.load_dataset("test/synthetic-v0")
    assert loaded.total_episodes == 150 == loaded.total_steps
    assert (tmp_path / "runs" / "test-synthetic-v0-synther" / "config.json").is_file()
    with pytest.raises(SystemExit):
        main(["augment", "synther", "--help"])
    assert "With --out minari:ID they are in runs/ID-synther, with - for each / of the id." in _words(
        capsys.readouterr().out
    )
    assert loaded.env_spec.id == "maze2d-umaze-v1"
    ours = minari.read("test/synthetic-v0")
    assert set(np.unique(ours.rewards)) <= {0.0, 1.0}  # a sparse reward stays one
    minari.write("walk-v0", hopper_like())  # an id without a namespace is told by its prefix alone
    assert synther("minari:walk-v0", tmp_path / "walk.hdf5", samples=150, **TINY).is_file()
    out = synther("test/synthetic-v0", tmp_path / "again.hdf5", samples=64, report=False, **TINY)
    assert len(d4rl.read(out)) == 64


def test_appended_rows_follow_the_real_ones(source: Path, tmp_path: Path) -> None:
    out = synther(str(source), tmp_path / "both.hdf5", ratio=0.5, mix="append", report=False, **TINY)
    real, both = d4rl.read(source), d4rl.read(out)
    kept = Transitions.from_dataset(real)
    n = len(kept)
    assert n == 396  # each of the four episodes that were cut loses its last row
    assert len(both) == n + round(0.5 * n)
    mixed = Transitions.from_dataset(both)
    assert torch.equal(mixed.rows[:n], kept.rows)
    assert both.metadata["real_rows"] == n


@pytest.mark.parametrize("mix", ["replace", "append"])
@pytest.mark.parametrize("stored", [True, False])
def test_successors_of_terminal_rows_are_called_what_they_are(mix: str, stored: bool, tmp_path: Path) -> None:
    """Of real rows without a successor it is their own observation, of generated ones what the model makes of it."""
    real = hopper_like()
    following = real.observations + np.float32(0.01)
    real = replace(real, next_observations=following) if stored else real
    source = d4rl.write(tmp_path / "real.hdf5", real)
    words: dict[str, Any] = {"samples": 2000, "mix": mix, "report": False}
    found = d4rl.read(synther(str(source), tmp_path / "new.hdf5", **words, **TINY))
    said = found.metadata.get("terminal_successors")
    n = found.metadata["real_rows"]
    assert found.terminals[n:].any(), "the model makes some"
    assert said == (None if stored else MADE_STAND_IN if mix == "replace" else BOTH_STAND_IN)
    if mix == "append" and not stored:
        ends = np.flatnonzero(found.terminals[:n])
        assert found.next_observations is not None
        assert np.array_equal(found.next_observations[ends], found.observations[ends])
    if mix == "append":  # what was augmented once is so again
        again = d4rl.read(synther(str(tmp_path / "new.hdf5"), tmp_path / "again.hdf5", **words, **TINY)).metadata
        assert again.get("terminal_successors") == said
        assert (again["real_rows"], again["synthetic_rows"]) == (n, 4000)
        assert f"after {n + 2000} rows of the source, {n} of them real" in again["description"]
    endless = d4rl.write(tmp_path / "endless.hdf5", replace(real, terminals=real.terminals & False))
    found = d4rl.read(synther(str(endless), tmp_path / "endless-new.hdf5", **words, **TINY))
    assert not found.terminals.any()
    assert "terminal_successors" not in found.metadata


def test_real_rows_that_end_in_an_episode_are_cut_from_those_that_follow(tmp_path: Path) -> None:
    """The data end within an episode, with next observations, so that the last row is kept."""
    real = hopper_like().with_successors()
    real = replace(real, timeouts=real.timeouts & (np.arange(len(real)) < len(real) - 1))
    real = replace(real, terminals=real.terminals & (np.arange(len(real)) < len(real) - 1))
    source = d4rl.write(tmp_path / "open.hdf5", real)
    n = len(real)
    before = d4rl.read(source)
    assert not before.terminals[-1]
    assert not before.timeouts[-1]
    both = d4rl.read(synther(str(source), tmp_path / "both.hdf5", ratio=0.5, mix="append", report=False, **TINY))
    assert both.timeouts[n - 1]
    assert n - 1 not in both.contradicted_rows()


def test_real_columns_end_an_episode_where_its_last_row_is_left_out() -> None:
    columns = hopper_like().with_successors().columns()
    assert np.flatnonzero(columns["timeouts"])[:2].tolist() == [48, 147]
    assert np.flatnonzero(columns["terminals"])[:2].tolist() == [98, 197]


def test_a_condition_is_of_whole_episodes_before_rows_are_held_out() -> None:
    """Half of each episode is held out: bins are of all its rows' rewards, and the held-out rows have them too."""
    data = Transitions.from_dataset(hopper_like())
    expected = bins_of(data, "return", 4)
    sides = hold_out(data, 0.5, 0, SynthERConfig(condition="return", bins=4))
    rows, bins = (torch.cat(parts) for parts in zip(*((s.transitions.rows, s.bins) for s in sides), strict=True))
    order, of_data = rows[:, 0].argsort(), data.rows[:, 0].argsort()
    assert torch.equal(rows[order], data.rows[of_data])
    assert torch.equal(bins[order], expected[of_data])


def model_of(source: Path) -> TransitionDiffusion:
    transitions = Transitions.from_dataset(d4rl.read(source))
    return TransitionDiffusion(SynthERConfig(width=16, blocks=1), RowCodec.fit(transitions))


def generated(
    folder: Path, model: TransitionDiffusion, sampling: Sampling, n: int, seed: int, stop_after: int
) -> np.ndarray:
    """n rows of a model in chunks of 64, of which `stop_after` are made at most."""
    asked = iter(range(99))
    about = {"seed": seed, "chunk": 64, "columns": model.codec.size, "rows_version": ROWS_VERSION}
    return np.array(
        chunks.generate(
            folder,
            n,
            lambda generator: generation.sample_rows(model, 64, generator, sampling)[0].numpy(),
            about,
            on_progress=lambda done, total: None,
            stopped=lambda: next(asked) == stop_after,
        )
    )


def test_generation_cut_anywhere_gives_the_same_rows(source: Path, tmp_path: Path) -> None:
    model, sampling = model_of(source), Sampling("heun", 3)

    def generate(folder: str, stop_after: int = 99, n: int = 500, seed: int = 5) -> np.ndarray:
        (tmp_path / folder).mkdir(exist_ok=True)
        return generated(tmp_path / folder, model, sampling, n, seed, stop_after)

    straight = generate("straight")
    assert straight.shape == (500, model.codec.size)
    assert len(np.unique(straight, axis=0)) == 500
    assert len(generate("cut", stop_after=3)) == 192
    with (tmp_path / "cut" / chunks.ROWS).open("ab") as file:
        file.write(b"torn by a kill")
    assert np.array_equal(generate("cut"), straight)
    assert np.array_equal(generate("cut", n=300), straight[:300])
    assert not np.array_equal(generate("cut", seed=6), straight)
    assert np.array_equal(generate("cut"), straight)  # rows of another seed are not taken for these


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_file(source: Path, tmp_path: Path) -> None:
    """kill -9 in training and in generating."""
    flags = ["--samples", "30000", "--no-report", *FLAGS, "--steps", "500"]
    words = ["augment", "synther", str(source), *flags, "--out"]
    straight, cut = tmp_path / "straight.hdf5", tmp_path / "cut.hdf5"
    assert main([*words, str(straight)]) == 0
    folder = tmp_path / "cut-synther"

    def kill_when(ready: Path) -> None:
        command = [sys.executable, "-m", "diffrl.cli", *words, str(cut)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ready.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()

    kill_when(folder / "metrics.csv")
    assert not (folder / "checkpoints" / "000000500").exists()
    kill_when(folder / chunks.ROWS)
    assert not cut.exists()
    assert main([*words, str(cut)]) == 0
    assert straight.read_bytes() == cut.read_bytes()


def test_a_model_is_kept_and_other_settings_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.hdf5"
    synther(str(source), out, samples=100, report=False, **TINY)
    with pytest.raises(UserError, match="Use --force"):
        synther(str(source), out, samples=100, **TINY)
    before = (tmp_path / "new-synther" / "checkpoints" / "000000020" / "state.safetensors").stat().st_mtime_ns
    synther(str(source), out, samples=200, report=False, force=True, **TINY)
    after = (tmp_path / "new-synther" / "checkpoints" / "000000020" / "state.safetensors").stat().st_mtime_ns
    assert before == after
    assert len(d4rl.read(out)) == 200
    other = {**TINY, "model": SynthERConfig(width=32, blocks=1, steps=20, batch_size=32)}
    with pytest.raises(UserError, match="width 16, not 32"):
        synther(str(source), out, samples=200, force=True, **other)
    model = load_model(tmp_path / "new-synther")
    assert model.config == TINY["model"]
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path)


def test_all_rows_by_number_are_the_whole_and_its_model_is_gone_on_with(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in a folder of an older version, which kept the number; a part of the rows is other data."""
    out, n = tmp_path / "new.hdf5", len(d4rl.read(source))
    synther(str(source), out, rows=n, samples=100, report=False, **{**TINY, "quiet": False})
    said = _words(capsys.readouterr().err)
    assert "all are taken." in said
    assert "--rows)" not in said
    path = tmp_path / "new-synther" / "config.json"
    about = json.loads(path.read_text())
    assert about["rows"] is None
    (path.parent / "SHA256SUMS").unlink()
    path.write_text(json.dumps(about | {"rows": n}))
    for rows in (None, n):
        synther(str(source), out, rows=rows, samples=100, report=False, force=True, **TINY)
    with pytest.raises(UserError, match=f"rows {n}, not {n - 1}; other data"):
        synther(str(source), out, rows=n - 1, samples=100, report=False, force=True, **TINY)


def first_version(folder: Path, name: str) -> dict[str, Any]:
    """Write a file of a model's folder as the first version of rows left it: without a version; give what it holds."""
    about: dict[str, Any] = json.loads((folder / name).read_text())
    assert about.pop("rows_version") == ROWS_VERSION
    (folder / name).write_text(json.dumps(about))
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    return about


def test_rows_say_their_version_and_a_trained_model_of_an_older_one_is_kept(source: Path, tmp_path: Path) -> None:
    """Its folder stays as it is, codec included, which was fitted to the rows that were its training's."""
    out, folder = tmp_path / "new.hdf5", tmp_path / "new-synther"
    synther(str(source), out, samples=300, report=False, **TINY)
    assert d4rl.read(out).metadata["rows_version"] == ROWS_VERSION == 2
    first_version(folder, "config.json")
    codec = RowCodec.from_state_dict(safetensors.torch.load_file(folder / "codec.safetensors"))
    codec.low[0] -= 1  # as of other rows
    safetensors.torch.save_file(codec.state_dict(), folder / "codec.safetensors")
    files = [folder / "config.json", folder / "codec.safetensors", *folder.glob("checkpoints/*/*")]
    before = [path.read_bytes() for path in files]
    again = synther(str(source), out, samples=300, force=True, **TINY)
    assert [path.read_bytes() for path in files] == before
    assert d4rl.read(again).metadata["rows_version"] == 2
    notes = json.loads((folder / "fidelity.json").read_text())["notes"]
    assert any("Another version of diffrl trained the model" in note for note in notes)


def test_a_training_begun_by_an_older_version_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    """Without a checkpoint nothing was begun, and the version is the new one."""
    out, folder = tmp_path / "new.hdf5", tmp_path / "new-synther"
    synther(str(source), out, samples=100, report=False, **TINY)
    about = first_version(folder, "config.json")
    shutil.rmtree(folder / "checkpoints" / "000000020")
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(UserError, match=r"began to train \(version 1 of rows, here 2\)"):
        synther(str(source), out, samples=100, report=False, force=True, **TINY)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    shutil.rmtree(folder / "checkpoints")
    synther(str(source), out, samples=100, report=False, force=True, **TINY)
    assert json.loads((folder / "config.json").read_text()) == {**about, "rows_version": 2}


def test_rows_that_are_there_survive_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written when generating goes on takes nothing of what there is."""
    model, made = model_of(source), []
    first = generated(tmp_path, model, Sampling("heun", 2), 150, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "atomic_path", full_disk)
        with pytest.raises(OSError, match="No space"):
            generated(tmp_path, model, Sampling("heun", 2), 150, 0, 99)
    monkeypatch.setattr(generation, "sample_rows", counted(generation.sample_rows, made))
    whole = generated(tmp_path, model, Sampling("heun", 2), 150, 0, 99)
    assert np.array_equal(whole[: len(first)], first)
    assert len(made) == -(-150 // 64) - 1  # the first chunk was there


def full_disk(path: Path) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def counted(function: Any, made: list[int]) -> Any:
    def one(*arguments: Any) -> Any:
        made.append(1)
        return function(*arguments)

    return one


def test_rows_of_two_versions_are_not_mixed(source: Path, tmp_path: Path) -> None:
    """What is half generated is refused in a sentence and left as it is; without it all rows are generated."""
    model = model_of(source)

    def generate(stop_after: int) -> np.ndarray:
        return generated(tmp_path, model, Sampling("heun", 2), 150, 0, stop_after)

    whole = generate(99)
    (tmp_path / chunks.ROWS).unlink()
    generate(1)
    first_version(tmp_path, chunks.ABOUT)
    rows = (tmp_path / chunks.ROWS).read_bytes()
    with pytest.raises(UserError, match=r"began to generate \(version 1 of rows, here 2\)"):
        generate(99)
    assert (tmp_path / chunks.ROWS).read_bytes() == rows
    (tmp_path / chunks.ROWS).unlink()
    assert np.array_equal(generate(99), whole)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--out", "new.hdf5", "--seed", "-1"], "--seed is -1; expected a whole number from 0 up"),
        (["--out", "new.csv"], "expected a path ending in .hdf5"),
        (["--out", "minari:nonsense"], "no Minari id"),
        (["--out", "folder.hdf5"], "is a folder"),
        (["--out", "new.hdf5", "--samples", "5", "--ratio", "2"], "give one of them"),
        (["--out", "new.hdf5", "--samples", "0"], "--samples is 0"),
        (["--out", "new.hdf5", "--ratio", "-1"], "--ratio is -1"),
        (["--out", "new.hdf5", "--held-out", "1"], "--held-out is 1"),
        (["--out", "new.hdf5", "--rows", "50"], "expected 100 or more"),
        (
            ["--out", "new.hdf5", "--rows", "400", "--held-out", "0.99"],
            "4 rows to train on, 392 are held out; expected 100",
        ),
        (["--out", "new.hdf5", "--env", "HalfCheetah-v4"], "do not fit"),
        (["--out", "new.hdf5", "--above", "0.5"], "train one with --condition"),
        (["--out", "source.hdf5", "--force"], "is the data set itself"),
        (["--out", "new.hdf5", "--folder", "other"], "no synthesis' of ours"),
        (["--out", "new.hdf5", "--churn", "5", "--solver", "dpmpp2m"], "does not go with"),
    ],
)
def test_mistakes(source: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, flags: list[str], text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.hdf5").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("[1]")
    assert main(["augment", "synther", str(source), *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error
    assert not (tmp_path / "new.hdf5").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mix": "both"}, "--mix is 'both'; "),
        ({"mix": "APPEND"}, "--mix is 'APPEND'; known: append, replace."),
        ({"time_limit_terminals": "x"}, "--time-limit-terminals is 'x'; "),
        ({"actions": "x"}, "--actions is 'x'; "),
        ({"report": "no"}, "--report is 'no'; expected true or false"),
        ({"force": "no"}, "--force is 'no'; expected true or false"),
        ({"quiet": "no"}, "quiet is 'no'; expected true or false"),
        ({"seed": "a"}, "--seed is 'a'; expected a whole number"),
        ({"cut_contradictions": 1}, "--cut-contradictions is 1; expected true or false"),
        ({"env_kwargs": {"g": object()}}, "values that JSON holds"),
        ({"env_kwargs": "g=2"}, "--env-kwargs is 'g=2'; expected a list"),
    ],
)
def test_what_an_option_does_not_take_is_refused_in_python_too(
    source: Path, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=re.escape(text)):
        synther(str(source), tmp_path / "new.hdf5", **TINY | options)
    assert not (tmp_path / "new-synther").exists()


def test_arguments_of_the_environment_may_be_a_dictionary(tmp_path: Path) -> None:
    """The file records them, values of every kind as they were given."""
    source = d4rl.write(tmp_path / "pendulum.hdf5", OfflineDataset(**pendulum(3)))
    words = {"env": "Pendulum-v1", "samples": 100, "report": False, "max_episode_steps": 50} | TINY
    for kwargs in ({"g": np.float32(2.5)}, ("g=2.5",)):
        out = synther(str(source), tmp_path / "new.hdf5", env_kwargs=kwargs, force=True, **words)
        spec = EnvSpec.of(d4rl.read(out, action_limit=None).metadata)
        assert spec is not None
        assert (spec.id, spec.kwargs, spec.max_episode_steps) == ("Pendulum-v1", {"g": 2.5}, 50)
    given = {"maze": "umaze", "n": None, "l": [1], "scalars": [np.int64(3), np.bool_(True), np.float64(0.5)]}
    assert parse_kwargs(Request("x", "y", env_kwargs=given).env_kwargs) == {  # type: ignore[arg-type]
        "maze": "umaze",
        "n": None,
        "l": [1],
        "scalars": [3, True, 0.5],
    }
    for value in (np.ones(2), np.complex64(1), np.longdouble(1)):
        with pytest.raises(UserError, match="values that JSON holds"):
            Request("x", "y", env_kwargs={"g": value})  # type: ignore[arg-type]


def test_the_docstring_names_every_option() -> None:
    assert synther.__doc__
    named = set(re.findall(r"[a-z_]+", synther.__doc__))
    assert {field.name for field in dataclasses.fields(Request)} <= named


def test_a_model_is_put_among_no_other_files(source: Path, tmp_path: Path) -> None:
    """They stay as they are, alone; a new folder inside will do."""
    folder = tmp_path / "cases"
    folder.mkdir()
    for name in ("rewards.py", "data.hdf5", "SHA256SUMS"):
        (folder / name).write_text(name)
    with pytest.raises(UserError, match=r"something else \(SHA256SUMS, data\.hdf5, rewards\.py\)") as refused:
        synther(str(source), tmp_path / "new.hdf5", samples=200, folder=folder, **TINY)
    assert "remove" not in str(refused.value)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        name: name for name in ("rewards.py", "data.hdf5", "SHA256SUMS")
    }
    synther(str(source), tmp_path / "new.hdf5", samples=200, folder=folder / "model", **TINY)


def test_a_verb_that_is_not_there(capsys: Any) -> None:
    assert main(["augment", "syntherr"]) == 2
    assert "did you mean `diffrl augment synther`?" in capsys.readouterr().err


def test_rows_are_written_in_bounded_memory(tmp_path: Path) -> None:
    """A million rows of 49 bytes, 49 MB, in blocks of 4,000; reading them back for the checksum included."""

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        for i in range(250):
            values = np.full((4000, 10), i, np.float32)
            yield {
                "observations": values,
                "actions": values[:, :1],
                "rewards": values[:, 0],
                "terminals": values[:, 0] < 0,
            }

    tracemalloc.start()
    try:
        d4rl.write_blocks(tmp_path / "large.hdf5", blocks(), {})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12e6
    assert d4rl.read(tmp_path / "large.hdf5", check=False).observations[-1, 0] == 249


def test_parts_and_whole_have_one_checksum(tmp_path: Path) -> None:
    whole = hopper_like()
    columns = whole.columns()
    parts = [{key: values[i : i + 150] for key, values in columns.items()} for i in range(0, 400, 150)]
    d4rl.write(tmp_path / "whole.hdf5", OfflineDataset(**columns))
    d4rl.write_blocks(tmp_path / "parts.hdf5", parts, {})
    a, b = (d4rl.read(tmp_path / name).metadata["sha256"] for name in ("whole.hdf5", "parts.hdf5"))
    assert a == b == d4rl.digest(columns)


@pytest.mark.usefixtures("own_data")
def test_of_fewer_rows_fewer_are_generated_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the paper's proportion; what is asked for counts, and at most a million is made."""
    out = synther("maze2d-umaze-v1", tmp_path / "new.hdf5", rows=300, report=False, **(TINY | {"quiet": False}))
    said = " ".join(capsys.readouterr().err.split())
    read = int(re.findall(r"Reads (\d+) transitions", said)[0])
    assert 200 < read <= 300
    assert f"generates {5 * read:,} synthetic ones (the default: 5 for each)" in said
    assert len(d4rl.read(out)) == 5 * read
    made = SynthER(SynthERConfig(), Sampling())
    for request, rows, n in (
        ({}, 300, 1_000_000),
        ({"rows": 400_000}, 399_000, 1_000_000),
        ({"rows": 300, "samples": 7}, 299, 7),
        ({"rows": 300, "ratio": 2.0}, 299, 598),
    ):
        assert job._samples(Request("a", "b.hdf5", **request), rows, made) == n
