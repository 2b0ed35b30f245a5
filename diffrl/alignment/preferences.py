"""Preferences as probabilities of scores (Bradley & Terry 1952): the loss, and how well scores foretell labels.

Of a pair with the scores z_1, z_2 the second is preferred with probability sigmoid(d), d = z_2 - z_1. A label y says
whether it was: 0, the first was preferred; 1, the second was; .5, neither. Everything here is a pure function of scores
(..., N) of N pairs, whatever was scored, and of labels (N,) or (..., N); leading dimensions, such as the members of an
ensemble, stay.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry_loss(first: Tensor, second: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The cross-entropy -E [y log sigmoid(d) + (1 - y) log sigmoid(-d)] (...), d = second - first.

    It is one term a pair, of the difference of both scores, and its derivative by d is sigmoid(d) - y. Where something
    longer than a step is scored, that is its score as a whole: a term for each segment's own score would be another
    model. weights: (N,) or (..., N), not negative, of the pairs in the mean; None: all alike.
    """
    d = second - first
    terms = F.binary_cross_entropy_with_logits(d, labels.to(d.dtype).expand_as(d), reduction="none")
    if weights is None:
        return terms.mean(-1)
    return (weights * terms).sum(-1) / weights.expand_as(terms).sum(-1)


def log_likelihood(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """The mean log-likelihood (...) of a label, in nats: log(1/2) = -.693 is what a coin would have."""
    return -bradley_terry_loss(first, second, labels)


def preference_accuracy(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """The share (...) of the pairs with a preference whose preferred one has the higher score.

    Equal scores are right by half. Labels of .5 are left out: no score can be right about them. NaN where there are no
    others.
    """
    y = labels.expand_as(first)
    told = y != 0.5
    right = 0.5 + 0.5 * torch.sign(second - first) * torch.sign(y - 0.5)
    return (right * told).sum(-1) / told.sum(-1)


def calibration_error(first: Tensor, second: Tensor, labels: Tensor, bins: int = 10) -> Tensor:
    """The expected calibration error (...) of the favoured one's probability (Guo et al. 2017, arXiv 1706.04599).

    The probability max(p, 1 - p), p = sigmoid(d), lies between .5 and 1, in one of `bins` equal parts of that. In each
    part its mean is compared with how often the favoured one was preferred, where a label of .5 counts as one half.
    The error is the mean of the absolute differences, weighted by the pairs in the parts: 0 for probabilities that can
    be believed. It does not change when both members of a pair change places.
    """
    p = torch.sigmoid(second - first)
    y = labels.to(p.dtype).expand_as(p)
    favoured, came = torch.maximum(p, 1 - p), torch.where(p > 0.5, y, 1 - y)
    came = torch.where(p == 0.5, torch.full_like(p, 0.5), came)
    part = ((favoured - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = F.one_hot(part, bins).to(p.dtype) * (favoured - came).unsqueeze(-1)
    return gaps.sum(-2).abs().sum(-1) / (p.shape[-1] or float("nan"))
