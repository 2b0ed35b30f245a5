"""A round of fine-tuning: an algorithm samples and says what the loss is, a trainer makes the steps of it."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Generic, Protocol

import torch
from torch import Tensor, nn

from diffrl.alignment.advantages import PromptStatistics
from diffrl.alignment.losses import kl_loss
from diffrl.images.algorithms import adamw8bit
from diffrl.images.examples import ImageBatch
from diffrl.images.model import Condition
from diffrl.images.rewards.scaled import ScaledSum
from diffrl.images.samples import (
    LOSS,
    NOISE,
    ORDER,
    PAIRS,
    PROMPTS,
    Config,
    RunState,
    Setup,
    denoiser,
    denoising_errors,
    noise_of,
    times_of,
)
from diffrl.images.signs import no_signal, not_called
from diffrl.support.errors import UserError
from diffrl.training.loop import DivergedError

Metrics = dict[str, float]
Term = tuple[Tensor, dict[str, Tensor]]
"""A part of a loss, to be added to its other parts, and metrics, to be averaged; both means over the rows asked for."""

PARAMETER, FIRST, SECOND, OWN = "parameter.", "first_moment.", "second_moment.", "algorithm."
FIRST_SCALE, SECOND_SCALE = "first_scale.", "second_scale."
"""What the names of a checkpoint's tensors begin with; scales are those of moments in 8 bits."""
MOMENTS = ((FIRST, FIRST_SCALE, "exp_avg"), (SECOND, SECOND_SCALE, "exp_avg_sq"))
ADAPT = 1.5
"""PPO's adaptive penalty (Schulman et al. 2017, arXiv 1707.06347, section 4): beyond this factor from the target the
weight doubles, or halves."""


# --- What an algorithm is ------------------------------------------------------------------------------------------


class Algorithm(ABC, Generic[Config]):
    """How a round is sampled, and the loss of some of it.

    A round has `units` that are shuffled, shared among updates, and shared among processes: samples, or what belongs
    together. `collect` prepares those of this process; `losses` is asked for parts of them.
    """

    units: int
    images: int = 1
    """How many images of a unit are in the network at once: `micro_batch` is divided by it."""

    def __init__(self, setup: Setup[Config], state: RunState) -> None:
        self.setup, self.state = setup, state

    @abstractmethod
    def collect(self, number: int) -> Metrics:
        """Prepare round `number`; metrics of the whole round, the same on all processes."""

    @abstractmethod
    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """The loss of some of this process's units (numbers in the round), term by term, each freed before the next.

        turn: which of the round's passes. The terms add up to the mean over `units`.
        """

    def has_signal(self, units: Tensor) -> bool:
        """Whether the round's rewards say anything of these units, numbered over all processes; the same in all.

        Without a signal no step is made, with --kl neither: Adam would make a full one of what is left, rounding.
        """
        return True

    @property
    def queries(self) -> int:
        """How many images are scored in a round: one a unit, unless the algorithm says otherwise."""
        return self.units

    @property
    def sampled(self) -> int:
        """How many images `collect` samples in all processes: those that are scored, unless the algorithm differs."""
        return self.queries

    @property
    def times(self) -> Sequence[float] | None:
        """The times at which a loss without --kl calls the network; None: at random ones, as it was trained with."""
        return None

    @property
    def sweep(self) -> int:
        """Rounds after which every decision of the chain has been trained on: 1, unless a window moves along it."""
        return 1

    def prepare(self, folder: Path | None) -> None:
        """Do what is done once before the first round, such as sampling pairs; `folder` may keep the result."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the algorithm, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs of the algorithm in tensors, by name."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave. Raises KeyError for one that is missing."""

    def finish(self, number: int) -> None:
        """Do what comes after the last update of round `number`."""

    def penalties(self, condition: Condition, states: Tensor) -> Iterator[Term]:
        """The penalty of --kl: its weight times the mean over steps of KL/d to the frozen model, a term a decision.

        condition: of n images. states: of their roll-out, (T + 1, n, *shape). For algorithms whose own loss does not go
        through the decisions.
        """
        setup, weight = self.setup, self.state.kl_weight
        if weight == 0:
            return
        current = denoiser(setup.model, condition, guidance=setup.train_guidance)
        reference = denoiser(setup.model, condition, reference=True, guidance=setup.train_guidance)
        for step in range(setup.chain.n_decisions):
            loss, metrics = kl_loss(setup.chain.kl(current, reference, states, [step]), dims=setup.dims)
            yield weight * loss / setup.chain.n_decisions, metrics

    def corruption(self, units: Tensor, *path: int) -> tuple[Tensor, Tensor]:
        """Times (n,) and noise (n, *shape) of a denoising loss: each of the units has its own."""
        setup, model = self.setup, self.setup.model
        noise = noise_of(model.shape, 1, setup.noise_path(NOISE, *path), units, model.device)
        return times_of(setup, 1, units, LOSS, *path)[0], noise[0]

    def denoising_term(self, batch: ImageBatch, prompts: list[str], units: Tensor, *path: int) -> Term:
        """The denoising loss on a batch of examples with these prompts, a time and a noise for each of the `units`."""
        model = self.setup.model
        condition = model.conditions(prompts, {name: images.to(model.device) for name, images in batch.extras.items()})
        x0 = model.encode(batch.images.to(model.device))
        times, noise = self.corruption(units, *path)
        errors = denoising_errors(model, condition, x0, times, noise, guidance=self.setup.loss_guidance)
        return errors.mean(), {"error": errors.detach().mean()}


