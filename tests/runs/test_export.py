"""An exported policy acts as the run's does, has nothing else in it, and is opened or refused in a sentence."""

import dataclasses
import errno
import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch

import agents
import diffrl
import diffrl.runs.train
from agents import Diffuser
from diffrl.cli import main
from diffrl.commands import train as command
from diffrl.runs.config import TrainConfig
from diffrl.runs.export import folder
from diffrl.runs.export.card import train_words, without_paths
from diffrl.runs.export.export import export
from diffrl.runs.online_config import OnlineConfig
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.training.logs import read_scores
from diffrl.tuning import config as tuning
from envs import registry
from envs.task import Task
from tests.fixtures.make_old_runs import FOLDER as OLD
from tests.runs.made_runs import BY_SUCCESS, MAZE, made_run, observations_of, small


def made(path: Path, name: str = "diffusion_ql") -> Path:
    name, _, kind = name.partition(" ")
    return made_run(path, small(name, goal_reaching=kind != "to no goal"), MAZE)


def called_twice(policy: diffrl.Policy, x: np.ndarray) -> list[np.ndarray]:
    """What a policy does with rows in two calls, and after a reset with one observation."""
    first = [policy(x), policy(x + 0.1)]
    policy.reset()
    return [*first, policy(x[0])]


def equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- the policy -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", [*agents.AGENTS, "diffuser to no goal"])
def test_every_agent_acts_as_its_run_does_bit_for_bit(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Both seeds, at both checkpoints; a planner with its plans, and its goal without an environment."""
    run = made(tmp_path / "run", name)
    x = observations_of(run)
    actions = []
    for seed, step in ((3, 20), (5, 20), (5, 10)):
        expected = called_twice(diffrl.load_policy(run, seed=seed, which=step), x)
        to = export(run, tmp_path / f"{seed}-{step}", seed=seed, which=step)
        with monkeypatch.context() as patch:
            patch.setattr(Task, "make", lambda self: pytest.fail("an environment was made"))
            actions.append(called_twice(diffrl.load_policy(to), x))
        assert equal(actions[-1], expected)
    assert not equal(actions[0], actions[1])
    assert not equal(actions[1], actions[2])


@pytest.mark.parametrize("name", ["offline", "online", "dppo", "policy-dpo"])
def test_runs_of_every_kind_are_exported(name: str, tmp_path: Path) -> None:
    """What fine-tuning adds, frozen first steps, is there too."""
    x = np.random.default_rng(0).uniform(-1, 1, (6, 3)).astype(np.float32)
    for seed in (0, 1):
        to = export(OLD / name, tmp_path / f"{name}{seed}", seed=seed)
        assert equal(
            called_twice(diffrl.load_policy(to), x), called_twice(diffrl.load_policy(OLD / name, seed=seed), x)
        )


def test_a_planner_takes_another_goal_from_the_environment_that_is_named(tmp_path: Path) -> None:
    """Named when it is loaded, or when it is exported."""
    run, other = made(tmp_path / "run", "diffuser"), "maze2d-medium-v1"
    x = observations_of(run)
    expected = called_twice(diffrl.load_policy(run, env=other), x)
    to = export(run, tmp_path / "own")
    assert equal(called_twice(diffrl.load_policy(to, env=other), x), expected)
    assert not equal(called_twice(diffrl.load_policy(to), x), expected)
    assert equal(called_twice(diffrl.load_policy(export(run, tmp_path / "other", env=other)), x), expected)


def test_the_first_seed_is_exported_and_another_is_not_made_up(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    to = export(run, tmp_path / "to")
    assert diffrl.load_policy(to).agent.seeds == (3,)
    diffrl.load_policy(to, seed=3, which=20)
    with pytest.raises(UserError, match="of seed 3 alone, and seed 5 is asked for"):
        diffrl.load_policy(to, seed=5)
    with pytest.raises(UserError, match="of step 20 alone; no evaluation says that it is the best"):
        diffrl.load_policy(to, which="best")
    with pytest.raises(UserError, match="of step 20 alone, and step 10 is asked for"):
        diffrl.load_policy(to, which=10)


# --- what is in it --------------------------------------------------------------------------------------------------


def test_what_acting_does_not_read_is_not_there(tmp_path: Path) -> None:
    """Of TD3+BC and IQL the actor alone, of FQL not even the flow; where critics choose, those that do."""
    expected = {
        "td3_bc": {"actor"},
        "iql": {"actor"},
        "fql": {"actor"},
        "qam": {"actor"},
        "dtql": {"actor", "target_critic"},
        "rlpd": {"actor"},
        "diffusion_ql": {"actor", "target_critic"},
        "idql": {"ema_actor", "target_critic"},
        "diffuser": {"average"},
    }
    for name, networks in expected.items():
        to = export(made(tmp_path / name, name), tmp_path / f"{name}-to")
        names = [key for key in safetensors.torch.load_file(to / "model.safetensors") if key.startswith("agent.")]
        assert {key.split(".")[1] for key in names} == networks, name


def test_every_stored_tensor_matters(tmp_path: Path) -> None:
    """Moving any one of them moves the actions of an agent whose actions are smooth in all of them."""
    run = made(tmp_path / "run", "fql")
    to = export(run, tmp_path / "to")
    x = observations_of(run)
    actions, tensors = diffrl.load_policy(to)(x), safetensors.torch.load_file(to / "model.safetensors")
    assert len(tensors) > 8
    for name, tensor in tensors.items():
        rewritten(to, {**tensors, name: tensor * 1.5 + 0.25})
        assert not np.array_equal(diffrl.load_policy(to)(x), actions), name


def rewritten(to: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> None:
    """Write other tensors or settings into an exported folder, with true checksums."""
    (to / "model.safetensors").write_bytes(safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}))
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **settings}))
    folder.folders.seal(to, ("config.json", "model.safetensors"))


def test_nothing_of_the_machine_is_in_it(tmp_path: Path) -> None:
    """Not where the run or its data are, not the user's folder, not the machine's name."""
    run = tmp_path / "hidden-place" / "run"
    made_run(run, small("bc"), dataset=str(tmp_path / "hidden-place" / "mine.hdf5"))
    to = export(run, tmp_path / "to")
    assert sorted(path.name for path in to.iterdir()) == ["README.md", "SHA256SUMS", "config.json", "model.safetensors"]
    content = b"".join(path.read_bytes() for path in to.iterdir())
    assert json.loads((to / "config.json").read_text())["version"] == 1  # which older versions read
    for secret in ("hidden-place", str(Path.home()), str(Path.cwd()), str(tmp_path), socket.gethostname()):
        assert secret.encode() not in content, secret
    assert b"mine.hdf5" in content


def test_paths_are_cut_wherever_they_stand() -> None:
    given = {"a": ["/home/me/x.xml", 3, "plain/name"], "b": {"c": "~/y.h5", "d": "C:\\me\\z.npz"}, "e": Path("/q/r")}
    assert without_paths(given) == {"a": ["x.xml", 3, "plain/name"], "b": {"c": "y.h5", "d": "z.npz"}, "e": "r"}


# --- the card -------------------------------------------------------------------------------------------------------


def test_the_hub_reads_the_card_and_its_scores_are_those_of_the_run(tmp_path: Path) -> None:
    """By the Hub's own parser: those of the seed that is exported, with its standard error over episodes."""
    run = made(tmp_path / "run")
    to = export(run, tmp_path / "to", which="best", seed=5)
    card = huggingface_hub.ModelCard((to / "README.md").read_text())
    assert card.data.library_name == "diffrl"
    assert {"reinforcement-learning", "diffusion_ql", "data.hdf5"} <= set(card.data.tags)
    returns = np.array(read_scores(run)["evaluations"][-1]["returns"])
    assert returns.shape == (2, 5)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for kind, values in (("mean_return", returns[1]), ("normalized_score", MAZE.score(returns[1]))):
        error = np.sqrt(((values - values.mean()) ** 2).sum() / 4 / 5)
        assert found[kind] == f"{values.mean():.2f} +/- {error:.2f}"
    assert {result.metric_name.split(",")[1] for result in card.data.eval_results} == {
        " seed 5 alone (standard error over episodes)"
    }
    for words in (
        "| 5 (this one) | 5 |",
        "| all | 5 |",
        "optimistic",
        "0" * 64,
        "2 seeds: too few",
        'load_policy("FOLDER")',
    ):
        assert words in card.text, words


@pytest.mark.long
@pytest.mark.parametrize("name", agents.AGENTS)
def test_the_cards_command_means_the_runs_configuration(name: str, monkeypatch: Any) -> None:
    """Parsed by `diffrl train` itself; what the machine chooses is left out."""
    config = TrainConfig(
        "maze2d-open-dense-v0",
        small(name, normalise_observations=name != "diffuser"),
        seeds=(4, 5),
        steps=7,
        log_every=3,
        rows=50,
    )
    began: list[TrainConfig] = []
    monkeypatch.setattr(diffrl.runs.train, "train", began.append)
    words = train_words(config)
    assert words[0] == "train"
    assert command.run(words[1:]) == 0
    assert began == [config]
    shared = dataclasses.replace(config, workers=2, eval_workers=1, compile=True)
    assert train_words(shared) == [*words, "--workers", "2"]
    assert command.run(train_words(shared)[1:]) == 0
    assert began[1:] == [dataclasses.replace(config, workers=2)]
    assert "--workers" not in train_words(dataclasses.replace(shared, seeds=(4,)))


def test_an_online_run_of_a_configuration_began_untrained(tmp_path: Path) -> None:
    """Its card names the configuration, and no offline run; a file of one's own by its name alone."""
    for name, called in (("rlpd/maze2d-umaze-v1-small", None), (str(tmp_path / "mine" / "own.yaml"), "own.yaml")):
        run = made_run(tmp_path / Path(name).stem, small("rlpd"), MAZE)
        settings = OnlineConfig(Path(name), warm_up=5, start_steps=(0, 0)).to_dict()
        dataclasses.replace(Run.read(run), kind="online", settings=settings).write()
        (run / "SHA256SUMS").unlink()  # which writing made anew, without the scores
        Run.read(run).seal()
        card = (export(run, tmp_path / f"{Path(name).stem}-to") / "README.md").read_text()
        assert f"\ndiffrl online {called or name} --steps 20 --seeds 3 5" in card
        assert f"It began untrained, from the configuration `{called or name}`" in card
        assert ("whoever trained it" in card.split("## Training")[1]) is (called is not None)
        assert "A policy that diffrl trained online, beside offline data: agent `rlpd`" in card
        assert "offline run" not in card
        assert " RUN" not in card
        assert "mine" not in card


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("offline", "Learned from data alone, it is tested in simulation only"),
        ("online", "Learned in simulation, as well as from data, it is tested in simulation only, in the environment"),
        ("dppo", "Learned in simulation, as well as from data, it is tested in simulation only, in the environment"),
        ("policy-dpo", "Fine-tuned from preferences between segments of data, it is tested in simulation only"),
    ],
)
def test_the_card_says_what_it_learned_from(name: str, words: str, tmp_path: Path) -> None:
    card = (export(OLD / name, tmp_path / name) / "README.md").read_text()
    assert words in card
    assert card.count("it is tested in simulation only") == 1
    assert ("It started from another run, RUN" in card) is (name != "offline")
    assert ("not where observations differ from that environment's." in card) is (name in ("online", "dppo"))
    assert ("not where observations differ from its data's." in card) is (name in ("offline", "policy-dpo"))


