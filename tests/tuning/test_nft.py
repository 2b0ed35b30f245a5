"""DiffusionNFT of a policy: its loss and optima to the letter, what it converges to, and runs of it."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

import diffrl
from agents import BFN, EDP, FQL, IDQL, IFQL, QAM, AgentConfig, DiffusionQL, QGuidance
from agents.base import Agent
from diffrl.commands.finetune_policy import run as command
from diffrl.diffusion import VE, VP, Kind, Prediction, Process, RectifiedFlow
from diffrl.nets import seed_generator
from diffrl.runs.kind import agent_of
from diffrl.runs.policy import load_stack
from diffrl.runs.run import Run
from diffrl.runs.tune import finetune_policy
from diffrl.support.errors import UserError
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.tuning.config import DPPOConfig, NFTConfig, from_dict, refuse_idle, to_dict
from diffrl.tuning.environments import Environments
from diffrl.tuning.nft import (
    NFTLearner,
    NFTTrainer,
    among_group,
    draw,
    goodness,
    normalised,
    policy_nft_loss,
    with_companions,
)
from tests.rounding import assert_equal_to_rounding, rounding
from tests.runs.made_runs import made_run
from tests.training.conftest import assert_same_run
from tests.tuning.conftest import BANDIT, BEST, SMALL, Target, target_run

F64 = torch.float64
QUICK: dict[str, Any] = {"environments": 10, "rollout_steps": 4, "batch_size": 20, "epochs": 2, "critic_width": 16}
FEW: dict[str, Any] = {"companions": 2}
BY_CRITICS: dict[str, Any] = {"advantages": "critics", "group": 8, "states": 16}


class Known:
    """A policy over one action whose denoiser is D(x, t) = c_0 + c_1 y + c_2 y^2, y = x / alpha; no network."""

    def __init__(self, kind: Kind, process: Process, c: Tensor) -> None:
        self.prediction, self.c = Prediction(kind, process, 0.5), c

    def bound(self, observations: Tensor, K: int = 1) -> Any:
        process = self.prediction.process

        def network(u: Tensor, label: Tensor) -> Tensor:
            t = self.times
            x = u * (1 if self.prediction.kind != "edm" else self.scale(t))
            y = x / process.alpha(t).unsqueeze(-1)
            return self.prediction.from_x0(self.c[0] + self.c[1] * y + self.c[2] * y**2, x, t)

        return network

    times: Tensor

    def scale(self, t: Tensor) -> Tensor:
        a, s = self.prediction.process.alpha(t), self.prediction.process.sigma(t)
        return torch.sqrt(a**2 * 0.25 + s**2).unsqueeze(-1)


def quadrature(mean: float, std: float, k: float, n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes (x_0, e) (n^2,) and weights of a ~ N(mean, std^2), e ~ N(0, 1): exact for polynomials of degree 2 n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    a, e = torch.meshgrid(mean + std * z, z, indexing="ij")
    return a.flatten(), e.flatten(), torch.outer(w, w).flatten()


def gradient(
    new: Known, old: Known, a: Tensor, e: Tensor, weights: Tensor, r: Tensor, t: float, config: NFTConfig
) -> Tensor:
    """The derivative of the loss with respect to the trained policy's coefficients, its rows (n,) weighted so."""
    # A row a seed: the loss is a mean over a seed's rows, and these have weights of their own.
    new.times = old.times = torch.full((len(a), 1), t, dtype=F64)
    given: Any = torch.zeros(len(a), 1, 1, dtype=F64), a.view(-1, 1, 1), r.view(-1, 1), new.times, e.view(-1, 1, 1)
    loss = (weights * policy_nft_loss(new, old, old, *given, config)[0]).sum()  # type: ignore[arg-type]
    return torch.autograd.grad(loss, new.c)[0]


