"""The schedules of diffusers as processes and times of our own.

A discrete schedule is `VP()` at t_i = -log(alpha_bar_i), i = 0 ... N - 1 the network's label; between the table's times
the label is interpolated, so that a chain may take any step. A flow is `RectifiedFlow()`, its label N t.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from diffrl.diffusion import VP, Prediction, RectifiedFlow
from diffrl.diffusion.prediction import Kind
from diffrl.support.errors import UserError

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' names of what a network predicts, and ours."""
SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings of diffusers' schedulers that place a grid by its noise levels, between the table's."""
OWN = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
"""Schedulers, without that word in their names, that spread their steps over all times but the last, "linspace" too."""
PURE = 50.0
"""The time that stands for alpha_bar = 0 (a schedule of zero terminal signal), where -log is infinite: k = 7e10."""


class Schedule(Protocol):
    """What a pipeline's scheduler says of its network."""

    prediction: Prediction

    def times(self, steps: int) -> Tensor:
        """The steps + 1 decreasing times of sampling, ending at 0, float32 on the host."""

    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n random times t > 0 as in training, on the generator's device."""

    def label(self, t: Tensor) -> Tensor:
        """What the network is told of the times t: of t's shape and device, float32."""


class DiscreteSchedule:
    """The table of alpha_bar of any discrete scheduler: DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC.

    **The grid** is that of `DDIMScheduler.set_timesteps` (timestep_spacing, steps_offset) with a 0 after it: the last
    step goes to clean data, k = 0. That is set_alpha_to_one = True. Where it is False (Stable Diffusion) DDIMScheduler
    ends at alpha_bar_0 instead, k = .03, leaving as much noise in the latents at eta = 0, and adding some at eta > 0,
    a decision of which DDPO's code makes a log-probability; here the last step is none. Steps go from each time to the
    next: so do DDIMScheduler's with the spacing leading, and with trailing where steps divides N; elsewhere its own
    step, of N // steps labels, misses its next time. A scheduler of consistency models (LCM, TCD) was distilled at a
    grid of its own, which is the grid then. So are the sigmas, where a scheduler has them, of OWN, of the spacing
    linspace, where DDIMScheduler rounds to whole times, and of a scheduler that spaces them (SPACED; Karras et al.
    2022, arXiv 2206.00364, eq. 5): sigma is sqrt(1 / alpha_bar - 1), and t = log(1 + sigma^2).

    Raises UserError for a prediction it does not know, and one of noise on a schedule that ends in pure noise.
    """

    def __init__(self, scheduler: Any) -> None:
        from diffusers import DDIMScheduler

        settings, n = scheduler.config, len(scheduler.alphas_cumprod)
        kind = str(settings.prediction_type)
        if kind not in KINDS:
            raise UserError(f"The scheduler's prediction_type is {kind!r}; expected one of {', '.join(KINDS)}.")
        table = -torch.log(scheduler.alphas_cumprod.double().cpu())
        if kind == "epsilon" and bool(torch.isinf(table[-1])):
            raise UserError(
                "The scheduler ends in pure noise (rescale_betas_zero_snr), where predicting the noise says nothing of "
                "the image: its prediction_type cannot be 'epsilon'."
            )
        spacing, offset = settings.get("timestep_spacing", "leading"), settings.get("steps_offset", 0)
        self._grid = DDIMScheduler(n, timestep_spacing=spacing, steps_offset=offset)
        if settings.get("use_flow_sigmas"):
            raise UserError(f"A {type(scheduler).__name__} with use_flow_sigmas needs prediction_type flow_prediction.")
        kind_of = type(scheduler).__name__.removesuffix("Scheduler")
        own = kind_of in OWN or any(settings.get(name) for name in SPACED)
        own |= spacing == "linspace" or settings.get("interpolation_type") == "log_linear"
        self._spaced = own and hasattr(scheduler, "sigmas")
        self.own_levels = kind_of in ("LCM", "TCD") or self._spaced
        """Whether the grid is the scheduler's own, and not DDIM's."""
        if self.own_levels:
            self._grid = type(scheduler).from_config(settings)
        self.prediction = Prediction(KINDS[kind], VP())
        self._table = table.clamp_max(PURE).float()
        self._copies: dict[torch.device, Tensor] = {}

    def times(self, steps: int) -> Tensor:
        """The times of the grid's time steps, then 0. Raises UserError for a number of steps it cannot make."""
        n = len(self._table)
        if not 1 <= steps <= n:
            raise UserError(f"{steps} steps of a schedule of {n}: expected from 1 to {n}.")
        most = self._grid.config.get("original_inference_steps", n)
        if steps > most:
            raise UserError(f"{steps} steps of {type(self._grid).__name__}, which has a grid of {most}: give fewer.")
        self._grid.set_timesteps(steps)
        if self._spaced:  # each sigma once, schedulers of the second order have them twice; some end above 0
            sigmas = self._grid.sigmas.double().unique_consecutive()
            levels = torch.log1p(sigmas[sigmas > 0][:steps] ** 2).cpu()
            if len(levels) < steps:
                raise UserError(f"{steps} steps of {type(self._grid).__name__}: two of its noise levels are one.")
            return torch.cat([levels, levels.new_zeros(1)]).clamp_max(PURE).float()
        index = self._grid.timesteps
        if int(index.max()) >= n:
            raise UserError(f"{steps} steps, offset by {self._grid.config.steps_offset}, leave a schedule of {n}.")
        return torch.cat([self._table[index], self._table.new_zeros(1)])

    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n random times, uniform over the table."""
        index = torch.randint(len(self._table), (n,), generator=generator, device=generator.device)
        return self._on(generator.device)[index]

    def label(self, t: Tensor) -> Tensor:
        """What the network is told of t: i at t_i, to the bit; linear between."""
        table, t = self._on(t.device), t.float()
        low = (torch.searchsorted(table, t.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        t_low, t_high = table[low], table[low + 1]
        return (low + (t - t_low) / (t_high - t_low)).clamp(0, len(table) - 1)

    def _on(self, device: torch.device) -> Tensor:
        """The table there, copied once: labels are asked for at every step."""
        if device not in self._copies:
            self._copies[device] = self._table.to(device)
        return self._copies[device]


class FlowSchedule:
    """The straight lines of `FlowMatchEulerDiscreteScheduler`, its grid shifted towards noise as it has it.

    A shift s takes t to s t / (1 + (s - 1) t) (Esser et al. 2024, arXiv 2403.03206, eq. 23). tokens: how many the
    transformer sees of an image, on which a dynamic shift depends.
    """

    def __init__(self, config: Mapping[str, Any], tokens: int) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.prediction = Prediction("velocity", RectifiedFlow())
        settings = self._scheduler.config
        if settings.invert_sigmas or settings.stochastic_sampling:
            raise UserError("A flow scheduler with invert_sigmas or stochastic_sampling is not supported.")
        self._labels = int(settings.num_train_timesteps)
        self._mu: float | None = None
        self._shift = float(settings.shift)
        if settings.use_dynamic_shifting:
            slope = (settings.max_shift - settings.base_shift) / (
                settings.max_image_seq_len - settings.base_image_seq_len
            )
            self._mu = settings.base_shift + slope * (tokens - settings.base_image_seq_len)
            self._shift = math.exp(self._mu) if settings.time_shift_type == "exponential" else self._mu

    def times(self, steps: int) -> Tensor:
        """The scheduler's sigmas, which are our times. Raises UserError for steps < 1."""
        if steps < 1:
            raise UserError(f"{steps} steps: expected at least 1.")
        self._scheduler.set_timesteps(steps, mu=self._mu)
        sigmas: Tensor = self._scheduler.sigmas
        return sigmas.float().cpu()

    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n random times: the logistic of a standard normal (arXiv 2403.03206, section 3.1), shifted as the grid is."""
        u = torch.sigmoid(torch.randn(n, generator=generator, device=generator.device))
        return self._shift * u / (1 + (self._shift - 1) * u)

    def label(self, t: Tensor) -> Tensor:
        """What the network is told of t: N t, N = 1000."""
        return t.float() * self._labels


class UniPCFlowSchedule(FlowSchedule):
    """The straight lines of a `UniPCMultistepScheduler` with flow_prediction, as Wan is published with.

    The grid is its sigmas, of which the first is 1 - 1e-6. What the network is told is N t, as of every flow here;
    UniPC's own time steps are that cut to whole numbers, less than one label of 1000 below.

    Raises UserError for another spacing than the flow's own, and for a grid that does not end at 0.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers import UniPCMultistepScheduler

        self._scheduler = UniPCMultistepScheduler.from_config(config)
        self.prediction = Prediction("velocity", RectifiedFlow())
        settings = self._scheduler.config
        other = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        if odd := [name for name in other if settings.get(name)]:
            raise UserError(f"A flow's UniPC scheduler with {odd[0]} is not supported.")
        if not settings.get("use_flow_sigmas") or settings.final_sigmas_type != "zero":
            raise UserError(
                "A UniPC scheduler with flow_prediction needs use_flow_sigmas, without which its sigmas are no flow's "
                "times, and final_sigmas_type zero."
            )
        self._labels = int(settings.num_train_timesteps)
        self._mu = None
        self._shift = float(settings.flow_shift)


def schedule_of(scheduler: Any, tokens: int) -> Schedule:
    """The schedule of a pipeline's scheduler; `tokens`: see `FlowSchedule`.

    Of diffusers' sampler the noise levels are taken, and not how it steps from one to the next. Raises UserError for a
    scheduler that is neither a table of alpha_bar nor a flow (EDM's, say).
    """
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") and "shift" in scheduler.config:
        return FlowSchedule(scheduler.config, tokens)
    if name == "UniPCMultistepScheduler" and scheduler.config.get("prediction_type") == "flow_prediction":
        return UniPCFlowSchedule(scheduler.config)
    if hasattr(scheduler, "alphas_cumprod"):
        return DiscreteSchedule(scheduler)
    raise UserError(f"The scheduler {name} is neither a flow's nor a table of alpha_bar as DDPM and DDIM have it.")
