"""What an agent of another package must keep to, tried with one that keeps to it until a line is changed."""

import copy
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import agents
from agents import contract
from agents.base import Agent
from agents.planning import Follower, Planner
from agents.td3_bc import TD3BCAgent
from diffrl.cli import main
from diffrl.data.transitions import Transitions
from diffrl.nets import Adam
from diffrl.support.errors import UserError
from diffrl.training.compilation import compile_agent
from diffrl.training.stack import StackTrainer
from tests.support.plugin_cases import install
from tests.test_plugins import AGENT, CONFIG, GROUPS, WORLD


def trained(of: Callable[[Agent], None] = lambda agent: None, steps: int = 12, **methods: Any) -> Agent:
    """TD3+BC as another package's agent, whose attributes are added to by `of`, after some steps of two seeds."""

    class Theirs(TD3BCAgent):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            of(self)

    for name, method in methods.items():
        setattr(Theirs, name, method)

    @dataclass(frozen=True)
    class Settings(agents.TD3BC):
        def implementation(self) -> type[Agent]:
            return Theirs

    Settings.__module__ = "theirs"
    agent = Settings(width=8, layers=1).build(3, 2, (0, 1))
    rows = torch.rand(64, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[:, -2], rows[:, -1] = 0, torch.arange(64)
    trainer = StackTrainer(agent, Transitions(rows, 3, 2), 4, torch.Generator().manual_seed(1))
    for _ in range(steps):
        trainer.advance(1, lambda: False)
    return agent


def network(agent: Agent) -> nn.Module:
    return next(iter(agent.networks.values()))


def forget(name: str) -> Callable[[Agent], None]:
    return lambda agent: agent.networks.pop(name) and None


def test_a_network_that_is_forgotten_is_named_at_the_end_of_the_first_period() -> None:
    """TD3+BC's actor moves in every second step: the first alone does not show that it would be lost."""
    trained(forget("actor"), steps=1)
    with pytest.raises(UserError, match=r"^Theirs trains \S*actor\S*, .*which no checkpoint would hold: put each"):
        trained(forget("actor"), steps=2)
    with pytest.raises(UserError, match=r"Theirs trains \S*critic"):
        trained(forget("critic"), steps=2)


def test_an_optimiser_that_is_forgotten_is_named() -> None:
    def of(agent: Agent) -> None:
        agent.hidden = {"critic": agent.optimisers.pop("critic")}  # type: ignore[attr-defined]
        agent.optimisers["critic"] = Adam(copy.deepcopy(agent.networks["critic"]), 1e-3)

    def update(self: Any, batch: Any, generator: torch.Generator, phase: int = 0) -> Any:
        kept = self.optimisers
        self.optimisers = kept | self.hidden
        try:
            return TD3BCAgent.update(self, batch, generator, phase)
        finally:
            self.optimisers = kept

    with pytest.raises(UserError, match=r"Theirs trains hidden\['critic'\]\._"):
        trained(of, update=update)


def test_what_is_trained_outside_of_modules_and_by_torchs_optimisers_is_seen() -> None:
    """A loose tensor, three containers deep, and the momentum of torch's SGD."""

    def of(agent: Any) -> None:
        agent.box = {"a": [{"alpha": torch.zeros(2, requires_grad=True)}]}
        agent.sgd = torch.optim.SGD([agent.box["a"][0]["alpha"]], 0.1, momentum=0.9)

    def update(self: Any, batch: Any, generator: torch.Generator, phase: int = 0) -> Any:
        self.sgd.zero_grad()
        (self.box["a"][0]["alpha"] - 1).square().sum().backward()
        self.sgd.step()
        return TD3BCAgent.update(self, batch, generator, phase)

    with pytest.raises(UserError, match=r"Theirs trains box\['a'\]\['alpha'\], which no checkpoint"):
        trained(of, update=update)

    def state_dict(self: Any) -> dict[str, Tensor]:
        return {**TD3BCAgent.state_dict(self), "alpha": self.box["a"][0]["alpha"].detach().clone()}

    trained(of, update=update, state_dict=state_dict)  # a copy holds it too


@pytest.mark.parametrize(
    "of",
    [
        lambda agent: setattr(agent, "teacher", copy.deepcopy(network(agent)).eval()),
        lambda agent: setattr(agent, "random", nn.Linear(3, 8)),
        lambda agent: setattr(agent, "alias", [network(agent)]),
        lambda agent: setattr(agent, "planning", torch.optim.Adam([torch.zeros(2, requires_grad=True)])),
        lambda agent: setattr(agent, "lazy", nn.LazyLinear(4)),
        lambda agent: setattr(agent, "x", torch.zeros(3, requires_grad=True)),
        lambda agent: setattr(agent, "empty", nn.Linear(0, 0)),
        lambda agent: setattr(agent, "me", {"agent": agent}),
    ],
    ids=["teacher", "random target", "alias", "planner's optimiser", "lazy", "input", "empty", "itself"],
)
def test_what_is_not_trained_may_be_anywhere(of: Callable[[Agent], None]) -> None:
    """And changes no number."""
    plain, other = trained(), trained(of)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert "update" not in vars(other)


def test_a_state_of_copies_holds_what_it_copies() -> None:
    trained(state_dict=lambda self: {name: t.clone() for name, t in TD3BCAgent.state_dict(self).items()})


@pytest.mark.parametrize(
    ("methods", "why"),
    [
        ({"update": lambda self, batch: {}}, r"update takes \(batch\); expected \(batch, generator, phase\)"),
        ({"act": lambda self, observations: 0}, r"act takes \(observations\); expected \(observations, generator\)"),
        ({"act": lambda self, s, *, generator: 0}, r"act takes \(s, \*, generator\); expected"),
    ],
)
def test_methods_that_take_something_else_are_refused_before_anything_is_trained(
    methods: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=f"Theirs.{why}"):
        trained(steps=0, **methods)


@pytest.mark.parametrize("name", agents.AGENTS)
def test_our_agents_keep_to_it(name: str) -> None:
    """All methods, and all that a few steps change."""
    more = {"horizon": 8} if name == "diffuser" else {"actor_every": 2} if name == "rlpd" else {}
    agent = agents.get(name)(width=8, layers=1, batch_size=4, **more).build(3, 2, (0, 1))
    contract.check(agent)

    def refuse(why: str) -> Exception:
        return AssertionError(why)

    contract.watch(agent, refuse)
    rows = torch.rand(64, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[:, -2], rows[:, -1] = 0, torch.arange(64)
    trainer = StackTrainer(agent, agent.source(Transitions(rows, 3, 2)), 4, torch.Generator().manual_seed(1))
    for _ in range(agent.period + 1):
        trainer.advance(1, lambda: False)
    assert "update" not in vars(agent)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path that packages are installed into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before: dict[str, ModuleType] = dict(sys.modules)
    yield folder
    for module in set(sys.modules) - set(before):
        if module.startswith(("toy_", "odd_")):
            sys.modules.pop(module)


@pytest.mark.parametrize(
    ("was", "gives", "why"),
    [
        ("        self.step += 1\n", "", "ToyAgent.update counts 0 steps; expected 1, by `self.step += 1`."),
        (
            'self.networks = {"actor": self.actor}',
            "pass",
            "ToyAgent trains actor.weight and actor.bias, which no checkpoint",
        ),
        (
            'self.networks = {"actor": self.actor}',
            "1 / 0",
            "ToyAgent(...) fails with ZeroDivisionError: division",
        ),
        ("observation_size, action_size, seeds, device):", "size):", "TypeError: ToyAgent.__init__() takes 3"),
    ],
)
def test_the_command_names_the_package(
    site: Path, capsys: pytest.CaptureFixture[str], was: str, gives: str, why: str
) -> None:
    """In one line, and where in its code; a run that is refused in its first steps may be begun anew after the mend."""
    assert was in AGENT
    module = f"odd_{abs(hash(gives))}"
    modules = {module: AGENT.replace(was, gives), "toy_config": CONFIG.replace("toy_agent", module)}
    install(site, "toy-package", GROUPS, toy_world=WORLD, **modules)
    words = ["train", "--agent", "toy", "--dataset", "toyfam-small", "--steps", "4", "--out", str(site.parent / "run")]
    assert main([*words, "--workers", "1", "--eval-workers", "0"]) == 2
    said = capsys.readouterr().err
    assert "The agent 'toy' of toy-package (toy_config:Toy) cannot be used: " in said
    assert why in said
    if gives == "1 / 0":
        assert f"({site / module}.py, line " in said


PLANNER = AGENT.replace("import Agent\n", "import Agent\nfrom agents.planning import Planner\n").replace(
    "ToyAgent(Agent)", "ToyAgent(Planner)"
)
PLANNER = (
    PLANNER.partition("    @torch.no_grad()")[0]
    + """
    replan_every, reaches_goal = 3, False

    @torch.no_grad()
    def plan(self, observations, generator):
        first = self.actor(observations).clamp(-1, 1)
        return torch.stack([first] * 3, 2)

    def follow(self, plans, t, observations):
        index = t[..., None, None].expand(*t.shape, 1, self.action_size)
        return plans.gather(2, index).squeeze(2)
"""
)
PLANS = ('"toy"\n', '"toy"\n    policy_kind: ClassVar[str] = "planner"\n')
"""In the settings: that the agent plans."""


def trained_by_command(site: Path, agent: str, config: str) -> tuple[int, Path]:
    """What `diffrl train` of a package's agent ends with, two seeds of four steps, evaluated in episodes of 5."""
    module = f"odd_{abs(hash(agent))}"
    modules = {module: agent, "toy_config": config.replace("toy_agent", module), "toy_world": WORLD}
    install(site, "toy-package", GROUPS, **modules)
    run = site.parent / "run"
    words = ["train", "--agent", "toy", "--dataset", "toyfam-small", "--steps", "4", "--eval-episodes", "2"]
    words += ["--seeds", "0", "1", "--workers", "1", "--eval-workers", "0", "--out", str(run)]
    return main(words), run


def test_asking_an_agent_to_act_leaves_it_as_it_is() -> None:
    """Also one that keeps what it saw, and one that draws of NumPy, Python and torch; one that fails is left alone."""

    def act(self: Any, observations: Tensor, generator: torch.Generator) -> Tensor:
        self.hidden = getattr(self, "hidden", 0) + torch.zeros(observations.shape[1])
        self.networks["actor"].first.bias.data += np.random.random() + random.random()  # noqa: NPY002
        return torch.rand(*observations.shape[:2], 2)

    np.random.seed(0), random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    other = trained(act=act)
    drawn = np.random.random(), random.random(), torch.rand(1)  # noqa: NPY002
    np.random.seed(0), random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    assert drawn == (np.random.random(), random.random(), torch.rand(1))  # noqa: NPY002
    assert not hasattr(other, "hidden")
    for name, tensor in trained().state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name

    def fails(self: Any, observations: Tensor, generator: torch.Generator) -> Tensor:
        raise RuntimeError("not yet")

    trained(act=fails)
    with pytest.raises(UserError, match=r"Theirs.act gave actions of shape \(2, 2\); expected a tensor \(2, 2, 2\)"):
        trained(act=lambda self, observations, generator: observations[..., 0])


def test_what_is_wrong_with_an_agent_is_no_fault_of_the_compiler() -> None:
    def act(self: Any, observations: Tensor, generator: torch.Generator) -> Tensor:
        return observations[..., 0]

    agent = trained(steps=0, act=act, compilable=())
    table = torch.rand(64, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    table[:, -2], table[:, -1] = 0, torch.arange(64)
    with pytest.raises(UserError, match=r"Theirs\.act gave actions of shape"):
        compile_agent(agent, agent.config, Transitions(table, 3, 2), say=lambda text: None)


def test_a_packages_planner_is_trained_and_its_online_run_refused(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rc, run = trained_by_command(site, PLANNER, CONFIG.replace(*PLANS))
    assert rc == 0
    assert main(["online", str(run), "--out", str(site.parent / "online")]) == 2
    assert "learns from whole segments of data: it cannot go on from single steps" in capsys.readouterr().err
    assert not (site.parent / "online").exists()


def test_a_packages_agent_of_segments_is_refused_online_as_one_of_segments(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose settings know no chunks."""
    stepwise = "    @property\n    def stepwise(self):\n        return False\n\n    def implementation"
    rc, run = trained_by_command(site, AGENT, CONFIG.replace("    def implementation", stepwise))
    assert rc == 0
    assert main(["online", str(run)]) == 2
    assert (
        "is of the agent toy, which as it is set learns from whole segments of data: it cannot go on from single steps "
        "in its environment. Start from a run of another agent."
    ) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("agent", "planner", "why"),
    [
        (PLANNER, False, "ToyAgent is a Planner, and policy_kind of Toy is 'deterministic'; expected policy_kind ="),
        (AGENT, True, "Toy says that it plans (policy_kind), and ToyAgent is no agents.planning.Planner."),
        (PLANNER.replace("= 3,", "= 0,"), True, "is 0; expected a"),
        (PLANNER.replace("= 3,", "= 2.5,"), True, "ToyAgent.replan_every is 2.5; expected a whole number of steps"),
    ],
)
def test_a_planner_that_is_none_by_its_settings_is_refused_before_it_is_trained(
    site: Path, capsys: pytest.CaptureFixture[str], agent: str, planner: bool, why: str
) -> None:
    rc, run = trained_by_command(site, agent, CONFIG.replace(*PLANS) if planner else CONFIG)
    assert rc == 2
    said = capsys.readouterr().err
    assert "The agent 'toy' of toy-package (toy_config:Toy) cannot be used: " in said
    assert why in said
    assert not any(run.glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("was", "gives", "why"),
    [
        ("[first] * 3, 2)", "[first] * 3, 2)[0]", "plan gave plans of shape (2, 3, 1); expected a tensor (2, 2, ...):"),
        ("[first] * 3, 2)", "[first] * 3, 2).numpy()", "plan gave plans as ndarray; expected a tensor (2, 2, ...):"),
        (
            "= 3,",
            "= 4,",
            "follow fails 3 steps after its plans of shape (1, 2, 3, 1) were made (RuntimeError: index 3 is out of "
            "bounds for dimension 2 with size 3); expected actions for replan_every = 4 steps.",
        ),
        ("= 3,", "= None,", "expected actions until the episode ends (replan_every = None)."),
    ],
)
def test_plans_of_another_shape_are_named(
    site: Path, capsys: pytest.CaptureFixture[str], was: str, gives: str, why: str
) -> None:
    assert was in PLANNER
    rc, run = trained_by_command(site, PLANNER.replace(was, gives), CONFIG.replace(*PLANS))
    assert rc == 2
    assert why in capsys.readouterr().err
    assert any(run.glob("checkpoints/*[1-9]")) == (was == "= 3,")  # its shape is seen after the first step


def test_plans_that_change_their_shape_are_named() -> None:
    class Shrinks(Planner):
        replan_every = 1

        def update(self, batch: Any, generator: torch.Generator, phase: int = 0) -> Any:
            return {}

        def plan(self, observations: Tensor, generator: torch.Generator) -> Tensor:
            self.H = getattr(self, "H", 4) - 1
            return torch.zeros(*observations.shape[:2], self.H, 2)

        def follow(self, plans: Tensor, t: Tensor, observations: Tensor) -> Tensor:
            return plans[:, :, 0]

    follower = Follower(Shrinks(agents.BC(), 3, 2, (0,), "cpu"), torch.Generator())
    follower(torch.zeros(1, 5, 3))
    with pytest.raises(UserError, match=r"Shrinks.plan gave plans of shape \(1, 5, 2, 2\) after \(1, 5, 3, 2\)"):
        follower(torch.zeros(1, 5, 3))
