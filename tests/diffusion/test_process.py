import math

import numpy as np
import pytest
import torch
from diffusion_cases import F64, PROCESSES, close
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrl.diffusion import VE, VP, Process, RectifiedFlow, TrigFlow, discrete_grid, expand

process_parameter = pytest.mark.parametrize("process", PROCESSES, ids=str)
T = torch.tensor([0.05, 0.3, 0.9], dtype=F64)


@given(process=st.sampled_from(PROCESSES), log_k=st.floats(-9.0, 9.0))
def test_time_inverts_the_noise_to_signal_ratio(process: Process, log_k: float) -> None:
    k = torch.tensor(math.exp(log_k), dtype=F64)
    torch.testing.assert_close(process.ratio(process.time(k)), k, rtol=1e-8, atol=0)


@process_parameter
def test_time_zero_is_clean_data(process: Process) -> None:
    zero = process.time(torch.zeros((), dtype=F64))
    assert (zero.item(), process.alpha(zero).item(), process.sigma(zero).item()) == (0, 1, 0)


@pytest.mark.parametrize(
    ("process", "f", "g_squared"),
    [
        (VP(), -0.5 * torch.ones_like(T), torch.ones_like(T)),
        (VE(), torch.zeros_like(T), 2 * T),
        (RectifiedFlow(), -1 / (1 - T), 2 * T / (1 - T)),
        (TrigFlow(0.5), -torch.tan(T), 2 * 0.25 * torch.tan(T)),
    ],
    ids=str,
)
def test_drift_is_the_closed_form(process: Process, f: torch.Tensor, g_squared: torch.Tensor) -> None:
    drift, diffusion = process.drift(T)
    close(drift, f)
    close(diffusion**2, g_squared)


@pytest.mark.parametrize(
    ("process", "d_alpha", "d_sigma"),
    [
        (VP(), -0.5 * torch.exp(-T / 2), 0.5 * torch.exp(-T) / torch.sqrt(1 - torch.exp(-T))),
        (VE(), torch.zeros_like(T), torch.ones_like(T)),
        (RectifiedFlow(), -torch.ones_like(T), torch.ones_like(T)),
        (TrigFlow(0.5), -torch.sin(T), 0.5 * torch.cos(T)),
    ],
    ids=str,
)
def test_rate_is_the_derivative(process: Process, d_alpha: torch.Tensor, d_sigma: torch.Tensor) -> None:
    rate = process.rate(T)
    close(rate[0], d_alpha)
    close(rate[1], d_sigma)


@process_parameter
def test_float32_keeps_its_digits_at_small_noise(process: Process) -> None:
    k = torch.tensor([1e-6, 1e-4, 1e-2, 1.0])
    torch.testing.assert_close(process.ratio(process.time(k)), k, rtol=1e-6, atol=0)


@process_parameter
def test_grid_is_uniform_in_log_snr(process: Process) -> None:
    times = process.grid(10, 0.02, 20.0, dtype=F64)
    assert times.shape == (11,)
    assert (times.diff() < 0).all()
    log_k = process.ratio(times).log()
    close(log_k, torch.linspace(math.log(20), math.log(0.02), 11, dtype=F64))


def test_grid_with_rho_7_is_edms_and_ends_at_zero() -> None:
    n, k_min, k_max = 18, 0.002, 80.0
    steps = VE().grid(n, k_min, k_max, rho=7, to_zero=True, dtype=F64)
    published = [
        (k_max ** (1 / 7) + i / (n - 1) * (k_min ** (1 / 7) - k_max ** (1 / 7))) ** 7 for i in range(n)
    ]  # Karras et al. 2022, eq. 5
    close(steps, torch.tensor([*published, 0.0], dtype=F64))
    close(VP().grid(n, k_min, k_max, rho=7, to_zero=True, dtype=F64), VP().time(steps))
    close(VE().grid(n - 1, k_min, k_max, rho=7, dtype=F64), steps[:-1])


