"""An agent and a family of data sets from another package: on the command line, in worker processes, from its folder.

The package is one module beside a `.dist-info`, on PYTHONPATH, and knows diffrl's public names only.
"""

import contextlib
import dataclasses
import json
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import agents
from agents import AgentConfig
from diffrl import load_policy
from diffrl.cli import main
from diffrl.commands.data import ListData
from diffrl.data import d4rl
from diffrl.images.rewards import ask, listing, parse
from diffrl.runs.config import TrainConfig, configuration, find
from diffrl.runs.study.policies import Policies
from diffrl.support import plugins
from diffrl.support.errors import DataError, UserError
from envs import datasets, registry
from tests.documents import ROOT, blocks
from tests.support.plugin_cases import install

CONFIG = """
from dataclasses import dataclass
from typing import ClassVar
from agents import AgentConfig

@dataclass(frozen=True)
class Toy(AgentConfig):
    '''A linear policy fitted by least squares.'''
    name: ClassVar[str] = "toy"
    learning_rate: float = 0.03
    '''Adam's learning rate.'''

    def implementation(self):
        from toy_agent import ToyAgent
        return ToyAgent
"""
AGENT = """
import torch
from agents.base import Agent
from diffrl.nets import Adam, StackedLinear

class ToyAgent(Agent):
    def __init__(self, config, observation_size, action_size, seeds, device):
        super().__init__(config, observation_size, action_size, seeds, device)
        self.actor = StackedLinear((self.n_seeds,), observation_size, action_size, self.generators).to(self.device)
        self.networks = {"actor": self.actor}
        self.optimisers = {"actor": Adam(self.actor, config.learning_rate)}

    def update(self, batch, generator, phase=0):
        loss = (self.actor(batch.observations) - batch.actions).square().mean((-2, -1))
        self.optimisers["actor"].step(loss)
        self.step += 1
        return {"bc_loss": loss.detach()}

    @torch.no_grad()
    def act(self, observations, generator):
        return self.actor(observations).clamp(-1, 1)
"""
WORLD = """
import gymnasium
import numpy as np
from diffrl.data.offline import OfflineDataset
from envs.registry import Benchmark, DataFamily

class Halve(gymnasium.Env):
    '''The reward is -|a - s / 2|; the state is drawn anew at each step.'''
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def draw(self):
        self.s = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.s

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.draw(), {}

    def step(self, action):
        reward = -abs(float(action[0]) - float(self.s[0]) / 2)
        return self.draw(), reward, False, False, {}

gymnasium.register("Halve-v0", Halve, max_episode_steps=5)

def load(name):
    rng = np.random.default_rng(0)
    n = {"toyfam-small": 400, "toyfam-large": 4000}[name]
    s = rng.uniform(-1, 1, (n, 1)).astype(np.float32)
    none = np.zeros(n, np.bool_)
    return OfflineDataset(s, s / 2, np.zeros(n, np.float32), none, np.arange(n) % 5 == 4)

NAMES = ("toyfam-small", "toyfam-large")
FAMILY = DataFamily([Benchmark(n, "toy_world:Halve-v0", 5, -2.5, 0.0, note="A toy.") for n in NAMES], load)
"""
GROUPS = {"diffrl.agents": {"toy": "toy_config:Toy"}, "diffrl.datasets": {"toyfam": "toy_world:FAMILY"}}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that packages are installed into, which worker processes have on their path too."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    for variable in ("DIFFRL_DATA", "MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("COLUMNS", "200")
    yield folder
    for module in ("toy_config", "toy_agent", "toy_world"):
        sys.modules.pop(module, None)


