"""The optimisation of a fine-tuning run: rounds of an algorithm, one after the other; and their state."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from diffrl.images.algorithms.base import ORDER, Algorithm, Metrics, Setup
from diffrl.training.loop import DivergedError

PARAMETER, FIRST, SECOND = "parameter.", "first_moment.", "second_moment."
"""What the names of a checkpoint's tensors begin with."""
ADAPT = 1.5
"""PPO's adaptive penalty (Schulman et al. 2017, arXiv 1707.06347, section 4): beyond this factor from the target the
weight doubles, or halves."""


class Finetuner:
    """AdamW on what an algorithm's losses say, over the processes of `setup.world`.

    The gradient of an update is the mean over its units, whichever process and part they are in. Its state is the
    parameters, AdamW's moments, the count of updates, the KL weight, and the algorithm's own: no generator has one.
    """

    def __init__(self, setup: Setup, algorithm: Algorithm) -> None:
        config = setup.config
        assert config.lr is not None
        self.setup, self.algorithm = setup, algorithm
        self.parameters = setup.model.tuned.parameters()
        self.optimiser = torch.optim.AdamW(self.parameters.values(), config.lr, weight_decay=config.weight_decay)
        fp16 = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(setup.model.device.type, enabled=fp16)
        self.round = 0
        self.updates = 0
        self.queries = algorithm.prepared

    def advance(self) -> Metrics:
        """Make one round; its metrics, alike on all processes. Raises DivergedError where the loss is not finite."""
        setup, config, algorithm = self.setup, self.setup.config, self.algorithm
        assert config.updates is not None
        metrics = algorithm.collect(self.round)
        means = _Means()
        for turn in range(config.passes):
            order = torch.randperm(algorithm.units, generator=setup.generator(ORDER, self.round, turn))
            for chosen in order.tensor_split(config.updates):
                means.add(self._update(chosen.sort().values, turn))
        self.round += 1
        self.queries += algorithm.queries
        metrics |= means.result()
        self._adapt(metrics)
        return metrics

    def _update(self, chosen: Tensor, turn: int) -> Metrics:
        """One step of the optimiser on some of the round's units."""
        setup, config = self.setup, self.setup.config
        self._warm_up()
        self.optimiser.zero_grad(set_to_none=True)
        own = chosen[chosen % setup.world.size == setup.world.rank]
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=setup.model.device))
        at_once = max(1, config.micro_batch // self.algorithm.images)
        for part in own.split(at_once) if len(own) else ():  # type: ignore[no-untyped-call]
            share = len(part) / len(chosen)
            terms: dict[str, list[Tensor]] = defaultdict(list)
            for loss, metrics in self.algorithm.losses(part, self.round, turn):
                self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
                sums["loss"] += loss.detach() * share
                for name, value in metrics.items():
                    terms[name].append(value.detach().double())
            for name, values in terms.items():
                sums[name] += torch.stack(values).mean() * share
            setup.on_progress(len(part))
        setup.world.sum_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip_norm)
        result = _summed(sums, setup)
        # fp16's scaler skips a step that overflows and lowers its scale; nothing else may be infinite.
        if not math.isfinite(result["loss"]) or not (self.scaler.is_enabled() or bool(torch.isfinite(norm))):
            raise DivergedError(
                f"Round {self.round}: the loss is {result['loss']:.4g} and its gradient's norm {float(norm):.4g}. "
                "Training has diverged and stops; a lower --lr or a smaller --clip-nats usually helps."
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.updates += 1
        return {**result, "gradient_norm": float(norm)}

    def _warm_up(self) -> None:
        config = self.setup.config
        assert config.lr is not None
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr * min(1.0, (self.updates + 1) / (config.warm_up + 1))

    def _adapt(self, metrics: Metrics) -> None:
        """Record the penalty's weight, and change it where `kl_target` is given: nats an image over the whole chain."""
        target = self.setup.config.kl_target
        if self.setup.kl_weight > 0:
            metrics["kl_weight"] = self.setup.kl_weight
        if target is not None and "kl" in metrics:
            whole = metrics["kl"] * self.setup.chain.n_decisions
            if whole > ADAPT * target:
                self.setup.kl_weight *= 2
            elif whole < target / ADAPT:
                self.setup.kl_weight /= 2

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[PARAMETER + name] = parameter.detach()
            moments = self.optimiser.state.get(parameter)
            if moments:
                tensors[FIRST + name], tensors[SECOND + name] = moments["exp_avg"], moments["exp_avg_sq"]
        info = {
            "updates": self.updates,
            "optimiser_steps": self._optimiser_steps(),
            "queries": self.queries,
            "kl_weight": self.setup.kl_weight,
            "scaler": self.scaler.state_dict(),
            "algorithm": self.algorithm.state(),
        }
        return tensors, info

    def _optimiser_steps(self) -> int:
        """AdamW's own count: fp16's scaler skips updates that overflow."""
        return max((int(moments["step"]) for moments in self.optimiser.state.values()), default=0)

    def load(self, step: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Take up the `state` after `step` rounds. Raises UserError where it is another model's."""
        starting = len(PARAMETER)
        self.setup.model.tuned.load_state_dict({n[starting:]: t for n, t in tensors.items() if n.startswith(PARAMETER)})
        for name, parameter in self.parameters.items():
            if FIRST + name in tensors:
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(info["optimiser_steps"])),
                    "exp_avg": tensors[FIRST + name].to(parameter),
                    "exp_avg_sq": tensors[SECOND + name].to(parameter),
                }
        self.round, self.updates, self.queries = step, info["updates"], info["queries"]
        self.setup.kl_weight = info["kl_weight"]
        self.scaler.load_state_dict(info["scaler"])
        self.algorithm.load(info["algorithm"])


class _Means:
    """Means of metrics over the updates of a round."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.values[name].append(value)

    def result(self) -> Metrics:
        return {name: sum(values) / len(values) for name, values in self.values.items()}


def _summed(sums: dict[str, Tensor], setup: Setup) -> Metrics:
    """The sums over all processes, as numbers; a process that had no units has no names of its own."""
    names = setup.world.union(sums)
    total = torch.stack([sums[name] for name in names])
    setup.world.sum_([total])
    return dict(zip(names, total.tolist(), strict=True))
