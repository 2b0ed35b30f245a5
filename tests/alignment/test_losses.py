"""The losses: against their papers' formulas, by the signs of their gradients, and on a Gaussian with a known optimum.

The Gaussian: a chain of one step from noise to x_0 ~ N(theta, .5^2 I), the denoiser the constant theta.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl.alignment import (
    PairErrors,
    PromptStatistics,
    d3po_loss,
    ddpo_is_loss,
    ddpo_sf_loss,
    diffusion_dpo_loss,
    dpok_loss,
    group_advantages,
    kl_loss,
    nft_loss,
    pair_errors,
    rwr_loss,
    rwr_weights,
)
from diffrl.diffusion import VP, DenoisingChain, Prediction, at_steps, denoising_loss
from tests.rounding import assert_equal_to_rounding, rounding

F64 = torch.float64
SD = 16_384
"""The dimensions of a latent of Stable Diffusion, 4 x 64 x 64."""
KINDS = ("sigmoid", "hinge", "ipo")


def draws(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), inputs)


# --- policy gradients: the formulas --------------------------------------------------------------------------------


def test_ddpo_sf_is_the_score_function() -> None:
    log_prob, advantages = draws(3, 8, scale=40).requires_grad_(), draws(8, seed=1)
    loss, metrics = ddpo_sf_loss(log_prob, advantages)
    torch.testing.assert_close(loss, -(advantages * log_prob).sum() / 24)
    torch.testing.assert_close(gradients(loss, log_prob)[0], -advantages.expand(3, 8) / 24)
    assert not metrics["log_prob"].requires_grad


def test_ddpo_is_starts_as_ddpo_sf() -> None:
    """At the first update the ratio is 1: the same gradient, the same loss but for a constant."""
    old, advantages = draws(3, 8, scale=40), draws(8, seed=1)
    new = old.clone().requires_grad_()
    loss, metrics = ddpo_is_loss(new, old, advantages, 0.1)
    torch.testing.assert_close(loss, -advantages.mean())
    torch.testing.assert_close(gradients(loss, new)[0], gradients(ddpo_sf_loss(new, advantages)[0], new)[0])
    assert metrics["clip_fraction"] == metrics["approx_kl"] == 0


@pytest.mark.parametrize("dims", [1, 64])
def test_ddpo_is_is_ppo(dims: int) -> None:
    """The unsimplified max(-A r, -A clip(r)), its gradient too, with all four cases of side and clip present."""
    old, advantages = draws(5, 200), draws(200, seed=1)
    new = (old + draws(5, 200, seed=2, scale=0.4)).requires_grad_()
    ratio = torch.exp((new - old) / dims)
    clipped = ratio.clamp(math.exp(-0.3 / dims), math.exp(0.3 / dims))
    expected = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    loss, metrics = ddpo_is_loss(new, old, advantages, 0.3, dims=dims)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, new)[0], gradients(expected, new)[0])
    torch.testing.assert_close(metrics["clip_fraction"], ((new - old).abs() > 0.3).double().mean())
    torch.testing.assert_close(metrics["approx_kl"], ((new - old) ** 2).mean().detach() / 2)


@pytest.mark.parametrize(
    ("L", "A", "pushes"), [(0.2, 1, True), (0.4, 1, False), (-0.4, 1, True), (-0.4, -1, False), (0.4, -1, True)]
)
def test_the_clip_stops_a_sample_where_it_is_pushed_to(L: float, A: float, pushes: bool) -> None:
    new = torch.tensor([[L]], dtype=F64, requires_grad=True)
    (gradient,) = gradients(ddpo_is_loss(new, torch.zeros(1, 1, dtype=F64), torch.tensor([A * 1.0]), 0.3)[0], new)
    assert (gradient != 0) == pushes
    assert gradient * A <= 0


def test_a_log_ratio_out_of_all_bounds_makes_no_nan() -> None:
    new = torch.tensor([[1e4, -1e4]], dtype=F64, requires_grad=True)
    (gradient,) = gradients(ddpo_is_loss(new, torch.zeros(1, 2, dtype=F64), torch.tensor([1.0, -1.0]), 0.3)[0], new)
    assert torch.equal(gradient, torch.zeros(1, 2, dtype=F64))


def published_ddpo(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """DDPO's loss as its code has it: log-probabilities are means over dimensions, the clip is 1 +- clip."""
    ratio = torch.exp((new - old) / SD)
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def test_a_clip_of_1e_4_is_1_64_nats_at_stable_diffusions_size() -> None:
    """The published loss, value and gradient, from clip_nats = 1e-4 d = 1.6384."""
    clip_nats = 1e-4 * SD
    assert abs(clip_nats - 1.64) < 0.002
    old, advantages = draws(20, 500, scale=1e3), draws(500, seed=1).clamp(-5, 5)
    new = (old + draws(20, 500, seed=2, scale=2)).requires_grad_()
    ours, expected = (
        ddpo_is_loss(new, old, advantages, clip_nats, dims=SD)[0],
        published_ddpo(new, old, advantages, 1e-4),
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)
    ours_gradient, expected_gradient = gradients(ours, new)[0], gradients(expected, new)[0]
    torch.testing.assert_close(ours_gradient, expected_gradient, rtol=1e-6, atol=0)
    assert 0.1 < (expected_gradient == 0).double().mean() < 0.4

    for L, moves in [(1.638, True), (1.639, False)]:
        point = torch.tensor([[L]], dtype=F64, requires_grad=True)
        zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64)
        for loss in (ddpo_is_loss(point, zero, one, clip_nats, dims=SD)[0], published_ddpo(point, zero, one, 1e-4)):
            assert bool(gradients(loss, point)[0] != 0) == moves