@pytest.mark.long
def test_a_toy_agent_trains_on_a_toy_family_and_is_evaluated(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By two training workers and one that evaluates; it learns a = s / 2, whose score is 100."""
    install(site, "toy-package", GROUPS, toy_config=CONFIG, toy_agent=AGENT, toy_world=WORLD)
    run = site.parent / "run"
    words = ["train", "--agent", "toy", "--dataset", "toyfam-small", "--steps", "300", "--eval-every", "150"]
    words += ["--eval-episodes", "2", "--seeds", "0", "1", "--workers", "2", "--eval-workers", "1", "--out", str(run)]
    assert main(words) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["agent"]["name"], config["workers"], config["eval_workers"]) == ("toy", 2, 1)
    assert main(["evaluate", str(run), "--episodes", "3", "--which", "last"]) == 0
    result = json.loads((run / "evaluation.json").read_text())["last"]
    returns, scores = np.asarray(result["returns"]), np.asarray(result["scores"])
    assert returns.shape == (2, 3)
    np.testing.assert_allclose(scores, 100 * (returns + 2.5) / 2.5)
    assert scores.min() > 95
    exported = site.parent / "exported"
    assert main(["export", str(run), "--to", str(exported)]) == 0
    card = (exported / "README.md").read_text()
    assert "\nNeeds: toy-package 1.0, which brings the agent, beside diffrl.\n" in card
    assert "source: the package toy-package 1.0, which makes or fetches it." in card
    assert ", toy-package 1.0. When training began:" in card
    assert load_policy(exported)(np.zeros(1)).shape == (1,)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err
    assert "Unknown agent 'toy'" in said
    assert "may be of another package (entry point `diffrl.agents`), which is not installed here" in said
    assert "The run was made with toy-package 1.0." in said
    with pytest.raises(UserError, match=r"which is not installed here\. .*exported needs toy-package 1\.0, by its"):
        load_policy(exported)
    for words in (
        ["train", "--agent", "bcc", "--dataset", "maze2d-umaze-v1"],
        ["augment", "synter", "maze2d-umaze-v1"],
    ):
        assert main(words) == 2
        assert "another package" not in capsys.readouterr().err  # where it was typed, one that is near is meant
    assert main(["resume", str(run), "--steps", "400"]) == 2
    assert "diffrl.agents" in capsys.readouterr().err
    for words, group in (
        (["train", "--agent", "bc", "--dataset", "toyfam-small"], "datasets"),
        (["train", "--agent", "bc", "--dataset", "spin-medium-v0"], "datasets"),  # near to ant-medium-v0
        (["finetune", "--reward", "toyish"], "rewards"),
        (["augment", "jitter", "toyfam-small"], "augmenters"),
    ):
        assert main(words) == 2
        said = f"may be of another package (entry point `diffrl.{group}`), which is not installed here"
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_the_recipes_of_contributing_can_be_copied(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An agent, a reward, a data family and an augmenter, as they stand there, are installed, named, trained, asked."""
    points: dict[str, dict[str, str]] = {}
    modules: dict[str, str] = {}
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        first = block.text.partition("\n")[0]
        if block.language == "toml":
            points |= tomllib.loads(block.text)["project"]["entry-points"]
        elif block.language == "python" and first.startswith("# "):
            modules[first.removeprefix("# ").removesuffix(".py")] = block.text
    install(site, "mine", points, **modules)
    assert set(points) == set(plugins.WHAT)
    run, more = site.parent / "run", site.parent / "more.hdf5"
    for words in (
        ["data", "list", "mine"],
        ["data", "info", "mine-small"],
        ["train", "--agent", "linear", "--dataset", "mine-small", "--steps", "300", "--out", str(run)],
        ["evaluate", str(run), "--episodes", "3", "--which", "last"],
        ["augment", "gaussian", "mine-small", "--steps", "50", "--samples", "2000", "--out", str(more)],
    ):
        assert main(words) == 0
    again = site.parent / "again"
    words = ["train", "--agent", "linear", "--dataset", str(more), "--env", "mine_data:Mine-v0", "--steps", "300"]
    assert main([*words, "--out", str(again)]) == 0  # scored as the family is that its rows are from
    capsys.readouterr()
    assert main(["report", str(run), str(again), "--by", "environment", "--out", str(site.parent / "page")]) == 0
    table = [line.split(",") for line in (site.parent / "page" / "results.csv").read_text().splitlines()]
    assert {line[0] for line in table[1:]} == {"mine_data:Mine-v0"}
    assert {line[1] for line in table[1:]} == {"linear on mine-small", "linear on more.hdf5"}
    said = " ".join("".join(capsys.readouterr()).split())
    assert "Scaled by mine's reference returns for mine, but data or environment are not mine's: do not" in said
    words = ["augment", "gaussian", "mine-small", "--steps", "50", "--no-report", "--out", str(site.parent / "m.hdf5")]
    assert main(words) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    words = ["train", *said.partition("To train on it: diffrl train ")[2].split()]
    assert words[-2:] == ["--env", "mine_data:Mine-v0"]  # a file may not import it
    words += ["--steps", "4", "--eval-episodes", "1", "--out", str(site.parent / "on-more")]
    assert main(words) == 0
    assert json.loads((site.parent / "on-more" / "scores.json").read_text())["evaluations"]
    most, on_most = site.parent / "most.hdf5", site.parent / "on-most"
    inside = ["--env", "mine_data:Mine-v0"]
    words = ["augment", "gaussian", str(site.parent / "m.hdf5"), *inside, "--steps", "50", "--no-report"]
    assert main([*words, "--out", str(most)]) == 0
    words = ["train", "--agent", "linear", "--dataset", str(most), *inside, "--steps", "4"]
    assert main([*words, "--eval-episodes", "1", "--out", str(on_most)]) == 0  # of rows of rows of the family
    twice, once = (json.loads((site.parent / n / "scores.json").read_text()) for n in ("on-most", "on-more"))
    assert twice["reference"] == once["reference"] == "mine-small"
    made = d4rl.read(more)
    assert made.metadata["algorithm"] == "A Gaussian (Gauss 1809), mine 1.0"
    assert np.cov(made.observations[:, 0], made.actions[:, 0])[0, 1] == pytest.approx(1 / 6, abs=0.02)  # a = s / 2
    assert min(json.loads((run / "evaluation.json").read_text())["last"]["scores"][0]) > 95
    images = torch.zeros(1, 3, 4, 4)
    images[:, 0] = 1
    assert ask(parse("redness"), images, ["p"]).item() == pytest.approx(2 / 3)
    assert "Mean red less the mean of all channels (mine)" in listing()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("was", "gives", "said"),
    [
        (
            "loss.detach()}",
            "loss.detach().mean()}",
            "update gave the metric 'bc_loss' of shape (); expected a tensor (2,)",
        ),
        ("loss.detach()}", "loss.detach()[None]}", "update gave the metric 'bc_loss' of shape (1, 2); expected"),
        ("loss.detach()}", "float(loss.mean())}", "update gave the metric 'bc_loss' as float; expected a tensor (2,)"),
        ('return {"bc_loss"', '{"bc_loss"', "update gave NoneType; expected metrics by name, each a tensor (2,)"),
        (".clamp(-1, 1)", "[0]", "act gave actions of shape (2, 1); expected a tensor (2, 2, 1): seeds, observations,"),
        (".clamp(-1, 1)", ".numpy()", "act gave actions as ndarray; expected a tensor (2, 2, 1)"),
        (".clamp(-1, 1)", " * 0 - 3", "act gave an action of 3 (its absolute value); expected actions in [-1, 1]"),
    ],
)
def test_what_breaks_an_agents_contract_is_named(
    site: Path, capsys: pytest.CaptureFixture[str], was: str, gives: str, said: str
) -> None:
    """In one sentence: the agent's class, what it gave, what is expected; but for values after the first step."""
    assert was in AGENT
    config = CONFIG.replace("toy_agent", "odd_agent")
    source = AGENT.replace(was, gives).replace("ToyAgent", "OddAgent")
    modules = {"toy_config": config.replace("ToyAgent", "OddAgent"), "odd_agent": source, "toy_world": WORLD}
    install(site, "toy-package", GROUPS, **modules)
    words = ["train", "--agent", "toy", "--dataset", "toyfam-small", "--steps", "4", "--eval-episodes", "2"]
    words += ["--seeds", "0", "1", "--workers", "1", "--eval-workers", "0", "--out", str(site.parent / "run")]
    try:
        assert main(words) == 2
    finally:
        sys.modules.pop("odd_agent", None)
    assert f"OddAgent.{said}" in " ".join(capsys.readouterr().err.split())
    assert bool(list((site.parent / "run").glob("checkpoints/*[1-9]"))) == ("an action of 3" in said)


