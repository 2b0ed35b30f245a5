"""Bradley and Terry's model of preferences: its loss against closed forms, and what foretells labels well."""

import math

import pytest
import torch

from diffrl.alignment.preferences import (
    bradley_terry_loss,
    calibration_error,
    log_likelihood,
    preference_accuracy,
)
from tests.rounding import assert_equal_to_rounding


def scored(pairs: int = 40, size: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (3, pairs) of three members, and labels with ties."""
    generator = torch.Generator().manual_seed(0)
    first, second = (size * torch.randn(2, 3, pairs, generator=generator, dtype=torch.float64)).unbind()
    labels = torch.randint(3, (pairs,), generator=generator).double() / 2
    return first, second, labels


def test_the_loss_is_the_cross_entropy_of_the_difference() -> None:
    first, second, y = scored()
    p, q = 1 / (1 + torch.exp(first - second)), 1 / (1 + torch.exp(second - first))
    plain = -(y * torch.log(p) + (1 - y) * torch.log(q)).mean(-1)
    assert_equal_to_rounding(bradley_terry_loss(first, second, y), plain, 64)
    assert torch.equal(log_likelihood(first, second, y), -bradley_terry_loss(first, second, y))
    w = torch.ones(40)
    assert_equal_to_rounding(bradley_terry_loss(first, second, w), -torch.log(p).mean(-1), 64)
    assert float(bradley_terry_loss(first, first, y)[0]) == pytest.approx(math.log(2))


def test_the_gradient_is_the_probability_less_the_label() -> None:
    """By the second score (sigmoid(d) - y) / N, by the first the opposite: not a term for each score by itself."""
    first, second, y = (value.requires_grad_(i < 2) for i, value in enumerate(scored()))
    by_first, by_second = torch.autograd.grad(bradley_terry_loss(first, second, y).sum(), (first, second))
    closed = (torch.sigmoid(second - first) - y) / 40
    assert_equal_to_rounding(by_second, closed, 16)
    assert_equal_to_rounding(by_first, -closed, 16)
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, y), (first, second))


def test_scores_far_apart_overflow_nowhere() -> None:
    first, second = torch.tensor([0.0, 0.0]), torch.tensor([1e4, -1e4])
    assert float(bradley_terry_loss(first, second, torch.tensor([1.0, 0.0]))) == 0
    assert float(bradley_terry_loss(first, second, torch.tensor([0.0, 1.0]))) == 1e4


def test_a_shift_changes_nothing_and_changing_places_turns_labels_round() -> None:
    first, second, y = scored()
    for function in (bradley_terry_loss, preference_accuracy, calibration_error):
        value = function(first, second, y)
        assert_equal_to_rounding(function(first + 7, second + 7, y), value, 64, 10)
        assert_equal_to_rounding(function(second, first, 1 - y), value, 16)
        assert value.shape == (3,)


def test_weights_choose_pairs_and_twice_the_weight_is_the_pair_twice() -> None:
    first, second, y = scored()
    chosen = torch.zeros(40, dtype=torch.float64)
    chosen[:7] = 1
    assert_equal_to_rounding(
        bradley_terry_loss(first, second, y, chosen),
        bradley_terry_loss(first[:, :7], second[:, :7], y[:7]),
        16,
    )
    double, again = torch.ones(40).double(), torch.tensor([*range(40), 3])
    double[3] = 2
    assert_equal_to_rounding(
        bradley_terry_loss(first, second, y, double),
        bradley_terry_loss(first[:, again], second[:, again], y[again]),
        64,
    )


def test_accuracy_is_the_share_of_preferences_foretold_and_ties_are_apart() -> None:
    first = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    second = torch.tensor([1.0, 1.0, -1.0, 5.0, 1.0])
    y = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0])
    assert float(preference_accuracy(first, second, y)) == (1 + 0 + 1 + 0.5) / 4
    assert preference_accuracy(first, second, torch.full((5,), 0.5)).isnan()


def test_probabilities_that_labels_follow_are_calibrated_and_bolder_ones_are_not() -> None:
    """Of labels drawn by the probabilities the error vanishes as 1/sqrt(N); of scores thrice as large it is known."""
    generator = torch.Generator().manual_seed(1)
    n = 200_000
    d = torch.full((n,), math.log(0.7 / 0.3))
    d[::2] *= -1
    y = (torch.rand(n, generator=generator) < torch.sigmoid(d)).float()
    zero = torch.zeros(n)
    noise = 4 * math.sqrt(0.21 / n)
    assert float(calibration_error(zero, d, y)) < noise
    bold = 1 / (1 + (3 / 7) ** 3)
    assert float(calibration_error(zero, 3 * d, y)) == pytest.approx(bold - 0.7, abs=noise)
    assert float(calibration_error(zero, -d, y)) == pytest.approx(0.7 - 0.3, abs=noise)


def test_calibration_is_by_parts_of_the_probability() -> None:
    """Against a loop over five parts of [.5, 1]; errors of opposite signs in two parts do not cancel."""
    first, second, y = scored(200, 1.0)
    p = torch.sigmoid(second - first)[0]
    total = 0.0
    for i in range(5):
        inside = [
            (max(float(q), 1 - float(q)), float(label) if q > 0.5 else 1 - float(label))
            for q, label in zip(p, y, strict=True)
            if 0.5 + i / 10 <= max(float(q), 1 - float(q)) < 0.6 + i / 10
        ]
        total += abs(sum(a for a, _ in inside) - sum(b for _, b in inside)) / 200
    assert float(calibration_error(first, second, y, bins=5)[0]) == pytest.approx(total, abs=1e-12)
    d = torch.tensor([math.log(0.6 / 0.4), math.log(0.9 / 0.1)])
    errors = calibration_error(torch.zeros(2), d, torch.tensor([1.0, 0.0]))
    assert float(errors) == pytest.approx((0.4 + 0.9) / 2)
