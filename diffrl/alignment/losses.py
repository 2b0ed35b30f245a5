"""Losses that align a diffusion or flow model with rewards or preferences: pure functions of tensors.

Shapes: what has a value a step is (K, B), K of a chain's decisions (`DenoisingChain`), or (K, S, B) for S seeds; what
has a value a sample is (B,) or (S, B). A loss is the mean over steps and batch, () or (S,), to be minimised: 1/T of the
sums over a chain's T decisions that papers write, whether all steps are in or a random few. Metrics are of its shape,
without a graph.

Units: log-probabilities and divergences come in as sums over the d dimensions of a sample, in nats. **DDPO's published
code, and what derives from it, takes means over them**: its ratio is exp(L/d) for a log-ratio L, its clip 1 +- 1e-4 the
trust region |L| <= 1e-4 d, 1.64 nats for Stable Diffusion's d = 16,384 and .0064 for an 8x8 image. Here a clip is in
nats on L, so that it means the same at every size, and `dims` says which ratio: 1, the true one, exp(L); d, the
published one, whose loss then is theirs with its scale, so that learning rates and gradient norms carry over.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl.diffusion.loss import denoising_loss
from diffrl.diffusion.prediction import Network, Prediction
from diffrl.diffusion.process import unknown

Metrics = dict[str, Tensor]
Preference = Literal["sigmoid", "hinge", "ipo"]


# --- policy gradients ----------------------------------------------------------------------------------------------


def ddpo_sf_loss(log_prob: Tensor, advantages: Tensor, *, dims: int = 1) -> tuple[Tensor, Metrics]:
    """DDPO-SF, the score function (Black et al. 2023, arXiv 2305.13301, section 4.3): -E[A log pi(x_r | x_t)].

    log_prob: (K, ..., B), of the very policy that made the samples: one update a batch. advantages: (..., B).
    """
    _check(log_prob, advantages)
    loss = _mean(-advantages * log_prob / dims)
    return loss, {"log_prob": _mean(log_prob.detach())}


def ddpo_is_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_nats: float, *, dims: int = 1
) -> tuple[Tensor, Metrics]:
    """DDPO-IS, PPO on each step (arXiv 2305.13301, section 4.3): E max(-A r, -A clip(r)), r = exp(L/d).

    log_prob, old_log_prob: (K, ..., B), of the policy that learns and of the one that made the samples; L is their
        difference. advantages: (..., B).
    clip_nats: |L| within which A pushes; beyond, on the side it pushes to, a sample has no gradient.
    dims: d above; clip_nats = c d with dims = d is the published loss with clip c, but that the clip is exp(+-c) and
        not 1 +- c. DPPO (Ren et al. 2024, arXiv 2409.00588) is the same with its environment's advantages.
    """
    log_ratio = _log_ratio(log_prob, old_log_prob, advantages, clip_nats)
    # max(-A r, -A clip(r)): min(r, e^C) where A > 0, max(r, e^-C) where A < 0. Written so, no overflow makes a nan.
    bounded = torch.where(advantages > 0, log_ratio.clamp_max(clip_nats), log_ratio.clamp_min(-clip_nats))
    loss = _mean(-advantages * torch.exp(bounded / dims))
    return loss, _ratio_metrics(log_ratio, clip_nats)


def dpok_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    kl: Tensor,
    clip_nats: float,
    *,
    reward_weight: float = 1.0,
    kl_weight: float = 0.01,
    dims: int = 1,
) -> tuple[Tensor, Metrics]:
    """DPOK (Fan et al. 2023, arXiv 2305.16381): E[-w_r A clamp(r) + w_kl KL(pi || pi_ref)], r = exp(L/d).

    The first term is `hard_clipped_loss`, the second `kl_loss`.

    log_prob, old_log_prob, advantages, clip_nats, dims: as for `ddpo_is_loss`; DPOK's advantages are r - V(x_t, t, c).
    kl: (K, ..., B), `DenoisingChain.kl` to the pretrained model, in nats; it is divided by `dims` as L is.
    """
    policy, metrics = hard_clipped_loss(log_prob, old_log_prob, advantages, clip_nats, dims=dims)
    penalty, kl_metrics = kl_loss(kl, dims=dims)
    return reward_weight * policy + kl_weight * penalty, metrics | kl_metrics


def hard_clipped_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_nats: float, *, dims: int = 1
) -> tuple[Tensor, Metrics]:
    """DPOK's policy term: E[-A clamp(r)], r = exp(L/d), with a hard clamp.

    A sample with |L| > clip_nats has no gradient, on either side; PPO's clip lets it come back. Arguments are those of
    `ddpo_is_loss`.
    """
    log_ratio = _log_ratio(log_prob, old_log_prob, advantages, clip_nats)
    loss = _mean(-advantages * torch.exp(log_ratio.clamp(-clip_nats, clip_nats) / dims))
    return loss, _ratio_metrics(log_ratio, clip_nats)


def kl_loss(kl: Tensor, *, dims: int = 1) -> tuple[Tensor, Metrics]:
    """The divergence from a frozen reference as a penalty on any of these losses: E[KL/d] for kl (K, ..., B) in nats.

    The metric is in nats a step, whatever `dims`.
    """
    return _mean(kl / dims), {"kl": _mean(kl.detach())}


# --- rewards as weights --------------------------------------------------------------------------------------------


def rwr_weights(rewards: Tensor, beta: float) -> Tensor:
    """exp(beta r) / Z over the batch, for rewards (..., B): sums to 1 along it."""
    return torch.softmax(beta * rewards, -1)


def rwr_loss(errors: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Metrics]:
    """RWR, reward-weighted regression (arXiv 2302.12192; arXiv 2305.13301, section 4.2): sum_i w_i errors_i.

    errors, rewards: (..., B); errors are `denoising_loss` on the model's own samples. beta: the inverse temperature.
    `effective_samples` is 1 / sum_i w_i^2: near 1, a single sample is all that is learnt from.
    """
    if errors.shape != rewards.shape:
        raise ValueError(f"errors of shape {tuple(errors.shape)} beside rewards of shape {tuple(rewards.shape)}")
    w = rwr_weights(rewards.detach(), beta)
    return (w * errors).sum(-1), {"effective_samples": 1 / (w**2).sum(-1), "error": errors.detach().mean(-1)}


def nft_loss(
    x0: Tensor,
    denoised: Tensor,
    old: Tensor,
    r: Tensor,
    *,
    beta: float = 1.0,
    adaptive: bool = True,
    event_dims: int = 1,
) -> tuple[Tensor, Metrics]:
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117, eq. 7) on denoised samples, of any parameterisation:

        E[ r e(D+) / b + (1 - r) e(D-) / b ],    D+ = b D + (1 - b) D_old,    D- = (1 + b) D_old - b D,

    with e the squared error of x_0. The weights of each mixture add up to 1, and every prediction m is affine in D at
    a given x_t and t: so mixing predictions, as the paper does, is mixing the D of them.

    x0: clean samples of the model that sampled (..., B, d), or (..., B, *image) with `event_dims` to match. denoised,
        old: D(x_t, t) of the trained model, and of the one that sampled, without a graph. r: (..., B) in [0, 1], how
        good each sample is; at r = 1/2 and D = D_old there is no gradient.
    adaptive: divide each squared error by its own mean absolute error, a constant, as the authors do. Without, the
        optimum is D = D_old + E[(2 r - 1) (x_0 - D_old) | x_t] / b.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if old.requires_grad or x0.requires_grad:
        raise ValueError("samples, and what the sampling model says of them, are constants: detach them")

    def error(mixture: Tensor) -> Tensor:
        difference = (mixture - x0).flatten(-event_dims)
        squared = (difference**2).mean(-1)
        return squared / difference.detach().abs().mean(-1).clamp_min(1e-5) if adaptive else squared

    better = error(beta * denoised + (1 - beta) * old)
    worse = error((1 + beta) * old - beta * denoised)
    loss = (r * better + (1 - r) * worse) / beta
    moved = ((denoised.detach() - old) ** 2).flatten(-event_dims).mean(-1)
    return loss.mean(-1), {"error": better.detach().mean(-1), "moved": moved.mean(-1)}


def refl_loss(rewards: Tensor, margin: float = 2.0) -> tuple[Tensor, Metrics]:
    """ReFL's reward term (Xu et al. 2023, arXiv 2304.05977, eq. 3): E relu(m - r), for differentiable rewards (..., B).

    A reward beyond the margin has no gradient.
    """
    return torch.relu(margin - rewards).mean(-1), {"reward": rewards.detach().mean(-1)}


# --- preferences ---------------------------------------------------------------------------------------------------


def d3po_loss(
    log_prob_w: Tensor,
    log_prob_l: Tensor,
    ref_log_prob_w: Tensor,
    ref_log_prob_l: Tensor,
    *,
    beta: float = 0.1,
    clip_nats: float | None = 0.1,
    dims: int = 1,
) -> tuple[Tensor, Metrics]:
    """D3PO, DPO on each step of two chains (Yang et al. 2023, arXiv 2311.13231): -E log sigmoid(z),

        z = beta / d (clamp(L_w) - clamp(L_l)),      L = log pi - log pi_ref.

    log_prob_w, ...: (K, ..., B), of the preferred (w) and the other (l) of B pairs of chains of one prompt, and of the
        frozen reference on the same chains.
    clip_nats: the clamp of L, hard, None for none. The authors clamp exp(L/d) to 1 +- .1: clip_nats = .1 d with dims =
        d. At beta = .1 the loss lies, whatever is learnt, between .683 and .703: watch `accuracy`, not the loss.
    """
    shapes = {tuple(v.shape) for v in (log_prob_w, log_prob_l, ref_log_prob_w, ref_log_prob_l)}
    if len(shapes) > 1:
        raise ValueError(f"log-probabilities of shapes {sorted(shapes)}; they must agree")
    if clip_nats is not None and not clip_nats > 0:
        raise ValueError(f"clip_nats must be positive, got {clip_nats}")
    L_w, L_l = log_prob_w - ref_log_prob_w, log_prob_l - ref_log_prob_l
    if clip_nats is None:
        z = beta / dims * (L_w - L_l)
    else:
        z = beta / dims * (L_w.clamp(-clip_nats, clip_nats) - L_l.clamp(-clip_nats, clip_nats))
    margin = (L_w - L_l).detach()
    return _mean(-F.logsigmoid(z)), {"accuracy": _mean(_right(margin)), "margin": _mean(margin)}


class PairErrors(NamedTuple):
    """Denoising errors (..., B) of B pairs: the model's and the frozen reference's, on the preferred and the other."""

    w: Tensor
    l: Tensor  # noqa: E741
    ref_w: Tensor
    ref_l: Tensor


def pair_errors(
    prediction: Prediction,
    network: Network,
    reference: Network,
    x_w: Tensor,
    x_l: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    event_dims: int = 1,
) -> PairErrors:
    """The four errors of `diffusion_dpo_loss`, means over dimensions, all at the same times and with the same noise.

    x_w, x_l: clean samples of one prompt, (..., B, d) or (B, *image) with `event_dims` to match; t, noise: one each a
        pair, as `denoising_loss` takes them. The condition is bound in `network` and `reference`, which are called
        twice each; the reference (the network with its adapters off, say) without gradients.
    """

    def error(network: Network, x0: Tensor) -> Tensor:
        return denoising_loss(prediction, network, x0, t, noise, event_dims=event_dims)

    with torch.no_grad():
        ref_w, ref_l = error(reference, x_w), error(reference, x_l)
    return PairErrors(error(network, x_w), error(network, x_l), ref_w, ref_l)


def diffusion_dpo_loss(
    errors: PairErrors, *, beta: float = 5000.0, kind: Preference = "sigmoid"
) -> tuple[Tensor, Metrics]:
    """Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14), on the implicit reward difference of a pair,

        z = -beta/2 ((e_w - e_ref_w) - (e_l - e_ref_l)),      e = |eps - eps_theta(x_t, t)|^2 / d:

        sigmoid   -log sigmoid(z)      DPO
        hinge     max(0, 1 - z)        SLiC (Zhao et al. 2023, arXiv 2305.10425)
        ipo       (z - 1/2)^2          IPO (Azar et al. 2023, arXiv 2310.12036), times beta^2 (see below)

    errors: of `pair_errors`, (..., B).
    beta: with the 1/2 above, as the paper's code has it: 5000 there; diffusers' script, without it, has 2500 for the
        same. It contains T and the dimensions: e is a mean over them.

    IPO regresses the log-ratio h = z/beta' on 1/(2 beta'), beta' = beta/2, which is of the order of 1e-4: times beta'^2
    it is the same minimum, at a scale at which the learning rate of the others serves. Raises ValueError for an unknown
    kind.
    """
    if len({tuple(e.shape) for e in errors}) > 1:
        raise ValueError(f"errors of shapes {[tuple(e.shape) for e in errors]}; they must agree")
    z = -beta / 2 * ((errors.w - errors.ref_w) - (errors.l - errors.ref_l))
    match kind:
        case "sigmoid":
            losses = -F.logsigmoid(z)
        case "hinge":
            losses = torch.relu(1 - z)
        case "ipo":
            losses = (z - 0.5) ** 2
        case _:
            raise unknown("preference loss", kind, get_args(Preference))
    metrics = {
        "accuracy": _right(z.detach()).mean(-1),
        "margin": z.detach().mean(-1),
        "error_w": errors.w.detach().mean(-1),
        "error_l": errors.l.detach().mean(-1),
    }
    return losses.mean(-1), metrics


# --- what they share -----------------------------------------------------------------------------------------------


def _mean(values: Tensor) -> Tensor:
    """The mean of values (K, ..., B) over steps and batch."""
    return values.mean(0).mean(-1)


def _right(margin: Tensor) -> Tensor:
    """How right a pair's margin is: 1 for a positive one, 1/2 for 0, 0 for a negative one."""
    return (1 + torch.sign(margin)) / 2


