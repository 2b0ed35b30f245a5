"""Flow-to-Better, measured: the learned reward, trajectories that are executed, policies cloned from them.

    python benchmarks/flow_to_better.py                       makes what is missing, then the page; hours
    python benchmarks/flow_to_better.py --stages reward       the reward models alone: minutes
    python benchmarks/flow_to_better.py --tasks hopper --pairs 500 --stages reward flow
    python benchmarks/flow_to_better.py --no-make             the page of what is there

Each cell is a JSON file under --out, written when it is done: a command that was cut goes on with the others.

    reward   a reward model of N labels of a synthetic teacher (segments of 100 rows), some of them wrong. Its judgement
             of 2,000 fresh pairs, rightly labelled, and the rank correlation of its returns with the true ones, over
             windows of 100 rows that do not overlap
    flow     trajectories of `diffrl augment flow-to-better`. The actions of each are executed in the simulator from its
             first state, those of the data's trajectory that it came from likewise: true returns of both, in pairs.
             "start its own": the flow has moved the first state, too, as published, so that a trajectory may be better
             because it begins at a better place. "the source's": with --same-start, both begin at one state, which
             may be anywhere in an episode. "the source's, an episode's": also with --windows first, so that it is one
             that the environment begins an episode in, as the published method's whole episodes do
    policy   agents on the data (bc), on the tenth of its episodes that the model likes best (bc top), on the generated
             trajectories (flow), and IQL on the data with the learned reward (iql); and preference DPO of a diffusion
             policy of the data by the same labels (dpo). Scores over --episodes

± is the standard error over seeds, where there are several; of the flow, over trajectories, one a source.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from asked import asked
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import spearmanr
from tables import Lines, markdown, print_lines
from trees import machine, processor

import diffrl
from agents import BC, IQL, DiffusionBC
from diffrl.augment.config import Request
from diffrl.augment.flow_to_better.augmenter import FlowToBetter
from diffrl.augment.flow_to_better.config import DiffuserConfig, FlowConfig, PreferenceConfig, RewardConfig
from diffrl.augment.flow_to_better.generate import split
from diffrl.augment.flow_to_better.reward_model import RewardModel, fit_reward_model
from diffrl.augment.flow_to_better.windows import window_returns
from diffrl.augment.job import augment
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.data.preferences import teach
from diffrl.data.segments import Windows
from diffrl.runs.config import TrainConfig
from diffrl.runs.tune import finetune_policy
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle
from diffrl.support.statistics import Estimate, estimate
from diffrl.support.stopping import Interrupted
from diffrl.tuning.config import DPOConfig
from envs.datasets import load_dataset
from envs.dynamics import Dynamics, dynamics_for

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORDING = ROOT.parent / "shared" / "data" / "rollouts" / "hopper_medium-replay-v4.hdf5"
SEGMENT, FRESH = 100, 2_000
Task = Literal["hopper", "maze2d-umaze"]
Stage = Literal["reward", "flow", "policy"]
Start = Literal["own", "same", "first"]
STARTS: dict[Start, str] = {"own": "its own", "same": "the source's", "first": "the source's, an episode's"}
"""Where a generated trajectory begins, and how the page says it."""
CELLS: dict[Start, str] = {"own": "flow", "same": "start", "first": "first"}
"""What the names of these cells begin with."""
WRONG = (0.1, 0.2)
"""Shares of wrong labels, of the most pairs."""


@dataclass(frozen=True)
class Bench:
    """Measure Flow-to-Better on a hopper recording (rewards hidden) and on maze2d-umaze."""

    tasks: tuple[Task, ...] = ("hopper", "maze2d-umaze")
    """Which data."""
    stages: tuple[Stage, ...] = ("reward", "flow", "policy")
    """What is made."""
    pairs: tuple[int, ...] = (15, 500)
    """Numbers of labels; the reward models also learn from 100."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the labels, the models, the agents."""
    steps: int = 8_000
    """Training steps of the diffuser."""
    horizon: int = 32
    """Rows of a trajectory."""
    trajectories: int = 128
    """How many are made, a flow; those that the reward model likes better than their sources are executed."""
    starts: tuple[Start, ...] = ("own", "same", "first")
    """Where trajectories begin, a flow each. own: where the flow puts it; same: --same-start; first: that with
    --windows first."""
    agent_steps: int = 10_000
    """Training steps of the policies."""
    episodes: int = 50
    """Of a policy's score, a seed."""
    recording: Path = RECORDING
    """The hopper recording."""
    make: bool = True
    """Make what is missing; --no-make: show what is there."""
    out: Path = Path("runs/flow_to_better")
    """Folder of the cells, the files and the runs."""

    @property
    def numbers(self) -> list[tuple[int, float]]:
        """Labels of the reward models, and the share of them that is wrong."""
        return [*((n, 0.0) for n in sorted({*self.pairs, 100})), *((max(self.pairs), share) for share in WRONG)]


