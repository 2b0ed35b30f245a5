"""Distillation of a policy: maps and losses against closed forms, and runs of it."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffrl
from agents import BFN, EDP, FQL, IDQL, TD3BC, AgentConfig, ConsistencyAC, Diffuser, DiffusionBC, DiffusionQL
from diffrl.commands.distil import run as command
from diffrl.diffusion import SOLVERS, VE, Sampler, consistency_loss, couple, solver_step
from diffrl.nets import Adam
from diffrl.runs import distil as runs_distil
from diffrl.runs.distil import AS_IT_ACTS, PICTURE, RESULT, distil
from diffrl.runs.export.export import export
from diffrl.runs.policy import load_agent
from diffrl.runs.run import Run, lowering_memory
from diffrl.runs.tune import finetune_policy
from diffrl.support.errors import UserError
from diffrl.support.plots import save
from diffrl.support.statistics import SINGLE
from diffrl.training import checkpoint
from diffrl.training.loop import DivergedError
from diffrl.tuning.config import FORWARD, NFTConfig
from diffrl.tuning.distil import DistilLearner, Teacher, keep_critics, student_map
from diffrl.tuning.distil_config import DistilConfig, keeps_critics, student_config
from diffrl.tuning.target import forward_policy, untrained_critics
from tests.rounding import rounding
from tests.runs.made_runs import made_run, small
from tests.training.conftest import assert_same_run
from tests.tuning.conftest import BANDIT, SMALL, target_run

KEPT = [(to, name) for to in ("consistency", "reflow") for name in FORWARD if keeps_critics(name, to)]
"""Students and the agents whose critics they keep."""
TEACHERS: tuple[AgentConfig, ...] = (DiffusionBC(**SMALL), EDP(**SMALL), BFN(**SMALL))
MEAN, STD = torch.tensor([0.2, -0.3]), torch.tensor([0.2, 0.15])
"""The Gaussian that `gaussian` teachers know."""


def built(config: AgentConfig, seeds: tuple[int, ...] = (0, 1)) -> Any:
    return config.build(3, 2, seeds)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
def test_each_step_is_distilled_from_the_network_that_makes_it(schedule: str) -> None:
    """Of a policy whose first steps are a frozen network's: a level that is a rounding below its time's is that one."""
    observations, y = drawn(2, 6, 3), drawn(2, 6, 2, seed=1)
    for steps in (2, 5, 8, 10, 20):
        with torch.no_grad():
            for n in range(1, steps):
                policy = built(DiffusionBC(**SMALL | {"denoising_steps": steps, "schedule": schedule})).policy
                levels = Teacher(policy).boundaries().float()[1:].flip(0)
                policy.freeze_start(n)
                for parameter in policy.mlp.parameters():
                    parameter += 0.05
                teacher, frozen = Teacher(policy), Teacher(policy.early)
                for i, k in enumerate(levels):
                    same = torch.equal(teacher.denoiser(observations)(y, k), frozen.denoiser(observations)(y, k))
                    assert same == (i < n), (steps, n, i)


def gaussian(config: AgentConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An agent whose policy is that of actions N(MEAN, STD^2), exactly, in every state: its network is the formula."""
    agent = built(config)
    policy = agent.policy

    def bound(observations: Tensor, K: int = 1) -> Any:
        prediction = policy.prediction

        def network(u: Tensor, label: Tensor) -> Tensor:
            x, t = u, label  # eps, velocity and x0 see both as they are
            a, s = (
                f(t).unsqueeze(-1) if t.ndim else f(t) for f in (prediction.process.alpha, prediction.process.sigma)
            )
            D = (MEAN * s**2 + a * STD**2 * x) / (a**2 * STD**2 + s**2)
            e = (x - a * D) / s
            p, q = prediction.coefficients(t.unsqueeze(-1) if t.ndim else t)
            return p * D + q * e

        return network

    monkeypatch.setattr(policy, "bound", bound)
    return agent