def test_a_published_clip_shrinks_with_the_picture() -> None:
    """1e-4 in means at 8x8 is .0064 nats: what is far inside the trust region at SD's size is outside it here."""
    new, old = torch.full((1, 1), 0.01, dtype=F64, requires_grad=True), torch.zeros(1, 1, dtype=F64)
    for dims, moves in [(SD, True), (64, False)]:
        loss, _ = ddpo_is_loss(new, old, torch.ones(1, dtype=F64), 1e-4 * dims, dims=dims)
        assert bool(gradients(loss, new)[0] != 0) == moves


def test_dpok_clamps_on_both_sides_and_pays_for_divergence() -> None:
    old, advantages = draws(5, 200), draws(200, seed=1)
    new = (old + draws(5, 200, seed=2, scale=0.4)).requires_grad_()
    kl = draws(5, 200, seed=3).abs().requires_grad_()
    ratio = torch.exp(((new - old) / 4).clamp(-0.3 / 4, 0.3 / 4))
    expected = -2 * (advantages * ratio).mean() + 0.5 * (kl / 4).mean()
    loss, metrics = dpok_loss(new, old, advantages, kl, 0.3, reward_weight=2.0, kl_weight=0.5, dims=4)
    torch.testing.assert_close(loss, expected)
    gradient, gradient_kl = gradients(loss, new, kl)
    outside = (new - old).abs() > 0.3
    assert 0 < outside.sum() < 1000
    assert torch.equal(gradient == 0, outside)
    assert (gradient * advantages <= 0).all()
    assert (gradient_kl > 0).all()
    torch.testing.assert_close(metrics["kl"], kl.detach().mean())
    torch.testing.assert_close(kl_loss(kl)[0], kl.mean())


def test_rwr_weighs_by_the_exponentiated_reward() -> None:
    rewards, errors = draws(2, 6), draws(2, 6, seed=1).abs().requires_grad_()
    w = torch.exp(3 * rewards) / torch.exp(3 * rewards).sum(-1, keepdim=True)
    torch.testing.assert_close(rwr_weights(rewards + 1e3, 3.0), w)
    loss, metrics = rwr_loss(errors, rewards, 3.0)
    torch.testing.assert_close(loss, (w * errors).sum(-1))
    torch.testing.assert_close(rwr_loss(errors, rewards, 0.0)[0], errors.mean(-1))
    assert (metrics["effective_samples"] < 6).all()
    (gradient,) = gradients(loss, errors)
    assert gradient[0].argmax() == rewards[0].argmax()


# --- preferences: the formulas -------------------------------------------------------------------------------------


