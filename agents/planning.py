"""Acting with memory: agents that plan several steps at once, and what follows their plans step by step."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Agent
from diffrl.data.preprocessing import Normaliser, Preprocessing
from diffrl.support.errors import UserError, counted, out_of_memory, said_by


class Planner(Agent):
    """An agent that plans from a state, and follows the plan for some steps before it plans again.

    A plan is a tensor (S, B, ...), one a row, of any further shape that is the same for all plans. `Follower` keeps the
    plans of episodes; `act` makes a plan for its first action alone.
    """

    replan_every: int | None = None
    """Steps after which a row gets a new plan, 1 or more; None: only when an episode begins."""
    calls: int = 1
    """Calls of the network for a plan."""
    scales: Preprocessing | None = None
    """Between the environment's units and the agent's, see `prepare`; None: they are the same."""
    reaches_goal: bool = True
    """Whether plans are to reach the environment's goal: only then is it asked for one, which takes making it."""
    goal: Tensor | None = None
    """(O,) the state to be reached, in the agent's units, see `prepare`; None: there is none."""

    def prepare(self, scales: Preprocessing, goal: Tensor | None) -> None:
        """Tell the agent what it is to act in. goal: the observation (O,) to be reached, in the environment's units."""
        self.scales = scales.to(self.device)
        self.goal = None if goal is None else self.scales.observations(goal.to(self.device))

    def check_ready(self) -> None:
        """Raise UserError where the agent could not plan for what it was told of by `prepare`."""

    @abstractmethod
    def plan(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Plans (S, B, ...) from observations (S, B, O), those of the present step alone.

        Its rows are of any episodes, in any number, and nothing tells where one begins: see `act`.
        """

    @abstractmethod
    def follow(self, plans: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """Actions (S, B, A) in [-1, 1] at observations (S, B, O), t (S, B) steps after the plans (S, B, ...) were made.

        t: whole numbers from 0, less than `replan_every` if there is one.
        """

    def states(self, plans: Tensor) -> Tensor | None:
        """The observations (S, B, H, O) that plans (S, B, ...) go through, in the agent's units; None: they have none.

        None is for plans of actions alone.
        """
        return None

    @override
    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The first actions (S, B, A) of new plans from observations (S, B, O)."""
        t = torch.zeros(observations.shape[:2], dtype=torch.int64, device=observations.device)
        return self.follow(plans_of(self, observations, generator), t, observations)


def plans_of(planner: Planner, observations: Tensor, generator: torch.Generator) -> Tensor:
    """`planner.plan`, whose plans (S, B, ...) are checked to be one for each of the observations (S, B, O).

    Raises UserError, naming the planner's class, where they are not: planners of other packages make them.
    """
    plans = planner.plan(observations, generator)
    if not isinstance(plans, Tensor) or plans.shape[:2] != observations.shape[:2]:
        found = f"of shape {tuple(plans.shape)}" if isinstance(plans, Tensor) else f"as {type(plans).__name__}"
        expected = ", ".join(map(str, observations.shape[:2]))
        raise UserError(
            f"{type(planner).__name__}.plan gave plans {found}; expected a tensor ({expected}, ...): seeds, "
            "observations, and what a plan holds."
        )
    return plans


class Follower:
    """A planner with memory: the plan of every row, and the steps since it was made.

    Every call is one step of all rows. Rows are planned for together as far as they need it at the same time, and a
    row's plan depends on its own observation and noise alone. generator: what the plans' noise is drawn from.
    """

    def __init__(self, planner: Planner, generator: torch.Generator) -> None:
        self._planner, self._generator = planner, generator
        self._plans: Tensor | None = None
        self._t: Tensor | None = None
        self._over: list[int] = []

    @property
    def plans(self) -> Tensor | None:
        """(S, B, ...) what the rows follow now; None: nothing was planned since everything was dropped."""
        return self._plans

    @torch.no_grad()
    def __call__(self, observations: Tensor) -> Tensor:
        """Actions (S, B, A) in [-1, 1] for observations (S, B, O).

        Raises ValueError for another B than before. Raises UserError where plans are no such tensors, or end before a
        new one is due.
        """
        if self._plans is None or self._t is None:
            self._plans = plans_of(self._planner, observations, self._generator).clone()  # rows of it are replaced
            self._t = torch.zeros(observations.shape[:2], dtype=torch.int64, device=observations.device)
        elif self._t.shape != observations.shape[:2]:
            raise ValueError(
                f"expected the {self._t.shape[1]} rows that plans are kept for, got {observations.shape[1]}: call "
                "reset() before other episodes begin"
            )
        else:
            self._renew(self._plans, self._t, observations)
        try:
            actions = self._planner.follow(self._plans, self._t, observations)
        except (IndexError, RuntimeError) as error:
            self._blame(error, self._plans, self._t, observations)
            raise
        self._t += 1
        return actions

    def _blame(self, error: Exception, plans: Tensor, t: Tensor, observations: Tensor) -> None:
        """Raise UserError where the plans can be followed at their first step, and `error` came of a later one."""
        if out_of_memory(error) or not t.any():
            return
        try:
            self._planner.follow(plans, torch.zeros_like(t), observations)
        except (IndexError, RuntimeError):
            return
        every = self._planner.replan_every
        until = "until the episode ends (replan_every = None)" if every is None else f"for replan_every = {every} steps"
        raise UserError(
            f"{type(self._planner).__name__}.follow fails {counted(int(t.max()), 'steps')} after its plans of shape "
            f"{tuple(plans.shape)} were made ({said_by(error)}); expected actions {until}."
        ) from error

    def _renew(self, plans: Tensor, t: Tensor, observations: Tensor) -> None:
        """Give a new plan to the rows whose plan was dropped, t < 0, or is as old as plans get.

        Rows whose episode is over begin their old one again.
        """
        every = self._planner.replan_every
        due = t < 0 if every is None else (t < 0) | (t >= every)
        wanted = due.any(0)
        wanted[self._over] = False
        columns = wanted.nonzero()[:, 0]
        if len(columns):
            fresh = plans_of(self._planner, observations[:, columns], self._generator)
            if fresh.shape[2:] != plans.shape[2:]:
                raise UserError(
                    f"{type(self._planner).__name__}.plan gave plans of shape {tuple(fresh.shape)} after "
                    f"{tuple(plans.shape)}; expected the same from the third axis on."
                )
            chosen = due[:, columns].view(len(due), -1, *[1] * (fresh.ndim - 2))
            plans[:, columns] = torch.where(chosen, fresh, plans[:, columns])
        t[due] = 0

    def finish(self, rows: Sequence[int]) -> None:
        """The episodes of these rows are over: until `reset` they get no new plan, and their actions mean nothing."""
        self._over += rows

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Drop the plans: of these rows, or of all, whose number may then be another.

        Raises ValueError for a row that there is not.
        """
        if rows is None:
            self._plans = self._t = None
            self._over = []
        elif self._t is not None:
            if not set(rows) <= set(range(self._t.shape[1])):
                raise ValueError(f"no rows {list(rows)} of the {self._t.shape[1]} that plans are kept for")
            self._t[:, list(rows)] = -1
            going = set((self._t[0] < 0).nonzero()[:, 0].tolist())
            self._over = [row for row in self._over if row not in going]


def waypoint_action(plans: Tensor, t: Tensor, observations: Tensor) -> Tensor:
    """Diffuser's controller in mazes: a = (next position - position) + (its velocity - velocity), (S, B, A).

    plans: (S, B, H, 2 A) states, positions before velocities, of which row 0 is where the plan begins. t: (S, B) steps
    since then. observations: (S, B, 2 A). From the last row on that is the next one, at rest. All are in the
    environment's units, and the actions are not bounded.
    """
    last = plans.shape[2] - 1
    index = (t + 1).clamp(max=last)[..., None, None].expand(*t.shape, 1, plans.shape[-1])
    position, velocity = plans.gather(2, index).squeeze(2).chunk(2, -1)
    velocity = torch.where((t >= last).unsqueeze(-1), 0.0, velocity)
    here, speed = observations.chunk(2, -1)
    return (position - here) + (velocity - speed)


def unscaled(scales: Preprocessing | None, observations: int, actions: int, device: torch.device) -> Preprocessing:
    """The scales, or those that change nothing where there are none; observations, actions: the sizes O and A."""
    if scales is not None:
        return scales
    return Preprocessing(Normaliser.identity(observations), Normaliser.identity(actions)).to(device)
