"""A run's policy written as a folder for others: see `export`."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import safetensors.torch

from diffrl.data.observations import Part
from diffrl.runs import packages
from diffrl.runs.diverged import diverged
from diffrl.runs.export import folder
from diffrl.runs.export.card import Facts, Scored, card
from diffrl.runs.policy import evaluate, load_stack
from diffrl.runs.run import Run
from diffrl.support.console import console
from diffrl.support.errors import UserError, disk_full, said_by
from diffrl.support.files import atomic_path, unused
from diffrl.support.folder import ABOUT, read_json
from diffrl.support.machine import usual_torch
from diffrl.training.logs import outcomes_of, read_scores
from diffrl.tuning.config import ALGORITHMS


@usual_torch()
def export(
    run: Path | str,
    to: Path | str,
    *,
    seed: int | None = None,
    which: str | int = "last",
    episodes: int = 0,
    onnx: bool = False,
    env: str | None = None,
    quiet: bool = False,
) -> Path:
    """Write one seed's policy of a run into a folder of its own, whole or not at all; give the folder's path.

    In it are a model card, the tensors and settings that acting needs, and no path of this machine. `load_policy` takes
    it, and the Hub. seed: by default the run's first, which is not chosen by its score. which: the `last` or `best`
    checkpoint, or that of a step. episodes: so many of each seed are evaluated for the card; 0: the card has the scores
    of training alone. onnx: write `policy.onnx` besides. env: the id of another environment than the run's, from which
    an agent that plans takes its goal.

    Raises UserError where the folder is there and not empty, and for what cannot be exported.
    """
    to = Path(to)
    unused(to)
    opened = Run.read(run).within(env, (), None)
    seed = opened.config.seeds[0] if seed is None else seed
    if (said := diverged(opened)) and not quiet:
        console.print(f"{run}: {said}", style="yellow", markup=False, highlight=False)
    if (said := opened.wrong_critics) and not quiet:
        console.print(f"{run}: {said}", style="yellow", markup=False, highlight=False)
    agent, (step,) = load_stack(opened, [seed], str(which), "cpu")
    parts, needs = _parts(opened, quiet), packages.of_agent(opened.config.agent.name)
    recorded = parts if all(part.path for part in parts) else ()
    config, tensors = folder.contents(agent, opened.preprocessing, step, _tuned_steps(opened), needs, recorded)
    more: dict[str, bytes] = {}
    graph = ""
    if onnx:
        from diffrl.runs.export.onnx import usage, write_graph

        written = write_graph(agent, opened.preprocessing)
        more[folder.GRAPH], graph = written.data, usage(written, parts)
    scores = [] if env is not None else _scored(opened, step)  # those of training are of the run's own environment
    if episodes:
        result = evaluate(run, episodes=episodes, which=(str(which),), quiet=quiet, env=env)[str(which)]
        what = f"at the export, on start states of its own, `{which}`"
        scores.append(Scored(what, outcomes_of(result)))
    facts = Facts(opened, seed, str(which), step, scores, _versions(opened.path), graph, parts)
    more[folder.CARD] = card(facts).encode()
    try:
        if to.exists():
            to.rmdir()
        with atomic_path(to) as temporary:
            folder.write(temporary, config, safetensors.torch.save(tensors), more)
    except OSError as error:
        reason = disk_full(error) or error.strerror or error
        raise UserError(f"{to} cannot be written: {reason}. Free some space, or choose another --to.") from error
    return to


def _parts(run: Run, quiet: bool) -> Sequence[Part]:
    """The arrays that a run's environment gives as an observation; (): vectors, or it cannot be made here to ask it.

    Where it gives no vectors and cannot be made, that is printed, unless `quiet`: a policy can be exported without.
    """
    try:
        return run.task.parts()
    except (UserError, ImportError, OSError, RuntimeError, gymnasium.error.Error) as error:
        if run.task.observation_parts is not None and not quiet:
            why = str(error) if isinstance(error, UserError) else said_by(error)
            console.print(
                f"{run.path}: the exported policy takes vectors alone, as nothing says how the environment's "
                f"observations make them: {why}",
                style="yellow",
                markup=False,
                highlight=False,
            )
    return ()


def _tuned_steps(run: Run) -> int | None:
    """Of a run of DPPO that tuned the last denoising steps alone: how many."""
    if run.kind not in ALGORITHMS or run.settings is None:
        return None
    tuned: int | None = run.settings.get("tuned_steps")
    return tuned


def _scored(run: Run, step: int) -> list[Scored]:
    """The returns of the evaluation during training at a step; none where there was none."""
    if not (run.path / "scores.json").exists():
        return []
    entries = [entry for entry in read_scores(run.path)["evaluations"] if entry["step"] == step]
    return [Scored(f"in training, after step {step:,}", outcomes_of(entry)) for entry in entries]


def _versions(run: Path) -> Mapping[str, str]:
    """The versions that a run's folder says it was begun with; old folders may not say."""
    about: Any = read_json(run / ABOUT)
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        return {str(name): str(version) for name, version in about["versions"].items()}
    return {}
