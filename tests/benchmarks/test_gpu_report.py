"""benchmarks/results/gpu.md as a function of the JSON files, and what replaces what among these."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import report
import stages

from diffrl.support.errors import UserError


def result(name: str, found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    machine = {"card": "NVIDIA H100 80GB HBM3", "driver": "580.1", "torch": "2.11.0"}
    about = {"stage": name, "state": "whole", "digest": "0123456789abcdef", "rehearsal": False, "machine": machine}
    return about | {"date": "2026-12-01 10:00:00", "commands": [f"python {name}.py"], "result": found} | changes


def run(steps: int, scores: list[list[float]], **changes: Any) -> dict[str, Any]:
    """A long run's result, an evaluation every 10,000 steps."""
    found = {
        "config": "diffusion_ql/maze2d-umaze-v1",
        "seeds": [0, 1],
        "target": 1_000_000,
        "steps": steps,
        "seconds": 1800.0,
        "steps_per_second": 1666.66,
        "evaluations": [{"step": 10_000 * (i + 1), "score": s, "mean_return": [0, 0]} for i, s in enumerate(scores)],
    }
    return result("diffusion_ql-umaze", found, **changes)


def row(page: str, name: str, number: int = 0) -> list[str]:
    """The cells of a stage's line in the overview (0), or among the long runs (1)."""
    lines = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in lines[number].strip("|").split("|")][1:]


def test_what_is_missing_has_not_been_run() -> None:
    page = report.page({})
    for stage in stages.STAGES:
        assert row(page, stage.name) == [stage.title, "not yet run", "", "", "", ""]
    assert row(page, "diffusion_ql-umaze", 1) == ["", "not yet run", "", "", "", "", "", ""]
    assert row(page, "iql-umaze", 1)[-1] == "42.1 ± 0.6"
    assert page.count("\n## ") == 1


def test_a_run_in_progress_shows_how_far_it_is() -> None:
    """Of two seeds the standard error is half their distance: 160 and 150; over three 150 and 140; best 170 and 150."""
    scores = [[170.0, 90.0], [140.0, 130.0], [150.0, 140.0], [160.0, 150.0]]
    page = report.page({"diffusion_ql-umaze": run(400_000, scores, state="cut")})
    assert row(page, "diffusion_ql-umaze")[1:] == ["cut", "NVIDIA H100 80GB HBM3", "2026-12-01", "30.0", "01234567"]
    figures = ["155.0 ± 5.0 (step 40,000)", "145.0 ± 5.0", "160.0 ± 10.0", "1,667", "0.50", ""]
    assert row(page, "diffusion_ql-umaze", 1) == ["2", "400,000 of 1,000,000", *figures]
    assert "NVIDIA H100 80GB HBM3; driver 580.1, torch 2.11.0; 2026-12-01 10:00:00 UTC." in page
    assert "    python diffusion_ql-umaze.py\n" in page
    assert row(page, "diffusion_ql-large")[1] == "not yet run"


def test_figures_of_tests_and_scripts() -> None:
    rows = [{"agent": "diffusion_ql", "seeds": 8, "ms": [0.5, 0.61, 9.0], "allocated": 1234.5}, {"agent": "iql"}]
    tests = {"passed": 28, "failed": 1, "skipped": 0, "failures": ["tests/a.py::test_one"], "seconds": 60.2}
    page = report.page(
        {
            "tests": result("tests", tests, state="failed", wrong="exit code 1: line\nother", digest="else"),
            "train-step": result("train-step", {"seconds": 90.0, "content": {"gpu": rows}}),
            "digits": result("digits", {"seconds": 1.0, "page": "# Title\n<!-- dropped -->\n| algo | 0.9 |\n"}),
            "stable-diffusion": result("stable-diffusion", {"seconds": 1.0}),
        }
    )
    assert "28 passed, 1 failed, 0 skipped, in 60 s.\n\n- `tests/a.py::test_one`\n" in page
    assert "tests failed:\n\n    exit code 1: line\n    other\n" in page
    assert row(page, "tests")[1:] == ["failed", "NVIDIA H100 80GB HBM3", "2026-12-01", "1.0", "else"]
    assert "| agent | seeds | ms | allocated |\n| --- | --- | --- | --- |\n" in page
    assert "| diffusion_ql | 8 | 0.61 | 1,234 |\n| iql |  |  |  |\n" in page
    assert "\n| algo | 0.9 |\n" in page
    assert "dropped" not in page


def test_a_result_is_replaced_by_one_that_is_more() -> None:
    whole, short, further = run(10**6, []), run(100, [], state="cut"), run(200, [], state="cut")
    other = run(50, [], state="cut", digest="of other code")
    assert report.replaces(short, None)
    assert report.replaces(further, short)
    assert not report.replaces(short, further)
    assert report.replaces(other, further)
    assert report.replaces(whole, further)
    assert not report.replaces(further, whole)
    assert not report.replaces(other, whole)
    assert report.replaces(run(10**6, [], digest="of other code"), whole)


def test_an_archive_is_merged(tmp_path: Path) -> None:
    content = run(100, [], state="cut")
    (tmp_path / "file.json").write_text(json.dumps(content))
    with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "file.json", "results/diffusion_ql-umaze.json")
        archive.add(tmp_path / "file.json", "scores/diffusion_ql-umaze.json")
    folder = tmp_path / "gpu"
    assert report.merge(report.read(tmp_path), folder) == ["diffusion_ql-umaze: cut"]
    assert report.read(folder) == {"diffusion_ql-umaze": content}
    less = {"diffusion_ql-umaze": run(50, [], state="cut")}
    assert report.merge(less, folder) == ["diffusion_ql-umaze: cut; what is there is more: kept"]
    assert report.read(folder) == {"diffusion_ql-umaze": content}


def test_a_rehearsal_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rehearsed"):
        report.merge({"tests": result("tests", {}, rehearsal=True)}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "odd.tar.gz").write_text("odd")
    with pytest.raises(UserError, match=r"results\.tar\.gz of run\.sh"):
        report.read(tmp_path / "odd.tar.gz")
    with pytest.raises(UserError, match="does not exist"):
        report.read(tmp_path / "none.tar.gz")


def test_the_page_in_the_repository_is_that_of_its_files() -> None:
    """But for the marks of results of older code: these hold for the day on which the page was written."""
    folder = report.RESULTS / "gpu"
    text = (report.RESULTS / "gpu.md").read_text().replace(report.OLDER, "")
    assert text == report.page(report.read(folder) if folder.is_dir() else {})


def test_a_result_of_older_code_is_marked() -> None:
    results = {"diffusion_ql-umaze": run(400_000, [], state="cut"), "train-step": result("train-step", {})}
    page = report.page(results, older=["diffusion_ql-umaze"])
    assert row(page, "diffusion_ql-umaze")[-1] == "01234567, older"
    assert row(page, "train-step")[-1] == "01234567"