def published_d3po(w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, d: int = 1) -> Tensor:  # noqa: E741
    """D3PO's loss as its code has it: beta .1, ratios of mean log-probabilities clamped to 1 +- .1."""
    ratio_w, ratio_l = (torch.exp((a - b) / d).clamp(0.9, 1.1) for a, b in ((w, ref_w), (l, ref_l)))
    return -torch.log(torch.sigmoid(0.1 * torch.log(ratio_w) * 1.0 + 0.1 * torch.log(ratio_l) * -1.0)).mean()


@pytest.mark.parametrize("d", [1, SD])
def test_d3po_is_the_published_loss(d: int) -> None:
    """Within the clamp the same; beyond, log(1 +- .1) is .095 and -.105 and not .1."""
    for scale, tolerance in [(0.02, 1e-12), (1.0, 2e-4)]:
        w, l, ref_w, ref_l = (draws(4, 50, seed=i, scale=scale * d) for i in range(4))  # noqa: E741
        loss, _ = d3po_loss(w, l, ref_w, ref_l, clip_nats=0.1 * d, dims=d)
        torch.testing.assert_close(loss, published_d3po(w, l, ref_w, ref_l, d), rtol=0, atol=tolerance)


def test_d3po_is_bounded_whatever_is_learnt() -> None:
    """[.683, .703] at the published settings: why users see a constant .693."""
    zero = torch.zeros(1, 1, dtype=F64)
    for d in (1, SD):
        best, worst = (
            d3po_loss(s * zero + s * 1e9, zero - s * 1e9, zero, zero, clip_nats=0.1 * d, dims=d)[0] for s in (1, -1)
        )
        assert abs(best - 0.683) < 5e-4
        assert abs(worst - 0.703) < 5e-4
    torch.testing.assert_close(d3po_loss(zero, zero, zero, zero)[0], zero.squeeze() + math.log(2))
    assert d3po_loss(zero + 1e3, zero - 1e3, zero, zero, clip_nats=None)[0] < 1e-6


def test_d3po_raises_the_winner_and_lowers_the_loser() -> None:
    w, l = draws(2, 5, scale=0.01).requires_grad_(), draws(2, 5, seed=1, scale=0.01).requires_grad_()  # noqa: E741
    zero = torch.zeros(2, 5, dtype=F64)
    loss, metrics = d3po_loss(w, l, zero, zero)
    gradient_w, gradient_l = gradients(loss, w, l)
    assert (gradient_w < 0).all()
    assert (gradient_l > 0).all()
    torch.testing.assert_close(metrics["accuracy"], (w > l).double().mean())
    assert d3po_loss(zero, zero, zero, zero)[1]["accuracy"] == 0.5


def errors(*values: float) -> PairErrors:
    return PairErrors(*(torch.tensor([v], dtype=F64, requires_grad=True) for v in values))