class OfData(Algorithm[Config]):
    """Learns from data: a round is `updates` batches of what `source` holds, drawn with replacement. Scores nothing."""

    source: Sized

    def __init__(self, setup: Setup[Config], state: RunState) -> None:
        super().__init__(setup, state)
        self.units = setup.config.batch * setup.config.updates
        self.index = torch.empty(0, dtype=torch.int64)

    @property
    def queries(self) -> int:
        """0: no image is scored."""
        return 0

    def collect(self, number: int) -> Metrics:
        """Draw the round's data."""
        self.index = torch.randint(len(self.source), (self.units,), generator=self.setup.generator(PAIRS, number))
        return {}


class AdvantageRule(Protocol):
    """How the rewards of a round become advantages."""

    group: int
    """Images of one prompt that stand side by side in a round."""

    def advantages(self, number: int, rewards: Tensor) -> Tensor:
        """Advantages (n,) of the rewards (n,) of all images of round `number`, in their order."""

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class WithinPrompts:
    """Advantages beside what each prompt has earned of late: `PromptStatistics`, kept from round to round."""

    group = 1

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.statistics = PromptStatistics()

    def advantages(self, number: int, rewards: Tensor) -> Tensor:
        """Advantages (n,) of the rewards (n,) of round `number`, which are added to those of their prompts."""
        prompts = self.setup.prompts
        chosen = prompts.draw(len(rewards), self.group, self.setup.generator(PROMPTS, number))
        return self.statistics.advantages(prompts.of(chosen)[0], rewards)

    def state_dict(self) -> dict[str, Any]:
        """The latest rewards of each prompt."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rewards of each prompt."""
        self.statistics.load_state_dict(state)


def require_decisions(setup: Setup, train_steps: int, option: str = "--train-steps") -> None:
    """Raise UserError for a chain that has fewer decisions than `train_steps`, which `option` asks for, or none."""
    decisions = setup.chain.n_decisions
    if max(train_steps, 1) > decisions:
        what = "--steps 1" if decisions == 0 else f"{option} {train_steps}"
        raise UserError(
            f"{what}: of {setup.config.steps} denoising steps {decisions} have noise to learn from, all but the last."
        )


def summary(rewards: Tensor) -> Metrics:
    """Mean and standard deviation of the rewards (n,) of a round; of equal ones exactly 0."""
    mean, std = rewards.mean(), rewards.std(correction=0)
    return {"reward": float(mean), "reward_std": 0.0 if rewards.min() == rewards.max() else float(std)}


# --- Who makes the steps -------------------------------------------------------------------------------------------


