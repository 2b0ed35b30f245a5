"""Diffuser (Janner et al. 2022, arXiv 2205.09991): planning as denoising a window of states and actions.

A window is x = [a_t, s_t] for H rows of one episode, (H, A + O). The network is the temporal U-Net, and predicts x_0:

    L = E |x_0 - D(x_i, i)|^2,    x_i = alpha_i x_0 + sigma_i eps,

with the known states written into x_i before the network sees them and into its answer (`diffusion.inpainting`, shown
"clean"): they are the first state, and with `goal_reaching` the last one. So their loss is 0. A plan is a sample of the
moving average of the network in which the first state is the one at hand and the last one the goal.

With `show_ends` every row of the network also sees the known states of its window and its own place, from -1 to 1, in
columns beside its own. As published, they reach a row only through its neighbours, by convolutions that do not know
where they are: with 256 rows and 6,000 steps of a small network row 1 does not yet depend on row 0.

With a goal one plan serves an episode, and is followed by the controller of `planning.waypoint_action`. Without, the
plan's own actions are executed, one before the next plan by default: cloning by windows, unless the plans are guided.

With `guidance` "return" a second network J learns the return that follows, of the same noised windows,

    L_J = E (R - J(x_i, i))^2 / Var R,

and plans are denoised with its gradient (section 3.2 there; `diffusion.classifier_guided`, J in log p(y | x)'s place):

    D' = D + scale (sigma^2 / alpha) grad J(x_i, i),

`guidance_steps` times, as a gradient ascent, at all but the `guidance_stop` last of the T steps. So a step of "ddpm"
moves its mean by scale beta_i / sqrt(alpha_i) grad J, with alpha_i and beta_i the step's own. The authors move x_i
before D, by scale times the posterior's variance, beta_i (1 - abar_{i-1}) / (1 - abar_i), which is less at the last
steps. The form here belongs to no step, so every solver takes it, and where J is exact and linear the plans are of p(x)
exp(scale J) with any of them. x_i that are hardly more than noise, sigma > 20 alpha, are not guided: there sigma^2 /
alpha is in the hundreds, and would multiply J's error.

Differences from the authors' code: one plan is made where theirs takes the best of 64 by J; no window runs over its
episode's end; terminals cost nothing in R (theirs: 100); J is trained as long as the diffuser; the loss is the mean
over the whole batch of 64, where theirs accumulates two of 32; on locomotion states are scaled to [-1, 1] by their
limits, where theirs have mean 0 and deviation 1, and D is clamped there, where theirs is not (so `guidance_scale` acts
in other units); the time's embedding goes through a layer of twice its width (theirs: four times); J's network has one
block a level and a mean over rows (theirs: two, two more, and a flattened end); the time label is i = T (2 / pi)
atan(k), which is the step's index on the cosine schedule, and means something to every solver's grid; actions are
scaled to [-1, 1] by their bounds, not by the data's limits. Sampling with fewer steps than T takes every so many of
the T times, "ddpm" as the others.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Metrics
from agents.planning import Planner, unscaled, waypoint_action
from agents.planning_config import Diffuser
from agents.returns import ReturnPredictor, ReturnSource, ReturnWindows
from diffrl.data.segments import Segments, SegmentSource
from diffrl.data.transitions import Transitions
from diffrl.diffusion import VP, Denoise, Prediction, Sampler, classifier_guided, denoising_loss, discrete_grid
from diffrl.diffusion.inpainting import Known
from diffrl.diffusion.loss import grid_times
from diffrl.nets import Adam, average_
from diffrl.nets.temporal import TemporalUNet
from diffrl.support.errors import DataError, UserError

_NOISE_ALONE = 20.0
"""Noise-to-signal ratio above which plans are not guided."""


class DiffuserNoise(NamedTuple):
    """All that is random in the losses of `DiffuserAgent`."""

    t: Tensor
    """(S, B) times of the grid, uniform over its steps."""
    eps: Tensor
    """(S, B, H, A + O) standard normal noise on the windows."""


class DiffuserAgent(Planner):
    """Plans by denoising windows of actions and states, see the top of this file."""

    compilable = ("denoising_loss", "return_loss")

    def __init__(
        self, config: Diffuser, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        if config.goal_reaching and observation_size != 2 * action_size:
            raise UserError(
                f"--agent.goal-reaching drives by positions and velocities, as many of each as there are actions; here "
                f"are {observation_size} observations and {action_size} actions. Leave it out for these data."
            )
        self.config: Diffuser = config
        self.horizon = config.horizon
        self.reaches_goal = config.goal_reaching
        self.replan_every = config.replan_every or (None if config.goal_reaching else 1)

        size = action_size + observation_size
        self.denoiser = TemporalUNet(
            size,
            self.generators,
            width=config.width,
            multipliers=config.channels,
            kernel=config.kernel,
            seen_features=(1 + config.goal_reaching) * observation_size + 1 if config.show_ends else 0,
        ).to(self.device)
        self.average = deepcopy(self.denoiser).requires_grad_(False)
        self.networks = {"actor": self.denoiser, "average": self.average}
        self.optimisers = {"actor": Adam(self.denoiser, config.learning_rate)}
        self.prediction = Prediction("x0", VP())
        T, n = config.denoising_steps, config.sampling_steps or config.denoising_steps
        grid = discrete_grid(config.schedule, T, dtype=torch.float64)
        kept = (torch.arange(n) * T) // n
        times = torch.cat([grid[kept], grid[-1:]])
        ddpm = config.solver == "ddpm"
        self.sampler = Sampler(VP(), times, "ddim" if ddpm else config.solver, eta=float(ddpm))
        self.calls = sum(1 + len(step.trials) for step in self.sampler.plan)
        self._times = grid.to(torch.get_default_dtype()).to(self.device)
        if config.guided:
            self.predictor = ReturnPredictor(size, self.generators, config).to(self.device)
            self.average_predictor = deepcopy(self.predictor).requires_grad_(False)
            self.networks |= {"return": self.predictor, "average_return": self.average_predictor}
            self.optimisers["return"] = Adam(self.predictor, config.learning_rate)
            rising = [*grid.flip(0).tolist(), math.inf]
            # Between two times of the grid, so that no rounding decides which are guided.
            self._unguided = sum(rising[config.guidance_stop : config.guidance_stop + 2]) / 2

    @override
    def source(self, transitions: Transitions) -> SegmentSource | ReturnSource:
        """Windows of `horizon` rows of one episode, with returns if plans are guided by them.

        Raises DataError where no episode is that long.
        """
        try:
            segments = SegmentSource.from_transitions(transitions, self.horizon)
        except DataError as error:
            raise DataError(f"{error} The rows of a segment are --agent.horizon.") from error
        if not self.config.guided:
            return segments
        source = ReturnSource(segments, self.config.discount)
        for predictor in (self.predictor, self.average_predictor):
            predictor.scale(source)
        return source

    # --- training ---------------------------------------------------------------------------------------------------

    def known(self, first: Tensor, last: Tensor | None) -> Known:
        """The known entries of windows (S, B, H, A + O): states (S, B, O) of the first row, and the last if given."""
        mask = torch.zeros(self.horizon, self.action_size + self.observation_size, device=first.device)
        mask[0, self.action_size :] = 1
        values = first.unsqueeze(2)
        if last is not None:
            mask[-1, self.action_size :] = 1
            middle = values.new_zeros(*values.shape[:2], self.horizon - 2, values.shape[-1])
            values = torch.cat([values, middle, last.unsqueeze(2)], 2)
        else:
            values = values.expand(-1, -1, self.horizon, -1)
        return Known(mask, torch.nn.functional.pad(values, (self.action_size, 0)), "clean")

    def network(self, unet: TemporalUNet, x: Tensor, t: Tensor) -> Tensor:
        """The prediction of x_0 (S, B, H, A + O) at x of that shape and t () or (S, B), labelled: the step's index.

        x holds the known states.
        """
        if self.config.show_ends:
            x = self.with_ends(x)
        prediction: Tensor = unet(x, self.label(t))
        return prediction

    def with_ends(self, x: Tensor) -> Tensor:
        """x (S, B, H, D), and in every row the known states of its window and the row's place: (S, B, H, D + E).

        E = O + 1, with a goal 2 O + 1. The place of row h = 0 ... H - 1 is 2 h / (H - 1) - 1.
        """
        states = x[..., self.action_size :]
        ends = [states[:, :, :1], states[:, :, -1:]] if self.config.goal_reaching else [states[:, :, :1]]
        place = torch.linspace(-1, 1, self.horizon, device=x.device, dtype=x.dtype)[:, None].expand(*x.shape[:3], 1)
        return torch.cat([x, *(end.expand_as(states) for end in ends), place], -1)

    def label(self, t: Tensor) -> Tensor:
        """What the networks are told of the time t, T (2 / pi) atan(k): the step's index on the cosine schedule."""
        k = self.prediction.process.ratio(t)
        label: Tensor = (2 / math.pi) * self.config.denoising_steps * torch.atan(k)
        return label

    def noise(self, batch: Segments | ReturnWindows, generator: torch.Generator) -> DiffuserNoise:
        """Draw what the losses need for a batch."""
        shape = (*batch.actions.shape[:3], self.action_size + self.observation_size)
        t = grid_times(self._times, shape[:2], generator)
        eps = torch.randn(shape, generator=generator, device=t.device)
        return DiffuserNoise(t, eps)

    def denoising_loss(self, batch: Segments | ReturnWindows, noise: DiffuserNoise) -> Tensor:
        """E |x_0 - D(x_i, i)|^2, the mean over batch, rows and columns, the first action's weighted: (S,).

        noise: of `noise`.
        """
        x0 = torch.cat([batch.actions, batch.observations], -1)
        states = batch.observations
        known = self.known(states[:, :, 0], states[:, :, -1] if self.config.goal_reaching else None)

        def network(x: Tensor, t: Tensor) -> Tensor:
            return known.insert(self.network(self.denoiser, known.insert(x), t))

        of_windows = self.prediction, network, x0, noise.t, noise.eps
        if self.config.action_weight == 1:
            return denoising_loss(*of_windows, event_dims=2).mean(-1)
        weights = torch.ones(x0.shape[-2:], device=x0.device)
        weights[0, : self.action_size] = self.config.action_weight
        return (weights * denoising_loss(*of_windows, event_dims=0)).mean((-3, -2, -1))

    def return_loss(self, batch: ReturnWindows, noise: DiffuserNoise) -> Tensor:
        """E (R - J(x_i, i))^2 / Var R, the mean over the batch: (S,). noise: of `noise`, as of `denoising_loss`."""
        x0 = torch.cat([batch.actions, batch.observations], -1)
        x = self.prediction.process.perturb(x0, noise.t, noise.eps)
        x = self.known(batch.observations[:, :, 0], None).insert(x)
        error: Tensor = self.predictor.f(x, self.label(noise.t)) - self.predictor.standardised(batch.returns)
        return error.square().mean(-1)

    @override
    def update(self, batch: Segments | ReturnWindows, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of denoising score matching on windows, and if plans are guided one of the predicted returns."""
        noise = self.noise(batch, generator)
        loss = self.denoising_loss(batch, noise)
        norm = self.optimisers["actor"].step(loss)
        # A rate as a tensor: no step branches on a counter. Up to `ema_start` the average is a copy.
        due = (self.step % self.config.ema_every == 0).float()
        rate = torch.where(self.step < self.config.ema_start, 1.0, self.config.ema_rate)
        average_(self.average, self.denoiser, due * rate)
        metrics = {"bc_loss": loss.detach(), "actor_grad_norm": norm}
        if isinstance(batch, ReturnWindows):
            return_loss = self.return_loss(batch, noise)
            metrics["return_grad_norm"] = self.optimisers["return"].step(return_loss)
            metrics["return_loss"] = return_loss.detach()
            average_(self.average_predictor, self.predictor, due * rate)
        self.step += 1
        return metrics

    # --- acting -----------------------------------------------------------------------------------------------------

    @override
    def check_ready(self) -> None:
        """Raise UserError where plans are to reach a goal, and none is known."""
        if self.config.goal_reaching and self.goal is None:
            raise UserError(
                "This Diffuser plans to a goal, and nothing says where it is: name an environment that has a "
                "`goal_state`, as maze2d's (--env ID; in Python load_policy(RUN, env=ID)), or train without "
                "--agent.goal-reaching."
            )

    @override
    @torch.no_grad()
    def plan(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Plans (S, B, H, A + O) from observations (S, B, O). Raises UserError where a goal is missing."""
        size = self.action_size + self.observation_size
        shape = (1 + self.sampler.n_noise, *observations.shape[:2], self.horizon, size)
        return self.plan_from(observations, torch.randn(shape, generator=generator, device=observations.device))

    def plan_from(self, observations: Tensor, noise: Tensor) -> Tensor:
        """The plans of `plan`, from noise (1 + sampler.n_noise, S, B, H, A + O), the start first."""
        self.check_ready()
        goal = self.goal.expand_as(observations) if self.config.goal_reaching and self.goal is not None else None
        known = self.known(observations, goal)
        denoise = self.prediction.denoiser(lambda x, t: self.network(self.average, x, t))
        if self.config.guided and self.config.guidance_scale > 0:
            denoise = self.guided(denoise, known)
        return self.sampler(denoise, noise[0], noise=noise[1:], clip=(-1.0, 1.0), inpaint=known)

    def predicted_return(self, x: Tensor, t: Tensor) -> Tensor:
        """J(x_t, t) (S, B), of windows x (S, B, H, A + O) at t () or (S, B), by the averaged network."""
        values: Tensor = self.average_predictor(x, self.label(t))
        return values

    @property
    def least_noise(self) -> Tensor:
        """The time () of the grid's last noise level: what the networks know that is nearest to a finished plan."""
        return self._times[-2]

    def guided(self, denoise: Denoise, known: Known) -> Denoise:
        """The denoiser bent by the gradient of `predicted_return`; known entries stay as they are."""
        process = self.prediction.process

        def guide(x: Tensor, t: Tensor) -> Tensor:
            on = (t > self._unguided) & (process.ratio(t) <= _NOISE_ALONE)
            value: Tensor = on * self.predicted_return(known.insert(x), t)
            return value

        scale, steps = self.config.guidance_scale, self.config.guidance_steps
        return classifier_guided(process, denoise, guide, scale, steps=steps)

    @override
    def states(self, plans: Tensor) -> Tensor:
        """The observations (S, B, H, O) of plans (S, B, H, A + O)."""
        return plans[..., self.action_size :]

    @override
    def follow(self, plans: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """Actions (S, B, A): of the controller that drives to the next state, or without a goal the plan's own."""
        if not self.config.goal_reaching:
            index = t.clamp(max=self.horizon - 1)[..., None, None].expand(*t.shape, 1, self.action_size)
            return plans[..., : self.action_size].gather(2, index).squeeze(2).clamp(-1, 1)
        scales = unscaled(self.scales, self.observation_size, self.action_size, self.device)
        states = scales.observations.inverse(self.states(plans))
        actions = waypoint_action(states, t, scales.observations.inverse(observations))
        return scales.actions(actions).clamp(-1, 1)
