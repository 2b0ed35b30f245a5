"""What a run is looked at by besides its reward: is it better, or has it only found how to please the scorer?

All measures are of the same prompts and the same noise at every evaluation, so that what changes is the model.

    reward           the one that is trained on; of a sum, each part beside it, without its weight
    held_out         another one, which is not: what the reward gains and this does not is over-optimisation; of a sum
                     each part beside it, too
    kl               of the whole chain from the frozen model's, in nats an image: how far the model has moved
    kl_rounding      the same of a model that has hardly moved: what rounding makes; in half precision, before training
    diversity        root mean square distance of two images of one prompt, averaged over pairs; 0: all alike
    reference_error  the frozen model's denoising loss on the images: how odd they are to what was learned from data
    class_accuracy   share that an independent classifier takes for what the prompt says (built-in models): the digit;
                     the object, and its colour where the prompt names one
    class_entropy    entropy of its classes over all images, in nats (built-in models); even: ln 10 = 2.30 of the
                     digits, ln 12 = 2.48 of the objects
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffrl.diffusion import Denoise
from diffrl.images.model import Condition, NotFinite, loss_guidance
from diffrl.images.rewards import Reward
from diffrl.images.run import FinetuneRun
from diffrl.images.samples import (
    EVALUATION,
    PROBE_NOISE,
    PROBE_TIMES,
    RunState,
    Samples,
    Setup,
    denoiser,
    denoising_errors,
    noise_of,
    parts,
    roll_out,
    rows,
    score,
    times_of,
)
from diffrl.images.stored import HELD_OUT_PART, PART
from diffrl.support.errors import joined
from diffrl.training.logs import MetricsLog


class IndependentClassifier(Protocol):
    """A classifier of a model's images that is no part of any reward."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> probabilities of classes, one row an image."""

    def agree(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether each image (B, C, H, W) is taken for what its prompt says: bool (B,)."""


@dataclass(frozen=True)
class Numbered:
    """The classifier of prompts that name a class by its number: images (B, ...) -> probabilities of classes (B, C)."""

    classify: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, ...) -> probabilities of classes (B, C)."""
        return self.classify(images)

    def agree(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether the most probable class of each image is its prompt's: bool (B,)."""
        return self.classify(images).argmax(1) == torch.tensor([int(prompt) for prompt in prompts])


def classifier_of(base: str) -> IndependentClassifier:
    """The classifier of a built-in model's images that is no part of any reward."""
    if base == "tiny-emoji":
        from diffrl.images.rewards.emoji import emoji_classifier

        return emoji_classifier()
    from diffrl.images.rewards.digits import digit_classifier

    return Numbered(digit_classifier())


COLLAPSED = {"diversity": 1e-3, "class_entropy": 0.05}
"""Measures, and values of theirs that no working model has before training."""
NOISE_LEVELS = 4
"""How many times t `reference_error` takes for each image."""


@dataclass(frozen=True)
class Evaluation:
    """Images (n, C, H, W) in [0, 1] of the fixed prompts and noise, on the CPU, and the measures of this module."""

    images: Tensor
    prompts: list[str]
    metadata: list[Mapping[str, Any]]
    measures: dict[str, float]


@torch.no_grad()
def sampled(setup: Setup, state: RunState) -> tuple[Samples, Tensor]:
    """An evaluation's samples, shared among the processes, and the numbers (eval_samples,) of their prompts."""
    config, n = setup.config, setup.config.eval_samples
    # Of many prompts so few that each has two images: diversity is of images of one prompt.
    group = 1 if n >= 2 * len(setup.prompts) else 2
    chosen = setup.prompts.draw(n, group, setup.generator(EVALUATION)).sort().values
    return roll_out(setup, state, chosen, setup.noise_path(EVALUATION), guidance=config.guidance), chosen


@torch.no_grad()
def evaluate(
    setup: Setup, state: RunState, held_out: Reward | None, classifier: IndependentClassifier | None
) -> Evaluation:
    """Sample and measure the model as it is; processes share the images, and all get the same measures.

    Raises NotFinite for images or measures that are not finite; diversity is nan where no prompt has two images.
    """
    config, n = setup.config, setup.config.eval_samples
    samples, chosen = sampled(setup, state)
    measures: dict[str, float] = {}
    if setup.reward is not None:
        total, each = score(setup.reward, samples, config.micro_batch)
        measures["reward"] = float(samples.whole(total).mean())
        if len(each) > 1:
            measures |= {PART + name: float(samples.whole(v).mean()) for name, v in each.items()}
    if held_out is not None:
        total, each = score(held_out, samples, config.micro_batch)
        measures["held_out"] = float(samples.whole(total).mean())
        if len(each) > 1:
            measures |= {HELD_OUT_PART + name: float(samples.whole(v).mean()) for name, v in each.items()}
    if setup.chain.n_decisions:
        measures["kl"] = float(samples.whole(chain_kl(setup, samples)).mean())
        if state.round == 0 and config.precision != "fp32":
            measures["kl_rounding"] = float(samples.whole(rounding_kl(setup, samples)).mean())
    images = samples.whole(samples.images.float()).cpu()
    measures["diversity"] = diversity(images, chosen)
    measures["reference_error"] = float(samples.whole(reference_error(setup, samples)).mean())
    texts, metadata = setup.prompts.of(chosen)
    if classifier is not None:
        probabilities = classifier(images)
        taken = probabilities.argmax(1)
        measures["class_accuracy"] = float(classifier.agree(images, texts).float().mean())
        share = torch.bincount(taken, minlength=probabilities.shape[1]).double() / n
        measures["class_entropy"] = abs(float((share * share.clamp_min(1e-12).log()).sum()))
    odd = [name for name, value in measures.items() if not math.isfinite(value) and name != "diversity"]
    if odd:
        are = "is" if len(odd) == 1 else "are"
        raise NotFinite(
            f"Round {state.round}: the evaluation's {joined(odd)} {are} not finite. Training has diverged and stops; a "
            "lower --lr usually helps."
        )
    return Evaluation(images, texts, metadata, measures)


def alarm(first: Mapping[str, float]) -> str | None:
    """A sentence where the measures of the evaluation before the first round have all collapsed; else None.

    Images that hardly differ, and all of one class: what was measured is then hardly what the model sampled.
    """
    measured = {name: limit for name, limit in COLLAPSED.items() if math.isfinite(first.get(name, math.nan))}
    if not measured or any(first[name] > limit for name, limit in measured.items()):
        return None
    found = ", ".join(f"{name.replace('_', ' ')} {first[name]:.3g}" for name in measured)
    return (
        f"Before the first round the images are all alike ({found}): the model is broken, or its images were changed "
        "before they were measured. Look at images/000000.png in the run's folder before you go on."
    )


def training_loss(run: FinetuneRun, log: MetricsLog) -> dict[str, float]:
    """The mean loss on examples since the last evaluation, as an evaluation has it: of supervised runs alone."""
    if run.config.algo != "supervised" or not run.history:
        return {}
    loss = log.mean("error", run.history[-1]["round"])
    return {} if loss is None else {"loss": loss}


def chain_kl(setup: Setup, samples: Samples) -> Tensor:
    """KL of the whole chain to the frozen model's, one value an image (n,): the sum over its decisions, in nats."""

    def pair(condition: Condition) -> tuple[Denoise, Denoise]:
        model, guidance = setup.model, setup.config.guidance
        reference = denoiser(model, condition, reference=True, guidance=guidance)
        return denoiser(model, condition, guidance=guidance), reference

    return _kl(setup, samples, pair)


def rounding_kl(setup: Setup, samples: Samples) -> Tensor:
    """KL of the whole chain where the model has hardly moved, one value an image (n,): in half precision, of rounding.

    To the model as it is, of one that Adam's first step in random directions has moved: each parameter of adapters is
    lr, at most 3e-4, greater or smaller; of a network that is trained whole, which this would move indeed, a hundredth
    of it. Nothing is changed, and no random numbers of the run are used.
    """
    tuned = setup.model.tuned
    size = min(setup.config.lr, 3e-4) / (100 if tuned.lora is None else 1)
    generator = torch.Generator(setup.model.device).manual_seed(0)

    def moved(parameter: Tensor) -> Tensor:
        uniform = torch.rand(parameter.shape, generator=generator, device=setup.model.device)
        result: Tensor = parameter.detach() + size * (uniform - 0.5).sign()
        return result

    parameters = {name: moved(parameter) for name, parameter in tuned.parameters().items()}

    def pair(condition: Condition) -> tuple[Denoise, Denoise]:
        denoise = denoiser(setup.model, condition, guidance=setup.config.guidance)

        def stepped(x: Tensor, t: Tensor) -> Tensor:
            with tuned.standing_in(parameters):
                return denoise(x, t)

        return stepped, denoise

    return _kl(setup, samples, pair)


def _kl(setup: Setup, samples: Samples, pair: Callable[[Condition], tuple[Denoise, Denoise]]) -> Tensor:
    """KL of a chain to another's, one value an image (n,): `pair` gives both denoisers for a condition."""
    chain, totals = setup.chain, []
    for part in parts(len(samples), setup.config.micro_batch):
        one, other = pair(rows(samples.condition, part))
        # Step by step: all at once would hold every mean of the chain.
        steps = [chain.kl(one, other, samples.states[:, part], [k])[0] for k in range(chain.n_decisions)]
        totals.append(torch.stack(steps).sum(0))
    return torch.cat(totals)


def reference_error(setup: Setup, samples: Samples) -> Tensor:
    """The frozen model's denoising loss on the images' x_0 (n,), at times and with noise that never change."""
    model = setup.model
    guidance = loss_guidance(model, setup.config.guidance)
    errors = []
    for part in parts(len(samples), setup.config.micro_batch):
        x0, index = samples.states[-1, part], samples.index[part]
        condition = rows(samples.condition, part)
        noise = noise_of(model.shape, NOISE_LEVELS, setup.noise_path(PROBE_NOISE), index, model.device)
        t = times_of(setup, NOISE_LEVELS, index, PROBE_TIMES)
        each = [
            denoising_errors(model, condition, x0, t[level], noise[level], reference=True, guidance=guidance)
            for level in range(NOISE_LEVELS)
        ]
        errors.append(torch.stack(each).mean(0))
    return torch.cat(errors)


def diversity(images: Tensor, groups: Tensor) -> float:
    """Root mean square distance a pixel of two images of one group (n,), averaged over pairs and then over groups.

    nan where no group has two.
    """
    means = []
    for group in torch.unique(groups):
        x = images[groups == group].flatten(1).double()
        if len(x) > 1:
            distances = torch.pdist(x) / x.shape[1] ** 0.5
            means.append(distances.mean())
    return float(torch.stack(means).mean()) if means else float("nan")
