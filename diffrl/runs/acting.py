"""A policy acts: actions for observations, and whole episodes in environments of its own, with their returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from agents.base import Agent, refuse_actions
from agents.planning import Follower, Planner
from diffrl.data.preprocessing import Preprocessing
from diffrl.support.errors import UserError
from diffrl.support.seeds import generator_at
from diffrl.support.stopping import check
from envs.making import MAX_ENVIRONMENTS
from envs.task import Task, refuse_not_finite, time_limit

Act = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Observations (S, E, O) as the environment gives them -> actions (S, E, A) as it takes them."""
_SEEDED_AT_ONCE = 400
"""Start states are drawn for so many environments at once. Scores depend on it: it stays, whatever is held at once."""
_MANY_CALLS = 10
"""Network calls a step from which on it is said what acting costs."""


def source_of_randomness(agent: Agent, *salt: int) -> torch.Generator:
    """The list of seeds is the stack's one source of randomness: its batches and noise come from it."""
    return generator_at(*agent.seeds, *salt, device=agent.device)


def cost_of_acting(agent: Agent) -> str:
    """What is to be known where an agent that plans takes many network calls a step, in a sentence or two; else ""."""
    if not isinstance(agent, Planner):
        return ""
    every = agent.replan_every
    calls = 0.0 if every is None else agent.calls / every
    if calls < _MANY_CALLS:
        return ""
    how = "a new plan at every step" if every == 1 else f"a plan of {agent.calls:,} calls every {every} steps"
    return (
        f"Acting takes {calls:,.0f} network calls a step ({how}), so evaluations are slow: --agent.replan-every, "
        "--agent.sampling-steps and --agent.solver lower that."
    )


