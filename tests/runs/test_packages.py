"""Runs of an agent of another package: what is said, and kept, where the package has another version, or other code."""

import hashlib
import importlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import diffrl
from diffrl.cli import main
from diffrl.runs.run import Run
from diffrl.support import folder
from diffrl.training.checkpoint import CheckpointError
from tests.support.plugin_cases import install
from tests.test_plugins import AGENT as TOY

CONFIG = """
from dataclasses import dataclass
from typing import ClassVar
from agents import AgentConfig

@dataclass(frozen=True)
class Kit(AgentConfig):
    '''A linear policy fitted by least squares.'''
    name: ClassVar[str] = "kit"
    policy_kind: ClassVar[str] = "deterministic"

    def implementation(self):
        from kit_agent import KitAgent
        return KitAgent
"""
AGENT = TOY.replace("ToyAgent", "KitAgent").replace("config.learning_rate", "0.03")
SMALL = ["--dataset", "maze2d-umaze-v1", "--rows", "300", "--steps", "4", "--eval-episodes", "1", "--eval-workers", "0"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path with the package kit 1.0."""
    where = tmp_path / "site"
    where.mkdir()
    monkeypatch.syspath_prepend(where)
    monkeypatch.setattr(folder, "_said", set())
    install(where, "kit", {"diffrl.agents": {"kit": "kit_config:Kit"}}, kit_config=CONFIG, kit_agent=AGENT)
    yield where
    for module in ("kit_config", "kit_agent"):
        sys.modules.pop(module, None)


@pytest.fixture
def run(site: Path) -> Path:
    path = site.parent / "run"
    assert main(["train", "--agent", "kit", *SMALL, "--seeds", "0", "--out", str(path)]) == 0
    return path


def version(site: Path, now: str) -> None:
    """Another version of the package is installed."""
    (site / "kit-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kit\nVersion: {now}\n")


def changed(site: Path, was: str, now: str) -> None:
    """Another code of the package is installed."""
    assert was in AGENT
    (site / "kit_agent.py").write_text(AGENT.replace(was, now))
    sys.modules.pop("kit_agent", None)
    importlib.invalidate_caches()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


def digests(path: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in path.rglob("*") if file.is_file()}


def test_another_version_of_the_package_is_said_and_noted_down(
    site: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of evaluations, policies and runs that go on; not of what the version that is here has made last."""
    note = f"{run} was made with kit 1.0, and kit 2.0 is installed here: its code may do otherwise."
    capsys.readouterr()
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    diffrl.load_policy(run)
    assert "was made with" not in said(capsys)
    version(site, "2.0")
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert said(capsys).count(note) == 1
    folder._said.clear()
    assert diffrl.load_policy(run)(np.zeros(4)).shape == (2,)
    assert said(capsys).count(note) == 1
    assert "later_packages" not in json.loads((run / "run.json").read_text())
    before = json.loads((run / "run.json").read_text())
    assert main(["resume", str(run), "--steps", "8"]) == 0
    assert said(capsys).count(note) == 1
    assert json.loads((run / "run.json").read_text()) == before | {"later_packages": {"4": "kit 2.0"}}
    version(site, "3.0")
    assert main(["resume", str(run), "--steps", "10"]) == 0
    assert "was made with kit 2.0, and kit 3.0 is installed here" in said(capsys)
    opened = Run.read(run)
    assert [opened.made_by(step) for step in (0, 4, 5, 8, 9, 10)] == ["kit 1.0"] * 2 + ["kit 2.0"] * 2 + ["kit 3.0"] * 2
    folder._said.clear()
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert "was made with" not in said(capsys)
    opened.goes_on(8)  # by the version that is here, behind a checkpoint of an older one
    assert Run.read(run).later_packages == {"4": "kit 2.0", "8": "kit 3.0"}
    version(site, "1.0")
    opened.goes_on(4)
    assert Run.read(run).later_packages == {}


def test_an_exported_policy_says_so_too(site: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = run.parent / "exported"
    assert main(["export", str(run), "--to", str(exported)]) == 0
    folder._said.clear()
    capsys.readouterr()
    diffrl.load_policy(exported)
    assert "was made with" not in said(capsys)
    version(site, "2.0")
    assert diffrl.load_policy(exported)(np.zeros(4)).shape == (2,)
    note = f"{exported} was made with kit 1.0, and kit 2.0 is installed here: its code may do otherwise."
    assert said(capsys).count(note) == 1


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        (
            '{"actor": self.actor}',
            '{"policy": self.actor}',
            "in the checkpoint alone: actor.bias, actor.weight; in the network alone: policy.bias, policy.weight.",
        ),
        (
            '= {"actor": Adam(self.actor, 0.03)}',
            "= {}",
            "in the checkpoint alone: optimiser.actor.",
        ),
        (
            "observation_size, action_size, self.generators)",
            "observation_size, 2 * action_size, self.generators)",
            "in the checkpoint, (1, 4, 4) in the network.",
        ),
    ],
)
def test_other_networks_are_the_packages_and_change_nothing(
    site: Path, run: Path, capsys: pytest.CaptureFixture[str], was: str, now: str, why: str
) -> None:
    """Which side has which names, whose code makes the networks, and by which version the run was made."""
    version(site, "2.0")
    changed(site, was, now)
    before = digests(run)
    capsys.readouterr()
    assert main(["resume", str(run), "--steps", "8"]) == 2
    text = said(capsys)
    assert f"step 4 in {run} does not fit the networks that the code of kit makes by its config.yaml" in text
    assert why in text
    assert "It was made with kit 1.0, and kit 2.0 is here. Give the code the networks of then" in text
    assert digests(run) == before
    for act in (lambda: diffrl.load_policy(run), lambda: diffrl.evaluate(run, episodes=1)):
        with pytest.raises(CheckpointError, match="that the code of kit makes"):
            act()


@pytest.mark.parametrize("where", ["update", "act"])
def test_an_error_of_the_packages_agent_ends_with_what_is_saved(site: Path, run: Path, where: str) -> None:
    """The traceback is its author's; its last line says up to where the run is saved, and what goes on."""
    if where == "update":
        changed(site, "self.step += 1", "self.step += int(self.step) < 6 or batch.missing")
    else:
        changed(site, "return self.actor(obs", "return self.missing(obs")
    with pytest.raises(AttributeError, match="missing") as caught:
        main(["resume", str(run), "--steps", "8"])
    last = traceback.format_exception(caught.value)[-1]
    step = 4 if where == "update" else 8
    assert (
        last == f"Saved up to step {step}. The agent kit is of kit 1.0: mend it, and `diffrl resume {run}` goes on.\n"
    )
    changed(site, "", "")
    assert main(["resume", str(run), "--steps", "8"]) == 0
    assert max(folder.steps(run)) == 8