@pytest.mark.parametrize(
    ("kind", "at_0", "slope"), [("sigmoid", math.log(2), -0.5), ("hinge", 1.0, -1.0), ("ipo", 0.25, -1.0)]
)
def test_minimising_diffusion_dpo_lowers_the_winners_error(kind: str, at_0: float, slope: float) -> None:
    """The inverted sign of an ORPO example: there the winner's error rose. And the loss at the reference."""
    pair = errors(0.4, 0.7, 0.4, 0.7)
    loss, metrics = diffusion_dpo_loss(pair, beta=4.0, kind=kind)
    torch.testing.assert_close(loss.item(), at_0)
    gradient_w, gradient_l, ref_w, ref_l = gradients(loss, *pair)
    torch.testing.assert_close(gradient_w.item(), -2 * slope)
    torch.testing.assert_close(gradient_l.item(), 2 * slope)
    assert (ref_w, ref_l) == (-gradient_w, -gradient_l)
    assert metrics["accuracy"] == 0.5
    better, worse = errors(0.3, 0.8, 0.4, 0.7), errors(0.5, 0.6, 0.4, 0.7)
    assert diffusion_dpo_loss(better, beta=4.0, kind=kind)[0] < loss < diffusion_dpo_loss(worse, beta=4.0, kind=kind)[0]
    assert diffusion_dpo_loss(better, beta=4.0, kind=kind)[1]["accuracy"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_beta_of_5000_is_2500_without_the_half(kind: str) -> None:
    """diffusers' script: logits = ref_diff - model_diff, loss of 2500 logits, and IPO's (logits - 1/(2 beta))^2."""
    w, l, ref_w, ref_l = (draws(200, seed=i, scale=3e-4).abs() for i in range(4))  # noqa: E741
    logits, beta = (ref_w - ref_l) - (w - l), 2500.0
    expected = {
        "sigmoid": -F.logsigmoid(beta * logits),
        "hinge": torch.relu(1 - beta * logits),
        "ipo": beta**2 * (logits - 1 / (2 * beta)) ** 2,
    }[kind].mean()
    torch.testing.assert_close(diffusion_dpo_loss(PairErrors(w, l, ref_w, ref_l), kind=kind)[0], expected)


def test_a_pair_has_one_time_and_one_noise() -> None:
    process = VP()
    x_w, x_l, noise = draws(6, 3), draws(6, 3, seed=1), draws(6, 3, seed=2)
    t = torch.linspace(0.1, 2, 6, dtype=F64)
    calls: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x, t))
        return 0.3 * x

    pair = pair_errors(Prediction("eps", process), network, network, x_w, x_l, t, noise)
    assert len(calls) == 4
    for (x_t, label), x0 in zip(calls, (x_w, x_l, x_w, x_l), strict=True):
        assert torch.equal(label, t)
        found = (x_t - process.alpha(t)[:, None] * x0) / process.sigma(t)[:, None]
        torch.testing.assert_close(found, noise)
    torch.testing.assert_close(pair.w, ((0.3 * calls[0][0] - noise) ** 2).mean(-1))
    assert torch.equal(pair.w, pair.ref_w)
    assert torch.equal(pair.l, pair.ref_l)


def test_the_reference_of_a_pair_is_a_constant() -> None:
    scale, ref_scale = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.3, 0.2))
    x_w, x_l, noise = draws(2, 3, 4, 4), draws(2, 3, 4, 4, seed=1), draws(2, 3, 4, 4, seed=2)
    t = torch.tensor([0.5, 1.0], dtype=F64)
    pair = pair_errors(
        Prediction("eps", VP()), lambda x, t: scale * x, lambda x, t: ref_scale * x, x_w, x_l, t, noise, event_dims=3
    )
    assert pair.w.shape == (2,)
    diffusion_dpo_loss(pair)[0].backward()
    assert scale.grad is not None
    assert ref_scale.grad is None


# --- seeds side by side --------------------------------------------------------------------------------------------


def test_seeds_are_apart() -> None:
    """(K, S, B) gives one loss and one metric a seed, each that of the seed alone."""
    steps = [draws(4, 3, 6, seed=i, scale=0.2) for i in range(4)]
    rows = [draws(3, 6, seed=i).abs() for i in range(4)]
    for loss in (
        lambda v, r: ddpo_sf_loss(v[0], r[0]),
        lambda v, r: ddpo_is_loss(v[0], v[1], r[0], 0.1),
        lambda v, r: dpok_loss(v[0], v[1], r[0], v[2], 0.1),
        lambda v, r: d3po_loss(*v),
        lambda v, r: rwr_loss(r[0], r[1], 2.0),
        lambda v, r: diffusion_dpo_loss(PairErrors(*r), beta=2.0),
    ):
        together, metrics = loss(steps, rows)
        assert together.shape == (3,)
        for s in range(3):
            alone, alone_metrics = loss([v[:, s] for v in steps], [r[s] for r in rows])
            torch.testing.assert_close(together[s], alone)
            for name, value in metrics.items():
                torch.testing.assert_close(value[s], alone_metrics[name])


# --- one Gaussian, whose optimum is known --------------------------------------------------------------------------

STD, TARGET, REFERENCE = 0.5, torch.tensor([0.8, -0.4], dtype=F64), torch.zeros(2, dtype=F64)
CHAIN = DenoisingChain(VP(), torch.tensor([1.0, 0.0], dtype=F64), min_std=STD)