def data(bench: Bench, task: Task) -> tuple[str, str, int | None]:
    """A task's data set, its environment, and how many of its rows are used."""
    if task == "hopper":
        if not bench.recording.exists():
            raise UserError(f"There is no recording {bench.recording}: give --recording, or --tasks maze2d-umaze.")
        return str(bench.recording), "Hopper-v4", None
    return "maze2d-umaze-v1", "envs:maze2d-umaze-v1", 200_000


def cell(bench: Bench, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The figures of a cell: as they are there, or made now; None: not there, and not to be made."""
    path = bench.out / "cells" / f"{name}.json"
    if not path.exists():
        if not bench.make:
            return None
        began = time.process_time()
        found = make() | {"cpu_seconds": round(time.process_time() - began)}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {json.dumps(found)[:300]}", flush=True)
    values: dict[str, Any] = json.loads(path.read_text())
    return values


# --- the learned reward --------------------------------------------------------------------------------------------


def reward(dataset: OfflineDataset, n: int, wrong: float, seed: int) -> dict[str, Any]:
    labels = teach(dataset, n, SEGMENT, seed, noise=wrong)
    model, report = fit_reward_model(dataset, labels.segments(dataset), RewardConfig(), seed)
    fresh = teach(dataset, FRESH, SEGMENT, 1_000 + seed)
    told = fresh.labels != 0.5
    judged = model.probabilities(dataset, fresh.pairs, SEGMENT).mean(0)
    right = float(((judged > 0.5) == (fresh.labels > 0.5))[told].mean())
    return {
        "held_out_accuracy": report.accuracy,
        "calibration_error": report.calibration,
        "fresh_accuracy": right,
        "rank_correlation": correlation(dataset, model),
    }


def correlation(dataset: OfflineDataset, model: RewardModel) -> float:
    """The rank correlation of predicted and true returns of windows that do not overlap."""
    every = [np.arange(a, b - SEGMENT + 1, SEGMENT) for a, b in dataset.episodes()]
    starts = np.concatenate(every)
    windows = Windows(starts, starts + SEGMENT - 1, SEGMENT)
    rewards = model.row_rewards(dataset).astype(np.float32), dataset.rewards
    predicted, true = (window_returns(each, windows) for each in rewards)
    return float(spearmanr(predicted, true).statistic)


# --- trajectories --------------------------------------------------------------------------------------------------


def executed(dynamics: Dynamics, start: NDArray[np.float32], actions: NDArray[np.float32]) -> float:
    """The true return of actions (H, A) from a start state (O,); it ends where the environment does."""
    state, total = start[None], 0.0
    for action in actions:
        state, received, terminal = dynamics.step(state, action[None])
        if not np.isfinite(received[0]):
            break
        total += float(received[0])
        if terminal[0]:
            break
    return total


def flow(bench: Bench, task: Task, n: int, seed: int, start: Start) -> dict[str, Any]:
    """Make the file of generated trajectories, then some of them with their sources, and execute both."""
    dataset, env, rows = data(bench, task)
    same_start = start != "own"
    method = FlowToBetter(
        PreferenceConfig(str(n), segment=SEGMENT),
        DiffuserConfig(
            steps=bench.steps,
            horizon=bench.horizon,
            same_start=same_start,
            windows="first" if start == "first" else "all",
        ),
        FlowConfig(),
        relabel=True,
        quiet=True,
    )
    out = bench.out / f"{task}-{n}-{seed}{'' if start == 'own' else f'-{start}-start'}.hdf5"
    if not out.exists():
        augment(Request(dataset, str(out), env=env, rows=rows, seed=seed, report=False), method, quiet=True)
    else:
        raise UserError(f"{out} is there, but its cell is not: remove the file.")
    generator = torch.Generator().manual_seed(seed)
    real: OfflineDataset = method._data.dataset
    starts, o, a = method._starts.windows.starts, real.observation_size, real.action_size
    H = method.together
    made = [method.sample(generator)]
    while sum(map(len, made)) < bench.trajectories * H:
        made.append(method.sample(generator))
    rows_of, told = split(np.concatenate(made)[: bench.trajectories * H])
    trajectories = rows_of.reshape(-1, H, rows_of.shape[1])
    dynamics = dynamics_for(env.removeprefix("envs:"))
    assert dynamics is not None
    pairs: dict[int, list[tuple[float, float, float]]] = {}
    for i, one in enumerate(trajectories):
        source = int(told.start[i * H])
        if told.kept[i * H] == 0 or not dynamics.reproducible(one[:1, :o])[0]:
            continue
        row = int(starts[source])
        first = real.observations[row]
        assert not same_start or np.allclose(one[0, :o], first, rtol=1e-4, atol=1e-4)  # standardised and back
        ours = executed(dynamics, first if same_start else one[0, :o], one[:, o : o + a])
        theirs = executed(dynamics, first, real.actions[row : row + H])
        pairs.setdefault(source, []).append((ours, theirs, float(real.rewards[row : row + H].sum())))
    means = np.array([np.mean(each, 0) for each in pairs.values()])
    improved = told.kept[::H] > 0
    errors = told.dynamics_error[np.isfinite(told.dynamics_error)]
    return {
        "trajectories": len(trajectories),
        "improved": float(improved.mean()),
        "predicted_return": float(told.predicted_return[::H][improved].mean()),
        "source_predicted_return": float(told.start_return[::H][improved].mean()),
        "sources": len(means),
        "executed": means[:, 0].tolist(),
        "source_executed": means[:, 1].tolist(),
        "source_recorded": means[:, 2].tolist(),
        "dynamics_error": float(np.median(errors)) if len(errors) else None,
    }


# --- policies ------------------------------------------------------------------------------------------------------


def policy(bench: Bench, task: Task, n: int, seed: int, how: str) -> dict[str, Any]:
    name, env, rows = data(bench, task)
    better = bench.out / f"{task}-{n}-{seed}.hdf5"
    folder = better.with_name(f"{better.stem}-flow-to-better")
    named = max(bench.pairs) if how in ("bc", "dpo") else n  # what they train on first does not depend on the labels
    out = bench.out / f"{task}-{named}-{seed}-{how.replace(' ', '-')}"
    agent: Any = BC(width=256, layers=2)
    if how == "flow":
        name, rows = str(better), None
    elif how == "bc top":
        path = bench.out / f"{task}-{n}-{seed}-top.hdf5"
        dataset = load_dataset(name, rows=rows, progress=False)
        best = np.argsort(-RewardModel.load(folder)[0].episode_returns(dataset), kind="stable")
        episodes = dataset.episodes()
        chosen = episodes[best[: max(len(best) // 10, 1)]]
        keep = np.concatenate([np.arange(a, b) for a, b in chosen])
        kept: Any = {k: v[keep] for k, v in dataset.columns().items()}
        d4rl.write(path, dataclasses.replace(dataset, **kept, infos={}), force=True)
        name, rows = str(path), None
    elif how == "iql":
        agent, name, rows = IQL(width=256, layers=2), str(folder / "relabelled.hdf5"), None
    elif how == "dpo":
        agent = DiffusionBC(width=128)
    config = TrainConfig(
        name,
        agent,
        env=env,
        rows=rows,
        steps=bench.agent_steps,
        eval_every=bench.agent_steps,
        eval_episodes=5,
        seeds=(seed,),
        workers=1,
        eval_workers=0,
        compile=False,
        out=out,
    )
    run = out if (out / "scores.json").exists() else diffrl.train(config, quiet=True)
    if how == "dpo":
        settings = DPOConfig(start_run=run, pairs=n, segment=SEGMENT, judge="return")
        tuned = bench.out / f"{task}-{n}-{seed}-dpo-tuned"
        steps = max(bench.agent_steps // 10, 100)
        run = finetune_policy(settings, quiet=True, steps=steps, eval_every=steps, eval_episodes=5, out=tuned)
    result = diffrl.evaluate(run, episodes=bench.episodes, which=("last",), quiet=True)["last"]
    return {"returns": result["returns"][0], "scores": result.get("scores", [None])[0]}


# --- the page ------------------------------------------------------------------------------------------------------


def mean(values: list[float | None]) -> str:
    """The mean over seeds with its standard error, two digits behind the point."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    error = np.std(known, ddof=1) / np.sqrt(len(known)) if len(known) > 1 else float("nan")
    return f"{np.mean(known):.2f}" + ("" if np.isnan(error) else f" ± {error:.2f}")


def over_sources(cells: list[dict[str, Any]], key: str) -> Estimate:
    return estimate([[value for one in cells for value in one[key]]])


def in_pairs(cells: list[dict[str, Any]]) -> Estimate:
    """How much more the generated trajectories earn than their sources, each held against its own."""
    return estimate([[a - b for one in cells for a, b in zip(one["executed"], one["source_executed"], strict=True)]])


def tables(bench: Bench) -> dict[str, Lines]:
    """Make what is missing, in the order of the stages, and give the tables."""
    reward_lines: Lines = [
        ["data", "labels", "wrong", "held-out accuracy", "calibration error", "fresh accuracy", "rank correlation"]
    ]
    flow_lines: Lines = [
        [
            *("data", "labels", "start", "improved", "executed", "of the sources", "in pairs", "recorded"),
            *("dynamics error", "sources"),
        ]
    ]
    policy_lines: Lines = [["data", "labels", "policy", "return", "score"]]
    for task in bench.tasks if "reward" in bench.stages else ():
        name, _, rows = data(bench, task)
        dataset = load_dataset(name, rows=rows, progress=False)
        for n, wrong in bench.numbers:
            cells = []
            for seed in bench.seeds:
                label = f"reward-{task}-{n}-{wrong:g}-{seed}"
                cells.append(cell(bench, label, functools.partial(reward, dataset, n, wrong, seed)))
            there = [one for one in cells if one is not None]
            keys = ("held_out_accuracy", "calibration_error", "fresh_accuracy", "rank_correlation")
            reward_lines.append([task, str(n), f"{wrong:.0%}", *(mean([one[key] for one in there]) for key in keys)])
    for task in bench.tasks if "flow" in bench.stages else ():
        for n, start in [(n, start) for n in bench.pairs for start in STARTS if start in bench.starts]:
            cells = [
                cell(bench, f"{CELLS[start]}-{task}-{n}-{seed}", functools.partial(flow, bench, task, n, seed, start))
                for seed in bench.seeds
            ]
            there = [one for one in cells if one is not None and one["sources"]]
            if there:
                ours, theirs, recorded = (
                    str(over_sources(there, key)) for key in ("executed", "source_executed", "source_recorded")
                )
                figures = [ours, theirs, f"{in_pairs(there).mean:+.2f} ± {in_pairs(there).error:.2f}", recorded]
                improved, errors = (mean([one[key] for one in there]) for key in ("improved", "dynamics_error"))
                sources = str(sum(one["sources"] for one in there))
                flow_lines.append([task, str(n), STARTS[start], improved, *figures, errors, sources])
    for task in bench.tasks if "policy" in bench.stages else ():
        for n in bench.pairs:
            for how in ("bc", "bc top", "flow", "iql", "dpo"):
                named = max(bench.pairs) if how == "bc" else n  # it does not look at labels
                cells = [
                    cell(
                        bench,
                        f"policy-{task}-{named}-{seed}-{how.replace(' ', '-')}",
                        functools.partial(policy, bench, task, n, seed, how),
                    )
                    for seed in bench.seeds
                ]
                there = [one for one in cells if one is not None]
                if there:
                    scores = [one["scores"] for one in there]
                    scored = "" if None in scores else str(estimate(scores))
                    policy_lines.append([task, str(n), how, str(estimate([one["returns"] for one in there])), scored])
    found = {"The learned reward": reward_lines, "Trajectories": flow_lines, "Policies": policy_lines}
    return {title: lines for title, lines in found.items() if len(lines) > 1}


def main(bench: Bench) -> int:
    """Make the cells and write the page; a mistake in the options is told in a sentence."""
    settle()
    try:
        found = tables(bench)
    except (UserError, Interrupted) as error:
        print(f"flow_to_better: {error}", file=sys.stderr)
        return error.exit_code
    about = machine()
    text = ["# Flow-to-Better", "", (__doc__ or "").strip(), ""]
    text.append(
        f"Diffuser: {bench.steps:,} steps, trajectories of {bench.horizon} rows; policies: {bench.agent_steps:,} "
        f"steps; seeds {' '.join(map(str, bench.seeds))}; {processor(about)}, one thread a process."
    )
    for title, lines in found.items():
        print_lines(lines, title, Console())
        text += ["", f"## {title}", "", markdown(lines)]
    page = RESULTS / "flow_to_better.md" if bench == dataclasses.replace(Bench(), make=bench.make) else None
    for path in [bench.out / "flow_to_better.md", *([page] if page else [])]:
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(asked(Bench, description=__doc__, config=(tyro.conf.AvoidSubcommands,))))
