"""`benchmarks/distil_images.py`: the table is what the runs found, and the page waits until all are there."""

import json
from pathlib import Path

import distil_images
import pytest
from distil_images import Bench, Way, folder

from diffrl.images import distil_job


def found(path: Path, teacher: float, student: float, seconds: float) -> None:
    """A finished run's result, as `diffrl distil` writes it."""
    path.mkdir(parents=True)
    rows = [
        {"who": who, "calls": calls, "agreement": value, "distance": value / 10}
        for who, value in (("teacher", teacher), ("student", student))
        for calls in (1, 2)
    ]
    (path / "distil.json").write_text(json.dumps({"rows": rows}))
    (path / "cpu_seconds.json").write_text(json.dumps(seconds))


def test_means_and_errors_over_seeds_and_the_page_of_all_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("what was measured\n")
    monkeypatch.setattr(distil_images, "PAGE", page)
    bench = Bench(make=False, out=tmp_path / "runs")
    for seed, (teacher, student) in enumerate(((0.7, 0.5), (0.8, 0.6), (0.9, 0.7))):
        for way in bench.ways:
            found(folder(bench, "tiny-digits", way, seed), teacher, student, 100 + 10 * seed)
    assert distil_images.main(bench) == 0
    assert page.read_text() == "what was measured\n"
    lines = distil_images.table(Bench(models=("tiny-digits",), make=False, out=bench.out))
    assert lines[1:3] == [
        ["tiny-digits", "teacher", calls, "0.800 ± 0.058", "0.080 ± 0.006", ""] for calls in ("2", "1")
    ]
    assert lines[3] == ["tiny-digits", "consistency", "**1**", "0.600 ± 0.058", "0.060 ± 0.006", "110 ± 6"]
    assert [line[2] for line in lines[5:]] == ["1", "**2**"]
    for seed in range(3):
        for way in bench.ways:
            found(folder(bench, "tiny-emoji", way, seed), 0.5, 0.5, 1)
    assert distil_images.main(bench) == 0
    assert "| tiny-digits | reflow | **2** | 0.600 ± 0.058 | 0.060 ± 0.006 | 110 ± 6 |" in page.read_text()
    assert "Seeds 0 1 2;" in page.read_text()


def test_the_teachers_rows_count_once_a_seed_and_unknown_times_not_at_all(tmp_path: Path) -> None:
    """Of seed 0 both runs are there, of seed 1 the second way's alone, whose kill left no time."""
    bench = Bench(models=("tiny-digits",), seeds=(0, 1), make=False, out=tmp_path)
    cells: tuple[tuple[Way, int, float], ...] = (("consistency", 0, 0.6), ("reflow", 0, 0.6), ("reflow", 1, 0.8))
    for way, seed, teacher in cells:
        found(folder(bench, "tiny-digits", way, seed), teacher, 0.5, 100)
    (folder(bench, "tiny-digits", "reflow", 1) / distil_images.CPU).unlink()
    lines = distil_images.table(bench)
    assert lines[1][:4] == ["tiny-digits", "teacher", "2", "0.700 ± 0.100"]
    assert lines[-1][-1] == "100"


@pytest.mark.slow
def test_the_time_of_a_run_that_was_stopped_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CPU seconds are those of both attempts."""
    bench = Bench(models=("tiny-emoji",), ways=("reflow",), seeds=(0,), steps=1, out=tmp_path)
    path = folder(bench, "tiny-emoji", "reflow", 0)
    with monkeypatch.context() as patched:
        patched.setattr(distil_job, "_train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            distil_images.table(bench)
    assert json.loads((path / distil_images.CPU).read_text()) > 0
    (path / distil_images.CPU).write_text("5000")
    assert 5000 < int(distil_images.table(bench)[-2][-1]) < 10000
    assert 5000 < json.loads((path / distil_images.CPU).read_text()) < 10000
