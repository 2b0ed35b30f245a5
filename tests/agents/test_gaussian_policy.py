"""The Gaussian behind tanh: its log-probability against torch.distributions and as a density."""

import torch

from agents.gaussian_policy import SquashedGaussian


def build() -> SquashedGaussian:
    return SquashedGaussian(3, 2, [torch.Generator().manual_seed(0)], width=16, layers=1, log_std=(-5.0, 2.0))


def test_the_log_probability_is_that_of_the_transformed_distribution() -> None:
    """Also far out, where 1 - tanh^2 is 0 in float32: there by the slope's asymptote, 2 (log 2 - |u|)."""
    policy, s = build().double(), torch.randn(1, 50, 3, dtype=torch.float64)
    z = torch.randn(1, 50, 2, dtype=torch.float64)
    actions, log_pi = policy.draw(s, z)
    mu, log_std = policy(s)
    d = torch.distributions
    plain = d.TransformedDistribution(d.Normal(mu, log_std.exp()), d.TanhTransform(cache_size=1))
    torch.testing.assert_close(log_pi, plain.log_prob(actions).sum(-1))
    torch.testing.assert_close(actions, policy.sample(s, z))
    far, log_far = build().draw(s.float(), torch.full((1, 50, 2), 200.0))
    assert (far == 1).all()
    mu, log_std = build()(s.float())
    u = mu + log_std.exp() * 200
    normal = d.Normal(mu, log_std.exp()).log_prob(u)
    torch.testing.assert_close(log_far, (normal - 2 * (torch.log(torch.tensor(2.0)) - u)).sum(-1))


def test_candidates_of_a_state_stand_in_a_row_and_the_mean_is_the_draw_without_noise() -> None:
    policy, s, z = build(), torch.randn(1, 4, 3), torch.randn(1, 12, 2)
    many = policy.sample(s, z)
    for i in range(4):
        one = policy.sample(s[:, i : i + 1].expand(-1, 3, -1), z[:, 3 * i : 3 * i + 3])
        torch.testing.assert_close(many[:, 3 * i : 3 * i + 3], one)
    torch.testing.assert_close(policy.mean(s), policy.sample(s, torch.zeros(1, 4, 2)))
