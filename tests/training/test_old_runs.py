"""Runs from before a field existed: it means what was done then, or the run is refused; nothing changes silently."""

from pathlib import Path

import pytest
import yaml

import diffrl
from agents import AGENTS, EDP, FQL
from diffrl.runs import config as configuration
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.folder import SUMS
from tests.training.conftest import tiny

SIZE = {"width": 8, "layers": 1, "batch_size": 4}


def aged(run: Path, *fields: str, **added: object) -> Path:
    """The run as an earlier version wrote it: without some of the agent's fields, with others."""
    (run / SUMS).unlink(missing_ok=True)
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["agent"] = {name: value for name, value in values["agent"].items() if name not in fields} | added
    values.pop("tf32")
    path.write_text(yaml.safe_dump(values))
    return run


@pytest.mark.usefixtures("own_data")
def test_fields_that_an_old_run_does_not_name_mean_what_was_done_then(tmp_path: Path) -> None:
    edp = diffrl.train(
        tiny(tmp_path / "edp", EDP(form="x0", actor_q="random", act_critics="target", **SIZE), steps=2), quiet=True
    )
    before = Run.read(edp).config.agent
    assert Run.read(aged(edp, "form", "actor_q", "act_critics")).config.agent == before
    assert Run.read(edp).config.tf32 is False
    fql = diffrl.train(tiny(tmp_path / "fql", FQL(networks="ours", q_agg="min", **SIZE), steps=2), quiet=True)
    before = Run.read(fql).config.agent
    assert Run.read(aged(fql, "networks", "q_agg", "actor_q", "n_critics", pessimistic=True)).config.agent == before
    diffrl.evaluate(fql, episodes=1)  # the networks are those of its checkpoint
    plain = configuration.from_dict({"dataset": "maze2d-umaze-v1", "agent": "edp"}, "here")
    assert plain.agent == EDP()  # what no run wrote has today's defaults


@pytest.mark.usefixtures("own_data")
def test_an_old_run_that_cannot_be_what_it_was_is_refused(tmp_path: Path) -> None:
    run = diffrl.train(tiny(tmp_path / "idql", AGENTS["idql"](blocks=1, **SIZE), steps=2), quiet=True)  # type: ignore[call-arg]
    aged(run, "sampler", "lr_decay_steps")
    with pytest.raises(UserError, match=r"Mish.*Train it anew"):
        diffrl.resume(run, steps=4, quiet=True)
