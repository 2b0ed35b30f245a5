"""The speed benchmark's own arithmetic: its floor, its targets, and one short run from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from floor import count_flops
from rich.console import Console
from train_step import TARGETS, Measurement, Results, check
from workload import TASKS, Work, config_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


def test_the_floor_of_diffusion_ql_at_hopper() -> None:
    """2.395 GFLOP a step (shared/reference/performance.md); five passes of the actor to sample, by hand."""
    counts = count_flops(config_of("diffusion_ql"), *TASKS["hopper"])
    assert counts[Work("train", 256)] == pytest.approx(2.395e9, rel=5e-3)
    network = 2 * ((3 + 16 + 11) * 256 + 2 * 256**2 + 256 * 3)  # a row's FLOPs
    embedding = 2 * 2 * 16 * 32
    assert counts[Work("sample", 256)] == 5 * (256 * network + embedding)


def results(compiled: float, eager: float) -> Results:
    """Made-up measurements: plain 100 ms, JAX 50 ms, floor 28 ms, sampling in plain 17 ms."""
    step = Measurement("diffusion_ql", "hopper", Work("train", 256), 2_800_000_000, gflops=[90.0, 100.0])
    step.ms = {"plain": [100.0, 100.0], "eager": [eager] * 2, "compiled": [compiled] * 2, "jax": [50.0, 50.0]}
    sample = Measurement("diffusion_ql", "hopper", Work("sample", 256), 360_000_000, gflops=[90.0])
    sample.ms = {"plain": [17.0], "eager": [17.0 * eager / 100], "compiled": [17.0 * compiled / 100]}
    return Results([step, sample])


def test_a_fast_enough_step_misses_nothing() -> None:
    assert check(results(compiled=50.0, eager=60.0), Console(quiet=True)) == []


@pytest.mark.parametrize(("compiled", "eager", "expected"), [(58.0, 60.0, {2}), (70.0, 80.0, {0, 1, 2, 3, 4})])
def test_missed_targets_are_named(compiled: float, eager: float, expected: set[int]) -> None:
    """58 ms is 1.16 of JAX's time, 1.97 floors, 1.72 times as fast as plain; 70 and 80 miss everything."""
    missed = check(results(compiled, eager), Console(quiet=True))
    assert {TARGETS.index(target) for target in missed} == expected


def test_without_jax_its_target_is_left_out() -> None:
    found = results(compiled=58.0, eager=60.0)
    del found.measurements[0].ms["jax"]
    assert check(found, Console(quiet=True)) == []


@pytest.mark.slow
def test_a_short_run_prints_its_table_and_writes_its_blocks(tmp_path: Path) -> None:
    out = tmp_path / "bc.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--agents", "bc", "--tasks", "hopper", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Memory while training" in run.stdout
    content = json.loads(out.read_text())
    assert {"plain", "eager", "compiled"} <= content["measurements"][0]["ms"].keys()
    assert all(len(blocks) == 3 for blocks in content["measurements"][0]["ms"].values())


def test_check_without_its_measurements_is_a_mistake_of_the_users() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), "--check", "--agents", "bc"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "diffusion_ql" in run.stderr
