"""What an agent of another package must keep to, looked at when it is built: a slip would lose its training unseen."""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from agents.base import Agent
from diffrl.nets import Adam
from diffrl.support.errors import UserError, joined

CALLS = {"update": "(batch, generator, phase)", "act": "(observations, generator)"}
"""The methods that are called from outside, and with what."""


def check(agent: Agent) -> None:
    """Raise UserError where checkpoints would not hold all that training changes, or a method takes something else."""
    name = type(agent).__name__
    for method, words in CALLS.items():
        signature = inspect.signature(getattr(agent, method))
        try:
            signature.bind(*words.split(","))
        except TypeError as error:
            raise UserError(f"{name}.{method} takes {signature}; expected {words}") from error
    kept = {tensor.data_ptr() for tensor in agent.state_dict().values()}
    lost: dict[int, str] = {}
    for where, tensor in _trained(agent):
        if tensor.data_ptr() not in kept:
            lost.setdefault(tensor.data_ptr(), where)
    if lost:
        names = list(lost.values())
        some = joined(names) if len(names) < 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
        raise UserError(
            f"{name} trains {some}, which no checkpoint would hold: put each network into `networks` and each "
            "diffrl.nets.Adam into `optimisers`, by a name"
        )


def _trained(agent: Agent) -> Iterator[tuple[str, Tensor]]:
    """All that an agent's attributes hold and training may change, and where: parameters, and optimisers' moments.

    Raises UserError for an optimiser whose state cannot be kept.
    """
    for name, value in vars(agent).items():
        if name in ("networks", "optimisers", "step"):
            continue
        things = (
            value if isinstance(value, list | tuple) else list(value.values()) if isinstance(value, dict) else [value]
        )
        for thing in things:
            if isinstance(thing, torch.optim.Optimizer):
                raise UserError(
                    f"{type(agent).__name__}.{name} is a {type(thing).__name__} of torch.optim, whose state no "
                    "checkpoint would hold: take diffrl.nets.Adam"
                )
            if isinstance(thing, nn.Module):
                yield from ((f"{name}.{key}", p) for key, p in thing.named_parameters() if p.requires_grad)
            elif isinstance(thing, Tensor) and thing.requires_grad and thing.is_leaf:
                yield name, thing
            elif isinstance(thing, Adam):
                yield from ((f"{name}.{key}", tensor) for key, tensor in thing.state_dict().items())
    for key, optimiser in agent.optimisers.items():
        yield from ((f"the parameters of optimisers[{key!r}]", p) for p in optimiser.parameters)
