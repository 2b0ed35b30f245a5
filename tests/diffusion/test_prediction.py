import math

import pytest
import torch
from diffusion_cases import F64, KINDS, PROCESSES, close, gaussian, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffrl.diffusion import VE, VP, Prediction, Process, RectifiedFlow, TrigFlow

K = torch.tensor([0.05, 0.7, 6.0], dtype=F64)


def noised(process: Process, k: Tensor = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0, e = torch.randn(2, len(k), 4, dtype=F64, generator=generator).chunk(2, -1)
    t = process.time(k).expand(2, len(k))
    return x0, e, t, process.perturb(x0, t, e)


@settings(deadline=None)
@given(
    process=st.sampled_from(PROCESSES),
    kind=st.sampled_from(KINDS),
    log_k=st.floats(-4.0, 4.0),
    data_std=st.floats(0.2, 3.0),
)
def test_every_prediction_gives_back_data_and_noise(process: Process, kind, log_k: float, data_std: float) -> None:
    prediction = Prediction(kind, process, data_std)
    x0, e, t, x = noised(process, torch.tensor([math.exp(log_k)], dtype=F64))
    m = prediction.target(x0, e, t)
    close(prediction.to_x0(m, x, t), x0, atol=1e-10)
    close(prediction.to_eps(m, x, t), e, atol=1e-10)
    torch.testing.assert_close(prediction.from_x0(x0, x, t), m, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_targets_by_name(process: Process) -> None:
    x0, e, t, _ = noised(process)
    a, s = process.alpha(t)[..., None], process.sigma(t)[..., None]
    d_a, d_s = (v[..., None] for v in process.rate(t))
    expected = {"eps": e, "x0": x0, "v": a * e - s * x0, "score": -e / s, "velocity": d_a * x0 + d_s * e}
    for kind, m in expected.items():
        close(Prediction(kind, process).target(x0, e, t), m)


def test_edm_on_ve_is_karras_table() -> None:
    """Karras et al. 2022, table 1, last column."""
    c_d, sigma = 0.5, K
    prediction = Prediction("edm", VE(), c_d)
    c_skip, c_out = prediction.preconditioning(sigma)
    close(c_skip, c_d**2 / (sigma**2 + c_d**2))
    close(c_out, sigma * c_d / torch.sqrt(sigma**2 + c_d**2))
    c_in, c_noise = prediction.inputs(torch.ones(3, dtype=F64), sigma)
    close(c_in, 1 / torch.sqrt(sigma**2 + c_d**2))
    close(c_noise, torch.log(sigma) / 4)


def test_edm_on_vp_with_unit_data_is_minus_v() -> None:
    x0, e, t, x = noised(VP())
    edm, v = Prediction("edm", VP()), Prediction("v", VP())
    close(edm.target(x0, e, t), -v.target(x0, e, t))
    close(edm.inputs(x, t)[0], x)


def test_edm_on_trigflow_is_scms_prediction_up_to_sign() -> None:
    """sCM, arXiv 2410.11081, section 3.1: D = cos(t) x - sin(t) c F(x / c, t), with c the data's deviation."""
    c, t = 0.5, torch.tensor([0.1, 0.8, 1.5], dtype=F64)
    edm = Prediction("edm", TrigFlow(c), c)
    c_skip, c_out = edm.preconditioning(t)
    close(c_skip, torch.cos(t))
    close(c_out, torch.sin(t) * c)  # on -F
    close(edm.inputs(torch.ones(3, dtype=F64), t)[0], torch.full((3,), 1 / c, dtype=F64))


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_edm_scales_input_and_target_to_unit_variance(process: Process) -> None:
    """Whatever the process: for data of deviation c_d, Var(c_in x) = 1 and p^2 c_d^2 + q^2 = 1."""
    c_d = 0.6
    prediction = Prediction("edm", process, c_d)
    t = process.time(K)
    p, q = prediction.coefficients(t)
    close(p**2 * c_d**2 + q**2, torch.ones_like(t))
    c_in, _ = prediction.inputs(torch.ones_like(t), t)
    close(c_in**2 * (process.alpha(t) ** 2 * c_d**2 + process.sigma(t) ** 2), torch.ones_like(t))


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_edm_denoiser_is_the_identity_at_time_zero(process: Process) -> None:
    x = torch.randn(3, 2)
    D = Prediction("edm", process, 0.5).denoiser(network)
    close(D(x, torch.zeros(())), x, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_tweedie(process: Process) -> None:
    """The score is -(x - a D)/s^2, checked by differentiating the exact log-density."""
    data = gaussian()
    t = process.time(torch.tensor(0.7, dtype=F64))
    x = torch.randn(5, 2, dtype=F64)

    def log_density(x: Tensor) -> Tensor:
        mean, std = data.marginal(process, t)
        return torch.distributions.Normal(mean, std).log_prob(x).sum()

    D = data.denoiser(process)(x, t)
    score = Prediction("score", process).from_x0(D, x, t)
    close(score, torch.func.grad(log_density)(x))
    close(score, -(x - process.alpha(t) * D) / process.sigma(t) ** 2)


@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_undoes_what_the_network_predicts(kind) -> None:
    """A network that knows the answer is denoised to it, for rows of their own times and for a scalar time alike."""
    for process in PROCESSES:
        prediction = Prediction(kind, process, 0.8)
        x0, e, t, x = noised(process)
        m = prediction.target(x0, e, t)
        close(prediction.denoiser(lambda *_, m=m: m)(x, t), x0)
        D = prediction.denoiser(network)
        close(D(x, t)[:, 1], D(x[:, 1], t[0, 1]))


def test_labels_are_the_time_and_edms_a_quarter_of_log_k() -> None:
    t = torch.tensor([0.2, 0.9])
    x = torch.randn(2, 3)
    for kind in KINDS[:-1]:
        x_in, label = Prediction(kind, VP()).inputs(x, t)
        assert x_in is x
        assert label is t
    _, label = Prediction("edm", RectifiedFlow()).inputs(x, t)
    close(label, torch.log(t / (1 - t)) / 4, atol=1e-6)


def test_edms_label_is_finite_at_both_ends() -> None:
    """In float32 cos(pi/2) is -4e-8: pure noise must not look like clean data."""
    for process, end in ((TrigFlow(), math.pi / 2), (RectifiedFlow(), 1.0)):
        _, label = Prediction("edm", process).inputs(torch.zeros(2, 1), torch.tensor([0.0, end]))
        close(label, torch.tensor([-1.0, 1.0]) * math.log(1e8) / 4, atol=0.5)


def test_clip_clamps_the_denoiser() -> None:
    x = torch.linspace(-9, 9, 7)[:, None]
    t = torch.tensor(1.0)
    free = Prediction("eps", VP()).denoiser(network)(x, t)
    clipped = Prediction("eps", VP()).denoiser(network, clip=(-1, 2))(x, t)
    assert free.min() < -1
    assert free.max() > 2
    close(clipped, free.clamp(-1, 2), atol=0)


def test_a_half_precision_network_keeps_the_states_digits() -> None:
    x, t = torch.randn(4, 2), torch.tensor(0.5)
    D = Prediction("edm", VE(), 0.5).denoiser(lambda x, _: x.bfloat16())
    assert D(x, t).dtype == torch.float32
    c_skip, _ = Prediction("edm", VE(), 0.5).preconditioning(t)
    m = (x / math.sqrt(0.5)).bfloat16().float()
    close(D(x, t), c_skip * x + (0.25 / math.sqrt(0.5)) * m, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_has_a_forward_derivative(kind, process: Process) -> None:
    """Continuous-time consistency models (sCM) need the JVP of D in (x, t), the velocity's own JVP nested in it."""
    D = Prediction(kind, process).denoiser(network)
    x, t = torch.randn(3, 2, dtype=F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    _, tangent = torch.func.jvp(D, (x, t), (torch.ones_like(x), torch.ones_like(t)))
    h = 1e-5
    close(tangent, (D(x + h, t + h) - D(x - h, t - h)) / (2 * h), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_edms_scale_is_the_hypotenuse_in_a_graph_too(dtype: torch.dtype) -> None:
    """To the bit `torch.hypot`; in an exported graph to rounding without it, where squares overflow or vanish too.

    Roundings of the graph's form: of the ratio, its square, the sum (half of each in the root), the root, the product.
    """

    class Scale(torch.nn.Module):
        def __init__(self, data_std: float) -> None:
            super().__init__()
            self.prediction = Prediction("x0", VE(), data_std)  # edm's own coefficients are not made for such numbers

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return self.prediction.scale(t)

    eps, low, high = torch.finfo(dtype).eps, torch.finfo(dtype).tiny ** 0.9, torch.finfo(dtype).max ** 0.9
    t = torch.tensor([0.0, low, 1e-3, 0.5, 2.0, 1e4, high], dtype=dtype)
    for data_std in (low, 0.5, high):
        wanted = torch.hypot(torch.full_like(t, data_std), t)
        assert torch.equal(Scale(data_std)(t), wanted)
        program = torch.export.export(Scale(data_std), (t,), strict=False)
        assert "hypot" not in program.graph_module.code
        torch.testing.assert_close(program.module()(t), wanted, rtol=4 * eps, atol=0)
        assert torch.equal(Scale(data_std)(t), wanted)  # also after an export


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="Did you mean 'velocity'"):
        Prediction("velocty", VP())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data_std"):
        Prediction("edm", VP(), 0.0)
    with pytest.raises(ValueError, match="shapes must agree"):
        Prediction("eps", VP()).denoiser(lambda x, _: x[..., :1])(torch.zeros(3, 2), torch.tensor(1.0))


def test_a_prediction_that_says_nothing_of_the_data_is_refused() -> None:
    class Steady(VE):
        """sigma' = 0: the velocity carries no information."""

        def sigma(self, t: Tensor) -> Tensor:
            return torch.ones_like(t)

    with pytest.raises(ValueError, match="does not determine x_0"):
        Prediction("velocity", Steady())
    Prediction("eps", Steady())