def exact(noise: Tensor, k: float) -> Tensor:
    """The end of the probability-flow path through y = k z: mean + std (y - mean) / sqrt(std^2 + k^2)."""
    return MEAN + STD * (k * noise - MEAN) / torch.sqrt(STD**2 + k**2)


# --- The teacher's map ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", TEACHERS)
def test_the_teachers_map_is_its_own_sampling_and_reflows_pairs_lie_on_it(config: AgentConfig) -> None:
    """Of solver and flow to the bit what they act by; of a chain its steps without noise; `couple` gives the same."""
    agent = built(config)
    policy, teacher = agent.policy, Teacher(agent.policy)
    observations, z = drawn(2, 6, 3), drawn(2, 6, 2, seed=1)
    actions = teacher.map()(observations, z)
    with torch.no_grad():
        if teacher.continuous:
            own = policy.sample(observations, z)
        else:
            grid = torch.cat([policy.times, policy.times.new_zeros(1)])
            sampler = Sampler(policy.prediction.process, grid)
            own = sampler(
                policy.step_denoiser(observations), float(policy.prediction.process.sigma(grid[0])) * z, clip=(-1, 1)
            )
        times = {5: torch.cat([policy.times, torch.zeros(1)]) if not teacher.continuous else None}
    torch.testing.assert_close(actions, own, rtol=0, atol=2e-5)
    if not teacher.continuous:
        pairs, start = couple(policy.prediction.process, policy.denoiser(observations), z, times[5])  # type: ignore[arg-type]
        assert torch.equal(start, z)
        torch.testing.assert_close(actions, pairs.clamp(-1, 1), rtol=0, atol=2e-5)
    assert teacher.calls == {"diffusion_bc": 5, "edp": 15, "bfn": 10}[config.name]
    for calls in (1, 2, 4):
        assert teacher.sampler(calls)[0].n_steps == calls


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_teacher_takes_the_calls_that_it_says_and_no_more_than_it_is_given(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step, to the data, is of one call, whatever the solver."""
    observations, z = drawn(2, 6, 3), drawn(2, 6, 2, seed=1)
    for n in range(1, 9):
        policy = built(EDP(**SMALL | {"sampling_steps": n, "solver": solver})).policy
        asked: list[int] = []
        bound = policy.bound

        def counted(*given: Any, bound: Any = bound, asked: list[int] = asked) -> Any:
            network = bound(*given)
            return lambda *x: (asked.append(1), network(*x))[1]

        monkeypatch.setattr(policy, "bound", counted)
        teacher = Teacher(policy)
        with torch.no_grad():
            policy.sample(observations, z)
        assert len(asked) == teacher.calls, n
        assert teacher.sampler()[0].n_steps == n
        for budget in range(1, teacher.calls + 1):
            asked.clear()
            teacher.map(budget)(observations, z)
            assert len(asked) <= budget
            assert len(asked) == budget or len(asked) + {"dpm2": 2, "dpm3": 3, "heun": 2}.get(solver, 1) > budget


@pytest.mark.parametrize(
    "config", [dataclasses.replace(TEACHERS[1], sampling_steps=200), dataclasses.replace(TEACHERS[2], flow_steps=400)]
)  # type: ignore[call-arg]
def test_a_gaussian_teachers_map_is_the_closed_form(config: AgentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = gaussian(config, monkeypatch)
    z = drawn(2, 50, 2)
    teacher = Teacher(agent.policy)
    k = 1e6 if config.name == "bfn" else teacher.noise_range[1]
    error = (teacher.map()(drawn(2, 50, 3, seed=1), z) - exact(z, k).clamp(-1, 1)).abs().max()
    assert float(error) < 5e-3


def test_levels_are_where_the_teacher_was_trained() -> None:
    for config in TEACHERS:
        teacher = Teacher(built(config).policy, levels=12)
        levels, (low, high) = teacher.boundaries(), teacher.noise_range
        assert (levels.diff() > 0).all()
        assert float(levels[-1]) == pytest.approx(high)
        if teacher.continuous:
            assert (len(levels), float(levels[0])) == (12, pytest.approx(low))
        else:
            np.testing.assert_allclose(levels[1:], teacher.policy.noise_levels())
            assert levels[0] < low / 50


# --- The losses ----------------------------------------------------------------------------------------------------


def learner(agent: Any, **fields: Any) -> tuple[DistilLearner, Any]:
    config = DistilConfig(start_run=Path(), **fields)
    noise_range = Teacher(agent.policy, config.levels).noise_range
    student = student_config(agent.config, config, noise_range).build(3, 2, agent.seeds)
    return DistilLearner(student, agent, config), student


@pytest.mark.parametrize("config", TEACHERS)
def test_cd_is_zero_at_the_exact_consistency_function(config: AgentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Gaussian, to the error of the teacher's steps, and by far not at a function that is off by half."""
    agent = gaussian(config, monkeypatch)
    made, _ = learner(agent, levels=200)
    levels, denoise = made.teacher.boundaries().float(), made.teacher.denoiser(drawn(2, 400, 3))
    # A chain of 5 levels takes steps too long to be exact: the same teacher, at more of them.
    levels = levels if made.teacher.continuous else torch.logspace(-2, 1, 200)
    i = torch.randint(1, 200, (2, 400), generator=torch.Generator().manual_seed(0))
    a_0, e = MEAN + STD * drawn(2, 400, 2, seed=1), drawn(2, 400, 2, seed=2)

    def known(shift: float) -> Any:
        def f(y: Tensor, k: Tensor) -> Tensor:
            k = k.unsqueeze(-1)
            return MEAN + STD * (y - MEAN) / torch.sqrt(STD**2 + k**2) + shift * k / (1 + k)

        return f

    losses = [
        consistency_loss(VE(), known(s), a_0, levels[i], levels[i - 1], e, teacher=denoise, solver="heun").mean()
        for s in (0.0, 0.5)
    ]
    assert float(losses[0]) < 1e-7
    assert float(losses[0]) < float(losses[1]) / 20


def test_what_cd_leads_to_is_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student without a loss is the teacher's steps from level to level; of a Gaussian they end near its map.

    About four times as near with twice the levels: Heun is of second order.
    """
    z, observations, errors = drawn(2, 200, 2), drawn(2, 200, 3, seed=1), []
    agent = gaussian(TEACHERS[1], monkeypatch)
    for levels in (18, 36):
        teacher = Teacher(agent.policy, levels)
        k = teacher.boundaries().float()
        y = k[-1] * z
        for high, low in zip(k.flip(0)[:-1], k.flip(0)[1:], strict=True):
            y = solver_step(VE(), teacher.denoiser(observations), y, high, low, teacher.step)
        errors.append(float((y - exact(z, float(k[-1]))).abs().max()))
    assert errors[0] < 0.03
    assert errors[1] < errors[0] / 3


@pytest.mark.long
@pytest.mark.parametrize(
    ("fields", "steps", "most"),
    [
        pytest.param({"to": "consistency", "levels": 10}, 600, 0.06, marks=pytest.mark.slow),
        ({"to": "consistency", "loss": "scm", "warm_up": 30, "learning_rate": 6e-3}, 150, 0.12),
        ({"to": "reflow"}, 250, 0.03),
    ],
)
def test_a_trained_students_map_is_the_closed_form_in_each_seed(
    fields: dict[str, Any], steps: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a Gaussian teacher of deviations .2 and .15: within .06 of its map by CD, .12 by sCM, .03 by reflow (root of
    the mean square; the mean action is .18 away), and far from the map of the opposite noise."""
    z, observations = drawn(1, 2, 300, 2, seed=5), drawn(2, 300, 3, seed=6)
    config: Any = dataclasses.replace(TEACHERS[1], width=64, layers=2, sampling_steps=8)
    made, student = learner(gaussian(config, monkeypatch), **({"learning_rate": 3e-3, "ema_rate": 0.05} | fields))
    if fields["to"] == "reflow":
        made._optimiser = Adam(made.trained, 1e-2, 10.0, decay_steps=steps)
    generator = torch.Generator().manual_seed(0)
    batch: Any = type("Batch", (), {"observations": drawn(2, 96, 3, seed=7)})()
    for _ in range(steps):
        made.update(batch, generator)
    found = student_map(student.policy, 1)(observations, z)
    k = 1e6 if fields["to"] == "reflow" else made.teacher.noise_range[1]
    error = (found - exact(z[0], k)).square().mean((-2, -1)).sqrt()
    wrong = (found - exact(-z[0], k)).square().mean((-2, -1)).sqrt()
    assert (error < most).all(), (fields, error)
    assert (wrong > 0.3).all()
    assert not torch.equal(*student.policy.mlp.first.weight)


def test_seeds_are_distilled_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a seed in a stack is its loss alone, from the same draws."""
    agent, alone = built(TEACHERS[0]), built(TEACHERS[0], (1,))
    made, _ = learner(agent)
    single, _ = learner(alone)
    observations, a_0, e = drawn(2, 9, 3), drawn(2, 9, 2, seed=1), drawn(2, 9, 2, seed=2)
    i = torch.randint(1, 6, (2, 9), generator=torch.Generator().manual_seed(0))
    both = made.cd_loss(observations, a_0, i, e)
    one = single.cd_loss(observations[1:], a_0[1:], i[1:], e[1:])
    assert float((both[1] - one[0]).abs().detach()) < rounding(torch.float32, 500, float(one.detach().abs()))
    t = torch.full((2, 9), 1.0)
    reflow, _ = learner(agent, to="reflow")
    step = a_0 - (e - reflow.trained.bound(observations)(e, t))
    torch.testing.assert_close(reflow.reflow_loss(observations, a_0, t, e), step.square().mean((-2, -1)))


# --- Runs ----------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"batch_size": 8, "steps": 4, "eval_every": 2, "eval_episodes": 2, "log_every": 2}


def distilled(start: Path, out: Path, **fields: Any) -> Path:
    fields = QUICK | fields
    settings = {name: fields.pop(name) for name in list(fields) if name in DistilConfig.__dataclass_fields__}
    return distil(DistilConfig(start_run=start, **settings), out=out, quiet=True, **fields)


@pytest.mark.long
@pytest.mark.parametrize("to", ["consistency", pytest.param("reflow", marks=pytest.mark.slow)])
def test_a_run_that_is_cut_goes_on_bit_for_bit_and_is_like_any_other(cloned: Path, tmp_path: Path, to: str) -> None:
    """Also where the cut is in the comparison after its steps; evaluate, load_policy and fine-tuning's refusal."""
    whole = distilled(cloned, tmp_path / "whole", to=to)
    cut = distilled(cloned, tmp_path / "cut", to=to, steps=2)
    diffrl.resume(cut, steps=4, quiet=True)
    assert_same_run(whole, cut)
    first = json.loads((whole / RESULT).read_text())["rows"]
    assert json.loads((cut / RESULT).read_text())["rows"] == first
    (cut / RESULT).unlink()
    diffrl.resume(cut, quiet=True)
    assert json.loads((cut / RESULT).read_text())["rows"] == first
    assert diffrl.resume(cut, quiet=True) == cut  # all are done
    with pytest.raises(UserError, match="has 4 steps already"):
        diffrl.resume(cut, steps=3, quiet=True)
    assert (whole / PICTURE).is_file()
    who = [row["who"] for row in first]
    assert who == ["teacher"] * 4 + ["student"] * 3 + ["teacher, as it acts", "student, as it acts"]
    assert first[3]["calls"] == 5
    assert max(first[3]["distance"]) == 0
    assert [len(values) for values in first[0]["values"]] == [2, 2]
    agent: Any = Run.read(whole).config.agent
    assert agent.name == {"consistency": "consistency_ac", "reflow": "bfn"}[to]
    assert agent.act_candidates == 1
    assert diffrl.load_policy(whole, seed=1)(np.zeros((4, 1), np.float32)).shape == (4, 2)
    assert len(diffrl.evaluate(whole, episodes=2, which=["last"], quiet=True)["last"]["returns"]) == 2


def test_a_cut_in_a_later_comparison_leaves_no_comparison_of_fewer_steps(
    cloned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went on and was cut before its new comparison makes it on resuming, and says meanwhile nothing old."""
    run = distilled(cloned, tmp_path / "run", steps=2)
    old = json.loads((run / RESULT).read_text())["rows"]

    def cut(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runs_distil, "compare_calls", cut)
        with pytest.raises(KeyboardInterrupt):
            diffrl.resume(run, steps=4, quiet=True)
    assert not (run / RESULT).exists()
    diffrl.resume(run, quiet=True)
    assert json.loads((run / RESULT).read_text())["rows"] != old


@pytest.mark.long
def test_critics_go_on_choosing_where_they_are_of_the_same_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they are not, learning online begins with untrained ones, and says so; and nft does not learn by them."""
    quick: dict[str, Any] = {"steps": 2, "eval_every": 2, "eval_episodes": 1, "seeds": (0,)}
    for config, to, kept in (
        (DiffusionQL(**SMALL, act_candidates=3), "consistency", True),
        (DiffusionQL(**SMALL, act_candidates=3), "reflow", False),
        (BFN(**SMALL, act_candidates=3), "reflow", True),
    ):
        name = f"{config.name}-{to}"
        start = target_run(tmp_path / name / "start", config, **quick)
        run = distilled(start, tmp_path / name / "run", to=to, steps=2, eval_every=2, calls=2)
        agent: Any = Run.read(run).config.agent
        assert agent.act_candidates == (3 if kept else 1)
        before, after = (checkpoint.load(r, n).learner for r, n in ((start, 2), (run, 2)))
        critics = [n for n in after if n.startswith(("critic.", "target_critic."))]
        assert critics
        loaded: Any = load_agent(Run.read(run), 0)
        if kept:  # the same values of the same actions: the networks are the same functions
            teacher: Any = load_agent(Run.read(start), 0)
            o, a = drawn(1, 5, 1), drawn(1, 5, 2, seed=1)
            assert torch.equal(loaded.critic(o, a), teacher.critic(o, a))
            assert all(torch.equal(after[n], before[n]) for n in critics)
        diffrl.online(run, out=tmp_path / name / "online", steps=2, warm_up=1, eval_every=2, eval_episodes=1)
        assert ("have never been trained: they steer" in " ".join(capsys.readouterr().err.split())) != kept
        assert untrained_critics(loaded) != kept
        if to == "reflow" and not kept:
            with pytest.raises(UserError, match="have never been trained: what they value says nothing"):
                finetune_policy(NFTConfig(run, advantages="critics"), steps=2, quiet=True)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("to", "name"), KEPT)
def test_critics_are_kept_where_they_are_the_same_function(to: str, name: str, layer_norm: bool) -> None:
    """Of every pair of teacher and student: to the bit, and for all networks that the teacher may have."""
    for networks in ("published", "ours"):
        config = small(name, critic_layer_norm=layer_norm, networks=networks)
        teacher = built(config)
        student = student_config(config, DistilConfig(start_run=Path(), to=to), (0.1, 5.0)).build(3, 2, (0, 1))  # type: ignore[arg-type]
        keep_critics(student, teacher)
        o, a = drawn(2, 50, 3), drawn(2, 50, 2, seed=1)
        for critics in ("critic", "target_critic"):
            assert torch.equal(student.networks[critics](o, a), teacher.networks[critics](o, a))


def test_a_student_that_reads_its_teachers_critics_wrongly_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of idql's that an older version made; those of today, whose critics have no say, say nothing."""
    idql = IDQL(**SMALL, blocks=1, act_candidates=3)
    start = target_run(tmp_path / "start", idql, steps=2, eval_every=2, eval_episodes=1, seeds=(0,))
    made = distilled(start, tmp_path / "run", steps=2)
    for old in (False, True):
        if old:  # its config.yaml as it was
            run = Run.read(made)
            agent = dataclasses.replace(run.config.agent, act_candidates=3)  # type: ignore[call-arg]
            dataclasses.replace(run, config=dataclasses.replace(run.config, agent=agent)).write_config()
        said = []
        for look in (
            lambda: diffrl.load_policy(made),
            lambda: diffrl.evaluate(made, episodes=1),
            lambda: export(made, Path(tempfile.mkdtemp(dir=tmp_path))),
        ):
            look()
            said.append(" ".join(capsys.readouterr().err.split()))
        assert ["Its critics choose among its actions, and wrongly" in text for text in said] == [old] * 3


def test_what_cannot_be_distilled_says_so(cloned: Path, tmp_path: Path) -> None:
    for config in (TD3BC(**SMALL), FQL(**SMALL), ConsistencyAC(**SMALL)):
        start = made_run(tmp_path / config.name, config, BANDIT)
        with pytest.raises(UserError, match="does not act by a diffusion or flow policy alone"):
            distilled(start, tmp_path / "a")
    for config in (DiffusionBC(**SMALL, denoising_steps=1), BFN(**SMALL, flow_steps=1)):
        once = made_run(tmp_path / f"{config.name}-once", config, BANDIT)
        with pytest.raises(UserError, match="in one call already"):
            distilled(once, tmp_path / "a")
    chunked = made_run(tmp_path / "chunked", BFN(**SMALL, chunk=2), BANDIT)
    for to in ("consistency", "reflow"):
        with pytest.raises(UserError, match=r"bfn has chunks of actions .*, and distillation is of single ones"):
            distilled(chunked, tmp_path / "a", to=to)
    with pytest.raises(UserError, match=r"--calls 6: the policy of .* itself samples in 5 calls"):
        distilled(cloned, tmp_path / "a", calls=6)
    for unused in ({"to": "reflow", "levels": 4}, {"warm_up": 10}):
        with pytest.raises(UserError, match=r"--(levels|warm-up) is for .* alone: leave it out"):
            distilled(cloned, tmp_path / "a", **unused)
    with pytest.raises(UserError, match="--levels 4: diffusion_bc is a chain, distilled at the 5 noise levels that it"):
        distilled(cloned, tmp_path / "a", levels=4)
    with pytest.raises(UserError, match="trained at its 5 own: take --loss cd"):
        distilled(cloned, tmp_path / "a", loss="scm")
    with pytest.raises(UserError, match="--loss scm is a loss of --to consistency"):
        DistilConfig(start_run=cloned, loss="scm", to="reflow")
    with pytest.raises(UserError, match="is not a run's folder"):
        distilled(tmp_path / "none", tmp_path / "a")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "run.json").write_text('{"kind": "images"}')
    with pytest.raises(UserError, match="run of an image model"):
        distilled(tmp_path / "images", tmp_path / "a")
    with pytest.raises(UserError, match="diffuser does not act by a diffusion or flow policy alone"):
        forward_policy(Diffuser(width=8).build(3, 2, (0,)))
    with pytest.raises(UserError, match="Which run's policy"):
        command([])
    assert not (tmp_path / "a").exists()


