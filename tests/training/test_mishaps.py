"""What may happen to a run on a real machine: data that change, rows that are torn, a NaN before a stop."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import diffrl
from agents import BC, DiffusionBC, DiffusionQL
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data.preprocessing import Normaliser, Preprocessing
from diffrl.data.replay import ReplayBuffer
from diffrl.runs.acting import Evaluator
from diffrl.runs.config import TrainConfig
from diffrl.runs.run import Run
from diffrl.support.errors import UserError, out_of_memory
from diffrl.support.folder import SUMS
from diffrl.training import checkpoint
from diffrl.training.logs import MetricsLog, Scores
from diffrl.training.loop import DivergedError
from diffrl.training.online import Collector
from diffrl.tuning.environments import Environments
from envs.datasets import load_dataset
from tests.training.conftest import AGENT, assert_same_run, tiny
from tests.training.test_runs import CountingEnv

pytestmark = pytest.mark.usefixtures("own_data")
SMALL_BC = BC(width=8, layers=1)


def own_file(path: Path, rows: int = 400, reward: float | None = None) -> Path:
    dataset = load_dataset("maze2d-umaze-v1", rows=rows, progress=False)
    if reward is not None:
        dataset.rewards[:] = reward
    return d4rl.write(path, dataset, force=True)


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    file = own_file(tmp_path / "data.hdf5")
    run = diffrl.train(TrainConfig(str(file), SMALL_BC, steps=10, env="none", out=tmp_path / "run"), quiet=True)
    own_file(tmp_path / "data.hdf5", rows=500)
    with pytest.raises(UserError, match="contents have changed") as caught:
        diffrl.resume(run, steps=20, quiet=True)
    (words,) = re.findall(r"`diffrl train (.*?) --out NEW`", str(caught.value))  # what it advises works
    assert main(["train", words, "--out", str(tmp_path / "new"), "--steps", "10"]) == 0
    own_file(tmp_path / "copy.hdf5")
    (words,) = re.findall(r"`diffrl (resume .*?) PATH`", str(caught.value))
    assert main([*words.split(), str(tmp_path / "copy.hdf5")]) == 0  # all steps are made; the path is noted
    diffrl.resume(run, steps=20, quiet=True)


def test_a_refused_resume_changes_nothing(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="larger --steps"):
        diffrl.resume(run, steps=150, quiet=True)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_nan_before_a_stop_is_not_saved_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diverged at step 7, told to stop at step 9, before the first logging point at 30."""
    import signal

    from agents.diffusion_ql import DiffusionQLAgent

    update = DiffusionQLAgent.update

    def poisoned(self, batch, generator, phase=0):  # type: ignore[no-untyped-def]
        step = int(self.step)
        if step == 7:
            batch.rewards[:] = float("nan")
        if step == 9:
            signal.raise_signal(signal.SIGTERM)
        return update(self, batch, generator, phase)

    monkeypatch.setattr(DiffusionQLAgent, "update", poisoned)
    with pytest.raises(DivergedError, match="Step 10"):
        diffrl.train(tiny(tmp_path / "run", seeds=(0,)), quiet=True)
    assert checkpoint.steps(tmp_path / "run") == [0]


def test_data_without_rewards_do_not_count_as_exploding(tmp_path: Path) -> None:
    file = own_file(tmp_path / "data.hdf5", reward=0.0)
    run = diffrl.train(
        TrainConfig(str(file), AGENT, steps=30, log_every=10, env="none", out=tmp_path / "r"), quiet=True
    )
    assert Run.read(run).value_limit >= 1


def test_an_environment_that_only_the_file_names_is_not_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = load_dataset("maze2d-umaze-v1", rows=300, progress=False)
    dataset.metadata["env_id"] = "Nowhere-v3"
    file = d4rl.write(tmp_path / "data.hdf5", dataset)
    diffrl.train(TrainConfig(str(file), SMALL_BC, steps=5, out=tmp_path / "run"))
    assert "without an environment" in capsys.readouterr().err