@pytest.mark.parametrize(
    ("kind", "process"), [("eps", VP()), ("velocity", RectifiedFlow()), ("edm", VE()), ("x0", VP())]
)
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_optimum_of_a_gaussian_is_known(kind: Kind, process: Process, beta: float) -> None:
    """Goodness linear in the action moves its mean by 2 c std^2 / b; quadratic, D by 4 c V (D - mean) / b.

    V is the variance of a given a noisy one, D its mean. The gradient is 0 there, and not with a flipped sign.
    """
    mean, std, k, c = 0.2, 0.6, 0.8, 0.05
    t = float(process.time(torch.tensor(k, dtype=F64)))
    V = k**2 * std**2 / (std**2 + k**2)
    D = torch.tensor([mean * V / std**2, std**2 / (std**2 + k**2), 0.0], dtype=F64)  # c_0 + c_1 y
    config = NFTConfig(start_run=Path(), beta=beta, anchor=0.0, adv_clip=5.0)
    a, e, w = quadrature(mean, std, k, n=8)
    linear = 0.5 + c * (a - mean)
    quadratic = 0.5 + c * (a - mean) ** 2
    shift = torch.tensor([2 * c * V / beta, 0, 0], dtype=F64)  # the denoiser of N(mean + 2 c std^2 / b, std^2)
    around = 4 * c * V / beta * (D - torch.tensor([mean, 0, 0], dtype=F64))
    for r, move in ((linear, shift), (quadratic, around)):
        sizes = []
        for sign in (1.0, -1.0):
            new, old = (Known(kind, process, x.clone()) for x in (D + sign * move, D))
            new.c.requires_grad_()
            sizes.append(float(gradient(new, old, a, e, w, r, t, config).abs().max()))
        assert sizes[0] < rounding(F64, 5000, 10)
        assert sizes[1] > 1e-3
    moved = torch.tensor([(mean + 2 * c * std**2 / beta) * V / std**2, D[1], 0], dtype=F64)
    assert_equal_to_rounding(D + shift, moved, 8)


@pytest.mark.parametrize("worth", [0.0, 0.3, -0.2])
def test_with_companions_the_gradient_is_the_policy_gradients_covariance(worth: float) -> None:
    """In D's offset it is 2 A_max c std^2 (c_1 - 1), for a goodness of 1/2 + worth + c (a - mean).

    So it is whatever a state is worth, and for a wrong denoiser c_0 + c_1 y. REINFORCE's in the mean is E[A (a - mean)]
    / std^2, of the opposite sign, as this is a loss. Without companions the worth of the state adds its own pull.
    """
    mean, std, k, c, n = 0.2, 0.6, 0.8, 0.05, 6
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    taken, other, e = (x.flatten() for x in torch.meshgrid(mean + std * z, mean + std * z, z, indexing="ij"))
    w = (w[:, None, None] * w[:, None] * w).flatten()
    r = 0.5 + worth + c * (taken - mean)
    config = NFTConfig(start_run=Path(), anchor=0.0, adv_clip=5.0)
    found = []
    for group in (2, 1):
        new, old = (Known("x0", VP(), torch.tensor([0.3, 0.7, 0.0], dtype=F64)) for _ in range(2))
        new.c.requires_grad_()
        new.times = old.times = VP().time(torch.full((len(w), group), k, dtype=F64))
        actions = torch.stack([taken, other], 1)[:, :group, None]
        rs, noise = with_companions(r[:, None], group - 1)[:, 0], e[:, None, None].expand(-1, group, -1)
        given: Any = torch.zeros(len(w), 1, 1, dtype=F64), actions, rs, new.times, noise, config
        loss = (w * policy_nft_loss(new, old, old, *given)[0]).sum()  # type: ignore[arg-type]
        found.append(torch.autograd.grad(loss, new.c)[0][0])
    known = torch.tensor(2 * config.adv_clip * c * std**2 * (0.7 - 1), dtype=F64)
    assert_equal_to_rounding(found[0], known, 5000)
    pull = 2 * config.adv_clip * 2 * worth * (0.3 + 0.7 * mean - mean)
    assert_equal_to_rounding(found[1], 2 * known + pull, 5000)


