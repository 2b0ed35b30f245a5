"""What an agent of another package must keep to: its methods' arguments, how it plans and acts, what checkpoints hold.

That steps are counted, that checkpoints hold all that is trained, and that it acts by actions, is seen, not guessed:
the first steps of a training are compared with what the agent had before, and then it is asked to act.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from agents.base import Agent, Metrics, refuse_actions
from agents.planning import Planner
from diffrl.support.errors import UserError, joined, shown
from diffrl.support.seeds import undrawn

CALLS = {"update": "(batch, generator, phase)", "act": "(observations, generator)"}
"""The methods that are called from outside, and with what."""
DEPTH = 6
"""How deep in attributes and containers a tensor is looked for."""


def check(agent: Agent) -> None:
    """Raise UserError where `update` or `act` takes something else than it is given.

    And where it is not made as an `Agent` is, and where a `Planner` is none by its configuration, or keeps its plans
    for no number of steps.
    """
    if missing := [name for name in ("config", "networks", "optimisers", "step") if not hasattr(agent, name)]:
        raise UserError(
            f"{type(agent).__name__} has no {joined(missing)}: its __init__ is to begin with super().__init__(config, "
            "observation_size, action_size, seeds, device)"
        )
    for method, words in CALLS.items():
        try:
            signature = inspect.signature(getattr(agent, method))
        except ValueError:  # of compiled functions nothing is known
            continue
        try:
            signature.bind(*words.split(","))
        except TypeError as error:
            raise UserError(f"{type(agent).__name__}.{method} takes {signature}; expected {words}") from error
    _check_planning(agent)


def _check_planning(agent: Agent) -> None:
    name, config = type(agent).__name__, type(agent.config).__name__
    if not isinstance(agent, Planner):
        if agent.config.plans:
            raise UserError(f"{config} says that it plans (policy_kind), and {name} is no agents.planning.Planner")
        return
    if not agent.config.plans:
        raise UserError(
            f"{name} is a Planner, and policy_kind of {config} is {agent.config.policy_kind!r}; expected "
            "policy_kind = 'planner'"
        )
    every: Any = agent.replan_every
    if every is not None and (isinstance(every, bool) or not isinstance(every, Integral) or every < 1):
        raise UserError(f"{name}.replan_every is {shown(every)}; expected a whole number of steps from 1, or None")


@torch.no_grad()
def try_acting(agent: Agent) -> None:
    """Ask a copy of the agent to act, at two observations of 0. Raises UserError where it gives nothing of their shape.

    A planner is asked for plans and their first actions. How large actions are, and whether a plan lasts, is seen in
    evaluations, once they are trained. An agent that cannot be copied, or that fails otherwise, is left to these too.
    The agent is as it was, and so is everybody's randomness.
    """
    with undrawn(agent.device):
        try:
            copy = deepcopy(agent)
            for name in agent.acting:  # of other shapes: not compiled anew for these
                vars(copy).pop(name, None)
            observations = torch.zeros(agent.n_seeds, 2, agent.observation_size, device=agent.device)
            actions = copy.act(observations, torch.Generator(agent.device).manual_seed(0))
            refuse_actions(
                agent, actions, observations, "follow" if isinstance(agent, Planner) else "act", bounds=False
            )
        except UserError:
            raise
        except Exception:
            return


def watch(agent: Agent, refuse: Callable[[str], Exception]) -> None:
    """Compare the agent before and after its first `period` updates; then its `update` is its own again.

    The first one has to count one step. Where it does not, it raises what `refuse` makes of a sentence that says so;
    and so does the last of them where the agent then does not act, see `try_acting`.

    A tensor that they changed in place, and that is not in `state_dict`, would be as it was made in every checkpoint,
    and so in each policy that is loaded and each run that goes on. The update that ends the period then raises what
    `refuse` makes of a sentence that names it. A tensor that an attribute is bound to anew, such as the last loss, may
    be a state or not, and is not looked at.
    """
    own = agent.update
    before: list[tuple[str, Tensor, Tensor]] = []
    made = 0

    def update(batch: Any, generator: torch.Generator, phase: int = 0) -> Metrics:
        nonlocal made
        if made == 0:
            before.extend((where, tensor, tensor.detach().clone()) for where, tensor in _reached(agent))
        step = int(agent.step)
        metrics = own(batch, generator, phase)
        made += 1
        if made == 1 and (counted := int(agent.step) - step) != 1:
            raise refuse(f"{type(agent).__name__}.update counts {counted} steps; expected 1, by `self.step += 1`")
        if made == agent.period:
            agent.__dict__.pop("update")
            changed = [(where, now) for where, now, then in before if not _same(now, then)]
            before.clear()
            if lost := _not_in(changed, agent.state_dict()):
                some = joined(lost) if len(lost) < 4 else f"{', '.join(lost[:3])} and {len(lost) - 3} more"
                raise refuse(
                    f"{type(agent).__name__} trains {some}, which no checkpoint would hold: put each network into "
                    "`networks` and each diffrl.nets.Adam into `optimisers`, by a name, or give what else it has in "
                    "`state_dict`"
                )
            try:
                try_acting(agent)
            except UserError as error:
                raise refuse(str(error)) from error
        return metrics

    agent.update = update  # type: ignore[method-assign]


def _not_in(changed: Sequence[tuple[str, Tensor]], state: dict[str, Tensor]) -> list[str]:
    """The names of changed tensors that a state holds neither themselves nor as a copy, each memory once."""
    kept = {tensor.data_ptr() for tensor in state.values()}
    lost: dict[int, str] = {}
    for where, tensor in changed:
        at = tensor.data_ptr()
        if at not in kept and not any(_same(tensor, copy) for copy in state.values()):
            lost.setdefault(at, where)
    return list(lost.values())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.detach(), other.detach())


def _reached(agent: Agent) -> Iterator[tuple[str, Tensor]]:
    """All tensors of an agent's attributes, through containers, modules, optimisers and other objects, and where."""
    seen: set[int] = set()

    def within(where: str, thing: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
        if id(thing) in seen or depth > DEPTH:
            return
        if isinstance(thing, Tensor):
            seen.add(id(thing))
            if not nn.parameter.is_lazy(thing):
                yield where, thing
            return
        if isinstance(thing, str | bytes | int | float | type | torch.Generator):
            return
        if isinstance(thing, nn.Module):
            seen.add(id(thing))
            for key, tensor in [*thing.named_parameters(), *thing.named_buffers()]:
                yield from within(f"{where}.{key}", tensor, depth)
            return
        if isinstance(thing, dict):
            inner = [(f"{where}[{key!r}]", value) for key, value in thing.items()]
        elif isinstance(thing, list | tuple | set):
            inner = [(where, value) for value in thing]
        elif hasattr(thing, "__dict__") and not inspect.isroutine(thing) and not inspect.ismodule(thing):
            inner = [(f"{where}.{key}", value) for key, value in vars(thing).items()]
        else:
            return
        seen.add(id(thing))
        for name, value in inner:
            yield from within(name, value, depth + 1)

    attributes = {key: value for key, value in vars(agent).items() if key not in ("config", "generators")}
    optimisers = attributes.pop("optimisers", {})  # last: what they move is named where it stands
    for key, value in [*attributes.items(), ("optimisers", optimisers)]:
        yield from within(key, value, 1)