class Finetuner:
    """AdamW on what an algorithm's losses say, over the processes of `setup.world`; no step where they say nothing.

    Raises UserError for a model of two networks where the one under training is called at no time of the losses.

    The gradient of an update is the mean over its units, whichever process and part they are in. A checkpoint holds the
    parameters, AdamW's moments, the counts of `RunState` and its KL weight, and the algorithm's own state: no generator
    has one.
    """

    def __init__(self, setup: Setup, state: RunState, algorithm: Algorithm) -> None:
        config = setup.config
        self.setup, self.state, self.algorithm = setup, state, algorithm
        self._told = False
        """Whether it has been said that a round called none of what is trained."""
        if algorithm.times is not None and hasattr(setup.model, "require_called"):  # of models of two networks
            setup.model.require_called(algorithm.times)
        self.parameters = setup.model.tuned.parameters()
        make = adamw8bit.make if config.optimiser == "adamw8bit" else torch.optim.AdamW
        self.optimiser = make(self.parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
        fp16 = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(setup.model.device.type, enabled=fp16)

    def advance(self) -> Metrics:
        """Make one round; give its metrics, alike everywhere: of the round, and means over the updates that it made.

        Raises DivergedError where the loss is not finite.
        """
        setup, state, algorithm = self.setup, self.state, self.algorithm
        metrics = algorithm.collect(state.round)
        updates, asked, called = state.updates, False, False
        each: dict[str, list[float]] = defaultdict(list)
        for turn in range(setup.config.passes):
            order = torch.randperm(algorithm.units, generator=setup.generator(ORDER, state.round, turn))
            for chosen in order.tensor_split(setup.config.updates):
                if not algorithm.has_signal(chosen):
                    continue
                made = self._update(chosen.sort().values, turn)
                asked, called = True, called or made is not None
                for name, value in (made or {}).items():
                    each[name].append(value)
        algorithm.finish(state.round)
        state.round += 1
        state.queries += algorithm.queries
        metrics |= {name: sum(values) / len(values) for name, values in each.items()}
        if asked and not called:
            if not self._told:
                state.say(f"[yellow]{not_called(state.round)}[/]")
            self._told = True
        elif state.updates == updates:
            state.silent += 1
            if state.silent == 1:
                state.say(f"[yellow]{no_signal(state.round, algorithm.queries, metrics, setup.config)}[/]")
        self._adapt(metrics)
        return metrics

    def _update(self, chosen: Tensor, turn: int) -> Metrics | None:
        """Make one step of the optimiser on some of the units; None where nothing that is trained was called."""
        setup, config, state = self.setup, self.setup.config, self.state
        self._warm_up()
        self.optimiser.zero_grad(set_to_none=True)
        # A process whose share has no loss unscales what others have: the scale is made at first use.
        self.scaler.scale(torch.zeros((), device=setup.model.device))
        size, rank = setup.world.size, setup.world.rank
        own = chosen[chosen % size == rank]
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=setup.model.device))
        at_once = max(1, config.micro_batch // self.algorithm.images)
        shares = list(own.split(at_once)) if len(own) else []  # type: ignore[no-untyped-call]
        real = len(shares)
        if config.shard:  # all must call the network equally often: who has less to do does something for nothing
            most = max(-(-int((chosen % size == other).sum()) // at_once) for other in range(size))
            shares += [torch.tensor([rank])] * (most - real)
        for number, part in enumerate(shares):
            share = len(part) / len(chosen) if number < real else 0.0
            terms: dict[str, list[Tensor]] = defaultdict(list)
            for loss, metrics in self.algorithm.losses(part, state.round, turn):
                if loss.requires_grad:  # else only a frozen network of two was called
                    self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
                sums["loss"] += loss.detach() * share
                for name, value in metrics.items():
                    terms[name].append(value.detach().double())
            for name, values in terms.items():
                sums[name] += torch.stack(values).mean() * share
            state.passed(len(part) if number < real else 0)
        setup.world.sum_gradients(self.parameters.values())
        if all(parameter.grad is None for parameter in self.parameters.values()):
            return None
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip_norm)
        result = self._summed(sums)
        # fp16's scaler skips a step that overflows and lowers its scale; nothing else may be infinite.
        if not math.isfinite(result["loss"]) or not (self.scaler.is_enabled() or bool(torch.isfinite(norm))):
            raise DivergedError(
                f"Round {state.round}: the loss is {result['loss']:.4g} and its gradient's norm {float(norm):.4g}. "
                "Training has diverged and stops; a lower --lr or a smaller --clip-nats usually helps."
            )
        if float(norm) != 0:  # else AdamW would still move by its momentum and its weight decay
            self.scaler.step(self.optimiser)
            state.updates += 1
        self.scaler.update()
        return {**result, "gradient_norm": float(norm)}

    def _summed(self, sums: dict[str, Tensor]) -> Metrics:
        """The sums over all processes, as numbers; a process that had no units has no names of its own."""
        names = self.setup.world.union(sums)
        total = torch.stack([sums[name] for name in names])
        self.setup.world.sum_([total])
        return dict(zip(names, total.tolist(), strict=True))

    def _warm_up(self) -> None:
        config = self.setup.config
        lr = config.lr * min(1.0, (self.state.updates + 1) / (config.warm_up + 1))
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):  # adamw8bit's
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _adapt(self, metrics: Metrics) -> None:
        """Record the penalty's weight, and change it where there is a target: nats an image over the whole chain.

        Once a sweep, by its mean: where a window stands decides how large the KL of its decisions is.
        """
        state, target = self.state, self.setup.config.kl_target
        if state.kl_weight > 0:
            metrics["kl_weight"] = state.kl_weight
        if target is not None and "kl" in metrics:
            state.kls.append(metrics["kl"])
        if target is not None and state.kls and state.round % self.algorithm.sweep == 0:
            whole = sum(state.kls) / len(state.kls) * self.setup.chain.n_decisions
            state.kls.clear()
            if whole > ADAPT * target:
                state.kl_weight *= 2
            elif whole < target / ADAPT:
                state.kl_weight /= 2

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds: tensors, and the rest as JSON."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[PARAMETER + name] = parameter.detach()
            moments = self.optimiser.state.get(parameter)
            if moments:
                for values, scale, moment in MOMENTS:
                    tensors[values + name] = moments[moment]
                    if self.setup.config.optimiser == "adamw8bit":
                        tensors[values + name], scales = adamw8bit.tensors_of(moments[moment])
                        if scales is not None:
                            tensors[scale + name] = scales
        tensors |= {OWN + name: tensor for name, tensor in self.algorithm.tensors().items()}
        # AdamW's own count: fp16's scaler skips updates that overflow.
        steps = max((int(moments["step"]) for moments in self.optimiser.state.values()), default=0)
        info = {
            "updates": self.state.updates,
            "optimiser_steps": steps,
            "queries": self.state.queries,
            "silent": self.state.silent,
            "kl_weight": self.state.kl_weight,
            "scaler": self.scaler.state_dict(),
            "algorithm": self.algorithm.state_dict(),
        }
        fewer = {  # a parameter that had no gradient in some updates, as of a network of two, has made fewer steps
            name: int(self.optimiser.state[parameter]["step"])
            for name, parameter in self.parameters.items()
            if parameter in self.optimiser.state and int(self.optimiser.state[parameter]["step"]) != steps
        }
        if fewer:
            info["fewer_steps"] = fewer
        if self.state.kls:
            info["kls"] = list(self.state.kls)
        if isinstance(self.setup.reward, ScaledSum):
            info["spreads"] = self.setup.reward.state_dict()
        return tensors, info

    def load_state_dict(self, step: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Restore what `state_dict` gave after `step` rounds. Raises UserError where it is another model's."""
        starting = len(PARAMETER)
        self.setup.model.tuned.load_state_dict({n[starting:]: t for n, t in tensors.items() if n.startswith(PARAMETER)})
        fewer = info.get("fewer_steps", {})
        for name, parameter in self.parameters.items():
            if FIRST + name in tensors:
                held: dict[str, Tensor] = {"step": torch.tensor(float(fewer.get(name, info["optimiser_steps"])))}
                for values, scale, moment in MOMENTS:
                    held[moment] = self._moment(tensors[values + name], tensors.get(scale + name), parameter, values)
                self.optimiser.state[parameter] = held
        state = self.state
        state.round, state.updates, state.queries = step, info["updates"], info["queries"]
        state.kl_weight = info["kl_weight"]
        state.kls = list(info.get("kls", []))
        state.silent = info.get("silent", 0)  # runs of before 2026-11-28 counted none
        self.scaler.load_state_dict(info["scaler"])
        self.algorithm.load_state_dict(info["algorithm"])
        if isinstance(self.setup.reward, ScaledSum):
            self.setup.reward.load_state_dict(info["spreads"])
        own = {name.removeprefix(OWN): tensor for name, tensor in tensors.items() if name.startswith(OWN)}
        self.algorithm.load_tensors(own)

    def _moment(self, values: Tensor, scale: Tensor | None, parameter: nn.Parameter, which: str) -> Tensor:
        """A moment of a checkpoint beside its parameter, whichever optimiser wrote it. which: FIRST or the second.

        AdamW takes what adamw8bit left as the numbers that its codes stand for; the other way float32 stays float32.
        """
        if scale is None:
            return values.to(parameter)
        moment = adamw8bit.moment_from(values, scale, parameter, signed=which == FIRST)
        return moment if self.setup.config.optimiser == "adamw8bit" else moment.dequantize().to(parameter)
