"""`benchmarks/distil_images.py`: the table is what the runs found, and the page waits until all are there."""

import json
from pathlib import Path

import distil_images
import pytest
from distil_images import Bench, folder


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
