"""A policy takes what an environment gives, refuses what means nothing, and draws the noise that is asked for."""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import diffrl
from diffrl.data.observations import Part
from diffrl.runs.export.export import export
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from envs.task import Task
from tests.runs.made_runs import MAZE, made_run, observations_of, small

Box, Dict, Tuple = gymnasium.spaces.Box, gymnasium.spaces.Dict, gymnasium.spaces.Tuple
BETWEEN: dict[str, gymnasium.Space[Any]] = {
    "Dictionary-v0": Dict({"pos": Box(-9, 9, (2,)), "goal": Box(-9, 9, (2,))}),
    "Nested-v0": Dict({"world": Dict({"b": Box(-9, 9, (1, 2)), "a": Box(-9, 9, ())}), "goal": Box(-9, 9, (1,))}),
    "Tuple-v0": Tuple((Box(-9, 9, (3,)), Box(-9, 9, (1,)))),
}
"""Observations of four numbers in several parts, by the ids of environments that give them."""


class Drawn(gymnasium.Env[Any, Any]):
    """Observations drawn anew at each step from any space."""

    action_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, space: gymnasium.Space[Any]) -> None:
        self.observation_space = space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for name, space in BETWEEN.items():
        gymnasium.register(name, Drawn, kwargs={"space": space}, max_episode_steps=3)
    yield
    for name in BETWEEN:
        del gymnasium.registry[name]


def stacked(given: Any) -> Any:
    """The same observation twice, as a vectorised environment gives several."""
    if isinstance(given, dict):
        return {key: stacked(part) for key, part in given.items()}
    return tuple(map(stacked, given)) if isinstance(given, tuple) else np.stack([given, given])


