"""An array job of Slurm: its script runs the runs of a sweep, each index its own, and saves when it is told to end."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from diffrl.cli import main
from diffrl.runs.sweep import plan, slurm
from diffrl.runs.sweep.plan import Sweep
from diffrl.runs.sweep.state import state_of
from diffrl.support.errors import UserError
from diffrl.support.folder import steps
from tests.runs.sweep_cases import GRID, runs, wait_for

pytestmark = pytest.mark.usefixtures("own_data")


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands `sbatch` and `scontrol` that write down their words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, answer in (("sbatch", "Submitted batch job 42"), ("scontrol", "")):
        (folder / name).write_text(f'#!/bin/bash\necho "$@" >> {folder}/{name}.said\necho "{answer}"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def start(text: str, index: int, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """The script as Slurm runs a task of it."""
    (folder / "script").write_text(text)
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "42", **environment}
    return subprocess.Popen(["bash", str(folder / "script")], env=env, text=True, stderr=subprocess.PIPE)


def test_the_script_names_the_runs_that_are_left(tmp_path: Path) -> None:
    text = slurm.script(tmp_path, [0, 1, 2, 5, 7, 8], 2, ["--time=1:00:00", "--gres=gpu:1"])
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=0-2,5,7-8%2" in head
    assert {"#SBATCH --requeue", "#SBATCH --time=1:00:00", "#SBATCH --gres=gpu:1"} <= set(head)
    assert f"#SBATCH --output={tmp_path}/slurm-%A_%a.log" in head
    assert text.splitlines()[: len(head) + 1] == ["#!/bin/bash", *head]  # sbatch reads none behind a command
    with pytest.raises(UserError, match="options of sbatch"):
        slurm.script(tmp_path, [0], None, ["gpu"])


def test_the_script_says_where_packages_and_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {name: f"/some where/{name}" for name in ("PYTHONPATH", "DIFFRL_DATA", "DIFFRL_CACHE")}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    text = slurm.script(tmp_path, [0], None, [])
    exports = [line for line in text.splitlines() if line.startswith("export ") and "OMP" not in line]
    said = subprocess.run(["bash", "-c", "\n".join([*exports, *(f'echo "${name}"' for name in values)])], env={},
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert said.splitlines() == list(values.values())
    assert "MINARI" not in text


def test_submitting_gives_sbatch_what_is_printed(
    tmp_path: Path, stubs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    assert main(["sweep", *GRID, "--out", str(folder), "--slurm"]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in printed
    assert plan.existing(folder) == Sweep(tuple(runs()))
    assert main(["sweep", "--out", str(folder), "--slurm", "--submit"]) == 0
    assert (stubs / "sbatch.said").read_text().strip() == str(folder / slurm.SCRIPT)
    assert (folder / slurm.SCRIPT).read_text() == printed
    assert "Submitted batch job 42" in capsys.readouterr().err
    (stubs / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert main(["sweep", "--out", str(folder), "--slurm", "--submit"]) == 2
    assert "invalid partition" in capsys.readouterr().err


@pytest.mark.slow
def test_each_index_runs_its_run_and_goes_on_when_it_was_cut(tmp_path: Path, stubs: Path) -> None:
    """Told by USR1 that its time is over, it saves and is queued again; then it goes on; by SIGTERM it only saves."""
    folder, order = tmp_path / "s", tmp_path / "order"
    folder.mkdir()
    both = runs()
    plan.write(folder, Sweep(tuple(both)))
    text = slurm.script(folder, [0, 1], None, [])
    order.write_text("hold")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process = start(text, 1, tmp_path, DIFFRL_TEST_ORDER=str(order))
        path = folder / both[1].name
        wait_for(lambda: 50 in steps(path) and (path / ".lock").exists(), process)  # noqa: B023
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130, said
        assert "Traceback" not in said
        assert state_of(folder, both[1]).kind == "cut"
        assert (stubs / "scontrol.said").read_text().splitlines() == ["requeue 42_1"]
    order.write_text("")
    process = start(text, 1, tmp_path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert [state_of(folder, run).kind for run in both] == ["waiting", "done"]