def test_the_card_of_a_run_without_an_environment_says_that_it_is_untested(tmp_path: Path) -> None:
    """In whole sentences; of several processes the settings name the number."""
    run = made_run(tmp_path / "run", small("bc"), Task(None, {}, None, False))
    opened = Run.read(run)
    dataclasses.replace(opened, config=dataclasses.replace(opened.config, workers=2)).write_config()
    card = (export(run, tmp_path / "to") / "README.md").read_text()
    words = "Learned from data alone, it is untested. Least is known of it where observations differ from its data's."
    assert f"- {words}\n" in card
    assert " --seeds 3 5 " in card
    assert " --workers 2\n" in card
    assert "\nworkers: 2\n" in card


@pytest.mark.parametrize("advantages", ["environment", "critics"])
def test_the_card_tells_nft_that_acts_from_nft_by_critics(
    advantages: Literal["environment", "critics"], tmp_path: Path
) -> None:
    run = made_run(tmp_path / "run", small("diffusion_ql"), MAZE)
    settings = tuning.to_dict(tuning.NFTConfig(Path("start"), advantages=advantages, start_steps=(0, 0)))
    dataclasses.replace(Run.read(run), kind="nft", settings=settings).write()
    (run / "SHA256SUMS").unlink()  # which writing made anew, without the scores
    Run.read(run).seal()
    card = (export(run, tmp_path / "to") / "README.md").read_text()
    words = "Fine-tuned by its critics' values of its own actions, in states of the data, it is tested in simulation"
    assert (words in card) is (advantages == "critics")
    assert ("Learned in simulation" in card) is (advantages == "environment")
    assert "preferences" not in card


