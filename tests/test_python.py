"""What a user of the Python interface sees: names, and a sentence for an argument of another type."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

import agents
import diffrl
from diffrl import cli
from diffrl.augment.flow_to_better.augmenter import flow_to_better
from diffrl.augment.synther.augmenter import synther
from diffrl.data import d4rl
from diffrl.runs.compare import compare
from diffrl.runs.distil import distil
from diffrl.runs.study.policies import Policies
from diffrl.runs.study.report import write_report
from diffrl.runs.study.scores import Scores
from diffrl.runs.study.selection import write_selection
from diffrl.runs.study.summary import Summary
from diffrl.runs.tune import finetune_policy
from diffrl.support.errors import UserError
from diffrl.support.schema import parse_kwargs
from tests.runs.made_runs import made_run, small


def test_the_package_lists_what_it_offers_and_nothing_that_it_imports() -> None:
    offered = {name for name in dir(diffrl) if not name.startswith("_")}
    assert offered >= set(diffrl.__all__)
    assert not {"Any", "TYPE_CHECKING"} & offered
    assert diffrl.__version__ == version("diffrl")
    assert all(hasattr(diffrl, name) for name in dir(diffrl))
    with pytest.raises(AttributeError, match="has no attribute 'finetune_policy'"):
        _ = diffrl.finetune_policy


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: diffrl.resume("run", steps="300"), "steps is '300'; expected a whole number"),
        (lambda: diffrl.resume("run", steps=0), "steps is 0; expected at least 1"),
        (lambda: diffrl.resume("run", eval_workers=1.5), "eval_workers is 1.5; expected a whole number"),
        (lambda: diffrl.resume("run", device=0), "device is 0; expected text"),
        (lambda: diffrl.online("run", {"steps": 1}), "config is .*; expected an instance of OnlineConfig"),
        (lambda: synther("data.hdf5", "new.hdf5", model={"width": 8}), "model is .*an instance of SynthERConfig"),
        (lambda: synther("data.hdf5", "new.hdf5", sampling=3), "sampling is 3; expected an instance of Sampling"),
        (
            lambda: synther("data.hdf5", "new.hdf5", smaples=3),
            "^synther has no argument 'smaples'; .* 'samples'",
        ),
        (lambda: synther("data.hdf5", "new.hdf5", modle=3), "^synther has no argument 'modle'; .* 'model'"),
        (lambda: flow_to_better("a.hdf5", "b.hdf5", 5, sed=3), "^flow_to_better has no argument 'sed'; .* 'seed'"),
        (lambda: flow_to_better("data.hdf5", "new.hdf5", 5, diffuser={}), "diffuser is {}; .*of DiffuserConfig"),
        (lambda: flow_to_better("data.hdf5", "new.hdf5", 5, blocks=3), "blocks is 3; .*of BlockConfig"),
        (lambda: finetune_policy("run"), "settings is 'run'; expected an instance of TuningConfig"),
        (lambda: Scores.of_runs(3), "paths is 3; expected a path, or a list of paths"),
        (lambda: Policies.of_runs(["run", 3]), "paths is .*; expected a path, or a list of paths"),
        (lambda: compare("run", "page.html"), r"by two runs or more: .* compare\(\[RUN, RUN, ...\]\)"),
        (lambda: compare(["run", "run"], 3), "out is 3; expected a path"),
        (lambda: write_report(None, 3), "out is 3; expected a path"),
        (lambda: write_selection(None, 3), "out is 3; expected a path"),
        (lambda: d4rl.write("new.hdf5", {"rewards": []}), "dataset is .*; expected an instance of OfflineDataset"),
        (lambda: distil("run"), "settings is 'run'; expected an instance of DistilConfig"),
    ],
)
def test_an_argument_of_another_type_is_answered_in_a_sentence(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()


@pytest.mark.parametrize("given", [str, Path])
def test_one_path_will_do_where_several_are_read_and_text_where_a_path_is_written(
    tmp_path: Path, given: Callable[[Path], str | Path]
) -> None:
    run = made_run(tmp_path / "run", small("bc"))
    scores = Scores.of_runs(given(run))
    assert scores == Scores.of_runs([run])
    assert Policies.of_runs(given(run)).tasks == scores.tasks
    page, _ = write_report(Summary(scores), given(tmp_path / "report"))
    assert page == tmp_path / "report" / "index.html"


@pytest.mark.parametrize("name", ["reward", "held_out"])
def test_a_reward_that_is_a_function_is_told_how_it_is_named(name: str) -> None:
    from diffrl.images import FinetuneConfig

    with pytest.raises(UserError, match=f"{name} is <function .*python:FILE.py#NAME.*diffrl.rewards") as caught:
        FinetuneConfig(**{name: lambda images, prompts, metadata: 0})
    assert "\n" not in str(caught.value)


def test_an_image_run_takes_a_configuration_of_its_own() -> None:
    pytest.importorskip("diffusers")
    from diffrl.images import finetune
    from diffrl.images.distil_job import distil as distil_images

    with pytest.raises(UserError, match="config is 'draft'; expected an instance of FinetuneConfig"):
        finetune("draft")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="config is 'run'; expected an instance of ImageDistilConfig"):
        distil_images("run")  # type: ignore[arg-type]


def test_the_first_page_names_the_functions_that_import_diffrl_has() -> None:
    page = " ".join((Path(__file__).parents[1] / "docs/index.md").read_text().split())
    named = re.search(r"`import diffrl` has (.*?)\.", page)
    assert named
    functions = {name for name in diffrl.__all__ if not isinstance(getattr(diffrl, name), type)}
    assert set(re.findall(r"`(\w+)`", named[1])) == functions


def test_every_verb_of_the_command_line_is_on_the_first_page_a_function_or_a_command_alone() -> None:
    page = (Path(__file__).parents[1] / "docs/index.md").read_text()
    page = page[page.index("## In Python") : page.index("## The next steps")]
    verbs = set(cli.VERBS) - {"augment", "finetune"}  # of which there are several each
    assert {verb for verb in verbs if not re.search(rf"\b{verb}\b", page)} == set()


@dataclass(frozen=True)
class Mine(agents.IQL):
    """Settings that no package brings."""

    more: float = 1.0


@dataclass(frozen=True)
class MyRun(diffrl.TrainConfig):
    """A run's settings and one more."""

    note: str = ""


