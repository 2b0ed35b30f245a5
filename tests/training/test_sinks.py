"""The numbers of a run are the same wherever they go, and stand there once, however often it was killed."""

import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffrl
from agents import BC
from diffrl.cli import main
from diffrl.runs.config import RunOptions, TrainConfig, load
from diffrl.runs.study.reading import minutes_of
from diffrl.support.errors import UserError
from diffrl.training.logs import MetricsLog
from diffrl.training.sinks import checked
from tests.fixtures.make_old_runs import FOLDER as OLD

SEEDS = [3, 5]
Numbers = dict[tuple[str, int], list[float]]
"""By name, such as loss/seed3, and step: all the values that stand there."""


def logged(run: Path, to: str, steps: list[int], start: int = 0) -> Numbers:
    """Write numbers of these steps as a run that goes on after `start` does; what was written."""
    log, expected = MetricsLog(run, SEEDS, start, to, {"agent": {"name": "bc"}}), {}
    for step in steps:
        rng = np.random.default_rng(step)
        metrics = {name: rng.normal(size=2).tolist() for name in ("loss", "q") if name == "loss" or step > 5}
        log.write(step, metrics)
        for name, values in metrics.items():
            expected |= {(f"{name}/seed{seed}", step): [v] for seed, v in zip(SEEDS, values, strict=True)}
    log.close()
    return expected


def of_csv(run: Path) -> Numbers:
    found: Numbers = {}
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step, seed = int(row.pop("step")), row.pop("seed")
            for name, value in row.items():
                if value:
                    found.setdefault((f"{name}/seed{seed}", step), []).append(float(value))
    return found


def of_tensorboard(run: Path) -> Numbers:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    found: Numbers = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


def records(data: bytes) -> Iterator[bytes]:
    """What a file in LevelDB's log format holds: blocks of 32 KiB, chunks of checksum, length and kind."""
    place, record = 7, b""  # after the file's own header
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def whole(path: Path, parse: Callable[[bytes], Any]) -> list[Any]:
    """A file's records, once it has its last: their own process still writes when `finish` has returned."""
    for _ in range(300):
        found = [parse(data) for data in records(path.read_bytes())]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} is never ended")


def of_wandb(run: Path) -> Numbers:
    """From the files that `wandb sync` sends, all of one run of theirs."""
    import json

    from wandb.proto import wandb_internal_pb2 as protocol

    found: Numbers = {}
    ids = set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in whole(path, protocol.Record.FromString):
            if record.run.run_id:
                ids.add(record.run.run_id)
            row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            if row:
                step = row.pop("step")
                for name, value in row.items():
                    if not name.startswith("_"):
                        found.setdefault((name, step), []).append(value)
    assert ids == {(run / "wandb" / "id").read_text()}
    return found


def assert_same(found: Numbers, expected: Numbers) -> None:
    """The same names and steps, each once, and values equal to the six digits of metrics.csv."""
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert len(found[key]) == 1, key
        assert found[key][0] == pytest.approx(values[0], rel=5e-6), key


BACK_ENDS: dict[str, Callable[[Path], Numbers]] = {"csv": of_csv, "tensorboard": of_tensorboard, "wandb": of_wandb}


@pytest.mark.parametrize("to", ["tensorboard", pytest.param("csv,tensorboard,wandb", marks=[pytest.mark.slow])])
def test_a_run_that_was_killed_has_every_number_once_everywhere(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had logged steps 12 and 16 beyond its checkpoint of step 8, and logs them again when it goes on."""
    if "wandb" in to:
        pytest.importorskip("wandb")
        for name in ("WANDB_MODE", "WANDB_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))  # where nobody is logged in
    expected = logged(tmp_path, to, [4, 8, 12, 16])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("20,3,1.")  # torn by the kill
    expected |= logged(tmp_path, to, [12, 16, 20], start=8)
    for name in {"csv", *to.split(",")}:
        assert_same(BACK_ENDS[name](tmp_path), expected)
    assert len(expected) == 2 * 5 + 2 * 4


def test_csv_alone_writes_nothing_else(tmp_path: Path) -> None:
    expected = logged(tmp_path, "csv", [4, 8])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert_same(of_csv(tmp_path), expected)


@pytest.mark.usefixtures("own_data")
def test_a_run_logs_where_it_was_told_and_goes_on_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is resumed; and its table goes on without a row twice."""
    env, short = "tests.training.held_env:Held-v0", {"rows": 400, "steps": 8, "eval_every": 8, "log_every": 4}
    config = TrainConfig(
        "maze2d-umaze-v1", BC(width=8, layers=1), env=env, eval_episodes=1, log="csv", out=tmp_path / "run", **short
    )
    run = diffrl.train(config, quiet=True)
    assert not (run / "tensorboard").exists()
    diffrl.resume(run, steps=16, quiet=True)
    assert not (run / "tensorboard").exists()
    assert sorted({step for _, step in of_csv(run)}) == [4, 8, 12, 16]
    assert all(len(values) == 1 for values in of_csv(run).values())


def test_names_are_checked_before_anything_is_made(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """In one line, with the nearest; and what is not installed with its extra."""
    assert checked("csv, tensorboard,csv") == "csv,tensorboard"
    words = ["train", "--agent", "bc", "--dataset", "maze2d-umaze-v1", "--out", str(tmp_path / "run"), "--log"]
    assert main([*words, "tensorbord"]) == 2
    assert "--log has 'tensorbord'; did you mean 'tensorboard'?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*words, "csv,wandb"]) == 2
    assert "pip install 'diffrl[wandb]'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"diffrl\[wandb\]"):
        RunOptions(log="wandb")
    assert not (tmp_path / "run").exists()


def test_a_run_that_starts_from_another_logs_as_that_did_unless_it_is_told() -> None:
    """Old runs, whose configuration does not say, had TensorBoard."""
    old = load(OLD / "offline" / "config.yaml", of_run=True)
    assert old.log == "tensorboard"
    csv_alone = TrainConfig("hopper-medium-v2", BC(), log="csv")
    assert RunOptions().applied(csv_alone).log == "csv"
    assert RunOptions(log="csv,tensorboard").applied(csv_alone).log == "csv,tensorboard"


@pytest.mark.long
def test_time_after_the_last_number_is_a_runs_too(tmp_path: Path) -> None:
    """A run that is stopped before it logs anything, and goes on, has worked all the same; pauses are no work."""
    begin = time.monotonic()
    for start, worked in ((0, 0.4), (5, 0.3)):
        log = MetricsLog(tmp_path, SEEDS, start)
        time.sleep(worked)
        log.close()
        time.sleep(1.1)  # files are named, and so ordered, by their seconds
    log = MetricsLog(tmp_path, SEEDS, 5)
    log.write(8, {"loss": [0.0, 0.0]})
    log.close()
    assert 0.7 <= 60 * minutes_of(tmp_path)[8] < time.monotonic() - begin - 2.2


def test_a_sink_that_fails_is_left_out_and_said(tmp_path: Path, capsys: Any) -> None:
    """The run goes on, and metrics.csv has every number."""
    (tmp_path / "tensorboard").write_text("a file")
    expected = logged(tmp_path, "tensorboard", [4, 8])
    assert_same(of_csv(tmp_path), expected)
    assert "metrics.csv has the same numbers" in capsys.readouterr().err