def _check(log_prob: Tensor, advantages: Tensor) -> None:
    if log_prob.ndim < 2 or log_prob.shape[1:] != advantages.shape:
        raise ValueError(
            f"log-probabilities of shape {tuple(log_prob.shape)} beside advantages of shape {tuple(advantages.shape)}; "
            "need (K, ..., B) and (..., B)"
        )
    if advantages.requires_grad:
        raise ValueError("advantages are constants to a policy gradient: detach them")


def _log_ratio(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_nats: float) -> Tensor:
    """The log-ratio L; raises ValueError for arguments that do not fit."""
    _check(log_prob, advantages)
    if old_log_prob.shape != log_prob.shape:
        raise ValueError(f"old log-probabilities of shape {tuple(old_log_prob.shape)} beside {tuple(log_prob.shape)}")
    if not clip_nats > 0:
        raise ValueError(f"clip_nats must be positive, got {clip_nats}")
    return log_prob - old_log_prob.detach()


def _ratio_metrics(log_ratio: Tensor, clip_nats: float) -> Metrics:
    """How far the policy has moved since it made the samples: `approx_kl` is to second order, in nats a step."""
    L = log_ratio.detach()
    return {"clip_fraction": _mean((L.abs() > clip_nats).to(L.dtype)), "approx_kl": _mean(L**2) / 2}
