"""The table of fine-tuning: a mistake is a line."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_runs_make_no_table(tmp_path: Path) -> None:
    words = ["--no-run", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / "benchmarks" / "finetune.py"), *words]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 1
    assert made.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'runs'} holds no finished run")
    assert "Traceback" not in made.stderr
    assert list(tmp_path.iterdir()) == []
