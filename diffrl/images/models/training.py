"""How the built-in models are trained: AdamW, its rate along half a cosine, and the running mean of the weights."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffrl.support.files import atomic_path, plain_file

LEARNING_RATE = 2e-3
WARM_UP = 50
"""Steps over which the learning rate rises, to fall to 0 from there."""
EMA = 0.995
KEEP_EVERY = 50
"""Steps between two states of a training that are kept."""

OnProgress = Callable[[int, int], None]
"""Called with (steps done, of how many)."""


@dataclass(frozen=True)
class Kept:
    """A file that holds a training's newest state while it lasts, so that one that is cut goes on bit for bit."""

    path: Path
    generator: torch.Generator
    """What the loss draws from."""

    def read(self, names: set[str], steps: int) -> dict[str, Tensor] | None:
        """The state, of these names; None where there is none of such a training, of so many steps by this torch."""
        try:
            with safe_open(plain_file(self.path), "pt") as file:
                whole = set(file.keys()) == names and file.metadata() == self._about(steps)
                return {name: file.get_tensor(name) for name in names} if whole else None
        except (OSError, SafetensorError):
            return None

    def write(self, state: dict[str, Tensor], steps: int) -> None:
        """Write the state of a training of so many steps; whole, or not at all."""
        with atomic_path(self.path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, self._about(steps))

    def _about(self, steps: int) -> dict[str, str]:
        return {"steps": str(steps), "torch": torch.__version__}


def optimise(
    network: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    *,
    average: bool,
    on_progress: OnProgress,
    kept: Kept | None = None,
) -> None:
    """Take `steps` steps down `loss`, which draws its own batch. average: what is left is the weights' running mean.

    kept: where the state is kept every `KEEP_EVERY` steps and at the end, to go on from if it is there.
    """
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / WARM_UP) * (1 + math.cos(math.pi * k / max(steps, 1))) / 2
    )
    mean = copy.deepcopy(network).requires_grad_(False) if average else None
    start = 0 if kept is None else _go_on(kept, steps, network, optimiser, schedule, mean)
    for step in range(start, steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if mean is not None:
            with torch.no_grad():
                rate = 1 - min(EMA, (step + 1) / (step + 10))
                for averaged, current in zip(mean.parameters(), network.parameters(), strict=True):
                    averaged.lerp_(current, rate)
        if kept is not None and ((step + 1) % KEEP_EVERY == 0 or step + 1 == steps):
            kept.write({**_state(kept, network, optimiser, mean), "done": torch.tensor(step + 1)}, steps)
        on_progress(step + 1, steps)
    if mean is not None:
        network.load_state_dict(mean.state_dict())


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of a parameter."""


def _state(
    kept: Kept, network: nn.Module, optimiser: torch.optim.Optimizer, mean: nn.Module | None
) -> dict[str, Tensor]:
    """All that a training's steps change, but for their number."""
    state = {f"network.{name}": p.detach() for name, p in network.named_parameters()}
    if mean is not None:
        state |= {f"mean.{name}": p for name, p in mean.named_parameters()}
    for name, p in network.named_parameters():
        state |= {f"adam.{key}.{name}": optimiser.state[p][key] for key in _MOMENTS}
    return {**state, "generator": kept.generator.get_state()}


@torch.no_grad()
def _go_on(
    kept: Kept,
    steps: int,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    mean: nn.Module | None,
) -> int:
    """Put back what is kept of such a training; give how many steps it has made, 0 where nothing is."""
    parameters = dict(network.named_parameters())
    averages = {} if mean is None else {f"mean.{name}": p for name, p in mean.named_parameters()}
    adam = {f"adam.{key}.{name}" for key in _MOMENTS for name in parameters}
    names = {f"network.{name}" for name in parameters} | set(averages) | adam | {"generator", "done"}
    state = kept.read(names, steps)
    if state is None or any(state[f"network.{name}"].shape != p.shape for name, p in parameters.items()):
        return 0
    for name, p in parameters.items():
        p.copy_(state[f"network.{name}"])
        optimiser.state[p] = {key: state[f"adam.{key}.{name}"] for key in _MOMENTS}
    for name, p in averages.items():
        p.copy_(state[name])
    kept.generator.set_state(state["generator"])
    done = int(state["done"])
    schedule.last_epoch = done
    for group, rate in zip(optimiser.param_groups, schedule.get_lr(), strict=True):
        group["lr"] = rate
    return done