def test_the_card_does_not_say_that_rebuilt_data_are_the_benchmarks_file(tmp_path: Path) -> None:
    """Nor, of a benchmark that cannot be rebuilt, that it was."""
    lines = {}
    for dataset in ("maze2d-umaze-v1", "hopper-medium-v2"):
        run = made_run(tmp_path / dataset, small("bc"), dataset=dataset)
        card = (export(run, tmp_path / f"{dataset}-to") / "README.md").read_text()
        lines[dataset] = next(line for line in card.splitlines() if line.startswith("- Data set:"))
    maze, hopper = registry.get("maze2d-umaze-v1").url, registry.get("hopper-medium-v2").url
    assert lines["maze2d-umaze-v1"].endswith(
        f"source: rebuilt by `diffrl data generate`, unless the benchmark's own file ({maze}) lay in its place."
    )
    assert lines["hopper-medium-v2"].endswith(f"source: the benchmark's, {hopper}.")


def test_an_evaluation_for_the_card(tmp_path: Path) -> None:
    """The returns of so many episodes, which are `evaluate`'s."""
    run = made_run(tmp_path / "run", small("bc"), Task("Pendulum-v1", {}, None, False, max_episode_steps=5))
    to = export(run, tmp_path / "to", episodes=3, quiet=True)
    returns = np.array(diffrl.evaluate(run, episodes=3, which=("last",), quiet=True)["last"]["returns"])
    text = (to / "README.md").read_text()
    assert f"| 5 | 3 | {returns[1].mean():.1f} ± " in text
    assert f"{returns[0].mean():.2f} +/- " in text
    assert f"| all | 3 | {returns.mean():.1f} ± " in text