DATA = "maze2d-umaze-v1"


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (
            agents.IQL(width=32),
            {"dataset": DATA},
            r"IQL has the settings of an agent .* diffrl.train\('iql', agent=IQL",
        ),
        (agents.AgentConfig, {"dataset": DATA}, "AgentConfig has the settings of an agent"),
        (agents.IQL, {"dataset": DATA}, r"IQL has the settings of an agent .* diffrl.train\('iql', agent=IQL"),
        (None, {"dataset": DATA}, "config is None; expected a diffrl.TrainConfig, a YAML file, or the name"),
        ({"agent": "iql"}, {}, "config is {'agent': 'iql'}; expected a diffrl.TrainConfig"),
        (
            "iql",
            {"dataset": DATA, "agent": agents.BC()},
            r"'iql' means the agent iql, and agent=BC\(...\) is one of bc",
        ),
        ("bc/maze2d-umaze-v1", {"agent": agents.IQL()}, "means the agent bc, and .* diffrl.train.'iql', agent=IQL"),
        ("iqll", {"dataset": DATA}, "did you mean the agent 'iql'"),
        ("IQL", {"dataset": DATA}, "did you mean the agent 'iql'"),
        (
            "iql",
            {"dataset": np.zeros(3)},
            r"dataset is array.*; expected a name or a file's path .diffrl.data.d4rl.write",
        ),
        ("iql", {"dataset": {"rewards": [1.0]}}, "dataset is {'rewards'.*; expected a name or a file's path"),
        ("iql", {"dataset": DATA, "env": len}, "env is .*; expected the id of a registered environment, or MODULE:ID"),
        ("iql", {"dataset": DATA, "env_kwargs": {1: 2}}, "env_kwargs has 1; expected names of arguments"),
        ("iql", {"dataset": DATA, "env_kwargs": {"g": len}}, "env_kwargs is {'g': .*; expected values that JSON holds"),
        (
            diffrl.TrainConfig(DATA, Mine()),
            {},
            r"The settings are of tests.test_python.Mine, which no package brings as the agent iql",
        ),
        (MyRun(DATA, agents.IQL()), {}, "MyRun is a class of your own: a run's folder is read by TrainConfig"),
    ],
)
def test_what_trains_nothing_that_could_be_opened_again_is_refused_before_there_is_a_folder(
    config: Any, settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        diffrl.train(config, quiet=True, **settings)
    assert list(tmp_path.iterdir()) == []


def test_paths_and_arguments_by_name_are_taken_as_python_has_them() -> None:
    config = diffrl.configuration(
        "iql", dataset=Path("data/mine.hdf5"), env_kwargs={"g": 2.0, "goal": "near", "on": None}
    )
    assert config.dataset == "data/mine.hdf5"
    assert parse_kwargs(config.env_kwargs) == {"g": 2.0, "goal": "near", "on": None}
    config = diffrl.configuration(
        "iql", dataset=PurePosixPath("mine.hdf5"), env_kwargs={"g": np.float32(2), "n": np.int64(3)}
    )
    assert (config.dataset, config.env_kwargs) == ("mine.hdf5", ("g=2.0", "n=3"))


def test_settings_of_a_class_that_was_loaded_anew_are_taken() -> None:
    """A notebook that reloads modules has objects of both classes."""
    config = diffrl.configuration("iql", dataset=DATA)
    copied = dataclasses.make_dataclass("IQL", [], bases=(agents.IQL,), frozen=True)
    copied.__module__, copied.__qualname__ = agents.IQL.__module__, agents.IQL.__qualname__
    old = copied(**{field.name: getattr(config.agent, field.name) for field in dataclasses.fields(config.agent)})
    assert diffrl.configuration(dataclasses.replace(config, agent=old)).agent == old