def test_nothing_is_learned_at_r_one_half_and_every_prediction_learns_the_same() -> None:
    """At v = v_old; and loss and gradient in a denoiser's coefficients do not depend on what the network predicts."""
    config = NFTConfig(start_run=Path(), beta=0.5, anchor=0.0)
    c_old, c_new = torch.tensor([0.1, 0.5, 0.05], dtype=F64), torch.tensor([0.2, 0.4, -0.05], dtype=F64)
    generator = torch.Generator().manual_seed(0)
    a, e = torch.rand(2, 1, 12, 1, generator=generator, dtype=F64) * 2 - 1
    k, r = torch.rand(2, 1, 12, generator=generator, dtype=F64)
    k = 0.3 + k
    seen = []
    for kind, process in (
        *((kind, VP()) for kind in ("eps", "x0", "v", "score", "velocity", "edm")),
        ("velocity", RectifiedFlow()),
        ("edm", VE()),
    ):
        policies = [Known(kind, process, c.clone()) for c in (c_new, c_old)]
        t = process.time(k)
        for policy in policies:
            policy.times = t
        new, old = policies
        new.c.requires_grad_()
        given: Any = torch.zeros(1, 12, 1, dtype=F64), a, r, t, e, config
        loss, _ = policy_nft_loss(new, old, old, *given)  # type: ignore[arg-type]
        seen.append(torch.cat([loss, torch.autograd.grad(loss.sum(), new.c)[0]]))
        same = Known(kind, process, c_old.clone().requires_grad_())
        same.times = t
        half: Any = torch.zeros(1, 12, 1, dtype=F64), a, torch.full_like(r, 0.5), t, e, config
        still, _ = policy_nft_loss(same, old, old, *half)  # type: ignore[arg-type]
        assert float(torch.autograd.grad(still.sum(), same.c)[0].abs().max()) < rounding(F64, 1000, 50), kind
    for other in seen[1:]:
        assert_equal_to_rounding(other, seen[0], 2000)


@pytest.mark.parametrize("agent", [DiffusionQL(**SMALL), EDP(**SMALL), BFN(**SMALL), IDQL(**SMALL, blocks=1)])
def test_no_policy_of_ours_moves_at_r_one_half(agent: AgentConfig) -> None:
    """Chain, solver, flow and residual network, through their own `bound` and their own times."""
    built = agent.build(3, 2, (0, 1))
    config = NFTConfig(start_run=Path(), anchor=0.0)
    policy: Any = built.policy.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    observations, actions = torch.randn(2, 5, 3, generator=generator), torch.rand(2, 5, 2, generator=generator)
    t, noise = draw(policy, actions, 1, 3, generator)
    assert t.shape == (2, 15)
    weights = [p for n, p in policy.named_parameters()]
    sizes = []
    for r in (0.5, 0.9):
        given: Any = observations, actions, torch.full((2, 5), r), t, noise, config
        loss, metrics = policy_nft_loss(policy, policy, policy, *given)
        assert metrics["moved"].tolist() == [0, 0]
        found = torch.autograd.grad(loss.sum(), weights, allow_unused=True)
        sizes.append(max(float(g.abs().max()) for g in found if g is not None))
    assert sizes[0] < 1e-4 * sizes[1]


def test_settings_of_an_older_run_are_without_what_came_later() -> None:
    """A run that was begun without companions and noise goes on without; what its folder names is kept."""
    config = NFTConfig(start_run=Path("run"))
    assert (config.companions, config.exploration) != (0, 0.0)
    assert from_dict(to_dict(config), "run") == config
    older = {name: value for name, value in to_dict(config).items() if name not in ("companions", "exploration")}
    assert from_dict(older, "run") == dataclasses.replace(config, companions=0, exploration=0.0)


