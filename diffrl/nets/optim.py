"""Adam with the gradient norm clipped seed by seed; moving averages, frozen twins and copies of weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from typing_extensions import override

from diffrl.support.errors import listed

EPS = 1e-8
"""What Adam adds to sqrt(v_hat), as in Kingma & Ba 2015 and torch.optim.Adam."""


def seed_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The joint L2 norm over all `tensors` (S, ...), seed by seed: (S,)."""
    if tensors[0].shape[0] == 1:
        norms = torch.stack(torch._foreach_norm(list(tensors)))[:, None]
    else:
        norms = torch.stack([torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in tensors])
    joint: Tensor = torch.linalg.vector_norm(norms, dim=0)
    return joint


class Adam:
    """Adam (Kingma & Ba 2015) on the parameters of `module`, every one of shape (S, ...).

    The gradient norm of each seed is clipped to `clip` (0: never). Gradients are taken with respect to these
    parameters alone, so that a loss may run through other networks without a gradient for their weights.
    decay_steps: the learning rate falls to 0 along half a cosine over this number of steps (Loshchilov & Hutter 2017,
    arXiv 1608.03983, without restarts), by the optimiser's own counter, and stays there; 0: it does not change.
    decay_start: the steps made before it begins to fall.
    warm_up: over this number of first steps the learning rate rises to its full value in equal parts.
    """

    def __init__(
        self,
        module: nn.Module,
        learning_rate: float,
        clip: float = 0.0,
        decay_steps: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        warm_up: int = 0,
        decay_start: int = 0,
    ) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = list(module.parameters())
        self.clip = clip
        self.betas = betas
        self.learning_rate, self.decay_steps, self.warm_up = learning_rate, decay_steps, warm_up
        self.decay_start = decay_start
        # One that changes is a tensor, so that a captured step reads what it is now.
        changes = decay_steps or warm_up
        self._rate = torch.tensor(learning_rate, device=self.parameters[0].device) if changes else learning_rate
        self._fused: Callable[[Sequence[Tensor]], Tensor] | None = None
        # All state exists from the start, so that any checkpoint can be loaded.
        self._steps = [torch.zeros((), dtype=torch.float32, device=parameter.device) for parameter in self.parameters]
        self._means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._squares = [torch.zeros_like(parameter) for parameter in self.parameters]

    def step(self, loss: Tensor) -> Tensor:
        """One step down the sum of `loss` (S,), one loss a seed. Returns the norms before clipping (S,)."""
        gradients = torch.autograd.grad(loss.sum(), self.parameters)
        with torch.no_grad():
            if self._fused is not None:
                return self._fused(gradients)
            norms = seed_norms(gradients)
            self._move(self._clipped(gradients, norms), self.parameters, self._means, self._squares, self._steps)
        return norms

    def _clipped(self, gradients: tuple[Tensor, ...], norms: Tensor) -> tuple[Tensor, ...]:
        """The gradients (S, ...) of these norms (S,), each seed's clipped; of one seed in place."""
        if self.clip > 0:
            factor = self._clipping(norms)
            if len(factor) == 1:
                torch._foreach_mul_(gradients, factor.view(()))
            else:
                gradients = tuple(g * factor.view(-1, *[1] * (g.ndim - 1)) for g in gradients)
        return gradients

    def _move(
        self,
        gradients: Sequence[Tensor],
        parameters: Sequence[Tensor],
        means: Sequence[Tensor],
        squares: Sequence[Tensor],
        steps: Sequence[Tensor],
    ) -> None:
        """Move parameters, or the slices of them that are a seed's, by one step, all in place. steps: ()."""
        if isinstance(self._rate, Tensor):
            self._rate.copy_(self._scheduled(steps[0]))
        # The function, not the class: an object of torch.optim.Adam imports the compiler, which takes a second.
        adam(
            list(parameters),
            list(gradients),
            list(means),
            list(squares),
            [],
            list(steps),
            fused=True,
            capturable=self.parameters[0].is_cuda,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self._rate,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def restart_(self, going: Tensor) -> None:
        """Where `going` (), 0 or 1, is 0, forget all steps made: the next one is Adam's first again.

        For a network that begins later than others, by a number on the device. Its loss is multiplied by `going` too,
        so that until then it does not move: of gradients that are all 0 Adam makes steps of 0.
        """
        for tensors in (self._steps, self._means, self._squares):
            torch._foreach_mul_(tensors, going)

    def fuse(self, compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None) -> None:
        """Let `step` use `compiled(plain_step)`, which clips and moves the parameters in few kernels; None: undo that.

        For a GPU, where the norms and factors of twenty tensors are sixty kernels, each shorter than its start.
        """
        self._fused = None if compiled is None else compiled(self.plain_step)

    def plain_step(self, gradients: Sequence[Tensor]) -> Tensor:
        """Clip the gradients and move the parameters down them, as a plain function of tensors; gives the norms (S,).

        This is what `step` does once it has gradients (Kingma & Ba 2015, algorithm 1; eps is added to sqrt(v_hat)).
        """
        parameters: list[Tensor] = [*self.parameters]
        gradients = list(gradients)
        steps, means, squares = self._steps, self._means, self._squares
        beta1, beta2 = self.betas
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        if self.clip > 0:
            factor = self._clipping(norms)
            factors = [factor.view(-1, *[1] * (g.ndim - 1)) for g in gradients]
            gradients = list(torch._foreach_mul(gradients, factors))
        rate = self._scheduled(steps[0]) if isinstance(self._rate, Tensor) else self._rate
        torch._foreach_add_(steps, 1.0)
        t = steps[0].double()  # the power of a float32 would err by more than all the rest
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_mul_(denominators, (1 - beta2**t).rsqrt().to(norms.dtype))
        torch._foreach_add_(denominators, EPS)
        moves = torch._foreach_div(means, denominators)
        torch._foreach_mul_(moves, (-rate / (1 - beta1**t)).to(norms.dtype))
        torch._foreach_add_(parameters, moves)
        return norms

    def _clipping(self, norms: Tensor) -> Tensor:
        """The factors (S,) by which gradients of these norms (S,) are clipped."""
        return (self.clip / (norms + 1e-6)).clamp(max=1.0)

    def _scheduled(self, made: Tensor) -> Tensor:
        """The learning rate () of the step after `made` () steps."""
        rate = torch.full_like(made, self.learning_rate)
        if self.decay_steps:
            share = ((made - self.decay_start) / self.decay_steps).clamp(0.0, 1.0)
            rate = rate * (1 + torch.cos(math.pi * share)) / 2
        if self.warm_up:
            rate = rate * ((made + 1) / self.warm_up).clamp(max=1.0)
        return rate

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the state by name: `NAME.exp_avg` (S, ...), ..., `NAME.step` ()."""
        state: dict[str, Tensor] = {}
        for name, step, mean, square in zip(self.names, self._steps, self._means, self._squares, strict=True):
            state |= {f"{name}.step": step, f"{name}.exp_avg": mean, f"{name}.exp_avg_sq": square}
        return state


class SeparateAdam(Adam):
    """Adam whose seeds may stand still: each counts the steps that it made itself, `NAME.step` (S,).

    So a seed that begins late, or pauses, makes the steps that it would make alone: bias correction and warm-up are
    those of its own count (t in Kingma & Ba 2015, algorithm 1).
    """

    def __init__(
        self, module: nn.Module, learning_rate: float, clip: float = 0.0, *, warm_up: int = 0, n_seeds: int
    ) -> None:
        super().__init__(module, learning_rate, clip, warm_up=warm_up)
        self._steps = [torch.zeros(n_seeds, device=parameter.device) for parameter in self.parameters]

    @override
    def step(self, loss: Tensor) -> Tensor:
        made = self._steps[0]
        if not bool((made == made[0]).all()):
            return self.step_where(loss, torch.ones_like(loss, dtype=torch.bool))
        gradients = torch.autograd.grad(loss.sum(), self.parameters)
        with torch.no_grad():  # all at once
            norms = seed_norms(gradients)
            counts = [steps[0].clone() for steps in self._steps]
            self._move(self._clipped(gradients, norms), self.parameters, self._means, self._squares, counts)
            for steps, count in zip(self._steps, counts, strict=True):
                steps.copy_(count)
        return norms

    def step_where(self, loss: Tensor, going: Tensor) -> Tensor:
        """`step` for the seeds that are `going` (S,) alone, without a look at which; give the norms (S,) of all.

        The others keep their parameters, moments and counts.
        """
        gradients = torch.autograd.grad(loss.sum(), self.parameters)
        with torch.no_grad():
            norms = seed_norms(gradients)
            tensors = [*self.parameters, *self.state_dict().values()]
            before = [tensor.detach().clone() for tensor in tensors]
            state = (self._clipped(gradients, norms), self.parameters, self._means, self._squares, self._steps)
            for s in range(len(norms)):
                self._move(*([tensor[s] for tensor in kind] for kind in state))
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(going.view(-1, *[1] * (tensor.ndim - 1)), tensor, old))
        return norms

    @override
    def fuse(self, compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None) -> None:
        raise NotImplementedError("steps of seeds by themselves are not fused")


@torch.no_grad()
def average_(average: nn.Module, online: nn.Module, rate: float | Tensor) -> None:
    """average <- (1 - rate) average + rate online, in place; `rate` is a number, or a tensor ()."""
    targets: list[Tensor] = list(average.parameters())
    sources: list[Tensor] = list(online.parameters())
    if isinstance(rate, Tensor):
        torch._foreach_lerp_(targets, sources, [rate] * len(targets))
    else:
        torch._foreach_lerp_(targets, sources, rate)


def frozen(module: nn.Module) -> nn.Module:
    """The same network with the same weights in the same memory, without gradients for them.

    For losses that run through a network they do not train: the compiler computes the gradient of every tensor that
    requires one, used or not.
    """
    twin = deepcopy(module).requires_grad_(False)
    for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        ours.data = theirs.data
    return twin


@torch.no_grad()
def state_of(parts: Mapping[str, nn.Module | Adam]) -> dict[str, Tensor]:
    """The tensors of networks and optimisers, by NAME.KEY: themselves and not copies, detached."""
    return {f"{name}.{key}": value.detach() for name, part in parts.items() for key, value in part.state_dict().items()}


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, saying which, where names or shapes of `state`, a checkpoint's, differ from `own`, a network's.

    A number () goes to each of (S,) seeds: older versions had one count of an optimiser's steps for all.
    """
    sides = {"in the checkpoint alone": state.keys() - own.keys(), "in the network alone": own.keys() - state.keys()}
    if any(sides.values()):
        raise ValueError("; ".join(f"{side}: {listed(names, 3)}" for side, names in sides.items() if names))
    for name, tensor in own.items():
        if tensor.shape != state[name].shape and not (tensor.ndim == 1 and state[name].ndim == 0):
            found, expected = tuple(state[name].shape), tuple(tensor.shape)
            raise ValueError(f"{name} has shape {found} in the checkpoint, {expected} in the network")


def copy_state_(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy each tensor of `state` into that of its name in `own`. Raises ValueError as `check_state`."""
    check_state(own, state)
    for name, tensor in own.items():
        tensor.copy_(state[name])