# --- writing and reading --------------------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    run, to = made(tmp_path / "run"), tmp_path / "to"
    to.mkdir()
    export(run, to)  # an empty one is taken
    before = {path: path.read_bytes() for path in to.iterdir()}
    with pytest.raises(UserError, match="is there already"):
        export(run, to, seed=5)
    assert {path: path.read_bytes() for path in to.iterdir()} == before


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    run = made(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.folders, "seal", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        export(run, tmp_path / "to")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """Anywhere in what opening reads; the card is for people, and may be edited."""
    to = export(made(tmp_path / "run", "bc"), tmp_path / "to")
    rng = np.random.default_rng(0)
    for name in ("config.json", "model.safetensors"):
        data = (to / name).read_bytes()
        for place in (0, len(data) - 1, *rng.integers(len(data), size=6)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            (to / name).write_bytes(flipped)
            with pytest.raises(UserError, match=r"SHA256SUMS"):
                diffrl.load_policy(to)
        (to / name).write_bytes(data)
    (to / "README.md").write_text("mine")
    diffrl.load_policy(to)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=to, check=True, capture_output=True)


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    """Files with true checksums, made by something else or by a hand."""
    to = export(made(tmp_path / "run"), tmp_path / "to")
    tensors = safetensors.torch.load_file(to / "model.safetensors")
    critic = next(name for name in tensors if "critic" in name)
    without = {name: tensor for name, tensor in tensors.items() if name != critic}
    agent = json.loads((to / "config.json").read_text())["agent"]
    cases: list[tuple[dict[str, torch.Tensor], dict[str, Any], str]] = [
        (without, {}, f"it lacks {critic.removeprefix('agent.')}"),
        ({**tensors, critic: tensors[critic][..., :1]}, {}, "expected torch.float32"),
        ({**tensors, critic: tensors[critic].double()}, {}, "is torch.float64"),
        ({**tensors, "agent.nothing": torch.zeros(1)}, {}, "there is no agent.nothing"),
        ({**tensors, "actions.shift": torch.zeros(3)}, {}, "scales of actions are not of 2"),
        ({n: t for n, t in tensors.items() if n != "actions.shift"}, {}, "'actions.shift' is missing"),
        (tensors, {"format": "something"}, "does not say `format: diffrl-policy`"),
        (tensors, {"version": 3}, "newer diffrl"),
        (tensors, {"version": "x"}, "version is 'x'"),
        (tensors, {"agent": {"name": "nobody"}}, "Unknown agent 'nobody'"),
        (tensors, {"agent": [1]}, "its `agent` has no name"),
        (tensors, {"agent": {**agent, "width": 16}}, "expected torch.float32"),
        (tensors, {"agent": {**agent, "colour": 1}}, "unknown key 'agent.colour'"),
        (tensors, {"observation_size": -1}, "observation_size is -1"),
        (tensors, {"tuned_steps": 1}, "it lacks actor.early"),
        (tensors, {"more": 1}, "unknown key 'more'"),
    ]
    for changed, settings, words in cases:
        rewritten(to, tensors, format="diffrl-policy", version=1, observation_size=4, tuned_steps=None, agent=agent)
        if "more" in json.loads((to / "config.json").read_text()):
            pytest.fail("the case with another key is the last one")
        rewritten(to, changed, **settings)
        with pytest.raises(UserError) as caught:
            diffrl.load_policy(to)
        assert words in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    """Weights in a pickle beside, or in the place of, the safetensors."""
    to = export(made(tmp_path / "run", "bc"), tmp_path / "to")
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save(Bomb(), to / "pytorch_model.bin")
    diffrl.load_policy(to)
    shutil.move(to / "pytorch_model.bin", to / "model.safetensors")
    folder.folders.seal(to, ("config.json", "model.safetensors"))
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        diffrl.load_policy(to)
    assert not marker.exists()


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    run, to = made(tmp_path / "run", "bc"), tmp_path / "to"
    assert main(["export", str(run), "--to", str(to), "--seed", "5", "--which", "best"]) == 0
    assert diffrl.load_policy(to).agent.seeds == (5,)
    assert "load_policy" in capsys.readouterr().err
    for words, said in ((["--seed", "4"], "has no seed 4"), (["--which", "15"], "has no checkpoint '15'")):
        assert main(["export", str(run), "--to", str(tmp_path / "other"), *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_goal_that_nothing_names_is_asked_for(tmp_path: Path) -> None:
    """A planner to a goal, trained without an environment: exported with one, or refused."""
    run = made_run(tmp_path / "run", small("diffuser", goal_reaching=True), Task(None, {}, None, False))
    assert isinstance(Run.read(run).config.agent, Diffuser)
    with pytest.raises(UserError, match="nothing says where it is"):
        export(run, tmp_path / "to")
    to = export(run, tmp_path / "to", env="maze2d-umaze-v1")
    assert "None: the run was not evaluated at this step" in (to / "README.md").read_text()
    with pytest.raises(UserError, match="it may be an exported policy, which load_policy"):
        Run.read(to)


def test_of_ogbench_the_card_counts_successes(tmp_path: Path) -> None:
    """Of the five episodes of each seed two and three have odd returns."""
    made_run(tmp_path / "run", small("bc"), BY_SUCCESS)
    card = (export(tmp_path / "run", tmp_path / "to") / "README.md").read_text()
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| in training")]
    assert [(row[1], row[-1].split(" ")[0]) for row in rows] == [
        ("3 (this one)", "40.0"),
        ("5", "60.0"),
        ("all", "50.0"),
    ]
    assert "success x100" in card
    assert "D4RL" not in card