def test_goodness_and_advantages() -> None:
    advantages = torch.tensor([-9.0, -2.5, 0.0, 2.5, 9.0])
    assert goodness(advantages, 5.0).tolist() == [0, 0.25, 0.5, 0.75, 1]
    A = normalised(torch.tensor([[1.0, 3.0], [0.1, 0.1]]))
    torch.testing.assert_close(A, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
    values = torch.tensor([[[1.0, 3.0], [0.1, 0.1]]])
    torch.testing.assert_close(among_group(values), torch.tensor([[[-1.0, 1.0], [0.0, 0.0]]]) * 2**0.5)


@pytest.mark.parametrize("agent", [DiffusionQL(**SMALL), EDP(**SMALL), BFN(**SMALL), IDQL(**SMALL, blocks=1)])
@pytest.mark.parametrize("companions", [1, 3])
def test_what_is_the_same_for_all_actions_of_a_state_teaches_nothing(agent: AgentConfig, companions: int) -> None:
    """The mean of the gradient over which action of a group was the one taken is 0, where they are equally good.

    So it is over actions and companions of one distribution, whatever the state's advantage is and however wrong the
    denoiser: that of an untrained network here. Without companions it is not, and neither where they differ.
    """
    built = agent.build(3, 2, (0, 1))
    config = NFTConfig(start_run=Path(), anchor=0.0)
    policy: Any = built.policy.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    group = 1 + companions
    observations, actions = torch.randn(2, 5, 3, generator=generator), torch.rand(2, 5 * group, 2, generator=generator)
    t, noise = draw(policy, actions, group, 2, generator)
    advantage = 0.5 + torch.rand(2, 5, generator=generator)  # of the states
    weights = list(policy.parameters())

    def gradients(r: Tensor) -> Tensor:
        loss, _ = policy_nft_loss(policy, policy, policy, observations, actions, r.flatten(1), t, noise, config)
        found = torch.autograd.grad(loss.sum(), weights, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    def mean(of_action: Tensor) -> tuple[Tensor, Tensor]:
        """Over which action of a group was taken, where the one in place k has the advantage of_action[k]."""
        with_, without = [], []
        for k in range(group):
            r = with_companions(goodness(advantage * of_action[k], 5.0), companions).roll(k, -1)
            with_.append(gradients(r))
            alone = torch.full_like(r, 0.5)
            alone[..., k] = r[..., k]
            without.append(gradients(alone))
        return torch.stack(with_).mean(0), torch.stack(without).mean(0)

    same, alone = mean(torch.ones(group))
    told, _ = mean(torch.linspace(-1, 1, group))
    assert float(same.norm()) < 1e-4 * float(alone.norm())
    assert float(told.norm()) > 30 * float(same.norm())


def test_the_actions_of_a_state_are_learned_from_with_the_same_noise() -> None:
    policy: Any = DiffusionQL(**SMALL).build(3, 2, (0, 1)).policy
    t, noise = draw(policy, torch.zeros(2, 12, 2), 4, 5, torch.Generator().manual_seed(0))
    assert (t.shape, noise.shape) == ((2, 60), (2, 60, 2))
    t, noise = t.view(2, 3, 4, 5), noise.view(2, 3, 4, 5, 2)
    assert torch.equal(t, t[:, :, :1].expand_as(t))
    assert torch.equal(noise, noise[:, :, :1].expand_as(noise))
    assert len(noise[:, :, 0].flatten().unique()) == 60  # states and times have their own


def test_companions_share_the_opposite_of_an_advantage() -> None:
    r = with_companions(torch.tensor([[0.9, 0.0]]), 4)
    torch.testing.assert_close(r, torch.tensor([[[0.9, 0.4, 0.4, 0.4, 0.4], [0.0, 0.625, 0.625, 0.625, 0.625]]]))
    assert with_companions(torch.tensor([[0.9]]), 0).tolist() == [[[pytest.approx(0.9)]]]


def trainer(cloned: Path, **fields: Any) -> tuple[NFTTrainer, Agent]:
    run = Run.read(cloned)
    config = NFTConfig(start_run=cloned, **(QUICK | FEW | {"critic_warm_up": 0, "warm_up": 0} | fields))
    agent, _ = load_stack(run, run.config.seeds, "last", "cpu")
    made = NFTTrainer(
        agent,
        config,
        Environments(Target, agent.seeds, config.environments),
        run.preprocessing,
        [seed_generator(seed) for seed in agent.seeds],
        torch.Generator().manual_seed(0),
        lambda step, on_progress: np.zeros((2, 1)),
    )
    return made, agent


@pytest.mark.long
def test_the_optimum_of_a_bandit_is_found_and_left_with_flipped_goodness(
    cloned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = torch.from_numpy(BEST).float()
    states, distances = torch.zeros(2, 200, 1), []
    for flipped in (False, True):
        if flipped:
            monkeypatch.setattr("diffrl.tuning.nft.goodness", lambda a, limit: goodness(-a, limit))
        fields = {"environments": 100, "rollout_steps": 1, "batch_size": 50, "learning_rate": 1e-3}
        made, agent = trainer(cloned, epochs=4, reward_scaling=False, **fields)
        if not flipped:
            before = agent.act(states, torch.Generator().manual_seed(0))
            distances.append(((before - best) ** 2).sum(-1).mean(-1))
        for _ in range(40 if not flipped else 5):
            made.advance(100, lambda: False)
        after = agent.act(states, torch.Generator().manual_seed(0))
        distances.append(((after - best) ** 2).sum(-1).mean(-1))
    start, end, away = distances
    assert (start > 0.6).all()
    assert (end < 0.1).all()
    assert (away > start).all()


def test_the_policy_that_acts_follows(cloned: Path) -> None:
    """After an iteration it is w old + (1 - w) trained; actions are its own, and learned from as they were taken."""
    made, _ = trainer(cloned, sampling_decay_rate=0.4, sampling_decay=0.5, exploration=0.0)
    before = {n: t.clone() for n, t in made.old.state_dict().items()}
    made.advance(40, lambda: False)
    for name, trained in made.policy.state_dict().items():
        torch.testing.assert_close(made.old.state_dict()[name], 0.4 * before[name] + 0.6 * trained)
    observations = torch.zeros(2, 4, 1)
    state = made._generator.get_state()
    actions, (kept,) = made.act(observations)
    made._generator.set_state(state)
    again = made.old.sample(observations, made.old.sampling_noise(observations, made._generator))
    assert torch.equal(actions, again.clamp(-1, 1))
    assert torch.equal(kept[0], actions)


def test_exploration_is_noise_on_what_is_taken_and_on_companions(cloned: Path) -> None:
    """Of the deviation that is asked for; what acts and its companions have one distribution."""
    states = torch.zeros(2, 2000, 1)
    spread, n = [], 2 * 2000 * 2
    for deviation in (0.0, 0.2):
        made, _ = trainer(cloned, exploration=deviation, companions=3)
        taken, (kept,) = made.act(states)
        nothing = torch.zeros(2, 2000)
        met = made.experience(states, [kept], nothing, nothing)
        assert torch.equal(met.actions[:, :, 0], taken)
        assert met.actions.shape == (2, 2000, 4, 2)
        variances = met.actions.var(1).mean((0, 2))
        assert variances[1:].mean() == pytest.approx(float(variances[0]), rel=5 * (2 / n) ** 0.5 * (4 / 3) ** 0.5)
        spread.append(float(variances.mean()))
    assert spread[1] - spread[0] == pytest.approx(0.2**2, rel=0.1)


@pytest.mark.parametrize("reward", [0.0, 0.1])
def test_without_a_signal_the_policy_stays_to_the_bit(cloned: Path, reward: float) -> None:
    made, _ = trainer(cloned)
    told: list[str] = []
    made._say = told.append
    step = made._environments.step
    made._environments.step = lambda actions: step(actions)._replace(  # type: ignore[method-assign]
        rewards=np.full(made._environments._begun.shape, reward, np.float32)
    )
    before = {n: t.clone() for n, t in made.state().items()}
    for _ in range(2):
        made.advance(40, lambda: False)
    after = made.state()
    policy = [n for n in before if n.startswith(("learner.", "finetune.optimiser.policy", "finetune.sampling"))]
    assert len(policy) > 20
    assert all(torch.equal(after[n], before[n]) for n in policy)
    assert len(told) == 1
    assert "All rewards so far are" in told[0]
    assert made.sums()["no_signal"].tolist() == [80, 80]


@pytest.fixture(scope="module")
def critical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of Diffusion-QL, which has critics; it clones."""
    out = tmp_path_factory.mktemp("critical") / "run"
    agent = DiffusionQL(**SMALL, ema_start=10, q_weight=0.0, actor_lr=3e-3)
    return target_run(out, agent, steps=100, eval_every=100, eval_episodes=2)


def by_critics(critical: Path, values: Any = None, **fields: Any) -> tuple[NFTLearner, Agent]:
    run = Run.read(critical)
    run = dataclasses.replace(
        run,
        config=dataclasses.replace(run.config, agent=dataclasses.replace(run.config.agent, act_candidates=1)),  # type: ignore[arg-type]
    )
    agent, _ = load_stack(run, run.config.seeds, "last", "cpu")
    made = NFTLearner(agent, NFTConfig(start_run=critical, **(BY_CRITICS | {"warm_up": 0} | fields)))
    if values is not None:
        made.values = values
    return made, agent


def test_critics_lead_to_what_they_value(critical: Path) -> None:
    """With values of the distance to the best action for critics, that is where the policy goes, in each seed."""
    best = torch.from_numpy(BEST).float()

    def values(observations: Tensor, actions: Tensor) -> Tensor:
        return -((actions - best) ** 2).sum(-1)

    made, agent = by_critics(critical, values, learning_rate=3e-3, states=32, group=8)
    states, generator = torch.zeros(2, 100, 1), torch.Generator().manual_seed(0)
    batch: Any = type("Batch", (), {"observations": torch.rand(2, 32, 1, generator=generator) * 2 - 1})()
    before = ((agent.act(states, generator) - best) ** 2).sum(-1).mean(-1)
    for _ in range(60):
        metrics = made.update(batch, generator)
    after = ((agent.act(states, generator) - best) ** 2).sum(-1).mean(-1)
    assert (after < before / 2).all()
    assert metrics["no_signal"].tolist() == [0, 0]


def test_critics_that_tell_nothing_apart_leave_that_seed_to_the_bit(critical: Path) -> None:
    """The other seed learns; the trainer says it once."""

    def values(observations: Tensor, actions: Tensor) -> Tensor:
        return torch.stack([torch.full_like(actions[0, :, 0], 0.1), actions[1, :, 0]])

    made, agent = by_critics(critical, values)
    before = {n: t.clone() for n, t in (agent.state_dict() | made.own_state()).items()}
    generator = torch.Generator().manual_seed(0)
    batch: Any = type("Batch", (), {"observations": torch.zeros(2, 16, 1)})()
    for _ in range(3):
        metrics = made.update(batch, generator)
    after = {n: t for n, t in (agent.state_dict() | made.own_state()).items() if not n.startswith("ema_actor")}
    assert metrics["no_signal"].tolist() == [1, 0]
    assert all(torch.equal(t[0], before[n][0]) for n, t in after.items() if t.ndim)
    assert any(not torch.equal(t[1], before[n][1]) for n, t in after.items() if t.ndim)


def test_a_run_that_hears_nothing_is_marked(cloned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In scores.json and in a line at the end, by DPPO and by NFT; one that hears something is not."""
    quick: dict[str, Any] = {"steps": 40, "eval_every": 40, "eval_episodes": 2}
    heard = tuned(cloned, tmp_path / "heard", critic_warm_up=0, **quick)
    assert "updates_without_signal" not in json.loads((heard / "scores.json").read_text())
    known: Any = gymnasium.spec("Target-v0").entry_point
    step = known.step
    monkeypatch.setattr(known, "step", lambda self, action: (step(self, action)[0], 0.25, True, False, {}))
    for schema in (NFTConfig, DPPOConfig):
        config = schema(start_run=cloned, **QUICK, critic_warm_up=0)
        run = finetune_policy(config, out=tmp_path / schema.algo, quiet=True, **quick)
        assert json.loads((run / "scores.json").read_text())["updates_without_signal"] == 1
        start, end = (checkpoint.load(r, n).learner for r, n in ((cloned, 500), (run, 40)))
        assert all(torch.equal(t, start[n]) for n, t in end.items())


# --- Runs ----------------------------------------------------------------------------------------------------------


def tuned(start: Path, out: Path, **fields: Any) -> Path:
    settings = {name: fields.pop(name) for name in list(fields) if name in NFTConfig.__dataclass_fields__}
    acting = QUICK | FEW if settings.get("advantages") != "critics" else {}
    config = NFTConfig(start_run=start, **(acting | settings))
    quick: dict[str, Any] = {"steps": 120, "eval_every": 80, "eval_episodes": 2}
    return finetune_policy(config, out=out, quiet=True, **(quick | fields))


def test_a_run_that_is_cut_goes_on_bit_for_bit(cloned: Path, critical: Path, tmp_path: Path) -> None:
    """In the environment, whose episodes of one step end where the run is cut; and by critics. What acts has moved."""
    whole = tuned(cloned, tmp_path / "whole")
    cut = tuned(cloned, tmp_path / "cut", steps=80)
    diffrl.resume(cut, steps=120, quiet=True)
    assert_same_run(whole, cut)
    quick: dict[str, Any] = BY_CRITICS | {"eval_every": 6, "log_every": 4}
    whole = tuned(critical, tmp_path / "whole-critics", steps=12, **quick)
    cut = tuned(critical, tmp_path / "cut-critics", steps=6, **quick)
    diffrl.resume(cut, steps=12, quiet=True)
    assert_same_run(whole, cut)
    start = checkpoint.load(critical, 100).learner
    moved = {n for n, t in checkpoint.load(whole, 12).learner.items() if not torch.equal(t, start[n])}
    assert moved
    assert all(name.startswith(("actor.", "ema_actor.")) for name in moved)
    assert diffrl.load_policy(whole)(np.zeros(1, np.float32)).shape == (2,)


def test_a_stop_within_an_iteration_is_saved_as_before_it(
    cloned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(cloned, tmp_path / "whole", steps=120, eval_every=120)
    original, calls = NFTTrainer.policy_loss, 0

    def interrupted(self: NFTTrainer, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(NFTTrainer, "policy_loss", interrupted)
    with pytest.raises(Interrupted, match="after 40 steps; saved"):
        tuned(cloned, tmp_path / "cut", steps=120, eval_every=120)
    diffrl.resume(tmp_path / "cut", quiet=True)
    assert_same_run(whole, tmp_path / "cut")


@pytest.mark.parametrize(
    "agent",
    [
        EDP(**SMALL),
        IDQL(**SMALL, blocks=1),
        *(pytest.param(agent, marks=pytest.mark.slow) for agent in (IFQL(**SMALL), QAM(**SMALL))),
    ],
)
def test_any_sampler_will_do(agent: AgentConfig, tmp_path: Path) -> None:
    """A solver, IDQL's own sampler, which is kept, a flow; in the environment and by critics."""
    start = target_run(tmp_path / "start", agent, steps=4, eval_every=4, eval_episodes=1, seeds=(0,))
    for run in (
        tuned(start, tmp_path / "acted", steps=80),
        tuned(start, tmp_path / "told", steps=4, **BY_CRITICS),
    ):
        config: Any = Run.read(run).config.agent
        alone: dict[str, Any] = {"act_candidates": 1} if hasattr(agent, "act_candidates") else {}
        assert config == dataclasses.replace(agent, **alone)
        last = checkpoint.steps(run)[-1]
        before, after = (checkpoint.load(r, n).learner for r, n in ((start, 4), (run, last)))
        assert any(not torch.equal(t, before[n]) for n, t in after.items())


def test_what_cannot_be_tuned_says_so(cloned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffusion_bc has no critics"):
        tuned(cloned, tmp_path / "a", advantages="critics")
    for agent in (FQL(**SMALL), QGuidance(**SMALL)):
        start = made_run(tmp_path / agent.name, agent, BANDIT)
        with pytest.raises(UserError, match="policy alone"):
            tuned(start, tmp_path / "a")
    chunked = made_run(tmp_path / "chunked", BFN(**SMALL, chunk=2), BANDIT)
    with pytest.raises(UserError, match=r"bfn has chunks of actions .*, and DiffusionNFT in an environment is of"):
        tuned(chunked, tmp_path / "a")
    blind = made_run(tmp_path / "blind", DiffusionQL(**SMALL), dataclasses.replace(BANDIT, env_id=None))
    with pytest.raises(UserError, match="nothing for DiffusionNFT to act in"):
        tuned(blind, tmp_path / "a")
    with pytest.raises(UserError, match="--group is 1"):
        NFTConfig(start_run=cloned, group=1)
    assert not (tmp_path / "a" / "run.json").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            "--advantages critics --environments 7",
            "--environments is for --advantages environment: nft by critics has no",
        ),
        ("--advantages critics --discount 0.5", "--discount is for --advantages environment: nft by critics has no"),
        ("--advantages critics --discount 0.99", "--discount is for --advantages environment"),  # the default, typed
        ("--advantages critics --no-reward-scaling", "--reward-scaling is for --advantages environment"),
        ("--group 8", "--group is for --advantages critics: nft in an environment has no use for it"),
    ],
)
def test_options_without_effect_are_refused(critical: Path, tmp_path: Path, words: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        command([str(critical), "--algo", "nft", *words.split(), "--steps", "4", "--out", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("target")
def test_an_option_that_would_do_nothing_is_refused(cloned: Path, critical: Path, tmp_path: Path) -> None:
    """Candidates where no critic chooses, and rows by updates where one is written an iteration."""
    for words, error in (
        ("--candidates 4", "--candidates is for agents whose critics choose an action when acting: diffusion_bc has"),
        ("--log-every 3", "--log-every is for updates: nft in an environment writes a row of metrics.csv an iteration"),
    ):
        options = ["--algo", "nft", "--steps", "4", "--out", str(tmp_path / "a"), *words.split()]
        with pytest.raises(UserError, match=error):
            command([str(cloned), *options])
    with pytest.raises(UserError, match="--candidates is for agents"):
        finetune_policy(NFTConfig(start_run=cloned, candidates=4), out=tmp_path / "a", quiet=True)
    assert not (tmp_path / "a").exists()
    settings = NFTConfig(start_run=critical, candidates=4, advantages="critics")
    refuse_idle(settings, agent_of(critical), 3)  # its critics choose, and its steps are updates


def test_an_older_run_that_holds_options_without_effect_goes_on(critical: Path, tmp_path: Path) -> None:
    """As it would without them: folders from before they were refused are read, and resumed."""
    quick: dict[str, Any] = BY_CRITICS | {"eval_every": 4, "log_every": 4}
    whole = tuned(critical, tmp_path / "whole", steps=8, **quick)
    cut = tuned(critical, tmp_path / "cut", steps=4, **quick)
    settings = cut / "settings.yaml"
    held = (
        settings.read_text().replace("environments: 20", "environments: 7").replace("discount: 0.99", "discount: 0.5")
    )
    assert "environments: 7" in held
    assert "discount: 0.5" in held
    settings.write_text(held)
    diffrl.resume(cut, steps=8, accept_changes=True, quiet=True)
    assert_same_run(whole, cut)
    with pytest.raises(UserError, match="--environments is for --advantages environment"):
        tuned(critical, tmp_path / "new", steps=8, environments=7, **quick)


def test_the_command(critical: Path, tmp_path: Path) -> None:
    words = "--algo nft --environments 5 --rollout-steps 4 --batch-size 10 --epochs 1 --critic-width 16 --eval-every 20"
    words += " --eval-episodes 2"
    assert (
        command([str(critical), *words.split(), "--steps", "40", "--seeds", "1", "--out", str(tmp_path / "run")]) == 0
    )
    assert command(["--resume", str(tmp_path / "run"), "--steps", "60"]) == 0
    assert checkpoint.steps(tmp_path / "run")[-1] == 60
    words = "--algo nft --advantages critics --group 4 --states 8 --steps 2 --eval-every 2 --eval-episodes 2"
    assert command([str(critical), *words.split(), "--out", str(tmp_path / "told")]) == 0