def test_an_agent_that_is_not_made_as_one_is_refused_and_the_rest_of_doctors_page_is_there(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = AGENT.replace("super().__init__(config, observation_size, action_size, seeds, device)", "pass")
    source = source.replace(source[source.index("        self.actor = ") : source.index("    def update")], "")
    modules = {"toy_config": CONFIG.replace("toy_agent", "bare_agent"), "bare_agent": source, "toy_world": WORLD}
    install(site, "toy-package", GROUPS, **modules)
    said = (
        "ToyAgent has no config, networks, optimisers and step: its __init__ is to begin with super().__init__(config,"
    )
    words = ["train", "--agent", "toy", "--dataset", "toyfam-small", "--steps", "4", "--out", str(site.parent / "run")]
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert main(["doctor", "--no-rendering"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert "toyfam of toy-package" in shown


def test_a_packages_agent_is_trained_from_python_by_its_name(site: Path) -> None:
    """As `diffrl train --agent toy --dataset toyfam-small` trains it; alone it says what else is expected."""
    install(site, "toy-package", GROUPS, toy_config=CONFIG, toy_agent=AGENT, toy_world=WORLD)
    config = configuration("toy", dataset="toyfam-small", agent={"learning_rate": 0.5})
    assert config == TrainConfig(dataset="toyfam-small", agent=agents.get("toy")(learning_rate=0.5))
    for ask_for in (configuration, find):
        with pytest.raises(UserError, match="toy is an agent, and no configuration: "):
            ask_for("toy")


def test_a_packages_agent_without_a_generative_model_is_not_diagnosed(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its networks are called."""
    source = AGENT.replace('self.networks = {"actor"', 'self.networks = {"net"')
    modules = {"toy_config": CONFIG.replace("toy_agent", "net_agent"), "net_agent": source, "toy_world": WORLD}
    install(site, "toy-package", GROUPS, **modules)
    run = site.parent / "run"
    words = ["train", "--agent", "toy", "--dataset", "toyfam-small", "--steps", "4", "--out", str(run)]
    assert main([*words, "--eval-episodes", "1", "--workers", "1", "--eval-workers", "0"]) == 0
    assert main(["diagnose", str(run)]) == 2
    assert "The agent toy has no generative model of actions to diagnose" in capsys.readouterr().err


def test_listings_name_what_other_packages_bring(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        with contextlib.suppress(SystemExit):  # as --help ends
            assert main([*words]) == 0
        return capsys.readouterr().out

    install(site, "toy-package", GROUPS, toy_config=CONFIG, toy_agent=AGENT, toy_world=WORLD)
    help_text = " ".join(said("train", "--help").replace("│", "").split())
    assert "fql, bfn, qam, dtql, rlpd, diffuser, toy (toy-package)." in help_text
    assert "--agent.learning-rate" in said("train", "--agent", "toy", "--help")
    shown = said("data", "list", "toyfam").splitlines()
    lines = [line.split() for line in shown if line.startswith("toyfam")]
    assert lines[0] == ["toyfam-small", "by", "toy-package", "-", "toy_world:Halve-v0", "-2.50", "0.00"]
    assert len(lines) == 2
    assert "- A toy." in shown
    assert "by PACKAGE: that package makes, fetches or reads it" in " ".join(shown)
    assert "here: on this machine" not in " ".join(shown)
    about = said("data", "info", "toyfam-small")
    assert "400 rows, 80 episodes" in about
    assert "\nenvironment: toy_world:Halve-v0, from the data family\n" in about
    assert "may not" not in about
    assert "read 1 remark" in about  # of the rewards, which are all 0


@pytest.mark.parametrize(
    ("source", "name", "why"),
    [
        ("raise ImportError('of no use')", "Toy", "its import fails with ImportError: of no use"),
        ("Toy = 3", "Toy", "it is 3; expected a subclass of agents.AgentConfig"),
        (CONFIG.replace("@dataclass(frozen=True)", ""), "Toy", r"not a @dataclass\(frozen=True\)"),
        (CONFIG.replace("implementation", "other"), "Toy", "no method `implementation`"),
        (CONFIG.replace('"toy"', '"boy"'), "Toy", "called 'boy'; expected name = 'toy'"),
        (
            CONFIG.replace("    learning", '    policy_kind: ClassVar[str] = "planer"\n    learning'),
            "Toy",
            "policy_kind is 'planer'; expected one of deterministic, .*, planner",
        ),
    ],
)
def test_an_agent_that_cannot_be_used_is_refused_with_the_reason(site: Path, source: str, name: str, why: str) -> None:
    module = f"broken_{abs(hash(source))}"
    install(site, "toy-package", {"diffrl.agents": {"toy": f"{module}:{name}"}}, **{module: source})
    with pytest.raises(UserError, match=f"The agent 'toy' of toy-package .* cannot be used: .*{why}"):
        agents.get("toy")
    assert issubclass(agents.get("bc"), AgentConfig)


def test_a_name_of_our_own_stays_ours(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is installed; what is left out is said where the name is asked for, and in lists."""
    install(site, "toy-package", {"diffrl.agents": {"bc": "toy:Toy"}, "diffrl.datasets": {"hopper": "toy:FAMILY"}})
    assert agents.get("bc") is agents.BC
    with pytest.raises(UserError, match=r"family of data sets 'hopper' of toy-package .* one of diffrl's own"):
        datasets.locate("hopper-mine-v0")
    assert datasets.locate("hopper-medium-v2").kind == "d4rl"
    assert "bc (toy-package; left out: the name is that of one of diffrl's own" in agents.listed()[-1]
    assert "bc" in agents.having("width")
    for words in (
        ["--agent", "bc", "--dataset", "maze2d-umaze-v1"],
        ["--agent", "iql", "--dataset", "hopper-medium-v2"],
    ):
        main(["train", *words, "--rows", "300", "--steps", "1", "--eval-episodes", "1", "--no-compile"])
        what = {"bc": "agent 'bc'", "iql": "family of data sets 'hopper'"}[words[1]]
        said = " ".join("".join(capsys.readouterr()).split())
        assert said.count("one of diffrl's own, which is used instead. Mend, update or uninstall toy-package") == 1
        assert f"The {what} of toy-package" in said


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "from no_such_module import It",
            "implementation() fails with ModuleNotFoundError: No module named 'no_such_module' ({file}, line 14)",
        ),
        ("import sys; sys.exit(4)", "implementation() fails with SystemExit: 4 ({file}, line 14)"),
        ("return int", "implementation() gives <class 'int'>; expected a subclass of agents.base.Agent"),
    ],
)
def test_an_implementation_that_gives_no_agent_is_refused_with_the_reason(
    site: Path, body: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = CONFIG.replace("from toy_agent import ToyAgent", body)
    install(site, "toy-package", GROUPS, toy_config=source, toy_world=WORLD)
    words = ["train", "--agent", "toy", "--dataset", "toyfam-small", "--steps", "4", "--out", str(site.parent / "run")]
    assert main(words) == 2
    why = why.format(file=site / "toy_config.py")
    said = (
        f"The agent 'toy' of toy-package (toy_config:Toy) cannot be used: {why}. Mend, update or uninstall toy-package."
    )
    assert said in capsys.readouterr().err
    assert main(["doctor", "--no-rendering"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.long
def test_a_run_whose_data_no_package_here_has_is_reported_as_it_was_scored(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "toy-package", GROUPS, toy_config=CONFIG, toy_agent=AGENT, toy_world=WORLD)
    small = ["--agent", "bc", "--steps", "2", "--eval-episodes", "2", "--no-compile", "--seeds", "0", "1"]
    ours, theirs = site.parent / "ours", site.parent / "theirs"
    for run, data in ((ours, ["maze2d-umaze-v1", "--rows", "300"]), (theirs, ["toyfam-small"])):
        assert main(["train", *small, "--dataset", *data, "--out", str(run)]) == 0
    page, results = ["--out", str(site.parent / "page")], site.parent / "page" / "results.csv"
    assert main(["report", str(ours), str(theirs), *page]) == 0
    assert "Left out" not in capsys.readouterr().out
    before = results.read_text()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    assert main(["report", str(ours), str(theirs), *page]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "The package whose benchmark is toyfam-small is not installed here, or cannot be used: scores are as" in said
    assert "Left out" not in said
    assert results.read_text() == before
    with pytest.raises(UserError, match=r"scores of a task that is not known here\. Unknown benchmark 'toyfam-small'"):
        Policies.of_runs([theirs])


def test_settings_of_an_agent_that_is_not_here_are_fields_as_they_are_written() -> None:
    absent = agents.get_or_absent("toy", {"width": "wide", "own": [1, {"a": 2}]})(width="wide", own=[1, {"a": 2}])
    assert dataclasses.asdict(absent) | {"width": "wide", "own": [1, {"a": 2}]} == dataclasses.asdict(absent)
    assert (absent.name, absent.untrained_steps) == ("toy", 0)
    with pytest.raises(UserError, match="Unknown agent 'toy'"):
        absent.implementation()
    for key in ("__class__", "a b", 3):
        with pytest.raises(UserError, match="can be no field's name"):
            agents.get_or_absent("toy", {key: 1})
    assert agents.get_or_absent("bc", {}) is agents.get("bc")


@pytest.mark.long
def test_a_run_whose_agents_package_is_gone_is_reported(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table needs no agent's code: it is the same table, with a note; what acts needs it still."""
    install(site, "toy-package", GROUPS, toy_config=CONFIG, toy_agent=AGENT, toy_world=WORLD)
    small = ["--dataset", "maze2d-umaze-v1", "--rows", "300", "--steps", "2", "--eval-episodes", "2", "--no-compile"]
    runs, page = [site.parent / name for name in ("slow", "fast", "bc")], site.parent / "page"
    for run, agent in zip(runs, (["toy"], ["toy", "--agent.learning-rate", "0.5"], ["bc"]), strict=True):
        assert main(["train", *small, "--seeds", "0", "1", "--agent", *agent, "--out", str(run)]) == 0
    tables = []
    for gone in (False, True):
        if gone:
            monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
        capsys.readouterr()
        assert main(["report", *map(str, runs), "--out", str(page)]) == 0
        tables.append((page / "results.csv").read_text())
        said = " ".join("".join(capsys.readouterr()).split())
        note = "The package of its agent, toy (toy-package 1.0), is not installed here, or cannot be used"
        assert (note in said) == gone
        assert "Left out" not in said
    assert tables[0] == tables[1]
    assert "toy learning_rate=0.5" in tables[1]
    assert main(["evaluate", str(runs[0])]) == 2
    assert "Unknown agent 'toy'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"No run has scores to report\. Unknown agent 'toy'"):
        Policies.of_runs(runs[:1])
    assert {policy.agent for policy in Policies.of_runs(runs).all} == {"bc"}


def family(site: Path, source: str) -> Any:
    module = f"broken_{abs(hash(source))}"
    return install(site, "toy-package", {"diffrl.datasets": {"toyfam": f"{module}:FAMILY"}}, **{module: source})


@pytest.mark.parametrize(
    ("source", "why", "listed"),
    [
        ("FAMILY = []", r"it is \[\]; expected an envs.registry.DataFamily", False),
        (WORLD.replace('"toyfam-large")', '"large")'), "its id 'large' does not begin with 'toyfam-'", False),
        (WORLD.replace("-2.5, 0.0", "3.0, 3.0"), "ref_min is 3.0 and ref_max 3.0; expected two finite returns", False),
        (WORLD.replace("-2.5, 0.0", "'0', '1'"), "ref_min is '0' and ref_max '1'; expected", False),
        (WORLD.replace("-2.5, 0.0", "None, 0.0"), "ref_min is None and ref_max 0.0; expected", False),
        (WORLD.replace("in NAMES]", "in NAMES + NAMES]"), "it has the id 'toyfam-small' twice", False),
        (WORLD.replace("rng = ", "1 / 0; rng = "), r"load\('toyfam-small'\) fails with ZeroDivisionError", True),
        (WORLD.replace("return Offline", "return ['a list'] or Offline"), "gives list; expected", True),
    ],
)
def test_a_family_that_cannot_be_used_is_refused_with_the_reason(
    site: Path, source: str, why: str, listed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a list of data sets says so, and goes on, where it can tell."""
    family(site, source)
    with pytest.raises(UserError, match=f"data sets 'toyfam' of toy-package .* cannot be used: .*{why}"):
        datasets.load_dataset("toyfam-small")
    assert ListData("-small" if listed else "maze2d-umaze-v1").run() == 0
    shown = capsys.readouterr().out
    assert ("cannot be used" in shown) == (not listed)
    assert ("\ntoyfam-small" in shown) == listed


def test_a_familys_data_are_checked_and_cut_as_any_other(site: Path) -> None:
    family(site, WORLD.replace("s / 2,", "s * 3,"))
    with pytest.raises(DataError, match="toyfam-small: actions: row"):
        datasets.load_dataset("toyfam-small")
    loaded = datasets.load_dataset("toyfam-small", rows=7, action_limit=None)
    assert len(loaded) == 7
    assert loaded.timeouts[-1]
    assert loaded.metadata == {"dataset": "toyfam-small", "env_id": "toy_world:Halve-v0"}
    for act in (datasets.download, datasets.generate):
        with pytest.raises(UserError, match="makes or fetches it itself"):
            act("toyfam-small")
    with pytest.raises(UserError, match="did you mean 'toyfam-small'"):
        datasets.load_dataset("toyfam-smal")
    assert registry.get("toyfam-large").normalised_score([-1.25]).tolist() == [50.0]
