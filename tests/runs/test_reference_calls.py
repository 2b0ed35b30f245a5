"""The calls that the reference gives for a report and a selection do what the commands do."""

import re
from pathlib import Path

import pytest

from diffrl.cli import main
from diffrl.runs.study.config import BanditConfig, FQEConfig
from diffrl.runs.study.policies import Policies
from diffrl.runs.study.report import write_report
from diffrl.runs.study.scores import Scores
from diffrl.runs.study.selection import select, write_selection
from diffrl.runs.study.summary import Summary
from tests.documents import ROOT
from tests.runs.made_runs import MAZE, made_run, small

KNOWN = (BanditConfig, FQEConfig, Path, Policies, Scores, Summary, select, write_report, write_selection)


@pytest.mark.long
@pytest.mark.parametrize(("command", "file"), [("report", "tables.md"), ("select", "selection.md")])
def test_a_call_of_the_reference_is_the_command(
    command: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "reference" / "runs.md").read_text()
    (call,) = re.findall(rf"What `diffrl {command}` does is `(.*?)`\.", text)
    monkeypatch.chdir(tmp_path)
    for name in ("bc", "iql"):
        made_run(Path("runs") / name, small(name), MAZE)
    eval(call, {one.__name__: one for one in KNOWN})
    folder = {"report": "report", "select": "selection"}[command]
    assert main([command, "runs", "--out", "again"]) == 0
    assert Path(folder, file).read_text() == Path("again", file).read_text()