def test_torn_rows_of_metrics_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,seed,loss\n10,0,1.5\n\n15")
    log = MetricsLog(tmp_path, [0], 20)
    log.write(30, {"loss": [0.5]})
    log.close()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,seed,loss", "10,0,1.5", "30,0,0.5"]


def test_best_means_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    scores = Scores(tmp_path, {})
    for step, value in ((10, 1.0), (20, 3.0), (30, 2.0)):
        scores.add(step, np.full((1, 2), value), None)
    assert scores.best() == [{"step": 20, "value": 3.0}]
    assert Scores(tmp_path, {}, steps=[10, 30]).best() == [{"step": 30, "value": 2.0}]


def test_leftovers_of_a_killed_write_are_cleared(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checkpoints" / ".000000300.abc").mkdir()
    (run / "checkpoints" / "000000250").mkdir()  # without contents: damaged
    diffrl.resume(run, steps=210, quiet=True)
    assert checkpoint.steps(run)[-1] == 210
    assert 250 not in checkpoint.steps(run)
    assert not list((run / "checkpoints").glob(".*"))


def test_actions_that_are_not_finite_are_refused() -> None:
    evaluator = Evaluator(CountingEnv, n_seeds=1)
    with pytest.raises(UserError, match="not finite"):
        evaluator(lambda observations: observations * np.nan, 2, (0,))


class Broken(gymnasium.Env):  # type: ignore[type-arg]
    """Five steps an episode; from the third on it gives `reward`, and `sight` among its observations."""

    observation_space = gymnasium.spaces.Box(-9, 9, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    reward, sight = 1.0, 0.0

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.n = 0
        return np.zeros(4, np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.n += 1
        reward, sight = (self.reward, self.sight) if self.n > 2 else (1.0, 0.0)
        return np.array([0, 0, sight, 0], np.float32), reward, False, self.n == 5, {}


gymnasium.register("Broken-v0", Broken)
NO_REWARD = r"The environment Broken-v0 gave the reward nan; expected finite numbers"


def test_an_environment_whose_rewards_are_no_numbers_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training, where the checkpoint is kept and no score is written down, and by whatever acts in it later."""
    monkeypatch.setenv("COLUMNS", "500")
    run = tmp_path / "run"
    words = ["train", "--agent", "diffusion_ql", "--dataset", "maze2d-umaze-v1", "--rows", "300", "--env", "Broken-v0"]
    words += ["--agent.width", "8", "--steps", "10", "--eval-every", "5", "--eval-episodes", "2", "--out", str(run)]
    words += ["--eval-workers", "0", "--no-compile"]
    with monkeypatch.context() as patch:
        patch.setattr(Broken, "reward", np.nan)
        assert main(words) == 2
        assert re.search(f"The evaluation at step 5, which is saved, failed: {NO_REWARD}", capsys.readouterr().err)
        assert checkpoint.steps(run) == [0, 5]
        assert not (run / "scores.json").exists()
    assert main(["resume", str(run)]) == 0
    copy = shutil.copytree(run, tmp_path / "copy")
    monkeypatch.setattr(Broken, "reward", np.nan)
    starts = ["--steps", "40", "--eval-episodes", "1", "--out"]
    later = [
        ["evaluate", str(run), "--episodes", "2"],
        ["compare", str(run), str(copy), "--out", str(tmp_path / "page.html")],
        ["online", str(run), "--warm-up", "5", *starts, str(tmp_path / "online")],
        ["finetune", "policy", str(run), "--algo", "dppo", "--critic-warm-up", "0", *starts, str(tmp_path / "dppo")],
    ]
    for command in later:
        capsys.readouterr()
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert re.search(NO_REWARD, said), (command, said)
    with pytest.raises(UserError, match=NO_REWARD):
        diffrl.evaluate(run, episodes=2, quiet=True)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_whoever_acts_refuses_what_is_not_finite(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Rewards and observations, of an evaluation, of online runs and of those that are fine-tuned."""
    env = gymnasium.make("Broken-v0")
    scaling = Preprocessing(*(Normaliser(torch.zeros(n), torch.ones(n)) for n in (4, 2)))

    def evaluate() -> None:
        Evaluator(lambda: env, 1)(lambda observations: observations[..., :2], 1, (0,))

    def online() -> None:
        buffer = ReplayBuffer(1, 9, 4, 2)
        collector = Collector(lambda: env, lambda x: torch.zeros(1, 1, 2), buffer, (0,), scaling)
        for _ in range(5):
            collector.step()

    def fine_tune() -> None:
        environments = Environments(lambda: env, (0,), 1)
        for _ in range(5):
            environments.observe()
            environments.step(np.zeros((1, 1, 2), np.float32))

    for acts in (evaluate, online, fine_tune):
        acts()
        for name, said in (("reward", f"the reward {value:g}"), ("sight", f"whose entry 2 is {value:g}")):
            with monkeypatch.context() as patch:
                patch.setattr(Broken, name, value)
                with pytest.raises(UserError, match=f"Broken-v0 gave .*{said}"):
                    acts()


def test_a_policy_refuses_observations_that_are_not_finite(straight: Path) -> None:
    policy = diffrl.load_policy(straight)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"expected observations that are finite in float32, got {bad}"):
            policy(np.array([0, bad, 0, 0], np.float32))


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda pattern: "20260101-000000")
    config = TrainConfig("maze2d-umaze-v1", SMALL_BC, rows=300, steps=5, env="none")
    assert diffrl.train(config, quiet=True) != diffrl.train(config, quiet=True)


def test_python_callers_may_write_paths_and_lists(tmp_path: Path) -> None:
    run = diffrl.train(
        TrainConfig("maze2d-umaze-v1", SMALL_BC, rows=300), steps=5, seeds=[3], env="none", out=str(tmp_path / "run")
    )
    assert Run.read(run).config.seeds == (3,)


@pytest.mark.parametrize(
    ("agent", "values"),
    [
        (DiffusionQL, {"actor_lr": 0.0}),
        (DiffusionQL, {"q_weight": float("inf")}),
        (DiffusionQL, {"target_rate": 0.0}),
        (DiffusionBC, {"denoising_steps": 0}),
        (DiffusionBC, {"grad_clip": -1.0}),
        (BC, {"width": 0}),
        (BC, {"learning_rate": float("nan")}),
    ],
)
def test_impossible_hyper_parameters_are_refused_at_once(agent: type, values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected"):
        agent(**values)


def test_a_data_file_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = own_file(tmp_path / "data.hdf5")
    assert main(["train", str(file)]) == 2
    assert "--agent NAME --dataset" in capsys.readouterr().err


def test_out_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").touch()
    assert main(["train", "--agent", "bc", "--dataset", "maze2d-umaze-v1", "--out", str(tmp_path / "x")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.long
def test_without_git_training_goes_on(tmp_path: Path) -> None:
    code = (
        "import diffrl; from diffrl.runs.config import TrainConfig; from agents import BC;"
        "diffrl.train(TrainConfig('maze2d-umaze-v1', BC(width=8, layers=1), rows=300, steps=5, env='none',"
        f" out={str(tmp_path / 'run')!r}), quiet=True)"
    )
    environment = {"PATH": "/nonexistent", "DIFFRL_DATA": str(tmp_path / "data")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "torch" in json.loads((tmp_path / "run" / "run.json").read_text())["versions"]


def test_a_run_of_another_device_goes_on_with_other_noise(straight: Path, tmp_path: Path) -> None:
    """The generator's state does not travel between kinds of device; told, not crashed. Here by the record alone."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    state = checkpoint.folder(run, 200) / "state.json"
    (state.parent / SUMS).unlink()
    state.write_text(state.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    diffrl.resume(run, steps=210, quiet=True)
    assert torch.isfinite(checkpoint.load(run, 210).tensors["learner.critic.mlp.linears.0.weight"]).all()


def test_evaluation_passes_over_a_damaged_checkpoint(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (checkpoint.folder(run, 200) / "state.safetensors").write_bytes(b"")
    result = diffrl.evaluate(run, episodes=1, quiet=True)
    assert result["last"]["step"] == [100, 100]
    assert result["best"]["step"] == [100, 100]


def test_evaluation_refuses_what_it_cannot_find_before_it_scores_anything(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a checkpoint that was never evaluated is whole: there is a last one, and no best one."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    whole = checkpoint.load(run, 100)
    checkpoint.save(run, 150, whole.tensors, whole.info)
    for step in (100, 200):
        (checkpoint.folder(run, step) / "state.safetensors").write_bytes(b"")
    scored: list[object] = []
    monkeypatch.setattr("diffrl.runs.acting.Evaluator.__call__", lambda *given, **_: scored.append(given))
    with pytest.raises(UserError, match="no best one: --which last"):
        diffrl.evaluate(run, episodes=1, quiet=True)
    assert not scored
    monkeypatch.undo()
    assert diffrl.evaluate(run, episodes=1, which=("last",), quiet=True)["last"]["step"] == [150, 150]


def test_a_field_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'steps'"):
        diffrl.train(tiny(tmp_path / "run"), stepz=3)


def test_the_environment_recorded_by_convert_is_the_one_evaluated_in(tmp_path: Path) -> None:
    file = own_file(tmp_path / "a.hdf5")
    target = tmp_path / "b.hdf5"
    assert main(["data", "convert", str(file), str(target), "--env", "maze2d-umaze-dense-v1"]) == 0
    config = TrainConfig(str(target), SMALL_BC, steps=5, eval_episodes=1, out=tmp_path / "run")
    assert Run.read(diffrl.train(config, quiet=True)).task.env_id == "maze2d-umaze-dense-v1"


FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB. Of the allocated memory"
)


def wrapped() -> RuntimeError:
    """As CUDA reports memory that ran out in a capture: another error, raised while the first one is handled."""
    try:
        try:
            raise torch.OutOfMemoryError(FULL)
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error", [pytest.param(torch.OutOfMemoryError(FULL), marks=pytest.mark.slow), wrapped()], ids=["step", "capture"]
)
def test_memory_that_runs_out_names_what_to_lower_and_loses_nothing(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    from agents.diffusion_ql import DiffusionQLAgent

    update = DiffusionQLAgent.update

    def greedy(self, batch, generator, phase=0):  # type: ignore[no-untyped-def]
        if int(self.step) == 130:
            raise error
        return update(self, batch, generator, phase)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionQLAgent, "update", greedy)
        with pytest.raises(UserError, match=r"2 seeds \(0, 1\)") as caught:
            diffrl.train(tiny(run), quiet=True)
    text = str(caught.value)
    for part in ("fewer --seeds", "--agent.batch-size", "--agent.width", f"resume {run}", "step 100"):
        assert part in text
    assert "Of the allocated" not in text
    diffrl.resume(run, quiet=True)
    assert_same_run(straight, run)


def test_data_too_large_for_the_memory_say_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffrl.data.preprocessing import Preprocessing

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(Preprocessing, "transitions", refuse)
    with pytest.raises(UserError, match="the one seed") as caught:
        diffrl.train(tiny(tmp_path / "run", seeds=(0,)), quiet=True)
    assert "resume" not in str(caught.value)
    assert "fewer --seeds" not in str(caught.value)


def test_memory_is_told_from_other_errors() -> None:
    """What PyTorch itself says where this machine has too little; and what it says of shapes."""
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**52, dtype=torch.float64)
    assert out_of_memory(full.value)
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(other.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "words",
    [
        "train --agent bc --dataset maze2d-umaze-v1 --rows 500 --out {new}",
        "resume {run} --steps 300",
        "evaluate {run}",
        "online {run} --out {new}",
        "diagnose {run}",
        "augment synther maze2d-umaze-v1 --rows 500 --out {new}.hdf5",
        "finetune --out {new}",
        "finetune policy {run} --out {new}",
    ],
)
def test_a_gpu_that_is_not_there_is_said_in_one_line(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    arguments = words.format(run=straight, new=tmp_path / "new").split()
    assert main([*arguments, "--device", "cuda"]) == 2
    assert "The device 'cuda' cannot be used" in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
