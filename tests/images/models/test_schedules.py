"""A discrete schedule is VP at -log(alpha_bar), its labels exact; a flow's grid is the scheduler's."""

from typing import Any

import pytest
import torch

from diffrl.diffusion import sample
from diffrl.images.models.pipelines import to_images
from diffrl.images.models.schedules import DiscreteSchedule, FlowSchedule, schedule_of
from diffrl.support.errors import UserError

SCHEDULES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
    {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("config", SCHEDULES)
def test_labels_are_exact_at_the_tables_times_and_linear_between(config: dict[str, Any]) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(config)
    schedule, alpha_bar = DiscreteSchedule(scheduler), scheduler.alphas_cumprod
    n = len(alpha_bar)
    times = schedule.training_times(20 * n, torch.Generator().manual_seed(0)).unique()
    assert len(times) == n
    assert torch.equal(schedule.label(times), torch.arange(n, dtype=torch.float32))
    assert torch.equal(schedule.label(times[n // 2]), torch.tensor(n // 2, dtype=torch.float32))
    alpha = schedule.prediction.process.alpha(times)
    assert torch.allclose(alpha**2, alpha_bar, rtol=1e-5, atol=1e-12)
    between = times[:-1] + (times[1:] - times[:-1]) / 4
    assert torch.allclose(schedule.label(between)[10:], (torch.arange(n - 1) + 0.25)[10:], atol=0.01)
    assert schedule.label(torch.tensor(0.0)) == 0
    assert schedule.label(torch.tensor(1e6)) == n - 1


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_grid_is_the_schedulers(spacing: str, steps: int) -> None:
    from diffusers import DDIMScheduler

    config = {"timestep_spacing": spacing, "steps_offset": 1, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler.from_config(config)
    schedule = DiscreteSchedule(scheduler)
    scheduler.set_timesteps(steps)
    times = schedule.times(steps)
    assert times.shape == (steps + 1,)
    assert times[-1] == 0
    assert schedule.label(times[:-1]).tolist() == scheduler.timesteps.tolist()
    assert bool((times[1:] < times[:-1]).all())


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
def test_a_consistency_models_grid_is_its_own(kind: str) -> None:
    """The levels that it was distilled at, and not DDIM's of as many steps: 751, 501, 251, 1."""
    import diffusers

    scheduler = getattr(diffusers, kind)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = DiscreteSchedule(scheduler)
    for steps in (1, 4, 50):
        scheduler.set_timesteps(steps)
        times = schedule.times(steps)
        assert schedule.label(times[:-1]).tolist() == scheduler.timesteps.tolist()
    if kind == "LCMScheduler":
        assert schedule.label(schedule.times(4)[:-1]).tolist() == [999, 759, 499, 259]
    with pytest.raises(UserError, match=f"51 steps of {kind}, which has a grid of 50: give fewer"):
        schedule.times(51)


@pytest.mark.parametrize("spaced", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("kind", ["EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_a_scheduler_that_spaces_its_sigmas_is_sampled_at_them(kind: str, spaced: str) -> None:
    """At each time sigma / alpha is its sigma; the network is told what it tells, which some cut to whole numbers."""
    import diffusers

    stable_diffusion = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config({**stable_diffusion, spaced: True})
    schedule = schedule_of(scheduler, 1)
    for steps in (1, 4, 20):
        scheduler.set_timesteps(steps)
        times, sigmas = schedule.times(steps), scheduler.sigmas.unique_consecutive()[:steps]
        assert (len(times), times[-1]) == (steps + 1, 0)
        process = schedule.prediction.process
        k = process.sigma(times) / process.alpha(times)
        assert torch.allclose(k[:-1], sigmas.float(), rtol=1e-5)
        told = scheduler.timesteps if "Heun" not in kind else scheduler.timesteps[::2]
        assert torch.allclose(schedule.label(times[:-1]), told.float(), atol=1.1)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"])
def test_a_scheduler_that_leaves_out_the_last_time_is_sampled_at_its_own(kind: str, spacing: str) -> None:
    """999, 799, 599, 400, 200, where DDIM's of that spacing ends at 0; to the bit of a label's float32."""
    import diffusers

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config({**config, "timestep_spacing": spacing})
    schedule = schedule_of(scheduler, 1)
    for steps in (2, 6, 20):
        scheduler.set_timesteps(steps)
        times = schedule.times(steps)
        assert (len(times), times[-1]) == (steps + 1, 0)
        assert torch.allclose(schedule.label(times[:-1]), scheduler.timesteps.float(), atol=0.02)


@pytest.mark.parametrize("kind", ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"])
def test_times_between_whole_ones_are_not_rounded(kind: str) -> None:
    """Of the spacing linspace: 832.5, 666, 499.5 ..., where DDIM's grid has 832, 666, 500."""
    import diffusers

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config({**config, "timestep_spacing": "linspace"})
    scheduler.set_timesteps(7)
    times = schedule_of(scheduler, 1).times(7)
    told = scheduler.timesteps.unique_consecutive().float()
    assert torch.allclose(schedule_of(scheduler, 1).label(times[:-1]), told, atol=0.05)
    assert told[1] == 832.5


def test_noise_levels_that_cannot_be_told_apart_are_refused() -> None:
    """As many steps as the table has: two of DPM-Solver's are one. Sigmas of a flow are none of a table's."""
    import diffusers

    solver = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    with pytest.raises(UserError, match="1000 steps of DPMSolverMultistepScheduler: two of its noise levels are one"):
        DiscreteSchedule(solver).times(1000)
    with pytest.raises(UserError, match="use_flow_sigmas needs prediction_type flow_prediction"):
        schedule_of(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), 1)
    odd = diffusers.EulerDiscreteScheduler.from_config({"original_inference_steps": 50, "timestep_spacing": "leading"})
    assert len(schedule_of(odd, 1).times(4)) == 5


@pytest.mark.parametrize("steps", [4, 11])
def test_spaced_steps_without_noise_are_eulers(steps: int) -> None:
    """Of one answer eps(x) = c x the chain of eta = 0 and EulerDiscreteScheduler make the same sample, to rounding."""
    from diffusers import EulerDiscreteScheduler

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "use_karras_sigmas": True}
    scheduler = EulerDiscreteScheduler.from_config(config)
    schedule = schedule_of(scheduler, 1)
    times = schedule.times(steps)
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    denoise = schedule.prediction.denoiser(lambda x, t: 0.4 * x)
    ours = sample(schedule.prediction.process, denoise, schedule.prediction.process.sigma(times[0]) * z, times, eta=0.0)
    scheduler.set_timesteps(steps)
    x = scheduler.sigmas[0] * z  # sigma / alpha times ours
    for label in scheduler.timesteps:
        x = scheduler.step(0.4 * scheduler.scale_model_input(x, label), label, x).prev_sample
    assert torch.allclose(ours, x, rtol=1e-5, atol=1e-5)


def test_what_a_schedule_cannot_be() -> None:
    from diffusers import DDIMScheduler

    with pytest.raises(UserError, match="prediction_type is 'learned'"):
        DiscreteSchedule(DDIMScheduler(prediction_type="learned"))
    with pytest.raises(UserError, match="ends in pure noise"):
        DiscreteSchedule(DDIMScheduler(rescale_betas_zero_snr=True))
    for steps in (0, 1001):
        with pytest.raises(UserError, match="from 1 to 1000"):
            DiscreteSchedule(DDIMScheduler()).times(steps)
    with pytest.raises(UserError, match="offset by 1"):
        DiscreteSchedule(DDIMScheduler(steps_offset=1)).times(1000)


def test_a_schedule_is_what_the_scheduler_steps_through() -> None:
    from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    rescaled = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for scheduler in (DDPMScheduler(), EulerDiscreteScheduler(beta_schedule="scaled_linear", **rescaled)):
        assert isinstance(schedule_of(scheduler, 1), DiscreteSchedule)
    assert isinstance(schedule_of(FlowMatchEulerDiscreteScheduler(), 1), FlowSchedule)
    with pytest.raises(UserError, match="EDMEulerScheduler is neither"):
        schedule_of(EDMEulerScheduler(), 1)
    own = DDPMScheduler(beta_schedule="sigmoid")  # a table that DDIM does not have
    schedule = schedule_of(own, 1)
    alpha = schedule.prediction.process.alpha(schedule.times(10)[:-1])
    assert torch.allclose(alpha**2, own.alphas_cumprod[range(900, -1, -100)], rtol=1e-5)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"shift": 1.0}, {"use_dynamic_shifting": True}])
def test_flows(config: dict[str, Any]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    tokens = 1024
    schedule = FlowSchedule(config, tokens)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = calculate_shift(tokens) if "use_dynamic_shifting" in config else None
    scheduler.set_timesteps(7, mu=mu)
    times = schedule.times(7)
    assert torch.equal(times, scheduler.sigmas)
    assert torch.equal(schedule.label(times[:-1]), scheduler.timesteps)
    # Training: logit-normal, shifted as the grid: s = odds(shifted) / odds(unshifted), whatever the time.
    s = config.get("shift", torch.tensor(mu or 0.0).exp())
    t = schedule.training_times(20_000, torch.Generator().manual_seed(0)).double()
    logit = torch.log(t / (1 - t)) - torch.log(torch.as_tensor(s))
    assert abs(float(logit.mean())) < 0.03
    assert abs(float(logit.std()) - 1) < 0.03
    with pytest.raises(UserError, match="at least 1"):
        schedule.times(0)


def test_images_are_clamped_and_gradients_lead_back() -> None:
    x = torch.tensor([-3.0, -3.0, 0.2, 0.2, 3.0, 3.0], requires_grad=True)
    images = to_images(x)
    assert torch.allclose(images, torch.tensor([0.0, 0.0, 0.6, 0.6, 1.0, 1.0]))
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    (gradient,) = torch.autograd.grad((images * weight).sum(), x)
    # Descent goes against the gradient: below 0 it may rise, above 1 it may fall.
    assert gradient.tolist() == [0.0, -0.5, 0.5, -0.5, 0.5, 0.0]