@pytest.mark.parametrize(
    ("env", "parts", "order"),
    [
        ("Dictionary-v0", None, lambda o: [o["goal"], o["pos"]]),
        ("Dictionary-v0", ("pos", "goal"), lambda o: [o["pos"], o["goal"]]),
        ("Nested-v0", None, lambda o: [o["goal"], o["world"]["a"], o["world"]["b"]]),
        ("Tuple-v0", None, lambda o: [*o]),
    ],
)
def test_observations_of_parts_are_taken_as_the_environment_gives_them(
    env: str, parts: tuple[str, ...] | None, order: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """By the run's policy and by the exported one, which makes no environment: joined as training has joined them."""
    run = made_run(tmp_path / "run", small("bc"), Task(env, {}, None, False, observation_parts=parts))
    to = export(run, tmp_path / "to")
    given = gymnasium.make(env).reset(seed=1)[0]
    vector = np.concatenate([np.ravel(part) for part in order(given)])
    np.testing.assert_array_equal(Run.read(run).task.make().reset(seed=1)[0], vector)
    policy = diffrl.load_policy(run)
    expected, twice = policy(vector), policy(np.stack([vector, vector]))
    assert expected.shape == (2,)
    assert not np.array_equal(expected, policy(vector[::-1]))
    np.testing.assert_array_equal(policy(given), expected)
    monkeypatch.setattr(Task, "make", lambda self: pytest.fail("an environment was made"))
    exported = diffrl.load_policy(to)
    for one in (exported, pickle.loads(pickle.dumps(exported))):
        np.testing.assert_array_equal(one(given), expected)
        np.testing.assert_array_equal(one(stacked(given)), twice)
    card = (to / "README.md").read_text()
    assert "The environment's observations are a " in card
    assert "joined in this order: " in card


def test_parts_that_are_none_of_the_policys_are_named(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", small("bc"), Task("Dictionary-v0", {}, None, False))
    pos, goal = np.zeros(2), np.zeros((5, 2))
    cases: list[tuple[Any, str]] = [
        ({"pos": pos}, r"of the parts goal \(2\), pos \(2\), got the keys pos"),
        ((pos, pos), r"of the parts goal \(2\), pos \(2\), got \(array"),
        ({"pos": pos, "goal": goal}, r"as many rows of each part of the observations, got goal \(2\) \(5,\), pos"),
        ({"pos": pos, "goal": np.zeros(3)}, r"the part goal \(2\) of an observation, or rows of it, got \(3,\)"),
        ({"pos": pos, "goal": np.full(2, np.nan)}, "finite in float32, got nan"),
        ({"pos": pos, "goal": "there"}, r"the part goal \(2\) of an observation, of real numbers; got 'there'"),
    ]
    for policy in (diffrl.load_policy(run), diffrl.load_policy(export(run, tmp_path / "to"))):
        assert policy({"pos": goal[:0], "goal": goal[:0]}).shape == (0, 2)
        for given, words in cases:
            with pytest.raises(ValueError, match=words):
                policy(given)
    plain = diffrl.load_policy(made_run(tmp_path / "plain", small("bc"), Task(None, {}, None, False)))
    with pytest.raises(ValueError, match="got the keys goal, pos; nothing here says how these parts make a vector"):
        plain({"pos": pos, "goal": pos})


def test_what_reset_gives_is_not_taken_for_an_observation(tmp_path: Path) -> None:
    """Its info is dropped by the caller; a tuple whose second part is a dictionary is an observation all the same."""
    words = r"pass env\.reset\(\)\[0\], the observation without its info"
    for name in ("none", *BETWEEN):
        task = Task(None if name == "none" else name, {}, None, False)
        policy = diffrl.load_policy(made_run(tmp_path / name, small("bc"), task))
        given = np.zeros(4) if name == "none" else gymnasium.make(name).reset(seed=1)[0]
        policy(given)
        with pytest.raises(ValueError, match=words):
            policy((given, {}))
    space = Tuple((Box(-9, 9, (3,)), Dict({"a": Box(-9, 9, (1,))})))
    gymnasium.register("Second-v0", Drawn, kwargs={"space": space})
    try:
        policy = diffrl.load_policy(made_run(tmp_path / "second", small("bc"), Task("Second-v0", {}, None, False)))
        np.testing.assert_array_equal(policy((np.ones(3), {"a": [2]})), policy([1, 1, 1, 2]))
    finally:
        del gymnasium.registry["Second-v0"]


def test_an_exported_policy_goes_by_the_environment_that_is_named_as_its_run_does(tmp_path: Path) -> None:
    """One that is not there, or does not fit, is refused by both, of an agent that does not plan, too."""
    run = made_run(tmp_path / "run", small("bc"), Task("Dictionary-v0", {}, None, False))
    to = export(run, tmp_path / "to")
    given = gymnasium.make("Dictionary-v0").reset(seed=1)[0]
    expected = diffrl.load_policy(run)(given)
    for path in (run, to):
        for env, words in (("Nosuch-v4", "There is no environment 'Nosuch-v4'"), ("Pendulum-v1", "do not fit")):
            with pytest.raises(UserError, match=words):
                diffrl.load_policy(path, env=env)
        np.testing.assert_array_equal(diffrl.load_policy(path, env="Dictionary-v0")(given), expected)
        assert diffrl.load_policy(path, env="none").agent.observation_size == 4


def test_parts_in_a_file_that_do_not_fit_are_damage(tmp_path: Path) -> None:
    from tests.runs.test_export import rewritten, safetensors

    run = made_run(tmp_path / "run", small("bc"), Task("Dictionary-v0", {}, None, False))
    to = export(run, tmp_path / "to")
    tensors = safetensors.torch.load_file(to / "model.safetensors")
    one = {"path": ["pos"], "shape": [2]}
    wrong: list[Any] = [{"path": [], "shape": [2]}, {"path": ["b"], "shape": ["x"]}, {"path": "pos", "shape": [2]}]
    wrong += [3, {"path": ["b"], "shape": {}}]
    for parts in ([one], 3, {}, "", *([one, other] for other in wrong)):
        rewritten(to, tensors, observation_parts=parts)
        with pytest.raises(UserError, match=r"config.json is damaged: its observation_parts"):
            diffrl.load_policy(to)
    for settings, words in (({}, "observation_parts"), ({"needs": "mine 0.1"}, "needs and no observation_parts")):
        rewritten(to, tensors, observation_parts=[one, {"path": ["b"], "shape": [2]}], version=1, **settings)
        with pytest.raises(UserError, match=rf"config.json is damaged: form 1 has no {words}"):
            diffrl.load_policy(to)
    assert str(Part(("a", 0), (2, 3))) == "a/0 (2, 3)"


@pytest.mark.parametrize("named", [None, ("pos", "goal")])
def test_an_export_says_where_the_parts_cannot_be_learned(
    named: tuple[str, ...] | None, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """An environment that is not here costs the parts alone; a mistake of another kind is not hidden."""
    task = Task("Dictionary-v0", {}, None, False, observation_parts=named)
    run = made_run(tmp_path / "run", small("bc"), task)
    capsys.readouterr()
    export(run, tmp_path / "whole")
    assert "takes vectors alone" not in capsys.readouterr().err
    with monkeypatch.context() as without:
        without.delitem(gymnasium.registry, "Dictionary-v0")
        export(run, tmp_path / "to")
        out = " ".join(capsys.readouterr().err.split())
        assert ("takes vectors alone" in out, "no environment 'Dictionary-v0'" in out) == (named is not None,) * 2
        export(run, tmp_path / "quiet", quiet=True)
        assert not capsys.readouterr().err
    monkeypatch.setattr(Task, "parts", lambda self: self.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        export(run, tmp_path / "other")


# --- arrays ---------------------------------------------------------------------------------------------------------


def test_whatever_holds_the_same_numbers_is_the_same_observation(tmp_path: Path) -> None:
    policy = diffrl.load_policy(made_run(tmp_path / "run", small("bc"), MAZE))
    vector = np.array([1.0, 2.0, -1.0, 0.5], np.float32)
    expected = policy(vector)
    same: list[Any] = [
        vector.tolist(),
        tuple(vector.tolist()),
        tuple(vector),
        vector.astype(object),
        vector.astype(np.float64),
        torch.from_numpy(vector),
        torch.tensor(vector, dtype=torch.bfloat16, requires_grad=True),
    ]
    for given in same:
        np.testing.assert_array_equal(policy(given), expected)
    rows = policy(np.stack([vector, -vector]))
    np.testing.assert_array_equal(policy((vector, -vector)), rows)


def test_what_is_no_observation_is_refused_in_a_line_without_a_warning(tmp_path: Path) -> None:
    policy = diffrl.load_policy(made_run(tmp_path / "run", small("bc"), MAZE))
    cases: list[tuple[Any, str]] = [
        (np.ones(4) + 1j, "of real numbers; got .*complex128"),
        (torch.ones(4) + 1j, "of real numbers; got .*complex64"),
        ([1, 1, 0, 1e300], r"finite in float32, got 1e\+300"),
        ([1, 1, 0, None], "finite in float32, got nan"),
        (["a", "b", "c", "d"], "of real numbers; got .*type <U1"),
        ([[1, 2], [3]], r"expected observations of shape \(4,\) or \(B, 4\), got \[\[1, 2\], \[3\]\]: "),
        (([1, [2, 3]], 1), r"expected observations of shape \(4,\) or \(B, 4\), got a tuple; "),
        (np.zeros(3), r"expected observations of shape \(4,\) or \(B, 4\), got \(3,\)"),
        (3.0, r"got \(\)"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given, words in cases:
            with pytest.raises(ValueError, match=words) as caught:
                policy(given)
            assert "\n" not in str(caught.value)


# --- episodes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bc", "diffuser"])
def test_a_reset_of_rows_that_are_none_is_refused_whether_the_agent_plans_or_not(name: str, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", small(name, goal_reaching=False), MAZE)
    policy, x = diffrl.load_policy(run), observations_of(run, 3)
    with pytest.raises(ValueError, match="no rows"):
        policy.reset([-1])
    policy.reset([7])  # nothing says yet how many there are
    policy(x)
    for rows, words in (([3], r"no rows \[3\] of the 3 of"), ([0, -1], "no rows"), ([True], "each of the 3 rows")):
        with pytest.raises(ValueError, match=words):
            policy.reset(rows)
    for rows in ([0, 1, 0], np.array([1, 0, 1]), [2, 2]):
        with pytest.raises(ValueError, match=r"expected each row once, got \[.*a mask is to be boolean: mask\.astype"):
            policy.reset(rows)
    odd: list[Any] = ["x", 1, [0.5], [[0]], [None]]
    for wrong in odd:
        with pytest.raises(TypeError, match="expected rows as a list of numbers, or of a boolean for each row"):
            policy.reset(wrong)
    policy.reset([])
    policy(x)
    policy.reset()
    policy(x[:2])
    with pytest.raises(ValueError, match="no rows"):
        policy.reset([2])


def test_booleans_mean_the_rows_where_they_are_true(tmp_path: Path) -> None:
    """Of a planner, whose new plans differ: those that a vectorised environment says are over."""
    run = made_run(tmp_path / "run", small("diffuser", goal_reaching=False, replan_every=6), MAZE)
    x, actions = observations_of(run, 3), []
    for rows in ([2], np.array([False, False, True]), [0, 1]):
        policy = diffrl.load_policy(run)
        policy(x)
        policy.reset(rows)
        actions.append(policy(x))
    np.testing.assert_array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0], actions[2])


# --- loading --------------------------------------------------------------------------------------------------------


def test_another_noise_seed_is_other_noise_and_the_same_one_the_same(tmp_path: Path) -> None:
    """Of a run and of what was exported of it; the default is 0, and a policy that draws nothing has no use for it."""
    run = made_run(tmp_path / "run", small("diffusion_bc"), MAZE)
    x = observations_of(run)
    for path in (run, export(run, tmp_path / "to")):
        default, zero, one, again = (
            diffrl.load_policy(path, **given)(x)
            for given in ({}, {"noise_seed": 0}, {"noise_seed": 1}, {"noise_seed": 1})
        )
        np.testing.assert_array_equal(default, zero)
        np.testing.assert_array_equal(one, again)
        assert not np.array_equal(zero, one)
    fixed = made_run(tmp_path / "fixed", small("bc"), MAZE)
    np.testing.assert_array_equal(diffrl.load_policy(fixed)(x), diffrl.load_policy(fixed, noise_seed=7)(x))
    with pytest.raises(UserError, match="noise_seed is -1"):
        diffrl.load_policy(run, noise_seed=-1)


def test_what_is_no_path_is_refused_in_a_line(tmp_path: Path, monkeypatch: Any) -> None:
    """An empty text is no path to the folder that one is in, whatever that holds."""
    monkeypatch.chdir(export(made_run(tmp_path / "run", small("bc"), MAZE), tmp_path / "to"))
    with pytest.raises(UserError, match=r"^run is an empty text; expected the folder of a run"):
        diffrl.load_policy("")
    wrong: list[Any] = [3, None, b"run"]
    for given in wrong:
        with pytest.raises(TypeError, match=r"^run is .*; expected a path, or the Hub's id, as text\.$"):
            diffrl.load_policy(given)
