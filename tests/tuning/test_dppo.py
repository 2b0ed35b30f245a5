"""PPO over a policy's chain: its first update, what it converges to, and runs of it."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import diffrl
from agents import EDP, FQL, IDQL, IFQL, TD3BC, DiffusionQL, QGuidance
from agents.base import Agent
from diffrl.cli import main
from diffrl.commands.finetune_policy import run as command
from diffrl.diffusion.chain import at_steps
from diffrl.nets import seed_generator
from diffrl.runs.policy import load_stack
from diffrl.runs.run import Run
from diffrl.runs.study.protocols import result
from diffrl.runs.study.scores import Scores
from diffrl.runs.tune import finetune_policy
from diffrl.support.errors import UserError
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.tuning.config import DPPOConfig
from diffrl.tuning.environments import MEMORY, Environments
from diffrl.tuning.ppo import DPPOTrainer
from tests.runs.made_runs import made_run
from tests.training.conftest import assert_same_run, final_state
from tests.tuning.conftest import BANDIT, BEST, SMALL, Target, target_run

QUICK: dict[str, Any] = {"environments": 10, "rollout_steps": 4, "batch_size": 20, "epochs": 2, "critic_width": 16}


def trainer(cloned: Path, **fields: Any) -> tuple[DPPOTrainer, Agent]:
    """One on the cloned policies, outside a run."""
    run = Run.read(cloned)
    config = DPPOConfig(start_run=cloned, **(QUICK | {"critic_warm_up": 0, "warm_up": 0} | fields))
    agent, _ = load_stack(run, run.config.seeds, "last", "cpu")
    if config.tuned_steps is not None:
        agent.networks["actor"].freeze_start(5 - config.tuned_steps)  # type: ignore[operator]
    made = DPPOTrainer(
        agent,
        config,
        Environments(Target, agent.seeds, config.environments),
        run.preprocessing,
        [seed_generator(seed) for seed in agent.seeds],
        torch.Generator().manual_seed(0),
        lambda step, on_progress: np.zeros((2, 1)),
    )
    return made, agent


@pytest.mark.parametrize("tuned_steps", [None, 2])
def test_ratios_are_1_before_the_first_update(cloned: Path, tuned_steps: int | None) -> None:
    """Old and new log-probabilities agree on what was collected, and the policy's gradient is that of -A log pi."""
    made, _ = trainer(cloned, tuned_steps=tuned_steps)
    experience, _ = made.collect()
    assert len(experience.log_probs) == (tuned_steps or 5)
    now = made.transition(made.policy, experience)
    log_prob = now.log_prob(made.chain.next_states(experience.states, made.steps))
    torch.testing.assert_close(log_prob, experience.log_probs, rtol=0, atol=2e-5)
    loss, metrics = made.policy_loss(experience)
    assert float(metrics["approx_kl"].max()) < 1e-9
    A = experience.advantages
    A = (A - A.mean(-1, keepdim=True)) / A.std(-1, correction=0, keepdim=True)
    discounts = 0.99 ** torch.arange(len(log_prob) - 1, -1, -1)
    plain = -(discounts[:, None, None] * A * log_prob).mean((0, -1))
    weights = made._optimisers["policy"].parameters
    gradients = (torch.autograd.grad(x.sum(), weights, retain_graph=True) for x in (loss, plain))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_same_rows_give_ratios_of_exactly_1(cloned: Path) -> None:
    made, _ = trainer(cloned)
    observations = torch.randn(2, 30, 1, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(6, 2, 30, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        rollout = made.chain.rollout(made.policy.step_denoiser(observations), noise[0], noise=noise[1:])
        again = made.chain.log_prob(made.policy.step_denoiser(observations, 0), rollout.states, made.steps)
    assert torch.equal(again, at_steps(rollout.log_probs, made.steps))


@pytest.mark.parametrize("tuned_steps", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_the_optimum_of_a_bandit_is_found(cloned: Path, tuned_steps: int | None) -> None:
    """From .15 at best to within what exploration costs of 1; the mean action is the best one."""
    fields = {"environments": 100, "rollout_steps": 1, "batch_size": 50, "learning_rate": 3e-3, "clip_nats": 0.2}
    made, agent = trainer(cloned, tuned_steps=tuned_steps, epochs=4, reward_scaling=False, **fields)
    states = torch.zeros(2, 200, 1)
    before = agent.act(states, torch.Generator().manual_seed(0))
    for _ in range(40):
        made.advance(100, lambda: False)
    after = agent.act(states, torch.Generator().manual_seed(0))
    best = torch.from_numpy(BEST).float()
    assert float(((before - best) ** 2).sum(-1).mean()) > 0.6
    assert float(((after - best) ** 2).sum(-1).mean(-1).max()) < 0.03
    assert float((after.mean(1) - best).abs().max()) < 0.1


def test_the_pretrained_policy_holds_by_kl_and_by_imitation(cloned: Path) -> None:
    """With either weight the policy ends nearer to where it began, and the divergence is what it says."""
    ends = {}
    for name in ("none", "kl_weight", "bc_weight"):
        weight = {} if name == "none" else {name: 3.0}
        made, _ = trainer(cloned, learning_rate=3e-3, epochs=4, **weight)
        for _ in range(5):
            made.advance(40, lambda: False)
        ends[name] = float(made._divergence(made.collect()[0]).mean())
    assert ends["kl_weight"] < ends["none"] / 2
    assert ends["bc_weight"] < ends["none"] / 2


def test_a_small_target_kl_stops_and_a_stopped_seed_stays(cloned: Path) -> None:
    """After the update that goes too far there is none, of that seed alone."""
    made, agent = trainer(cloned, learning_rate=1e-2, target_kl=1e-6, epochs=10)
    metrics = made.learn(made.collect()[0])
    assert metrics["updates"].tolist() == [1, 1]  # the first update is measured by the second minibatch
    made.hold([1], agent.state_dict() | {})
    held = {name: tensor[1].clone() for name, tensor in agent.state_dict().items() if tensor.ndim}
    moved = agent.networks["actor"].mlp.first.weight[0].clone()  # type: ignore[union-attr, index]
    made.learn(made.collect()[0])
    assert all(torch.equal(tensor[1], held[n]) for n, tensor in agent.state_dict().items() if tensor.ndim)
    assert not torch.equal(agent.networks["actor"].mlp.first.weight[0], moved)  # type: ignore[union-attr, index]


def test_a_frozen_seed_learns_nothing_and_the_others_as_before(cloned: Path) -> None:
    """The critic warms up alone; then a held seed's critic and optimisers stand still too."""
    made, _ = trainer(cloned, critic_warm_up=1)
    before = {name: tensor.clone() for name, tensor in made.policy.state_dict().items()}
    critic = made.critic.first.weight.clone()
    made.advance(40, lambda: False)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.policy.state_dict().items())
    assert not torch.equal(made.critic.first.weight, critic)
    made.advance(40, lambda: False)
    assert not torch.equal(before["mlp.linears.0.weight"], made.policy.state_dict()["mlp.linears.0.weight"])


class Clock(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Observes the time; rewards it; terminal after 3 steps, or cut after 2 where the start says so."""

    observation_space = gymnasium.spaces.Box(-1, 9, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time, self.short, self.start = 0, self.np_random.random() < 0.5, seed
        return np.zeros(1, np.float32), {}

    def step(self, action: NDArray[np.float32]) -> Any:
        self.time += 1
        return np.full(1, self.time, np.float32), float(self.time), self.time == 3, self.short and self.time == 2, {}


def test_environments_go_on_from_episode_to_episode() -> None:
    """What is reached is of the episode that ends; returns are whole; starts are of seed, place and number."""
    made = Environments(Clock, (5, 6), 3)
    starts: dict[tuple[int, int], list[int]] = {}
    for _ in range(12):
        met = made.observe()
        for s, row in enumerate(made._environments):
            for e, env in enumerate(row):
                if met[s, e, 0] == 0:
                    starts.setdefault((s, e), []).append(env.start)  # type: ignore[attr-defined]
        outcome = made.step(np.zeros((2, 3, 1), np.float32))
        np.testing.assert_array_equal(outcome.reached, met + 1)
        np.testing.assert_array_equal(outcome.rewards, outcome.reached[..., 0])
        np.testing.assert_array_equal(outcome.terminals, outcome.reached[..., 0] == 3)
        assert (outcome.ends[outcome.terminals == 1] == 1).all()
    assert set(made.finished[0]) | set(made.finished[1]) == {3.0, 6.0}
    every = [start for one in starts.values() for start in one]
    assert len(set(every)) == len(every)
    alone = Environments(Clock, (6,), 2)
    alone.observe()
    assert [env.start for env in alone._environments[0]] == [starts[1, e][0] for e in range(2)]  # type: ignore[attr-defined]
    state = made.state_dict()
    assert state["finished"].shape == (2, MEMORY)
    again = Environments(Clock, (5, 6), 3)
    again.load_state_dict(state)
    assert again.finished == made.finished
    assert (again.observe() == 0).all()


def tuned(cloned: Path, out: Path, **fields: Any) -> Path:
    settings = {name: fields.pop(name) for name in list(fields) if name in DPPOConfig.__dataclass_fields__}
    config = DPPOConfig(start_run=cloned, **(QUICK | settings))
    return finetune_policy(config, out=out, **({"steps": 200, "eval_every": 80, "quiet": True} | fields))


def test_a_policy_of_another_sampler_is_tuned_and_acts_by_the_posterior(tmp_path: Path) -> None:
    """IDQL's own sampler clamps its states, which leaves PPO no probabilities; the run's configuration says so."""
    start = target_run(tmp_path / "idql", IDQL(**SMALL, blocks=1), steps=20, eval_every=20, seeds=(0,))
    assert Run.read(start).config.agent.sampler == "beta"  # type: ignore[attr-defined]
    run = Run.read(tuned(start, tmp_path / "tuned", steps=80, eval_every=80))
    assert run.config.agent.sampler == "posterior"  # type: ignore[attr-defined]
    agent, _ = load_stack(run, (0,), "last", "cpu")
    assert agent.policy.chain().n_decisions == 4  # type: ignore[attr-defined]


def test_a_run_that_is_cut_goes_on_bit_for_bit(cloned: Path, tmp_path: Path) -> None:
    """Episodes of one step end where the run is cut, so that nothing is lost: everything is as if it had not been."""
    whole = tuned(cloned, tmp_path / "whole", tuned_steps=3)
    cut = tuned(cloned, tmp_path / "cut", tuned_steps=3, steps=80)
    diffrl.resume(cut, steps=200, quiet=True)
    assert_same_run(whole, cut)
    assert diffrl.resume(cut, quiet=True) == cut  # all are done
    with pytest.raises(UserError, match="has 200 steps already, more than the 80 steps asked for"):
        diffrl.resume(cut, steps=80, quiet=True)
    assert_same_run(whole, cut)


def test_a_run_is_like_any_other(cloned: Path, tmp_path: Path) -> None:
    """Step 0 is the policy as it came; load_policy and evaluate take it; the files are there."""
    run = tuned(cloned, tmp_path / "run", steps=190)  # five iterations of 40 steps
    assert checkpoint.steps(run)[-1] == 200
    for name in ("config.yaml", "settings.yaml", "run.json", "metrics.csv", "scores.json", "learning_curve.png"):
        assert (run / name).is_file()
    first = json.loads((run / "scores.json").read_text())["evaluations"][0]
    assert first["step"] == 0
    start = checkpoint.load(cloned, 500).learner
    moved = {n for n, t in checkpoint.load(run, 200).learner.items() if not torch.equal(t, start[n])}
    assert moved
    assert all(name.startswith("actor.") for name in moved)
    observations = np.zeros((4, 1), np.float32)
    policy, before = diffrl.load_policy(run, seed=1), diffrl.load_policy(cloned, seed=1)
    assert policy(observations).shape == (4, 2)
    assert not np.array_equal(policy(observations), before(observations))
    assert len(diffrl.evaluate(run, episodes=3, which=["last"], quiet=True)["last"]["returns"]) == 2


def test_no_evaluation_of_an_untouched_policy_is_the_best(
    cloned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the critic learns alone it is that of step 0, in other episodes; of such alone, one is, which is said."""
    run = tuned(cloned, tmp_path / "run", steps=120, eval_every=40, critic_warm_up=2, quiet=False)
    same = "Up to step 80 its policy is the one that it started with, while its critic learns alone (--critic-warm-up)."
    assert same in " ".join(capsys.readouterr().err.split())
    start = checkpoint.load(cloned, 500).learner
    moved = [
        not all(torch.equal(tensor, start[name]) for name, tensor in checkpoint.load(run, step).learner.items())
        for step in (80, 120)
    ]
    assert moved == [False, True]
    found = json.loads((run / "scores.json").read_text())
    values = np.array([entry["mean_return"] for entry in found["evaluations"]])
    assert (values[:3].max(0) > values[3]).any()  # by the noise of other episodes
    assert [best["step"] for best in found["best"]] == [120, 120]
    assert diffrl.evaluate(run, episodes=1, which="best", quiet=True)["best"]["step"] == [120, 120]
    rows = Scores.of_runs([run]).rows
    assert [result([row for row in rows if row.seed == seed], "best") for seed in (0, 1)] == values[3].tolist()
    del found["unchanged_until"]  # as older versions wrote it
    found["best"] = []
    (run / "SHA256SUMS").unlink()
    (run / "scores.json").write_text(json.dumps(found))
    assert diffrl.evaluate(run, episodes=1, which="best", quiet=True)["best"]["step"] == [120, 120]
    last = found["evaluations"][3]
    found["evaluations"] = found["evaluations"][:3]
    (run / "scores.json").write_text(json.dumps(found))
    capsys.readouterr()
    assert set(diffrl.evaluate(run, episodes=1, which="best")["best"]["step"]) <= {0, 40, 80}
    assert same in " ".join(capsys.readouterr().err.split())
    found["evaluations"].append(last)
    (run / "scores.json").write_text(json.dumps(found))
    shutil.rmtree(run / "checkpoints" / f"{120:09d}")  # as an older version pruned it
    diffrl.evaluate(run, episodes=1, which="best")
    said = " ".join(capsys.readouterr().err.split())
    assert "of step 120, has no checkpoint any more: of those that are there step" in said


def test_a_frozen_start_is_loaded_with_the_policy(cloned: Path, tmp_path: Path) -> None:
    run = tuned(cloned, tmp_path / "run", tuned_steps=2)
    learner = final_state(run)
    assert "learner.actor.early.mlp.linears.0.weight" in learner
    start = checkpoint.load(cloned, 500).learner["actor.mlp.linears.0.weight"]
    assert torch.equal(learner["learner.actor.early.mlp.linears.0.weight"], start)
    assert not torch.equal(learner["learner.actor.mlp.linears.0.weight"], start)
    assert diffrl.load_policy(run)(np.zeros(1, np.float32)).shape == (2,)
    with pytest.raises(UserError, match="a second time"):
        tuned(run, tmp_path / "again")
    valued = target_run(tmp_path / "ql", DiffusionQL(**SMALL), steps=2, eval_every=2, seeds=(0,))
    frozen = tuned(valued, tmp_path / "frozen", tuned_steps=2, steps=80)
    with pytest.raises(UserError, match="a second time"):
        diffrl.online(frozen, out=tmp_path / "online", steps=20, warm_up=0)


def test_diffusion_ql_is_tuned_as_a_policy_alone(tmp_path: Path) -> None:
    """Its critics choose no more, unless it is asked for; the averaged actor follows."""
    start = target_run(tmp_path / "ql", DiffusionQL(**SMALL, ema_start=10), steps=40, eval_every=40, seeds=(3,))
    run = tuned(start, tmp_path / "run", steps=80)
    assert Run.read(run).config.agent == dataclasses.replace(DiffusionQL(**SMALL, ema_start=10), act_candidates=1)
    state = checkpoint.load(run, 80).learner
    assert torch.equal(state["actor.mlp.linears.0.weight"], state["ema_actor.mlp.linears.0.weight"])
    kept = tuned(start, tmp_path / "kept", steps=80, candidates=7)
    assert Run.read(kept).config.agent.act_candidates == 7  # type: ignore[attr-defined]


@pytest.mark.slow
def test_that_a_policy_is_untrained_is_said_however_many_runs_lie_between(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of fine-tuned runs of fine-tuned runs, and of online runs until their own updates have trained it."""

    def said(words: str, run: Path, *more: Any) -> str:
        assert main([*words.split(), str(run), *map(str, more)]) == 0
        return " ".join(capsys.readouterr().err.split())

    agent = DiffusionQL(**SMALL, ema_start=100, act_with="average")
    start = target_run(tmp_path / "start", agent, steps=40, eval_every=40, seeds=(3,))
    trained = target_run(tmp_path / "trained", agent, steps=101, eval_every=101, seeds=(3,))
    short = ["--steps", 4, "--eval-every", 4, "--eval-episodes", 1, "--out"]
    tune = "finetune policy --algo dpo --pairs 8 --segment 2 --batch-size 4"
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert "Up to step 100 the policy that acts is untrained" in said(tune, start, *short, once)
    back = f"It goes back to an untrained policy, that of {start} at step 40."
    assert back in said(tune, once, *short, twice)
    assert back in said("online --warm-up 0", twice, *short, tmp_path / "a")
    assert "untrained" not in said(tune, trained, *short, tmp_path / "b")
    assert "untrained" not in said(tune, tmp_path / "b", *short, tmp_path / "c")

    # 60 updates are missing, of which an online run makes 2 in each of its steps but the first.
    online = tmp_path / "online"
    sixty = ["--steps", 32, "--eval-every", 31, "--eval-episodes", 1, "--updates-per-step", 2, "--out", online]
    said("online --warm-up 1", start, *sixty)
    own = f"At step 31 the policy that acts is untrained: it is that of {start} at step 40."
    assert f"31: {own}" in said("evaluate --episodes 1 --which 31", online)
    assert own in said(f"{tune} --start-checkpoint 31", online, *short, tmp_path / "d")
    assert "untrained" not in said(tune, online, *short, tmp_path / "e")
    shutil.rmtree(start)
    assert "untrained" not in said(tune, twice, *short, tmp_path / "f")  # nothing is known of it any more


def test_what_cannot_be_tuned_says_so(cloned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 1 to 5"):
        tuned(cloned, tmp_path / "a", tuned_steps=6)
    with pytest.raises(UserError, match="no seed 7"):
        tuned(cloned, tmp_path / "a", seeds=(7,))
    with pytest.raises(
        UserError, match=r"--steps is 80, and in the first 80 the critic alone .*-up 2, in iterations of"
    ):
        tuned(cloned, tmp_path / "a", steps=80, critic_warm_up=2)
    with pytest.raises(UserError, match="is not a run's folder"):
        tuned(tmp_path / "none", tmp_path / "a")
    with pytest.raises(UserError, match="--clip-nats is 0"):
        DPPOConfig(start_run=cloned, clip_nats=0.0)
    with pytest.raises(UserError, match="no way 'ppo'"):
        command([str(cloned), "--algo", "ppo"])
    chains = "expected one of diffusion_bc, diffusion_ql and idql"
    for agent, words in (
        (TD3BC(**SMALL), rf"no diffusion chain to fine-tune: {chains}\.$"),
        (FQL(**SMALL), rf"no diffusion chain to fine-tune: {chains}\.$"),
        (IFQL(**SMALL), rf"{chains}; by DiffusionNFT \(--algo nft\) ifql can be fine-tuned\.$"),
        (EDP(**SMALL), r"solver.*; by DiffusionNFT \(--algo nft\) or from preferences \(--algo dpo\) edp can be"),
        (QGuidance(**SMALL), rf"deterministic solver.*{chains}; from preferences \(--algo dpo\) q_guidance can be"),
    ):
        start = made_run(tmp_path / agent.name, agent, BANDIT)
        with pytest.raises(UserError, match=words):
            tuned(start, tmp_path / "a")
    blind = target_run(tmp_path / "blind", steps=2, env="none", seeds=(0,))
    with pytest.raises(UserError, match="without an environment"):
        tuned(blind, tmp_path / "a")
    assert not (tmp_path / "a" / "run.json").exists()


def test_the_command(cloned: Path, tmp_path: Path) -> None:
    words = "--environments 5 --rollout-steps 4 --batch-size 10 --epochs 1 --critic-width 16 --eval-every 20 --steps 40"
    assert command([str(cloned), *words.split(), "--seeds", "1", "--out", str(tmp_path / "run")]) == 0
    assert Run.read(tmp_path / "run").config.seeds == (1,)
    assert command(["--resume", str(tmp_path / "run"), "--steps", "60"]) == 0
    assert checkpoint.steps(tmp_path / "run")[-1] == 60


def test_steps_are_rounded_up_to_whole_iterations_and_it_says_so(
    cloned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    words = "--environments 5 --rollout-steps 4 --batch-size 20 --epochs 1 --eval-episodes 1 --seeds 1"
    said = "60 steps are made (50 asked for; iterations are whole, 20 steps each)."
    command([str(cloned), *words.split(), "--steps", "50", "--eval-every", "60", *out])
    assert said in " ".join(capsys.readouterr().err.split())
    command(["--resume", str(tmp_path / "run"), "--steps", "60"])
    assert "are made" not in capsys.readouterr().err
    command(["--resume", str(tmp_path / "run"), "--steps", "50"])
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert "all 60 steps are done" in told


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--tuned-steps 99", "--tuned-steps is 99; the policy has 5 denoising steps, so expected 1 to 5."),
        ("--batch-size 1", "--batch-size is 1; expected at least 2 and at most 10,000,000."),
        ("--min-std 1e-9", "--min-std is 1e-09; expected at least 1e-06 and at most 10."),
        ("--algo nft --adv-clip inf", "--adv-clip is inf; expected a finite number, more than 0."),
        ("--algo dpo --preferences none.json", "There is no file of preferences none.json;"),
        ("--steps 4000", "--steps is 4,000, and in the first 4,000 the critic alone learns (--critic-warm-up 1,"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(cloned: Path, tmp_path: Path, words: str, error: str) -> None:
    arguments = [str(cloned), *words.split(), "--out", str(tmp_path / "a")]
    program = (
        "import sys\nfrom diffrl.commands.finetune_policy import run\nfrom diffrl.support.errors import UserError\n"
        f"try:\n    run({arguments!r})\nexcept UserError as error:\n    print(error, 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.startswith(error)
    assert told.rstrip().endswith(" False")


@pytest.mark.parametrize(
    ("owner", "method", "number"),
    [pytest.param(Environments, "step", 6, marks=pytest.mark.slow), (DPPOTrainer, "value_loss", 6)],
)
def test_a_stop_within_an_iteration_is_saved_as_before_it_and_says_how_to_go_on(
    owner: type, method: str, number: int, cloned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second iteration, in acting or in learning: what goes on then is the run that was never stopped.

    An iteration acts four times and learns from four minibatches; of these no further one is made.
    """
    whole = tuned(cloned, tmp_path / "whole", steps=120, eval_every=120)
    original, calls = getattr(owner, method), 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(owner, method, interrupted)
    with pytest.raises(Interrupted, match=r"after 40 steps; saved\. Go on with `diffrl resume"):
        tuned(cloned, tmp_path / "cut", steps=120, eval_every=120)
    assert calls == number
    diffrl.resume(tmp_path / "cut", quiet=True)
    assert_same_run(whole, tmp_path / "cut")


@pytest.mark.parametrize("reward", [0.0, 0.1, -3.0])
def test_without_a_signal_the_policy_stays_to_the_bit(cloned: Path, reward: float) -> None:
    """Optimiser too, whatever the critic's errors say; it is said once, and learning begins with the first signal."""
    made, _ = trainer(cloned, kl_weight=0.1, bc_weight=0.1)
    told: list[str] = []
    made._say = told.append
    earned = [reward]
    step = made._environments.step
    made._environments.step = lambda actions: step(actions)._replace(  # type: ignore[method-assign]
        rewards=np.full(made._environments._begun.shape, earned[-1], np.float32)
    )
    before = {n: t.clone() for n, t in made.state().items()}
    for _ in range(2):
        made.advance(40, lambda: False)
    after = made.state()
    policy = [n for n in before if n.startswith(("learner.", "finetune.optimiser.policy"))]
    assert len(policy) > 10
    assert all(torch.equal(after[n], before[n]) for n in policy)
    assert any(not torch.equal(after[n], before[n]) for n in before if n.startswith("finetune.critic"))
    assert len(told) == 1
    assert f"All rewards so far are {np.float32(reward):g} (seed 0, 1)" in told[0]
    assert made.sums()["no_signal"].tolist() == [80, 80]

    saved = {n: t.clone() for n, t in made.state().items()}
    again, _ = trainer(cloned)
    again.load(saved, 80)
    assert again.signal.tolist() == [False, False]
    earned.append(reward + 1)
    made.reset()
    made.advance(40, lambda: False)
    assert any(not torch.equal(made.state()[n], before[n]) for n in policy)
    assert "no_signal" not in made.sums()
    del saved["finetune.met"]  # of a run of before 2026-11-28: it goes on as it did
    again.load(saved, 80)
    assert again.signal.tolist() == [True, True]


def test_what_a_signal_is(cloned: Path) -> None:
    """Rewards that differ; and when they end, unless they are all 0."""
    flags = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    for rewards, heard in (
        (torch.zeros(1, 2, 2), [False, False]),
        (torch.full((1, 2, 2), 2.0), [True, False]),
        (torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]), [False, True]),
    ):
        made, _ = trainer(cloned)
        made._note(rewards, flags)
        assert made.signal.tolist() == heard
