"""Rewards by name, as `--reward` takes them: [WEIGHT*]NAME[:ARGUMENT], several joined by " + "."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from diffrl.images.rewards import registry
from diffrl.images.rewards.base import Metadata, Reward, ask
from diffrl.images.rewards.registry import Options
from diffrl.support.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRAMMAR = "[WEIGHT*]NAME[:ARGUMENT], several joined by ' + ', such as 'jpeg + 0.5*digit:8'"


class Sum:
    """The weighted sum of rewards, itself one, in `terms` order; differentiable where all its parts are."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        names = [part.name for _, part in terms]
        if len(set(names)) < len(names):
            raise UserError(f"a reward stands twice in {' + '.join(names)!r}; add up its weights instead")
        self.terms = list(terms)
        self.name = " + ".join(part.name if w == 1 else f"{w:g}*{part.name}" for w, part in terms)
        self.differentiable = all(part.differentiable for _, part in terms)

    def values(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> dict[str, Tensor]:
        """Each part's values (B,) by its name, without their weights, checked as `ask` does."""
        return {part.name: ask(part, images, prompts, metadata) for _, part in self.terms}

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sum of what `values` gave, with the weights."""
        import torch

        return torch.stack([weight * values[part.name] for weight, part in self.terms]).sum(0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The values (B,)."""
        return self.combine(self.values(images, prompts, metadata))


def ask_parts(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `ask`, with the values of each part of a sum beside it, for the log: (B,), and (B,) by name."""
    metadata = [{}] * len(prompts) if metadata is None else metadata
    if not isinstance(reward, Sum):
        total = ask(reward, images, prompts, metadata)
        return total, {reward.name: total}
    parts = reward.values(images, prompts, metadata)
    return reward.combine(parts), parts


def parse(spec: str, *, device: str | torch.device = "cpu", timeout: float = 60.0) -> Reward:
    """The reward that `spec` says, its networks loaded on `device`.

    A single reward of weight 1 is that reward; anything else a `Sum`. Raises UserError for what does not follow
    `GRAMMAR`, an unknown name (naming the nearest known), and for what an argument names and cannot be loaded.
    """
    options = Options(device, timeout)
    terms = [_term(text, spec, options) for text in spec.split(" + ")]
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Sum(terms)


def _term(text: str, spec: str, options: Options) -> tuple[float, Reward]:
    match = re.fullmatch(r"\s*(?:([^*:\s]*)\s*\*)?\s*([a-z0-9-]+)(?::(.*\S))?\s*", text, re.DOTALL)
    if match is None:
        raise UserError(f"--reward {spec!r}: {text.strip()!r} is not of the form {GRAMMAR}")
    number, name, argument = match.group(1), match.group(2), match.group(3) or ""
    try:
        weight = 1.0 if number is None else float(number)
    except ValueError:
        weight = float("nan")
    if not abs(weight) < float("inf"):
        raise UserError(f"--reward {spec!r}: the weight {number!r} of {name!r} is not a number")
    entry = registry.get(name)
    if entry is None:
        raise UserError(f"--reward {spec!r}: there is no reward {name!r}; {nearest(name, registry.names())}")
    if argument and entry.argument == "none":
        raise UserError(f"--reward {spec!r}: {name!r} takes no argument, got {argument!r}")
    if not argument and entry.argument == "required":
        raise UserError(f"--reward {spec!r}: {name!r} needs an argument: {entry.usage}")
    return weight, entry.build(argument, options)