def test_levels_are_taken_of_a_teacher_that_has_none_of_its_own(cloned: Path, tmp_path: Path) -> None:
    """And the default's number, which says nothing, of a chain too."""
    solver = target_run(tmp_path / "solver", EDP(**SMALL), steps=2, eval_every=2, eval_episodes=1)
    for start, levels in ((solver, 4), (cloned, DistilConfig.levels)):
        settings = Run.read(distilled(start, tmp_path / str(levels), levels=levels, steps=2)).settings
        assert settings is not None
        assert settings["levels"] == levels


@pytest.mark.long
@pytest.mark.parametrize("start", ["distil", "finetune policy", "online"])
def test_an_untrained_start_is_named(
    start: str, cloned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At step 0 a policy is as it was made; at its last checkpoint it is not, and that is named."""
    if start == "online":  # which cloning does not
        fields: dict[str, Any] = {"steps": 2, "eval_every": 2, "eval_episodes": 1, "seeds": (0,)}
        cloned = target_run(tmp_path / "start", DiffusionQL(**SMALL), **fields)
    last = checkpoint.steps(cloned)[-1]
    named = f"At step 0 the policy that acts is untrained: as it was made. --start-checkpoint {last} names a trained"
    for which, told in (("0", True), ("last", False)):
        out = tmp_path / which
        if start == "distil":
            settings = DistilConfig(start_run=cloned, to="consistency", start_checkpoint=which)
            distil(settings, steps=1, eval_episodes=1, out=out)
        elif start == "online":
            diffrl.online(cloned, start_checkpoint=which, warm_up=1, steps=2, eval_episodes=1, out=out)
        else:
            few = NFTConfig(cloned, start_checkpoint=which, environments=2, rollout_steps=4)
            finetune_policy(few, steps=16, eval_episodes=1, out=out)
        assert (named in " ".join(capsys.readouterr().err.split())) is told


def test_the_command(cloned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two calls, one seed; the table tells teacher and student apart."""
    words = f"{cloned} --to reflow --calls 2 --batch-size 8 --steps 4 --eval-every 4 --eval-episodes 2 --seeds 1"
    assert command([*words.split(), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "network calls" in said
    assert "student, as it acts" in said
    said = " ".join(said.split())
    assert "2 episodes a seed (--eval-episodes), the same for all rows, ± standard error over episodes" in said
    assert f"As it acts: {AS_IT_ACTS}" in said
    assert Run.read(tmp_path / "run").config.agent.flow_steps == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("seeds", [(1,), (0, 1)])
def test_errors_are_named_where_there_are_some(
    seeds: tuple[int, ...], cloned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An episode of one seed has none: the picture names none, the table says so once, below it."""
    titles = []

    def saved(figure: Any, path: Path) -> None:
        titles.append(figure.get_suptitle())
        places = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() in ("o", "*")]
        assert len(set(places)) == len(places) >= 5  # none hides another
        save(figure, path)

    monkeypatch.setattr(runs_distil, "save", saved)
    settings = DistilConfig(start_run=cloned, to="reflow", batch_size=8)
    distil(settings, steps=1, eval_episodes=1, seeds=seeds, out=tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    several = len(seeds) > 1
    assert titles == ["reflow of run on target.hdf5" + (", ± standard error over seeds" if several else "")]
    table = said[said.index("Teacher and student after the last step") : said.index("Drawn:")]
    assert table.count(SINGLE) == (0 if several else 1)
    assert ("the same for all rows, ± standard error over seeds." in table) is several
    assert "is distilled into a rectified flow, 1 network call," in said


def test_what_a_run_without_agents_options_advises_it_has(cloned: Path, tmp_path: Path) -> None:
    """Where training diverges, and where memory runs out: --agent.width and a q-weight are of runs from data alone."""
    with pytest.raises(DivergedError, match=r"A lower learning rate usually helps\.$"):
        distilled(cloned, tmp_path / "run", learning_rate=1e30, grad_clip=0.0, steps=20, eval_every=20)
    run = Run.read(tmp_path / "run")
    said = r"needs less with .*a smaller --batch-size in a new run\.$"
    with pytest.raises(UserError, match=said), lowering_memory(run.config, None, run.kind):
        raise MemoryError