def constant(theta: Tensor):
    return lambda x, t: theta.expand_as(x)


def reward(x: Tensor) -> Tensor:
    """Its mean under N(theta, STD^2) is greatest at theta = TARGET."""
    return -((x - TARGET) ** 2).sum(-1) / 2


def climbed(update, steps: int = 80, lr: float = 0.2, epochs: int = 1, batch: int = 512) -> Tensor:
    """Gradient descent on update(theta, rollout) from the reference; the mean of the second half of the iterates."""
    generator = torch.Generator().manual_seed(0)
    theta = REFERENCE.clone().requires_grad_()
    visited = []
    for _ in range(steps):
        x = torch.randn(batch, 2, generator=generator, dtype=F64)
        with torch.no_grad():
            rollout = CHAIN.rollout(constant(theta), x, generator)
        for _ in range(epochs):
            (gradient,) = torch.autograd.grad(update(theta, rollout), theta)
            theta = (theta - lr * gradient).detach().requires_grad_()
        visited.append(theta.detach())
    return torch.stack(visited[steps // 2 :]).mean(0)


def reaches(theta: Tensor, optimum: Tensor, atol: float = 0.03) -> None:
    """Noise: one iterate wanders by about .02, the mean of forty by less than .01; the start is .9 away."""
    torch.testing.assert_close(theta, optimum, rtol=0, atol=atol)


@pytest.mark.parametrize("advantages", ["centred", "group", "prompt"])
def test_ddpo_sf_reaches_the_best_mean(advantages: str) -> None:
    statistics = PromptStatistics(size=512)

    def update(theta, rollout):
        r = reward(rollout.x)
        match advantages:
            case "centred":
                A = r - r.mean()
            case "group":
                A = group_advantages(r.reshape(64, 8)).flatten()
            case _:
                A = statistics.advantages(["a", "b"] * 256, r)
        return ddpo_sf_loss(CHAIN.log_prob(constant(theta), rollout.states), A)[0]

    reaches(climbed(update, lr=0.2 if advantages == "centred" else 0.05), TARGET)


@pytest.mark.parametrize("dims", [1, 2])
def test_ddpo_is_reaches_the_best_mean(dims: int) -> None:
    def update(theta, rollout):
        r = reward(rollout.x)
        log_prob = CHAIN.log_prob(constant(theta), rollout.states)
        return ddpo_is_loss(log_prob, rollout.log_probs, r - r.mean(), 0.3, dims=dims)[0]

    reaches(climbed(update, epochs=3), TARGET)


def test_dpok_stops_where_divergence_outweighs_reward() -> None:
    """theta = (x* + v ref)/(1 + v), v = w_kl / n^2: half way at v = 1."""

    def update(theta, rollout):
        r = reward(rollout.x)
        log_prob = CHAIN.log_prob(constant(theta), rollout.states)
        kl = CHAIN.kl(constant(theta), constant(REFERENCE), rollout.states)
        return dpok_loss(log_prob, rollout.log_probs, r - r.mean(), kl, 0.3, kl_weight=STD**2)[0]

    reaches(climbed(update), (TARGET + REFERENCE) / 2)


def test_rwr_reaches_the_best_mean() -> None:
    """Tilting a Gaussian by exp(beta r) moves its mean towards x*, again and again."""
    prediction, t = Prediction("x0", VP()), torch.tensor(1.0, dtype=F64)

    def update(theta, rollout):
        x = rollout.x
        errors = denoising_loss(prediction, constant(theta), x, t, torch.zeros_like(x))
        return rwr_loss(errors, reward(x), beta=4.0)[0]

    reaches(climbed(update, lr=0.5), TARGET)


def test_draft_reaches_the_best_mean() -> None:
    generator = torch.Generator().manual_seed(0)

    def update(theta, rollout):
        x = CHAIN.rollout(constant(theta), rollout.states[0], generator, differentiable_steps=1).x
        return -reward(x).mean()

    reaches(climbed(update), TARGET)


def pairs(n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of the reference in pairs, and p(first preferred) for the reward TARGET . x (Bradley & Terry)."""
    a, b = draws(n, 2, scale=STD), draws(n, 2, seed=1, scale=STD)
    return a, b, torch.sigmoid((a - b) @ TARGET)


def descended(loss, steps: int, lr: float) -> Tensor:
    theta = REFERENCE.clone().requires_grad_()
    for _ in range(steps):
        theta = (theta - lr * torch.autograd.grad(loss(theta), theta)[0]).detach().requires_grad_()
    return theta.detach()


def test_d3po_reaches_the_tilted_reference() -> None:
    """pi ~ pi_ref exp(r / beta): theta = ref + n^2 g / beta for r = g . x. Both orders, by their probability."""
    a, b, p = pairs()
    beta, noise = 0.5, torch.zeros_like(a)

    def loss(theta):
        ours, theirs = (
            [CHAIN.log_prob(constant(m), torch.stack([noise, x]))[..., None] for x in (a, b)]
            for m in (theta, REFERENCE)
        )
        first = d3po_loss(ours[0], ours[1], *theirs, beta=beta, clip_nats=None)[0]
        second = d3po_loss(ours[1], ours[0], *theirs[::-1], beta=beta, clip_nats=None)[0]
        return (p * first + (1 - p) * second).mean()

    reaches(descended(loss, 150, 1.0), REFERENCE + STD**2 * TARGET / beta, atol=1e-4)


def test_diffusion_dpo_reaches_the_tilted_reference() -> None:
    """The implicit reward of D = theta is beta/d (theta - ref) . x: theta = ref + d g / beta."""
    a, b, p = pairs()
    prediction, t, beta = Prediction("x0", VP()), torch.tensor(1.0, dtype=F64), 2.0

    def loss(theta):
        w, l, ref_w, ref_l = (  # noqa: E741
            e[:, None]
            for e in pair_errors(prediction, constant(theta), constant(REFERENCE), a, b, t, draws(64, 2, seed=2))
        )
        first = diffusion_dpo_loss(PairErrors(w, l, ref_w, ref_l), beta=beta)[0]
        second = diffusion_dpo_loss(PairErrors(l, w, ref_l, ref_w), beta=beta)[0]
        return (p * first + (1 - p) * second).mean()

    reaches(descended(loss, 200, 3.0), REFERENCE + 2 * TARGET / beta, atol=1e-4)


@pytest.mark.parametrize(("kind", "margin"), [("ipo", 0.5), ("hinge", 1.0)])
def test_ipo_and_hinge_stop_at_their_margin(kind: str, margin: float) -> None:
    """One pair u = x_w - x_l: theta - ref = margin d/(beta |u|^2) u. Hinge stops past it by less than a step."""
    a, b, _ = pairs(1)
    prediction, t, beta = Prediction("x0", VP()), torch.tensor(1.0, dtype=F64), 2.0

    def loss(theta):
        pair = pair_errors(prediction, constant(theta), constant(REFERENCE), a, b, t, torch.zeros_like(a))
        return diffusion_dpo_loss(pair, beta=beta, kind=kind)[0]

    u = (a - b).squeeze(0)
    theta = descended(loss, 500, 0.04)
    reaches(theta, margin * 2 / (beta * u.norm() ** 2) * u, atol=0.02)
    if kind == "hinge":
        assert loss(theta) == 0


# --- the whole step ------------------------------------------------------------------------------------------------


def test_one_update_of_a_random_few_steps() -> None:
    """A roll-out of images, steps of each row's own, ratio 1, a gradient towards the reward."""
    chain = DenoisingChain(VP(), VP().grid(6, 0.05, 10.0, to_zero=True, dtype=F64), event_dims=3)
    theta = torch.zeros((), dtype=F64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return theta + x / 2

    with torch.no_grad():
        rollout = chain.rollout(denoise, 10 * draws(4000, 1, 2, 2), generator)
    steps = chain.draw_steps(2, generator, (4000,))
    log_prob = chain.log_prob(denoise, rollout.states, steps)
    old = at_steps(rollout.log_probs, steps)
    torch.testing.assert_close(log_prob.detach(), old)
    advantages = group_advantages(rollout.x.mean((1, 2, 3)).reshape(-1, 8), scale=False).flatten()
    loss, _ = ddpo_is_loss(log_prob, old, advantages, 0.1)
    assert torch.autograd.grad(loss, theta)[0] < 0


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("adaptive", [True, False])
def test_nft_says_nothing_where_nothing_is_better(beta: float, adaptive: bool) -> None:
    """At D = D_old: for r = 1 the gradient is 2 (D - x_0) over its size, for r = 0 minus that, for r = 1/2 none."""
    x0, old = draws(64, 6), draws(64, 6, seed=1)
    each = []
    for r in (0.0, 0.5, 1.0):
        denoised = old.clone().requires_grad_()
        loss, metrics = nft_loss(x0, denoised, old, torch.full((64,), r, dtype=x0.dtype), beta=beta, adaptive=adaptive)
        each.append(torch.autograd.grad(loss, denoised)[0] * 64 * 6)
        assert metrics["moved"] == 0
    size = (old - x0).abs().mean(-1, keepdim=True) if adaptive else torch.ones(64, 1, dtype=F64)
    expected = 2 * (old - x0) / size
    assert_equal_to_rounding(each[2], expected, 64 / beta)
    assert_equal_to_rounding(each[0], -expected, 64 / beta)
    assert float(each[1].abs().max()) < rounding(x0.dtype, 64 / beta, float(expected.abs().max()))


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_nfts_optimum_is_the_papers(beta: float) -> None:
    """Of one x_t, without the errors' own sizes: D = D_old + E[(2 r - 1) (x_0 - D_old)] / b."""
    x0, r = draws(500, 2), torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old = torch.tensor([0.3, -0.2], dtype=torch.float64).expand(500, 2)
    best = old[0] + ((2 * r - 1)[:, None] * (x0 - old)).mean(0) / beta
    denoised = best.clone().requires_grad_()
    loss, _ = nft_loss(x0, denoised.expand(500, 2), old, r, beta=beta, adaptive=False)
    assert float(torch.autograd.grad(loss, denoised)[0].abs().max()) < rounding(torch.float64, 64 / beta, 8)
    for step in (0.1, -0.1):
        assert nft_loss(x0, (best + step).expand(500, 2), old, r, beta=beta, adaptive=False)[0] > loss


def test_nft_is_the_same_for_every_prediction() -> None:
    """The loss of mixed predictions m, each turned into x_0 afterwards, is that of mixed x_0."""
    process = VP()
    t = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    x0, noise, new, old = (draws(3, 4, seed=seed) for seed in range(4))
    x, r, b = process.perturb(x0, t, noise), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), 0.5
    expected, _ = nft_loss(x0, new, old, r, beta=b)
    for kind in ("eps", "x0", "v", "score", "velocity", "edm"):
        prediction = Prediction(kind, process)
        m, m_old = prediction.from_x0(new, x, t), prediction.from_x0(old, x, t)
        e = []
        for mixture in (b * m + (1 - b) * m_old, (1 + b) * m_old - b * m):
            difference = prediction.to_x0(mixture, x, t) - x0
            e.append((difference**2).mean(-1) / difference.abs().mean(-1))
        assert abs(float(((r * e[0] + (1 - r) * e[1]) / b).mean() - expected)) < rounding(torch.float64, 1000, 10), kind


def test_mistakes_are_named() -> None:
    step, row = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(ValueError, match="advantages of shape"):
        ddpo_sf_loss(row, row)
    with pytest.raises(ValueError, match="advantages of shape"):
        ddpo_is_loss(step, step, torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match="detach"):
        ddpo_sf_loss(step, row.clone().requires_grad_())
    with pytest.raises(ValueError, match="old log-prob"):
        ddpo_is_loss(step, step[:1], row, 0.1)
    with pytest.raises(ValueError, match="clip_nats"):
        ddpo_is_loss(step, step, row, 0.0)
    with pytest.raises(ValueError, match="agree"):
        d3po_loss(step, step[:1], step, step)
    with pytest.raises(ValueError, match="rewards of shape"):
        rwr_loss(row, torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="Did you mean 'sigmoid'"):
        diffusion_dpo_loss(PairErrors(row, row, row, row), kind="sigmoyd")