def test_one_step_grids() -> None:
    assert VE().grid(1, 0.5, 2.0).tolist() == [2.0, 0.5]
    assert VE().grid(1, 0.5, 2.0, to_zero=True).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("bad", [(0, 0.1, 1.0), (4, 0.0, 1.0), (4, 2.0, 1.0), (4, 0.1, math.inf), (4, 0.1, 1.0, -1.0)])
def test_grid_refuses_what_is_no_grid(bad: tuple) -> None:
    with pytest.raises(ValueError, match="need"):
        VP().grid(*bad)


def test_a_number_of_steps_is_whole() -> None:
    for bad in (2.5, 2.0, "3"):
        with pytest.raises(ValueError, match="whole"):
            VP().grid(bad, 0.02, 20.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="whole"):
            discrete_grid("vp", bad)  # type: ignore[arg-type]
    assert torch.equal(VP().grid(np.int64(3), 0.02, 20.0), VP().grid(3, 0.02, 20.0))
    with pytest.raises(ValueError, match="at least one step"):
        discrete_grid("vp", 0)


def test_diffusion_ql_schedule_is_vp_at_the_published_times() -> None:
    times = discrete_grid("vp", 5, dtype=F64)
    close(times, torch.tensor([5.05, 3.248, 1.842, 0.832, 0.218, 0.0], dtype=F64))
    # and its alpha_bar the product of the paper's alpha_i
    alpha_bar = 1.0
    for i in range(1, 6):
        alpha_bar *= math.exp(-0.1 / 5 - (10 - 0.1) * (2 * i - 1) / (2 * 25))
        assert VP().alpha(times[5 - i]).item() ** 2 == pytest.approx(alpha_bar)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_discrete_schedules_are_those_of_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(1000, beta_schedule={"cosine": "squaredcos_cap_v2"}.get(name, name))
    times = discrete_grid(name, 1000, dtype=F64)
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    close((-times[:-1].flip(0)).exp(), theirs.alphas_cumprod.double(), atol=2e-5)


def test_a_schedule_of_one_step() -> None:
    close(discrete_grid("vp", 1, dtype=F64), torch.tensor([0.1 + 9.9 / 2, 0.0], dtype=F64))


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'cosine'"):
        discrete_grid("cosin", 10)
    with pytest.raises(ValueError, match="at least one step"):
        discrete_grid("vp", 0)


def test_times_expand_on_the_right() -> None:
    x = torch.zeros(2, 3, 4)
    assert expand(torch.zeros(()), x).shape == ()
    assert expand(torch.zeros(2, 3), x).shape == (2, 3, 1)
    assert expand(torch.zeros(2), x).shape == (2, 1, 1)
    assert expand(torch.zeros(2, 1), x).shape == (2, 1, 1)
    for shape in [(3,), (4,), (2, 4), (2, 3, 4, 1)]:
        with pytest.raises(ValueError, match="do not fit"):
            expand(torch.zeros(shape), x)


@process_parameter
@settings(max_examples=20)
@given(log_k=st.floats(-4.0, 4.0))
def test_perturb_scales_data_and_noise_row_by_row(process: Process, log_k: float) -> None:
    x0, noise = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 3, 4, dtype=F64)
    t = process.time(torch.full((2, 3), math.exp(log_k), dtype=F64))
    t[1] = process.time(torch.tensor(0.3, dtype=F64))
    x = process.perturb(x0, t, noise)
    close(x[1, 2], process.alpha(t[1, 2]) * x0[1, 2] + process.sigma(t[1, 2]) * noise[1, 2])
    close(x[0], process.alpha(t[0, 0]) * x0[0] + process.sigma(t[0, 0]) * noise[0])


def test_trigflow_needs_a_positive_data_std() -> None:
    with pytest.raises(ValueError, match="data_std"):
        TrigFlow(0.0)