class Actor:
    """An agent as a function from observations (S, B, O) to actions (S, B, A), both the environment's.

    A planner's plans are kept from call to call, one a row, until `reset`. keep: how many rows' first plans are noted
    down, in `first_plans`. generator: what noise is drawn from; by default made of the agent's seeds and `salt`.
    """

    def __init__(
        self,
        agent: Agent,
        preprocessing: Preprocessing,
        salt: int = 0,
        keep: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        self._agent, self._keep = agent, keep
        self._generator = source_of_randomness(agent, salt) if generator is None else generator
        self._parts = preprocessing.to(agent.device)
        self._follower = Follower(agent, self._generator) if isinstance(agent, Planner) else None
        self._checked = False
        self.first_plans: NDArray[np.float32] | None = None
        """(B', H, O) the states that the first seed's first plans go through, in the environment's units."""

    @torch.no_grad()
    def __call__(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """Actions (S, B, A). Raises ValueError for another B than that of the plans at hand.

        Raises UserError where the first call's are no actions: see `refuse_actions`.
        """
        x = torch.as_tensor(observations, dtype=torch.float32, device=self._agent.device)
        z = self._parts.observations(x)
        chosen = self._agent.act(z, self._generator) if self._follower is None else self._follower(z)
        if not self._checked:
            refuse_actions(self._agent, chosen, z)
            self._checked = True
        actions: NDArray[np.float32] = self._parts.actions.inverse(chosen).cpu().numpy()
        if self._keep and self.first_plans is None:
            self._note_down()
        return actions

    def _note_down(self) -> None:
        if isinstance(self._agent, Planner) and self._follower is not None and self._follower.plans is not None:
            states = self._agent.states(self._follower.plans[:, : self._keep])
            if states is not None:
                self.first_plans = self._parts.observations.inverse(states[0]).cpu().numpy()

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Other episodes begin, in these rows or in all: what was planned for the last ones is dropped."""
        if self._follower is not None:
            self._follower.reset(rows)

    def finish(self, rows: Sequence[int]) -> None:
        """The episodes of these rows are over: nothing is planned for them until `reset`."""
        if self._follower is not None:
            self._follower.finish(rows)


def rows_at_once(episodes: int, n_seeds: int, max_environments: int) -> int:
    """How many episodes of each seed an evaluation runs side by side, where so many simulators are held at once."""
    return max(1, min(episodes, max_environments // n_seeds))


def start_seeds(entropy: tuple[int, ...], n_seeds: int, episodes: int) -> NDArray[np.uint32]:
    """What the environments of an evaluation are reset with (S, `episodes`), however many run side by side."""
    blocks = []
    for start in range(0, episodes, block := rows_at_once(episodes, n_seeds, _SEEDED_AT_ONCE)):
        n = min(block, episodes - start)
        seeds = np.random.SeedSequence((*entropy, start)).generate_state(n_seeds * n)
        blocks.append(seeds.reshape(n_seeds, n))
    return np.concatenate(blocks, axis=1)


@dataclass
class Evaluator:
    """Lets S policies act in environments of their own, for a number of episodes each.

    At most `max_environments` simulators are held at once, reused from one evaluation to the next; more episodes are
    run in turns. Only episodes that go on are stepped; the batch keeps its shape, so `act` is called the same way
    throughout.
    """

    make_env: Callable[[], gymnasium.Env[Any, Any]]
    n_seeds: int
    max_environments: int = MAX_ENVIRONMENTS
    successes: NDArray[np.bool_] | None = None
    """(S, E) of the last call, whether each episode ended in success; None: the environment does not tell."""
    _environments: list[gymnasium.Env[Any, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, task: Task, n_seeds: int = 1) -> Self:
        """In the task's environment, as many of them at once as fit beside each other."""
        return cls(task.make, n_seeds, task.max_environments)

    def __call__(
        self,
        act: Act,
        episodes: int,
        entropy: tuple[int, ...],
        on_step: Callable[[float, int], None] = lambda finished, total: None,
        record: int = 0,
    ) -> tuple[NDArray[np.float64], list[NDArray[np.float32]]]:
        """Undiscounted returns (S, `episodes`), and the observations of seed 0's first `record` episodes.

        entropy: what the start states are drawn from, so that an evaluation repeats itself. `on_step` hears how many
        episodes are finished, of how many; of those that go on, their part of the time limit is counted. What the
        environment says of success is then in `successes`. Raises UserError for actions that are not finite, and for
        what an environment gives that is not.
        """
        turn = rows_at_once(episodes, self.n_seeds, self.max_environments)
        while len(self._environments) < self.n_seeds * turn:
            self._environments.append(self.make_env())
        returns = np.zeros((self.n_seeds, episodes))
        successes, told = np.zeros((self.n_seeds, episodes), np.bool_), False
        paths: list[list[NDArray[np.float32]]] = [[] for _ in range(min(record, episodes))]
        finished, all_seeds = 0, start_seeds(entropy, self.n_seeds, episodes)
        for start in range(0, episodes, turn):
            n = min(turn, episodes - start)
            seeds = all_seeds[:, start : start + n]
            grid = {(s, e): self._environments[s * n + e] for s in range(self.n_seeds) for e in range(n)}
            first = {where: env.reset(seed=int(seeds[where]))[0] for where, env in grid.items()}
            if isinstance(act, Actor):
                act.reset()
            observations = np.array([[first[s, e] for e in range(n)] for s in range(self.n_seeds)], dtype=np.float32)
            self._refuse_not_finite(observations, returns[:, start : start + n])
            limit, t = time_limit(self._environments[0]), 0
            while grid:
                check()
                for e in range(start, min(start + n, len(paths))):
                    if (0, e - start) in grid:
                        paths[e].append(observations[0, e - start].copy())
                actions = act(observations)
                if not np.isfinite(actions).all():  # MuJoCo would take them for zeros
                    raise UserError("The policy's actions are not finite: its training has diverged.")
                for (s, e), env in list(grid.items()):
                    observations[s, e], reward, terminal, cut, info = env.step(actions[s, e])
                    returns[s, start + e] += float(reward)
                    if terminal or cut:
                        del grid[s, e]
                        finished += 1
                        told |= "success" in info
                        successes[s, start + e] = bool(info.get("success", False))
                        if isinstance(act, Actor) and not any((seed, e) in grid for seed in range(self.n_seeds)):
                            act.finish([e])
                self._refuse_not_finite(observations, returns[:, start : start + n])
                t += 1
                parts = len(grid) * min(t / limit, 1.0) if limit else 0.0
                on_step(finished + parts, self.n_seeds * episodes)
        self.successes = successes if told else None
        return returns, [np.stack(path) for path in paths]

    def _refuse_not_finite(self, observations: NDArray[np.float32], returns: NDArray[np.float64]) -> None:
        """Raise UserError, naming the environment, where an observation (S, E, O) or a return (S, E) is not finite."""
        if np.isfinite(observations).all() and np.isfinite(returns).all():
            return
        for place, reward in np.ndenumerate(returns):  # the return is the first reward that was not finite
            refuse_not_finite(self._environments[0], observations[place], float(reward))

    def outcomes(self, returns: NDArray[np.float64]) -> NDArray[np.float64]:
        """The last call's returns (S, E); where the environment tells of success, with it behind them: (S, E, 2)."""
        return returns if self.successes is None else np.stack([returns, self.successes.astype(np.float64)], axis=-1)

    def close(self) -> None:
        """Close the simulators."""
        for env in self._environments:
            env.close()
        self._environments.clear()


@dataclass(frozen=True)
class Share:
    """Turns the progress of one seed's episodes into that of all `n` seeds, of which `before` episodes are finished."""

    on_progress: Callable[[float, int], None]
    before: int
    n: int

    def __call__(self, done: float, total: int) -> None:
        """So many of one's episodes are finished, of how many."""
        self.on_progress(self.before + done, self.n * total)
